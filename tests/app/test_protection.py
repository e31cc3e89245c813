"""Keys, rates, deadlines and limits: who may ask, how often, how much at a time, and what overload looks like."""

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
from app_harness import RedisServer, opened, png, serving, until

from app.batching import Batcher, Lane
from app.keys import holder, is_key, key_hash, new_key, parse_keys
from app.problems import Overloaded
from app.rates import Rates, parse_rate
from app.settings import load_settings
from dcar_core.errors import DcarError
from index_jobs.artifact import Artifact

ALICE, BOB, ADMIN = new_key(), new_key(), "correct horse battery"
KEYS = {"api_keys": f"alice:{key_hash(ALICE)}, bob:{key_hash(BOB)}", "admin_key": f"sha256:{key_hash(ADMIN)}"}
WORDS = {"query": "red"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_told_apart_by_their_hashes() -> None:
    keys = parse_keys(f"alice:{key_hash(ALICE)}\nbob:{key_hash(BOB).upper()}")
    assert (holder(keys, ALICE), holder(keys, BOB), holder(keys, ALICE[:-1]), holder(keys, "")) == (
        "alice",
        "bob",
        None,
        None,
    )
    assert is_key(ADMIN, ADMIN)
    assert is_key(ADMIN, f"sha256:{key_hash(ADMIN)}")
    assert not is_key(f"sha256:{key_hash(ADMIN)}", f"sha256:{key_hash(ADMIN)}"), "the hash is no key"
    for wrong in ("alice", "alice:00", f":{key_hash(BOB)}", f"a:{key_hash(BOB)},a:{key_hash(ALICE)}"):
        with pytest.raises(ValueError, match=r"NAME:HASH|two keys") as caught:
            parse_keys(wrong)
        assert key_hash(BOB) not in str(caught.value)
    assert len({new_key() for _ in range(100)}) == 100


def test_settings_name_what_is_wrong_with_keys_rates_and_origins(tmp_path: Path) -> None:
    for given, name in (
        ({"api_keys": "x"}, "API_KEYS"),
        ({"rate_limit": "fast"}, "RATE_LIMIT"),
        ({"cors_origins": "shop"}, "CORS"),
    ):
        with pytest.raises(DcarError, match=f"DCAR_{name}"):
            load_settings(index=tmp_path, **given)


def test_every_route_but_pages_and_probes_needs_a_key(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, **KEYS) as client:
            for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/ui/search.js", "/favicon.ico"):
                assert (await client.get(path)).status_code == 200, path
            document = (await client.get("/openapi.json")).json()
            for path, methods in document["paths"].items():
                if path in ("/healthz", "/readyz"):
                    continue
                for method in methods:
                    answer = await client.request(method, path.replace("{item_id}", "circle%2Fred.png"))
                    assert answer.status_code == 401, path
                    assert answer.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/nothing")).status_code == 401, "a stranger does not learn what there is"
            for wrong in (
                bearer("wrong"),
                {"Authorization": ALICE},
                {"X-API-Key": ""},
                bearer(key_hash(ALICE)),
                bearer("é"),
            ):
                headers = {name: value.encode() for name, value in wrong.items()}
                assert (await client.post("/search/text", json=WORDS, headers=headers)).status_code == 401
            for right in (bearer(ALICE), bearer(BOB), {"X-API-Key": BOB}):
                assert (await client.post("/search/text", json=WORDS, headers=right)).status_code == 200
            assert (await client.post("/search/text", json=WORDS, headers=bearer(ADMIN))).status_code == 401
            assert (await client.post("/admin/reload", headers=bearer(ALICE))).status_code == 401
            assert (await client.post("/admin/reload", headers=bearer(ADMIN))).status_code == 200
            assert (await client.get("/metrics", headers=bearer(ADMIN))).status_code == 200

    asyncio.run(main())


def test_a_caller_that_asks_too_often_waits(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, rate_limit="3/minute", **KEYS) as client:

            async def ask(key: str) -> httpx.Response:
                return await client.post("/search/text", json=WORDS, headers=bearer(key))

            assert [(await ask(ALICE)).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
            refused = await ask(ALICE)
            assert refused.headers["content-type"] == "application/problem+json"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert "alice" in refused.json()["detail"]
            assert (await ask(BOB)).status_code == 200
            assert (await client.get("/healthz")).status_code == 200
        async with opened(built_index, rate_limit="1/second") as client:

            async def allowed() -> bool:
                return (await client.post("/search/text", json=WORDS)).status_code == 200

            await until(allowed)
            assert not await allowed()
            await until(allowed)

    asyncio.run(main())


@pytest.mark.redis
def test_processes_count_together_in_redis_and_alone_without(redis_server: RedisServer) -> None:
    async def main() -> None:
        first, second = (Rates("4/minute", redis_url=redis_server.url, timeout_s=1) for _ in range(2))
        waits = [await rates.wait_for("alice") for rates in (first, second, first, second, first, second)]
        assert [wait == 0 for wait in waits] == [True] * 4 + [False] * 2
        assert all(0 < wait <= 60 for wait in waits[4:])
        redis_server.stop()
        assert [await first.wait_for("alice") == 0 for _ in range(6)] == [True] * 4 + [False] * 2
        assert first.breaker.open
        await first.close()
        await second.close()

    asyncio.run(main())


def test_rates_are_read() -> None:
    assert parse_rate("20/second").amount == 20
    assert parse_rate("100 per 10 seconds").get_expiry() == 10
    for wrong in ("", "20", "-1/second", "20/blink"):
        with pytest.raises(ValueError, match="20/second"):
            parse_rate(wrong)


def test_a_search_has_a_deadline_and_is_not_computed_after_it(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, deadline_ms=100) as client:
            encoder = client.app.state.collections[None].live.encoder
            encode, gate, seen = encoder.encode_text, threading.Event(), []

            def held(texts: list[str]) -> np.ndarray:
                seen.extend(texts)
                assert gate.wait(10)
                return encode(texts)

            encoder.encode_text = held
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
            assert "dcar_pending_searches 0.0" in text

    asyncio.run(main())


def test_a_queue_that_cannot_be_worked_off_in_time_takes_no_more() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=1, max_wait_s=0, max_queue_s=0.1)
        batcher.start()

        def slow(payloads: list[Any]) -> np.ndarray:
            time.sleep(0.03)
            return np.ones((len(payloads), 2), np.float32)

        lane = Lane("text", slow)
        await batcher.submit(lane, "the pace is known now")
        answers = await asyncio.gather(*(batcher.submit(lane, i) for i in range(20)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        assert 12 <= len(refused) <= 17, "about 0.1 s of work is taken on"
        assert isinstance(await batcher.submit(lane, "again"), np.ndarray)
        await batcher.close()

    asyncio.run(main())


def test_a_full_queue_takes_no_picture_and_still_answers_what_is_remembered(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index, max_queue_ms=1) as client:
            known = {"query": "a red square", "k": 3}
            assert (await client.post("/search/text", json=known)).status_code == 200
            batcher = client.app.state.retriever._embedder._batcher  # type: ignore[attr-defined]
            batcher._backlog = 5.0
            for answer in (
                await client.post("/search/image", files={"file": png()}),
                await client.post("/search/image", files={"file": b"not even a picture"}),
                await client.post("/search/text", json={"query": "new words"}),
            ):
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            for k in (3, 4):  # the answer is remembered; the embedding is
                assert (await client.post("/search/text", json=known | {"k": k})).status_code == 200
            batcher._backlog = 0.0
            assert (await client.post("/search/image", files={"file": png()})).status_code == 200

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
            assert answer.headers["connection"] == "close"
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
            assert (await client.post("/search/image", files={"file": picture})).status_code == 200

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
            collections = client.app.state.collections  # type: ignore[attr-defined]
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


def test_pictures_that_need_a_key_are_for_no_shared_cache(built_index: Path) -> None:
    async def main() -> None:
        path = "/items/circle%2Fred.png/image"
        for given, who, wanted in (({}, {}, "public"), (KEYS, bearer(ALICE), "private")):
            async with opened(built_index, cors_origins="https://shop.example", **given) as client:
                headers = {**who, "Origin": "https://shop.example"}
                whole = await client.get(path, headers=headers)
                again = await client.get(path, headers={**headers, "If-None-Match": whole.headers["etag"]})
                assert (whole.status_code, again.status_code) == (200, 304)
                for answer in (whole, again):
                    assert answer.headers["cache-control"].startswith(f"{wanted}, max-age=")
                    vary = {each.strip() for each in answer.headers.get("vary", "").split(",")}
                    assert ({"Authorization", "X-API-Key"} <= vary) == bool(given)
                    assert "Origin" in vary

    asyncio.run(main())


def test_a_large_picture_is_not_hashed_in_the_event_loop(built_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, bool]] = []
    hash_of = hashlib.blake2b

    def seen(data: bytes, **given: int) -> Any:
        hashed.append((len(data), threading.current_thread() is threading.main_thread()))
        return hash_of(data, **given)

    monkeypatch.setattr("app.retriever.hashlib.blake2b", seen)

    async def main() -> None:
        async with opened(built_index) as client:
            artifact = type(client.app.state.collections[None].live.artifact)  # type: ignore[attr-defined]
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


def test_head_is_get_without_the_body(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index) as client:
            for path in (
                "/",
                "/docs",
                "/openapi.json",
                "/healthz",
                "/readyz",
                "/metrics",
                "/items/circle%2Fred.png",
                "/items/circle%2Fred.png/image",
                "/items/nothing",
            ):
                get, head = await client.get(path), await client.head(path)
                assert head.status_code == get.status_code, path
                assert head.content == b""
                assert head.headers["content-type"] == get.headers["content-type"]
                if path != "/metrics":
                    assert head.headers["content-length"] == get.headers["content-length"]
            wrong = await client.head("/search/text")
            assert wrong.status_code == 405
            assert wrong.headers["allow"] == "POST"
            assert (await client.delete("/healthz")).headers["allow"] == "GET, HEAD"

    asyncio.run(main())


def test_other_sites_may_search_only_when_they_are_named(built_index: Path) -> None:
    async def main() -> None:
        origin = {"Origin": "https://shop.example"}
        asks = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        async with opened(built_index) as client:
            assert "access-control-allow-origin" not in (await client.get("/readyz", headers=origin)).headers
            assert (await client.options("/search/text", headers=asks)).status_code == 405
        async with opened(built_index, cors_origins="https://shop.example", **KEYS) as client:
            asked = await client.options("/search/text", headers=asks)
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == "https://shop.example"
            refused = await client.post("/search/text", json=WORDS, headers=origin)
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://shop.example", "its page can read why"
            other = await client.get("/readyz", headers={"Origin": "https://evil.example"})
            assert "access-control-allow-origin" not in other.headers

    asyncio.run(main())


def _read_all(connection: socket.socket) -> bytes:
    connection.settimeout(10)
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def test_connections_without_a_request_and_callers_that_leave(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.connections.HEAD_S", 0.3)
    with serving(built_index) as (app, port):
        at = ("127.0.0.1", port)
        with socket.create_connection(at) as silent, socket.create_connection(at) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHo")
            assert _read_all(silent).startswith(b"HTTP/1.1 408")
            assert _read_all(slow).startswith(b"HTTP/1.1 408")
        with socket.create_connection(at) as endless:
            endless.sendall(b"GET /healthz HTTP/1.1\r\n")
            with pytest.raises(ConnectionError):  # broken off long before this
                endless.sendall((b"X-Y: " + b"x" * 1000 + b"\r\n") * 50_000)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/healthz").status_code == 200
            time.sleep(0.5)
            assert client.get("/healthz").status_code == 200, "an idle connection that was used is kept a while"

            encoder = app.state.collections[None].live.encoder
            encode, gate, seen = encoder.encode_text, threading.Event(), []

            def held(texts: list[str]) -> np.ndarray:
                seen.extend(texts)
                assert gate.wait(10)
                return encode(texts)

            encoder.encode_text = held
            for query in ("first", "left"):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"http://127.0.0.1:{port}/search/text", json={"query": query}, timeout=0.3)
            end = time.monotonic() + 5
            while app.state.retriever._pending.total() and time.monotonic() < end:
                time.sleep(0.02)
            assert app.state.retriever._pending.total() == 0, "their searches are given up"
            gate.set()
            assert client.post("/search/text", json={"query": "stays"}).status_code == 200
            assert seen == ["first", "stays"]
