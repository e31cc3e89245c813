"""A rebuild notifies the running service; polling is off in these tests."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from app.service import collections
from index_jobs.jobs.notify import notify
from index_jobs.rebuild import rebuild
from index_jobs.store.manifest import PUBLISHED_CHANNEL
from tests.support.processes import free_port
from tests.support.redis_server import RedisServer
from tests.support.service import opened, serving, until, until_ready


@pytest.mark.redis
async def test_a_rebuild_notifies_the_service_over_redis(
    index: Path, gallery: Path, tiny_checkpoint: Path, redis_server: RedisServer
) -> None:
    async with opened(index, redis_url=redis_server.url, poll_s=0) as client:

        async def is_received() -> bool:
            """Notify again until the service has subscribed."""
            notified = await asyncio.to_thread(notify, [redis_server.url], index, 1)
            return list(notified.values()) == ["received by 1"]

        await until(is_received)
        options = {"force": True, "notify": [redis_server.url], "progress": False, "workers": 0}
        summary = await asyncio.to_thread(lambda: rebuild(gallery, tiny_checkpoint, index, **options))
        assert list(summary.notified.values()) == ["received by 1"]
        await until_ready(client, index_version=2)
        await asyncio.to_thread(redis_server.stop)
        assert (await client.get("/readyz")).status_code == 200


async def test_redis_that_does_not_respond_at_the_start_is_named_once(
    index: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collections, "_REDIS_S", 0.05)
    with caplog.at_level(logging.DEBUG, logger="app.service.collections"):
        async with opened(index, redis_url=f"redis://127.0.0.1:{free_port()}"):
            await until(lambda: caplog.text.count("Redis cannot be used yet (Error ") > 2)
    levels = [record.levelname for record in caplog.records if "Redis" in record.message]
    assert levels == ["WARNING"] + ["DEBUG"] * (len(levels) - 1)


FLOOD = "for i = 1, ARGV[2] do redis.call('publish', ARGV[1], i) end"  # run by Redis, so it takes none of our time


def seconds_to_read(server: Any, count: int) -> float:
    """Return the processor time that a subscriber takes for so many notices, which it does nothing with."""
    with server.pubsub() as channel:
        channel.subscribe("another channel")
        channel.get_message(timeout=10)
        server.eval(FLOOD, 0, "another channel", count)
        began = time.process_time()
        for _ in range(count):
            assert channel.get_message(timeout=10)
        return time.process_time() - began


@pytest.mark.redis
async def test_a_flood_of_notices_costs_little_and_hides_no_version(index: Path, redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.url) as server:
        each_s = seconds_to_read(server, 2_000) / 2_000
        async with opened(index, redis_url=redis_server.url, poll_s=0):
            await until(lambda: server.pubsub_numsub(PUBLISHED_CHANNEL)[0][1] == 1)
            began = time.process_time()
            for _ in range(6):
                server.eval(FLOOD, 0, PUBLISHED_CHANNEL, 40_000)
                await asyncio.sleep(0.2)
            assert time.process_time() - began < each_s * 240_000 / 10


def test_a_rebuild_posts_to_the_admin_route(
    index: Path, gallery: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(index, admin_key="long enough", poll_s=0) as (_, port):
        monkeypatch.setenv("DCAR_ADMIN_KEY", "long enough")
        url = f"http://127.0.0.1:{port}"
        options = {"force": True, "notify": [url], "progress": False, "workers": 0}
        summary = rebuild(gallery, tiny_checkpoint, index, **options)
        assert (summary.version, summary.notified) == (2, {url: f"serves version 2 of {index.name}"})
        monkeypatch.setenv("DCAR_ADMIN_KEY", "not the key")
        assert notify([url], index, 2)[url].startswith("not reached: 401")
