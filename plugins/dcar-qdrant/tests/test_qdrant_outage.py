"""A Qdrant that is lost while the service runs: searches fail soon, and operators are
told.
"""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from qdrant_client import models
from qdrant_server import QdrantServer

from dcar_core.util.errors import StoreUnavailableError
from dcar_qdrant import connection
from index_jobs.index.versions import open_current
from tests.support.responses import scrape
from tests.support.service import WORDS, opened, until_ready
from tests.support.versions import Build


@pytest.fixture
def index(
    build: Build,
    server: QdrantServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.setattr(connection, "READ_SECONDS", 1)
    monkeypatch.setattr(connection, "REST_SECONDS", 0.1)
    # whoever waited is gone
    monkeypatch.setattr(server.http, "handle_error", lambda *_: None)
    build(engine=f"qdrant={server.url}")
    return tmp_path / "index"


async def test_a_lost_qdrant_refuses_searches_until_it_is_back(
    index: Path, server: QdrantServer
) -> None:
    async with opened(index) as client:
        respond, server.respond = server.respond, lambda *_: (404, None)  # type: ignore[method-assign]
        assert (await client.post("/search/text", json=WORDS)).status_code == 503
        assert (await scrape(client))[
            "dcar_refused_total", (("reason", "vector_store"),)
        ] == 1
        server.respond = respond  # type: ignore[method-assign]
        assert (await client.post("/search/text", json=WORDS)).status_code == 200


async def test_lost_points_are_a_missing_store_and_no_index_without_vectors(
    index: Path, server: QdrantServer
) -> None:
    client = server.client
    name = server.client.get_collections().collections[0].name
    lost = client.retrieve(name, [3])[0]
    similar = f"/items/{quote(open_current(index).item(3).id, safe='')}/similar"
    async with opened(index) as service:
        client.delete(name, [3])
        assert (await service.get(similar)).status_code == 503
        client.upsert(name, [models.PointStruct(id=3, vector=lost.vector, payload={})])
        assert (await service.get(similar)).status_code == 200


async def test_a_qdrant_that_hangs_holds_no_search_to_the_deadline_and_no_item(
    index: Path, server: QdrantServer
) -> None:
    async with opened(index, poll_s=0.02) as client:
        await until_ready(client, status="ready")
        place = f"/items/{quote(open_current(index).item(0).id, safe='')}"
        goes_on = threading.Event()
        respond = server.respond

        def hang(method: str, path: str, body: bytes) -> tuple[int, object]:
            goes_on.wait()
            return respond(method, path, body)

        server.respond = hang  # type: ignore[method-assign]
        try:
            began = time.monotonic()
            asked = [
                client.post("/search/text", json={"query": f"red {number}"})
                for number in range(30)
            ]
            responses = await asyncio.gather(*asked, client.get(place))
            assert time.monotonic() - began < 8, (
                "the first threads wait for two attempts of a second"
            )
            assert [response.status_code for response in responses] == [503] * 30 + [
                200
            ]
        finally:
            goes_on.set()


def test_one_slow_search_stops_no_other(
    index: Path,
    server: QdrantServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "REST_SECONDS", 60)
    opened = open_current(index)
    respond = server.respond
    goes_on = threading.Event()
    vectors = opened.vectors(opened.live.nonzero()[0])

    def hang(method: str, path: str, body: bytes) -> tuple[int, object]:
        if path.endswith("/batch"):
            goes_on.wait()
        return respond(method, path, body)

    server.respond = hang  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(opened.search, vectors[:1], 1)
        while not slow.done():
            opened.vectors(opened.live.nonzero()[0][:1])
            time.sleep(0.05)
        goes_on.set()
    assert isinstance(slow.exception(), StoreUnavailableError)
    assert opened.search(vectors[:1], 1)[1].tolist() == [[0]]
