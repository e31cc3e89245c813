"""A tiny CLIP and training pairs."""

from tests.conftest import tiny_data, tiny_gallery, tiny_model

__all__ = ["tiny_data", "tiny_gallery", "tiny_model"]
