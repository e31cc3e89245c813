"""The embedding cache in the process, and in a real Redis that is killed, stopped and corrupted."""

import asyncio
import contextlib
import signal
import time
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import SecretStr

from app.core.metrics import Metrics
from app.core.rate_limit import RateLimiter
from app.core.redis import CircuitBreaker, connect
from app.core.settings import Settings
from app.service.embedding_cache import EmbeddingCache, cache_key, rounded
from dcar_core.util.arrays import Floats
from tests.support.redis_server import RedisServer
from tests.support.responses import scrape
from tests.support.service import opened, until

VECTOR = np.linspace(-1, 1, 32, dtype=np.float32)
ROUNDED = rounded(VECTOR)


def count(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def cache_of(url: str | None, size: int = 0, metrics: Metrics | None = None, *, timeout_s: float = 1) -> EmbeddingCache:
    settings = Settings.model_construct(
        cache_size=size, redis_url=SecretStr(url) if url else None, redis_timeout_ms=int(1000 * timeout_s)
    )
    return EmbeddingCache(settings, metrics or Metrics())


def test_keys_differ_by_encoder_kind_and_content() -> None:
    kinds: tuple[Literal["text", "image"], ...] = ("text", "image")
    keys = {cache_key(*each) for each in product(("a" * 64, "b" * 64), kinds, (b"secret words", b"y"))}
    assert len(keys) == 8
    assert not any("secret words" in key for key in keys)


async def test_the_circuit_breaker_opens_after_failures_and_allows_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("app.core.redis.time", SimpleNamespace(monotonic=lambda: now))
    breaker = CircuitBreaker("the cache")
    for _ in range(3):
        assert breaker.allows()
        async with breaker.attempt(1):
            raise OSError("x")
    assert not breaker.allows()
    now = 5.1
    assert breaker.allows(), "one trial"
    assert not breaker.allows(), "and no stampede"
    async with breaker.attempt(1):
        pass
    assert breaker.allows()


@pytest.mark.parametrize("fault", ["missing", pytest.param("hanging", marks=pytest.mark.redis)])
async def test_a_faulty_redis_fails_no_search_and_costs_little(
    built_index: Path, fault: str, request: pytest.FixtureRequest
) -> None:
    url, server = "redis://127.0.0.1:1/0", None
    if fault == "hanging":
        server = request.getfixturevalue("redis_server")
        url = server.url
    async with opened(built_index, redis_url=url, cache_size=0, rate_limit="1000/minute") as client:
        if server is not None:
            server.send_signal(signal.SIGSTOP)
        try:
            for _ in range(6):
                started = time.perf_counter()
                response = await client.post("/search/text", json={"query": "red"})
                assert (response.status_code, response.json()["cached"]) == (200, False)
            assert time.perf_counter() - started < 1
            metrics = (await client.get("/metrics")).text
        finally:
            if server is not None:
                server.send_signal(signal.SIGCONT)
        for use in ("read", "count") if server else ("read", "write", "count"):  # hanging writes may still wait
            assert f'dcar_redis_breaker_open{{use="{use}"}} 1.0' in metrics
        for outcome in ("error", "skipped"):  # not used after three failures
            assert f'dcar_cache_lookups_total{{level="redis",outcome="{outcome}"}} 3.0' in metrics


@pytest.mark.redis
async def test_corrupted_values_are_not_used(redis_server: RedisServer) -> None:
    metrics = Metrics()
    cache = cache_of(redis_server.url, metrics=metrics)
    store: Any = connect(redis_server.url)

    async def stored(key: str, vector: Floats) -> bytes:
        writer = cache_of(redis_server.url)
        writer.put(key, vector)
        await writer.close()
        return bytes(await store.get(key))

    true = await stored("other", VECTOR)
    bent = bytes([*true[:-1], true[-1] ^ 1])
    nan, nothing = [await stored("key", np.full(32, fill, np.float32)) for fill in (np.nan, 0)]
    for value in (b"", b"x", true[:-1], true * 2, bent, nan, nothing, true):
        await store.set("key", value)
        assert await cache.get("key", 32) is None
    assert await cache.get("other", 32) is not None
    assert count(metrics, "dcar_cache_lookups_total", level="redis", outcome="wrong") == 8
    await store.delete("key")
    await store.lpush("key", "a list")
    assert await cache.get("key", 32) is None
    assert count(metrics, "dcar_cache_lookups_total", level="redis", outcome="error") == 1
    await store.aclose()
    await cache.close()


NONSENSE = {
    "nested": b"*1\r\n" * 20_000,
    "a key that is a list": b"%1\r\n*1\r\n+a\r\n+b\r\n",
    "no length": b"$x\r\n",
    "another type": b":1\r\n",
    "html": b"<html>\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("reply", NONSENSE.values(), ids=NONSENSE)
async def test_an_invalid_or_no_redis_reply_fails_no_search(reply: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.readline():
                writer.write(reply)
                await writer.drain()
                await reader.read(4096)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    patient = "?socket_timeout=60&socket_connect_timeout=60"  # the service has its own time-outs
    for options in ("", "?protocol=2", patient):
        url = f"redis://127.0.0.1:{port}/0{options}"
        metrics = Metrics()
        cache = cache_of(url, metrics=metrics, timeout_s=0.1)
        rates = RateLimiter("2/minute", redis_url=url, timeout_s=0.1)
        async with asyncio.timeout(20):
            for _ in range(4):
                assert await cache.get("key", 32) is None
                cache.put("key", VECTOR)
            assert min([await rates.charge("alice") for _ in range(3)]) >= 0
            await cache.close()
            outcomes = [count(metrics, "dcar_cache_writes_total", outcome=each) for each in ("ok", "error", "skipped")]
            assert sum(outcomes) == 4, "each write ends without an exception"
        await rates.close()
    server.close()


@pytest.mark.redis
async def test_a_full_redis_is_still_read(redis_server: RedisServer) -> None:
    metrics = Metrics()
    cache = cache_of(redis_server.url, metrics=metrics)
    store: Any = connect(redis_server.url)
    cache.put("key", VECTOR)
    await until(partial(store.exists, "key"))
    await store.config_set("maxmemory", "1")

    def writes() -> dict[str, float]:
        return {name: count(metrics, "dcar_cache_writes_total", outcome=name) for name in ("ok", "error", "skipped")}

    for i in range(5):
        cache.put(f"more {i}", VECTOR)
        await until(lambda: sum(writes().values()) == i + 2)  # noqa: B023
    assert (cache.write_breaker.is_open, cache.read_breaker.is_open) == (True, False)
    assert await cache.get("key", 32) is not None
    assert writes() == {"ok": 1, "error": 3, "skipped": 2}
    await store.aclose()
    await cache.close()


async def test_a_computed_value_is_cached_in_the_process_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.service.embedding_cache.MAX_WRITES", 2)
    metrics = Metrics()
    cache = cache_of("redis://127.0.0.1:1/0", 10, metrics, timeout_s=0.1)
    for i in range(5):
        cache.put(f"key {i}", VECTOR)
        for _ in range(2):
            known = cache.peek(f"key {i}")
            assert known is not None
            np.testing.assert_array_equal(known, ROUNDED)
            known[0] = 5  # changes nothing that is cached
    assert count(metrics, "dcar_cache_writes_total", outcome="skipped") == 3, "pending writes are bounded"
    await cache.close()


@pytest.mark.slow
@pytest.mark.redis
async def test_results_are_the_same_with_and_without_redis(
    built_index: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "redis_url": redis_server.url,
        "redis_timeout_ms": 500,
        "cache_size": 0,
        "cache_ttl_s": 100,
    }
    async with opened(built_index, **given) as client:

        async def ask() -> Any:
            response = await client.post("/search/text", json={"query": "red circle", "k": 24})
            assert response.status_code == 200
            return response.json()

        first = await ask()
        assert first["cached"] is False

        async def cached() -> bool:
            return (await ask())["cached"]

        await until(cached)
        assert (await ask())["results"] == first["results"]
        store = connect(redis_server.url)
        (key,) = await store.keys("dcar:*")
        assert 0 < await store.ttl(key) <= 100
        await store.aclose()
    async with opened(built_index, **given) as client:  # as another process would
        assert (await ask())["cached"] is True
        breaker = client.app.state.retriever.compute.cache.read_breaker
        monkeypatch.setattr("app.core.redis.PAUSE_S", 0.2)
        redis_server.stop()
        for _ in range(4):
            response = await ask()
            assert response["cached"] is False
            assert response["results"] == first["results"]
        assert breaker.is_open
        name = "dcar_redis_breaker_open", (("use", "read"),)
        assert (await scrape(client))[name] == 1
        monkeypatch.setattr("app.core.redis.KNOWN_S", 0)
        await asyncio.sleep(0.2)
        assert (await scrape(client))[name] == 0, "nobody has tried since"
        redis_server.start()
        await until(cached)
        assert not breaker.is_open
