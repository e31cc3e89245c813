"""A tiny CLIP and training pairs."""

from tests.conftest import tiny_data, tiny_gallery, tiny_model
from tests.dcar_core.conftest import (
    backbone,
    described_twice,
    pairs,
    training,
    uneven,
)

__all__ = [
    "backbone",
    "described_twice",
    "pairs",
    "tiny_data",
    "tiny_gallery",
    "tiny_model",
    "training",
    "uneven",
]
