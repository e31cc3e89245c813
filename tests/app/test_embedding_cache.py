"""Vectors of queries in a real Redis: shared, bound to their model, and never the cause of a failed search."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from app.service.redis_cache import RedisCache
from tests.support.redis_server import RedisServer
from tests.support.service import opened

pytestmark = pytest.mark.redis

VECTOR = np.linspace(-1, 1, 32, dtype=np.float32)
QUERY = {"query": "secret words", "k": 5}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.service.redis_cache.TIMEOUT_S", 2)


async def test_a_vector_is_found_by_its_model_and_query_alone(redis_server: RedisServer) -> None:
    writer, reader = (RedisCache(redis_server.url, 60) for _ in range(2))
    writer.put("model", "red", VECTOR)
    await writer.close()
    found = await reader.get("model", "red", 32)
    assert found is not None
    np.testing.assert_array_equal(found, VECTOR)
    for fingerprint, query, dim in (("another", "red", 32), ("model", "blue", 32), ("model", "red", 31)):
        assert await reader.get(fingerprint, query, dim) is None
    await reader.close()


async def test_services_share_vectors_by_hashes_and_answer_alike(built_index: Path, redis_server: RedisServer) -> None:
    client, pages = redis.Redis.from_url(redis_server.url), list[list[dict[str, Any]]]()
    image = (built_index.parent / "gallery/circle/red.png").read_bytes()
    for stored in (0, 2):
        async with opened(built_index, redis_url=redis_server.url) as http:
            assert client.dbsize() == stored
            answers = [await http.post("/search/text", json=QUERY)]
            answers.append(await http.post("/search/image", files={"file": ("x.png", image)}))
            pages.append([answer.json() for answer in answers])
    assert [[page["cached"] for page in each] for each in pages] == [[False, False], [True, True]]
    assert [page["results"] for page in pages[0]] == [page["results"] for page in pages[1]]
    for key in client.scan_iter():
        assert b"secret" not in key
        assert 0 < client.ttl(key) <= 7 * 24 * 3600
        client.set(key, b"damaged")
    async with opened(built_index, redis_url=redis_server.url) as http:
        answer = (await http.post("/search/text", json=QUERY)).json()
        assert (answer["cached"], answer["results"]) == (False, pages[0][0]["results"])
    client.close()


async def test_after_a_failure_redis_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.service.redis_cache.PAUSE_S", 0.2)
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
        assert await reader.get("model", "red", 32) is not None
        await reader.close()
