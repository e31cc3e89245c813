"""Limits on concurrent work and its duration, and responses under overload."""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import socket
import threading
import time
import tracemalloc
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.api import routes
from app.api.requests import read_image_query
from app.search.rows import mask_key
from app.service.batching import BatchGroup, PassTime
from app.service.files import PIECE_BYTES
from dcar_core.serving.encoder import encode_text_rows
from index_jobs.store.artifact import Artifact
from tests.support.images import png
from tests.support.redis_server import RedisServer
from tests.support.service import WORDS, before_encoding, hold, opened, restore, serving, until


async def test_search_past_its_deadline_is_refused_and_skipped(built_index: Path) -> None:
    async with opened(built_index, deadline_ms=300) as client:
        encoder = client.app.state.collections[None].live.encoder
        gate, seen = hold(encoder)
        first = asyncio.create_task(client.post("/search/text", json={"query": "q0"}))
        await until(lambda: bool(seen))
        others = client.post("/search/text", json={"query": "q1"}), client.post("/v1/embeddings", json={"input": "q2"})
        late = await asyncio.gather(first, *others)
        assert [response.status_code for response in late] == [503] * 3
        assert all(response.headers["retry-after"] == "1" for response in late)
        gate.set()
        restore(encoder)
        assert (await client.post("/search/text", json=WORDS)).status_code == 200
        assert seen == ["q0"], "cancelled work is skipped"
        text = (await client.get("/metrics")).text
        assert 'dcar_refused_total{reason="late"} 3.0' in text
        assert 'dcar_pending{what="searches"} 0.0' in text


async def test_many_closed_loops_of_one_caller_are_refused_nothing(built_index: Path) -> None:
    """256 texts at a time, of a model that answers some 600 a second."""
    async with opened(built_index, cache_size=0) as client:
        before_encoding(client.app.state.collections[None].live.encoder, lambda texts: time.sleep(0.05))

        async def ask(loop: int) -> list[int]:
            queries = [{"query": f"loop {loop}, query {number}"} for number in range(3)]
            return [(await client.post("/search/text", json=query)).status_code for query in queries]

        statuses = await asyncio.gather(*map(ask, range(256)))
        assert {status for each in statuses for status in each} == {200}


async def test_full_queue_refuses_new_queries_and_answers_cached_ones(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(built_index, max_queue_ms=1) as client:
        known = {"query": "a red square", "k": 3}
        assert (await client.post("/search/text", json=known)).status_code == 200
        batcher = client.app.state.retriever.compute.batcher
        batcher._expected_wait = lambda: 5.0
        for response in (
            await client.post("/search/image", files={"file": png()}),
            await client.post("/search/image", files={"file": b"not even a picture"}),
            await client.post("/search/text", json={"query": "new words"}),
            await client.post("/search/batch", json={"queries": [{"query": "new words"}]}),
        ):
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        for k in (3, 4):
            assert (await client.post("/search/text", json=known | {"k": k})).status_code == 200
        del batcher._expected_wait
        known_image = {"image": base64.b64encode(png()).decode()}
        assert (await client.post("/search/image", files={"file": png()})).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr("app.core.decoders.Decoders.expected_wait", lambda _: 5.0)
            new_image = {"image": base64.b64encode(png("cyan")).decode()}
            for image, status in ((known_image, 200), (new_image, 503)):
                response = await client.post("/search/batch", json={"queries": [image]})
                assert (response.status_code, response.headers.get("retry-after", "5")) == (status, "5")
            assert (await client.post("/search/image", files={"file": b"not read"})).status_code == 503
            assert (await client.post("/search/text", json={"query": "other words"})).status_code == 200
        gate, seen = hold(client.app.state.collections[None].live.encoder)
        first = asyncio.create_task(client.post("/search/text", json={"query": "pending"}))
        await until(lambda: bool(seen))
        batcher._expected_wait = lambda: 5.0
        second = asyncio.create_task(client.post("/search/text", json={"query": "pending", "k": 3}))
        await asyncio.sleep(0.05)
        gate.set()
        assert [(await each).status_code for each in (first, second)] == [200, 200], "pending computations are shared"


async def test_what_belongs_together_is_accepted_or_refused_by_its_first_query(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.service.batching._FEW", 0)
    async with opened(built_index, max_queue_ms=500, cache_size=0) as client:
        compute = client.app.state.retriever.compute
        batcher = compute.batcher
        key = BatchGroup(id(client.app.state.collections[None].live.encoder.runtime), encode_text_rows)
        slow = PassTime()
        for size in (1, 32):
            slow.add(size, 0.2 * size)
        batcher._pass_times[key] = deepcopy(slow)  # the queue is full after three texts
        texts = [f"red {number}" for number in range(8)]
        assert (await client.post("/search/batch", json={"queries": [{"query": text} for text in texts]})).is_success
        batcher._pass_times[key] = deepcopy(slow)
        assert (await client.post("/v1/embeddings", json={"input": texts})).is_success
        batcher._pass_times[key] = deepcopy(slow)
        gate, _ = hold(client.app.state.collections[None].live.encoder)
        alone = [asyncio.create_task(client.post("/search/text", json={"query": text})) for text in texts]
        await until(lambda: sum(task.done() for task in alone) >= 4)
        gate.set()
        statuses = sorted([(await task).status_code for task in alone])
        assert statuses in ([200] * 3 + [503] * 5, [200] * 4 + [503] * 4), "the first may have left the queue"
        decode = compute.decode

        async def fill_meanwhile(*given: Any, **options: Any) -> Any:
            batcher._expected_wait = lambda: 5.0
            return await decode(*given, **options)

        monkeypatch.setattr(compute, "decode", fill_meanwhile)
        assert (await client.post("/search/image", files={"file": png()})).is_success, "it was accepted before"
        batcher._expected_wait = lambda: 5.0
        assert (await client.post("/search/image", files={"file": png()})).status_code == 503
        del batcher._expected_wait
        monkeypatch.setattr(compute, "decode", decode)
        read = read_image_query

        async def fill_while_reading(*given: Any) -> Any:
            batcher._expected_wait = lambda: 5.0
            return await read(*given)

        monkeypatch.setattr(routes, "read_image_query", fill_while_reading)
        assert (await client.post("/search/image", files={"file": png()})).is_success, "so was this one"
        del batcher._expected_wait
        monkeypatch.setattr(routes, "_PROMPT_S", 0.0)
        assert (await client.post("/search/image", files={"file": png()})).status_code == 503, "but it took long"


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ({"image": base64.b64encode(bytes(2**20)).decode()}, 422, "queries.0: image: not an image"),
        ({"query": "x", "filter": {"a": "x" * 2**20}}, 422, "filter: takes at most 64 KiB"),
        ({"query": "x", "filter": {"a": ["x" * 1000] * 1000}}, 422, "filter: takes at most 64 KiB"),
        ({"query": "x", "filter": json.loads("[" * 190 + '"",' * 40_000 + '""' + "]" * 190)}, 422, "queries.0.filter"),
        (
            {"query": "x", "filter": {"a": json.loads("[" * 180 + '"",' * 40_000 + '""' + "]" * 180)}},
            422,
            "at most 64 KiB",
        ),
        ({"query": "x", "filter": {"a": [0] * 60_000}}, 413, "at most 50,000 values"),
        ({"query": "x", "filter": {f"{key:030}": 1 for key in range(60_000)}}, 413, "at most 50,000 values"),
        ({"query": "x", "filter": {"a": "\U0001f600" * 2**20}}, 413, "at most 2 MiB besides images in base64"),
    ],
)
async def test_a_large_body_holds_images_and_little_else(
    built_index: Path, query: dict[str, Any], status: int, says: str
) -> None:
    async with opened(built_index) as client:
        response = await client.post("/search/batch", json={"queries": [query]})
        assert (response.status_code, says in response.json()["detail"]) == (status, True), response.text


@pytest.mark.redis
async def test_full_queue_answers_what_redis_has_cached(built_index: Path, redis_server: RedisServer) -> None:
    given: dict[str, Any] = {"redis_url": redis_server.url, "redis_timeout_ms": 1000, "max_queue_ms": 1}
    async with opened(built_index, **given) as client:
        assert (await client.post("/search/text", json=WORDS)).status_code == 200
    async with opened(built_index, **given) as client:  # with an empty local cache
        client.app.state.retriever.compute.batcher._expected_wait = lambda: 5.0
        assert (await client.post("/search/text", json=WORDS)).status_code == 200
        assert (await client.post("/search/text", json={"query": "new words"})).status_code == 503


async def test_pages_and_filters_that_are_used_again_stay_in_their_caches(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.search.snapshots._MAX_PAGES", 3)
    monkeypatch.setattr("app.search.snapshots._MAX_MASKS", 3)
    async with opened(built_index) as client:

        async def ask(word: str) -> tuple[Any, Any]:
            filter = {"category": {"not": [word]}}
            for query in ({"query": word}, {"query": "a", "filter": filter}):
                assert (await client.post("/search/text", json=query)).is_success
            live = client.app.state.collections[None].live
            return next(page for key, page in live.pages.items() if key[1] == word), live.masks[mask_key(filter)]

        first = await ask("known")
        for number in range(5):
            await ask(f"new {number}")
            assert all(one is other for one, other in zip(await ask("known"), first, strict=True))


@pytest.mark.parametrize("is_small", [True, False], ids=["small", "large"])
async def test_caches_of_a_version_are_bounded_in_bytes(
    built_index: Path, monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    if not is_small:
        monkeypatch.setattr("app.search.snapshots._MAX_MASK_BYTES", 2 * 24)
        monkeypatch.setattr("app.search.facets._MAX_CACHED_BYTES", 10)
    async with opened(built_index) as client:
        snapshot = client.app.state.collections[None].live
        for number in range(20):
            filter = {"caption": {"not": [f"{number}" + "\U0001f600" * 10_000]}}
            body = {"query": "red", "filter": filter, "facets": ["category", "caption"]}
            assert (await client.post("/search/text", json=body)).is_success
        assert (len(snapshot.masks), len(snapshot.facets)) == ((16, 40) if is_small else (2, 0))
        assert sum(len(str(key)) for cache in (snapshot.masks, snapshot.facets) for key in cache) < 10_000


async def test_pages_of_long_texts_are_not_cached(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(built_index) as client:
        snapshot = client.app.state.collections[None].live
        for most in (100, 10_000):
            monkeypatch.setattr("app.search.engine._MAX_PAGE_BYTES", most)
            assert (await client.post("/search/text", json=WORDS)).is_success
            assert len(snapshot.pages) == (most > 100)


async def test_large_image_is_hashed_and_read_in_threads(
    built_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noted(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            threads.add(threading.current_thread().name)
            assert size is not None
            assert 0 < size <= PIECE_BYTES
            return super().read(size) or b""

    threads, file = set[str](), tmp_path / "large.jpg"
    file.write_bytes(b"\xff\xd8\xff" + np.random.default_rng(0).bytes(300_000))
    monkeypatch.setattr(Artifact, "open_image", lambda *_: (Noted(file), file.stat().st_size))
    async with opened(built_index) as client:
        response = await client.get("/items/circle%2Fred.png/image")
        assert response.content == file.read_bytes()
        assert response.headers["content-type"] == "image/jpeg"
        assert response.headers["etag"] == f'"{hashlib.blake2b(response.content, digest_size=16).hexdigest()}"'
        known = await client.get("/items/circle%2Fred.png/image", headers={"If-None-Match": response.headers["etag"]})
        assert (known.status_code, known.content) == (304, b"")
        head = await client.head("/items/circle%2Fred.png/image")
        assert (head.headers["content-length"], head.content) == (str(file.stat().st_size), b"")
    assert {name.rpartition("_")[0] for name in threads} == {"dcar-image"}


@pytest.mark.slow
def test_images_that_are_not_read_cost_little_memory(
    built_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, size, file = 100, 2**21, tmp_path / "large.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n".ljust(size))
    monkeypatch.setattr(Artifact, "open_image", lambda *_: (file.open("rb"), size))
    with serving(built_index) as (app, port), contextlib.ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(count):
            deaf = stack.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", port))
            deaf.sendall(b"GET /items/circle%2Fred.png/image HTTP/1.1\r\nHost: localhost\r\n\r\n")
        end = time.monotonic() + 20
        while len(app.state.retriever.compute.image_threads._threads) < 8 and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.5)
        _, peak = tracemalloc.get_traced_memory()
    assert peak - before < count * size / 5


@pytest.mark.slow
async def test_slow_gallery_does_not_delay_searches(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slow(artifact: Artifact, row: int) -> tuple[io.BytesIO, int]:
        assert gate.wait(20)
        return io.BytesIO(png()), len(png())

    monkeypatch.setattr(Artifact, "open_image", slow)
    async with opened(built_index, deadline_ms=1500, max_pending=20) as client:
        images = [asyncio.create_task(client.get("/items/circle%2Fred.png/image")) for _ in range(30)]
        try:
            await asyncio.sleep(0.1)
            body = {"query": "red", "k": 3, "filter": {"category": "circle"}}
            began = time.monotonic()
            assert (await client.post("/search/text", json=body)).status_code == 200
            assert (await client.get("/items/circle%2Fred.png")).status_code == 200
            assert time.monotonic() - began < 1
            responses = await asyncio.gather(*images)
            assert {response.status_code for response in responses} == {503}
            assert all("retry-after" in response.headers for response in responses)
        finally:
            gate.set()
