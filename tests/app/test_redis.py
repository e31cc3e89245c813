"""A real Redis, in which processes count together and share vectors: kinds of URLs,
failures, and nonsense.
"""

import asyncio
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from app.core.callers import RateLimiter
from app.core.redis import RedisCache, connect
from tests.support.servers import RedisServer
from tests.support.service import opened

pytestmark = pytest.mark.redis
VECTOR = np.linspace(-1, 1, 32, dtype=np.float32)
QUERY = {"query": "secret words", "k": 5}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.core.redis.TIMEOUT_S", 2)


async def assert_shared(url: str) -> None:
    """Assert that two processes count together through this URL."""
    limiters = [RateLimiter("2/minute", redis_url=url) for _ in range(2)]
    try:
        waits = [await limiter.charge("alice") for limiter in (*limiters, *limiters)]
        assert [wait > 0 for wait in waits] == [False, False, True, True]
    finally:
        for limiter in limiters:
            await limiter.close()


@pytest.mark.parametrize("fault", ["missing", "hanging"])
async def test_faulty_redis_fails_no_search_at_little_cost(
    built_index: Path,
    fault: str,
    request: pytest.FixtureRequest,
) -> None:
    server = request.getfixturevalue("redis_server") if fault == "hanging" else None
    url = server.url if server else "redis://127.0.0.1:1/0"
    async with opened(built_index, redis_url=url, rate_limit="1000/minute") as client:
        if server is not None:
            server.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):
                for _ in range(6):
                    response = await client.post("/search/text", json={"query": "red"})
                    assert response.status_code == 200
        finally:
            if server is not None:
                server.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    "reply",
    [b"*1\r\n" * 20_000, b"%1\r\n*1\r\n+a\r\n+b\r\n", b"$x\r\n", b"html\r\n", b""],
)
async def test_an_invalid_or_no_reply_fails_no_count(
    reply: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while await reader.readline():
                writer.write(reply)
                await writer.drain()
                await reader.read(4096)
        writer.close()

    monkeypatch.setattr("app.core.redis.TIMEOUT_S", 0.1)
    async with (
        await asyncio.start_server(talk, "127.0.0.1", 0) as server,
        asyncio.timeout(20),
    ):
        rates = RateLimiter(
            "2/minute", f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        )
        assert [await rates.charge("alice") for _ in range(3)] == [0, 0, 0]
        await rates.close()


async def test_a_password_a_database_and_a_socket_are_used(tmp_path: Path) -> None:
    with RedisServer(
        "--requirepass",
        "pass/word",
        "--unixsocket",
        str(tmp_path / "redis.sock"),
    ) as server:
        await assert_shared(f"redis://:pass%2Fword@127.0.0.1:{server.port}/3")
        await assert_shared(f"unix://:pass%2Fword@{tmp_path}/redis.sock")


@pytest.mark.parametrize(
    "url",
    [
        "http://:secretword@localhost",
        "redis://:secretword@localhost:many",
        "redis://:half/secretword@localhost",
        "redis://:secretword@localhost?socket_timeout=soon",
        "redis://:secretword@localhost?colour=red",
        "rediss://:secretword@localhost?ssl_cert_reqs=maybe",
    ],
)
def test_an_invalid_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be redis://.* %2F") as caught:
        connect(url)
    assert "half" not in str(caught.value)
    assert "secretword" not in str(caught.value)


async def test_services_share_vectors_by_hashes_and_answer_alike(
    built_index: Path, redis_server: RedisServer
) -> None:
    client = redis.Redis.from_url(redis_server.url)
    pages = list[list[dict[str, Any]]]()
    image = (built_index.parent / "gallery/circle/red.png").read_bytes()
    for stored in (0, 2):
        async with opened(built_index, redis_url=redis_server.url) as http:
            assert client.dbsize() == stored
            answers = [await http.post("/search/text", json=QUERY)]
            answers.append(
                await http.post("/search/image", files={"file": ("x.png", image)})
            )
            pages.append([answer.json() for answer in answers])
    assert [[page["cached"] for page in each] for each in pages] == [
        [False, False],
        [True, True],
    ]
    assert [page["results"] for page in pages[0]] == [
        page["results"] for page in pages[1]
    ]
    for key in client.scan_iter():
        assert b"secret" not in key
        assert 0 < client.ttl(key) <= 7 * 24 * 3600
        client.set(key, b"damaged")
    async with opened(built_index, redis_url=redis_server.url) as http:
        response = await http.post("/search/text", json=QUERY)
        answer = response.json()
        assert answer["cached"] is False
        assert answer["results"] == pages[0][0]["results"]
    client.close()


def _flip(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 64])


async def test_a_damaged_vector_is_a_miss(redis_server: RedisServer) -> None:
    cache = RedisCache(redis_server.url, 60)
    client = redis.Redis.from_url(redis_server.url)
    cache.put("model", "red", VECTOR)
    cache.put("model", "blue", -VECTOR)
    await cache.close()
    cache = RedisCache(redis_server.url, 60)
    key, other = client.scan_iter()
    whole = client.get(key)
    foreign = client.get(other)
    assert isinstance(whole, bytes)
    assert isinstance(foreign, bytes)
    digest = whole[:-128]
    for damaged in (
        digest + bytes(128),
        digest + np.random.default_rng(0).random(32, np.float32).tobytes(),
        digest + (100 * VECTOR).tobytes(),
        _flip(whole),
        foreign,  # of another query
    ):
        client.set(key, damaged)
        found = [await cache.get("model", query, 32) for query in ("red", "blue")]
        assert sum(vector is None for vector in found) == 1
    client.set(key, whole)
    for query in ("red", "blue"):
        assert await cache.get("model", query, 32) is not None
    client.close()
    await cache.close()


async def test_failed_redis_rests_for_a_while_and_vectors_are_of_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.core.redis.PAUSE_S", 0.2)
    with RedisServer() as server:
        cache = RedisCache(server.url, 60)
        cache.put("model", "red", VECTOR)
        server.stop()
        assert await cache.get("model", "red", 32) is None
        server.start()
        cache.put("model", "red", VECTOR)  # not tried
        assert await cache.get("model", "red", 32) is None
        await asyncio.sleep(0.3)
        cache.put("model", "red", VECTOR)
        await cache.close()
        reader = RedisCache(server.url, 60)
        np.testing.assert_array_equal(await reader.get("model", "red", 32), VECTOR)
        for fingerprint, query, dim in (
            ("another", "red", 32),
            ("model", "blue", 32),
            ("model", "red", 31),
        ):
            assert await reader.get(fingerprint, query, dim) is None
        await reader.close()
