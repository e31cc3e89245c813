"""A gallery, checkpoints and a server for the tests of the engine.

`QDRANT_URL` names a real server, which some of the tests then use in place of Qdrant's
core in this process.
"""

import os
from collections.abc import Iterator

import pytest
from qdrant_server import QdrantServer, running_server

from dcar_qdrant import connection, engine
from tests.conftest import (
    anyio_backend,
    build,
    other_checkpoint,
    tiny_checkpoint,
    tiny_gallery,
    tiny_model,
)

__all__ = [
    "anyio_backend",
    "build",
    "other_checkpoint",
    "tiny_checkpoint",
    "tiny_gallery",
    "tiny_model",
]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("QDRANT_URL"):
        monkeypatch.setattr(engine, "POLL_SECONDS", 0)
        monkeypatch.setattr(connection, "PAUSE_SECONDS", 0)


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server whose new collections are dropped at the end."""
    if real := os.environ.get("QDRANT_URL"):
        client = connection.connect(real)
        before = {
            collection.name for collection in client.get_collections().collections
        }
        yield real
        for name in {
            collection.name for collection in client.get_collections().collections
        } - before:
            client.delete_collection(name)
    else:
        with running_server(tmp_path_factory.mktemp("core")) as server:
            yield server.url


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with running_server(tmp_path_factory.mktemp("core")) as server:
        yield server
