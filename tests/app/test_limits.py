"""Limits on concurrent work and its duration, and responses under overload."""

import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.search.batching import Batcher, BatchGroup
from app.search.errors import OverloadedError
from index_jobs.store.artifact import Artifact
from tests.support.images import png
from tests.support.redis_server import RedisServer
from tests.support.service import ADMIN, ALICE, KEYS, WORDS, bearer, hold, opened, serving, until


def test_a_search_has_a_deadline_and_is_not_computed_after_it(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, deadline_ms=100) as client:
            encoder = client.app.state.collections[None].live.encoder
            gate, seen = hold(encoder)
            first = asyncio.create_task(client.post("/search/text", json={"query": "q0"}))

            async def begun() -> bool:
                return bool(seen)

            await until(begun)
            late = await asyncio.gather(first, *(client.post("/search/text", json={"query": q}) for q in ("q1", "q2")))
            assert [answer.status_code for answer in late] == [503] * 3
            assert all(answer.headers["retry-after"] == "1" for answer in late)
            gate.set()
            del encoder.encode_text
            assert (await client.post("/search/text", json=WORDS)).status_code == 200
            assert seen == ["q0"], "what nobody waits for any more is not computed"
            text = (await client.get("/metrics")).text
            assert 'dcar_refused_total{reason="late"} 3.0' in text
            assert 'dcar_pending{what="searches"} 0.0' in text

    asyncio.run(main())


def test_a_queue_that_cannot_be_worked_off_in_time_takes_no_more() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=1, max_wait_s=0, max_queue_s=0.1)
        batcher.start()

        def slow(payloads: list[Any]) -> np.ndarray:
            time.sleep(0.03)
            return np.ones((len(payloads), 2), np.float32)

        group = BatchGroup("text", slow)
        await batcher.submit(group, "the pace is known now")
        answers = await asyncio.gather(*(batcher.submit(group, i) for i in range(20)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
        assert 12 <= len(refused) <= 17, "about 0.1 s of work is taken on"
        assert isinstance(await batcher.submit(group, "again"), np.ndarray)
        await batcher.close()

    asyncio.run(main())


def test_a_full_queue_takes_no_picture_and_still_answers_what_is_remembered(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, max_queue_ms=1) as client:
            known = {"query": "a red square", "k": 3}
            assert (await client.post("/search/text", json=known)).status_code == 200
            batcher = client.app.state.retriever._embedder._batcher
            batcher._backlog = 5.0
            for answer in (
                await client.post("/search/image", files={"file": png()}),
                await client.post("/search/image", files={"file": b"not even a picture"}),
                await client.post("/search/text", json={"query": "new words"}),
                await client.post("/search/batch", json={"queries": [{"query": "new words"}]}),
            ):
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            for k in (3, 4):
                assert (await client.post("/search/text", json=known | {"k": k})).status_code == 200
            batcher._backlog = 0.0
            assert (await client.post("/search/image", files={"file": png()})).status_code == 200
            gate, seen = hold(client.app.state.collections[None].live.encoder)
            first = asyncio.create_task(client.post("/search/text", json={"query": "under way"}))

            async def begun() -> bool:
                return bool(seen)

            await until(begun)
            batcher._backlog = 5.0
            second = asyncio.create_task(client.post("/search/text", json={"query": "under way", "k": 3}))
            await asyncio.sleep(0.05)
            gate.set()
            assert [(await each).status_code for each in (first, second)] == [200, 200], "what is computed is shared"

    asyncio.run(main())


@pytest.mark.redis
def test_a_full_queue_still_answers_what_redis_remembers(built_index: Path, redis_server: RedisServer) -> None:
    async def main() -> None:
        given: dict[str, Any] = {"redis_url": redis_server.url, "redis_timeout_ms": 1000, "max_queue_ms": 1}
        async with opened(built_index, **given) as client:
            assert (await client.post("/search/text", json=WORDS)).status_code == 200
        async with opened(built_index, **given) as client:  # which has not seen it
            client.app.state.retriever._embedder._batcher._backlog = 5.0
            assert (await client.post("/search/text", json=WORDS)).status_code == 200
            assert (await client.post("/search/text", json={"query": "new words"})).status_code == 503

    asyncio.run(main())


def test_an_upload_that_does_not_come_is_given_up(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, upload_timeout_s=0.2) as client:

            async def trickle() -> AsyncIterator[bytes]:
                yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n\r\n'
                while True:
                    await asyncio.sleep(0.05)
                    yield b"x"

            kind = {"Content-Type": "multipart/form-data; boundary=b"}
            began = time.monotonic()
            answer = await client.post("/search/image", content=trickle(), headers=kind)
            assert answer.status_code == 408
            assert time.monotonic() - began < 3
            assert (await client.post("/search/image", files={"file": png()})).status_code == 200

    asyncio.run(main())


def test_bodies_under_way_share_a_limit(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, max_in_flight_bytes=2**20) as client:
            arrived, go = asyncio.Event(), asyncio.Event()
            picture = png()

            async def slowly(size: int) -> AsyncIterator[bytes]:
                yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n\r\n' + picture
                yield bytes(size)
                arrived.set()
                await go.wait()
                yield b"\r\n--b--\r\n"

            kind = {"Content-Type": "multipart/form-data; boundary=b"}
            first = asyncio.create_task(client.post("/search/image", content=slowly(900 * 2**10), headers=kind))
            await arrived.wait()
            go_on = await client.post("/search/image", content=slowly(500 * 2**10), headers=kind)
            assert go_on.status_code == 503
            assert go_on.headers["retry-after"] == "1"
            assert (await client.post("/search/image", files={"file": picture})).status_code == 200, "small ones fit in"
            go.set()
            assert (await first).status_code == 200
            again = await client.post("/search/image", content=slowly(900 * 2**10), headers=kind)
            assert again.status_code == 200, "what others held is free again"
            assert (await client.post("/search/image", files={"file": picture})).status_code == 200
        async with opened(built_index, max_in_flight_bytes=1024) as client:
            large = await client.post("/search/image", content=slowly(2000), headers=kind)
            assert large.status_code == 200, "one alone always has room"

    asyncio.run(main())


def test_what_is_only_announced_takes_no_room(built_index: Path) -> None:
    with serving(built_index, max_in_flight_bytes=2**20) as (_, port), contextlib.ExitStack() as idle:
        head = b"POST /search/image HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        connections = [idle.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(5)]
        for connection in connections:
            connection.sendall(head + b"Content-Length: 1048576\r\n\r\n--b\r\n")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            time.sleep(0.2)
            assert client.post("/search/text", json=WORDS).status_code == 200
            assert client.post("/search/image", files={"file": png()}).status_code == 200


@pytest.mark.parametrize("length", [{}, {"Content-Length": "0"}])
def test_a_request_without_a_body_is_whole_from_the_start(built_index: Path, length: dict[str, str]) -> None:
    async def main() -> None:
        async with opened(built_index, upload_timeout_s=0.1, poll_s=0, **KEYS) as client:
            collections = client.app.state.collections
            left = asyncio.Event()

            async def slow() -> dict[str, bool]:
                try:
                    await asyncio.sleep(0.5)
                except asyncio.CancelledError:
                    left.set()
                    raise
                return {}

            collections.reload = slow
            request = client.build_request("POST", "/admin/reload", headers=bearer(ADMIN))
            del request.headers["content-length"]
            request.headers.update(length)
            assert (await client.send(request)).status_code == 200
            assert not left.is_set()
            hollow = client.build_request("POST", "/search/text", headers={"Content-Type": "application/json"} | length)
            hollow.headers.update(bearer(ALICE))
            assert (await client.send(hollow)).status_code == 400

    asyncio.run(main())


def test_a_large_picture_is_not_hashed_in_the_event_loop(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, bool]] = []
    hash_of = hashlib.blake2b

    def seen(data: bytes, **given: Any) -> Any:
        hashed.append((len(data), threading.current_thread() is threading.main_thread()))
        return hash_of(data, **given)

    monkeypatch.setattr("app.search.retriever.hashlib.blake2b", seen)

    async def main() -> None:
        async with opened(built_index) as client:
            artifact = type(client.app.state.collections[None].live.artifact)
            size = 5 * 2**20
            monkeypatch.setattr(artifact, "image_bytes", lambda *_: bytes(size))
            assert len((await client.get("/items/circle%2Fred.png/image")).content) == size
            assert [each for each in hashed if each[0] == size] == [(size, False)]

    asyncio.run(main())


def test_a_slow_gallery_holds_up_no_search(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slow(artifact: Artifact, row: int) -> bytes:
        assert gate.wait(20)
        return b""

    monkeypatch.setattr(Artifact, "image_bytes", slow)

    async def main() -> None:
        async with opened(built_index, deadline_ms=3000, max_pending=20) as client:
            pictures = [asyncio.create_task(client.get("/items/circle%2Fred.png/image")) for _ in range(30)]
            await asyncio.sleep(0.1)
            body = {"query": "red", "k": 3, "filter": {"category": "circle"}}
            began = time.monotonic()
            assert (await client.post("/search/text", json=body)).status_code == 200
            assert (await client.get("/items/circle%2Fred.png")).status_code == 200
            assert time.monotonic() - began < 1.5
            answers = await asyncio.gather(*pictures)
            assert {answer.status_code for answer in answers} == {503}
            assert all("retry-after" in answer.headers for answer in answers)
            gate.set()

    try:
        asyncio.run(main())
    finally:
        gate.set()


def test_bodies_that_have_been_answered_take_no_room(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, max_in_flight_bytes=40_000) as client:
            for number in range(6):
                files = {"file": ("a.png", png() + bytes([number]) * 15_000, "image/png")}
                assert (await client.post("/search/image", files=files)).status_code == 200

    asyncio.run(main())
