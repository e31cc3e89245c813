"""Photos to be captioned."""

from pathlib import Path

import pytest

from tests.conftest import tiny_model
from tests.support.images import draw

__all__ = ["tiny_model"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Draw two categories with two images each."""
    root = tmp_path / "photos"
    for name in ("red_fox/1.png", "red_fox/2.png", "owl/1.png", "owl/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        draw("red" if "fox" in name else "blue", "circle" if "1" in name else "cross").save(root / name)
    return root
