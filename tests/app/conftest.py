"""A real index of the tiny gallery, and a real Redis."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.service.collections import Collection
from app.service.write_worker import WriteWorker
from dcar_core import Encoder
from dcar_core.util.errors import DcarError
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.versions import open_current
from index_jobs.jobs.update import apply_waiting
from index_jobs.rebuild import rebuild
from tests.support.servers import RedisServer
from tests.support.service import ODD_ID, ServiceClient, opened


@pytest.fixture(scope="session")
def gallery(tiny_gallery: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny gallery with given ids, the file names; one is as awkward in a URL as
    can be.
    """
    root = Path(
        shutil.copytree(tiny_gallery, tmp_path_factory.mktemp("app") / "gallery")
    )
    rows = [
        json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()
    ]
    for row in rows:
        row["id"] = (
            ODD_ID if row["file_name"] == "cross/black.png" else row["file_name"]
        )
    (root / "metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    return root


def _built(gallery: Path, checkpoint: Path, name: str, **options: Any) -> Path:
    rebuild(
        gallery,
        checkpoint,
        gallery.parent / name,
        workers=0,
        progress=False,
        **options,
    )
    return gallery.parent / name


@pytest.fixture(scope="session")
def built_index(gallery: Path, tiny_checkpoint: Path) -> Path:
    """Do not change it: take `index` for that."""
    return _built(gallery, tiny_checkpoint, "index")


@pytest.fixture(scope="session")
def reranking_index(gallery: Path, reranking_checkpoint: Path) -> Path:
    """The same gallery, encoded by a model with a second stage. Do not change it."""
    return _built(gallery, reranking_checkpoint, "reranking")


@pytest.fixture(scope="session")
def products(gallery: Path, tiny_checkpoint: Path) -> Path:
    """An index in which the images of one color are one product."""
    return _built(gallery, tiny_checkpoint, "products", group_field="color")


@pytest.fixture(scope="session")
def index_version(built_index: Path) -> IndexVersion:
    return open_current(built_index)


@pytest.fixture(scope="session")
def encoder(tiny_checkpoint: Path) -> Encoder:
    return Encoder.load(tiny_checkpoint, device="cpu")


@pytest.fixture
def index(built_index: Path, tmp_path: Path) -> Path:
    """A copy to publish to and to damage."""
    return Path(shutil.copytree(built_index, tmp_path / "index"))


@pytest.fixture(scope="module")
async def started(built_index: Path) -> AsyncIterator[ServiceClient]:
    """The application, started once for the tests of a module that change nothing in
    it.
    """
    async with opened(built_index, max_upload_bytes=20_000) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DCAR_") and name != "DCAR_REQUIRE_ALL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("DCAR_RUNTIME", "torch")  # these tests are not about `auto`


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Apply jobs in a thread of this process, which saves seconds of imports; return
    the exit statuses.
    """
    codes = list[int]()

    async def run_apply(_: WriteWorker, collection: Collection) -> tuple[int, str]:
        try:
            await asyncio.to_thread(
                apply_waiting,
                collection.path,
                device="cpu",
                runtime="torch",
            )
        except DcarError as error:
            codes.append(error.exit_code)
            return error.exit_code, f"error: {error}\n"
        codes.append(0)
        return 0, ""

    monkeypatch.setattr(WriteWorker, "run_apply", run_apply)
    return codes


@pytest.fixture
def no_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply no jobs, and leave their number to requests."""
    monkeypatch.setattr(WriteWorker, "start", lambda _: None)
