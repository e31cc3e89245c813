"""Photos to be captioned."""

from tests.conftest import photos, tiny_model

__all__ = ["photos", "tiny_model"]
