"""ProLIP: the image tower's projection alone, held to the frozen one.

Fahes et al., "CLIP's Visual Embedding Projector is a Few-shot Cornucopia", 2024.
"""

from functools import partial

import torch
from torch import Tensor

from dcar_core.model.config import plain_config
from dcar_core.model.methods import Method
from dcar_core.model.weight_changes import WeightChanges

PROJECTION = r"^visual\.(proj$|head\.|trunk\.head\.)"


def distance(changes: WeightChanges) -> Tensor:
    """Return the squared Frobenius norm of all differences."""
    squares = [changes.difference(name).square().sum() for name in changes.names]
    return torch.stack(squares).sum()


METHOD = Method(
    config=plain_config("prolip"),
    changes=partial(WeightChanges, names=PROJECTION),
    penalty=distance,
    lr_factor=0.2,
)
