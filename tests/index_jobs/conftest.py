"""Galleries, an encoder and a published index for the tests of index_jobs."""

import shutil
from pathlib import Path

import pytest

from dcar_core import Encoder
from index_jobs.gallery import locations
from index_jobs.rebuild import rebuild


@pytest.fixture(autouse=True)
def memory_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read fsspec's store in memory, which stands for remote ones."""
    monkeypatch.setattr(locations, "SCHEMES", locations.SCHEMES | {"memory"})


@pytest.fixture
def gallery(tiny_gallery: Path, tmp_path: Path) -> Path:
    """A copy to break things in."""
    return Path(
        shutil.copytree(tiny_gallery, tmp_path / "gallery", copy_function=shutil.copy2)
    )


@pytest.fixture(scope="session")
def encoder(tiny_checkpoint: Path) -> Encoder:
    return Encoder.load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def published(
    tiny_gallery: Path,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    index = tmp_path_factory.mktemp("published") / "index"
    rebuild(tiny_gallery, tiny_checkpoint, index, progress=False)
    return index


@pytest.fixture
def index(published: Path, tmp_path: Path) -> Path:
    """A copy to break things in."""
    return Path(shutil.copytree(published, tmp_path / "index"))
