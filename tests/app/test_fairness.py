"""Expensive filters, explanations and re-ranking do not delay other searches."""

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from app.core.rate_limit import current_caller
from app.core.threads import ComputeThreads, FairThreads
from index_jobs.store import filters
from tests.support.service import opened, until


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is one of the process")
async def test_the_event_loop_has_a_processor_before_the_threads() -> None:
    threads = ComputeThreads(1, "test")
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        assert await threads.run(os.getpriority, os.PRIO_PROCESS, 0) == min(mine + 5, 19)
        assert os.getpriority(os.PRIO_PROCESS, 0) == mine
    finally:
        threads.shutdown()


async def test_chunks_of_images_take_turns_by_caller(built_index: Path) -> None:
    async with opened(built_index) as client:
        compute, order = client.app.state.retriever.compute, list[str]()

        async def encode(caller: str) -> None:
            current_caller.set(caller)
            async with compute.chunk_turn():
                order.append(caller)
                await asyncio.sleep(0.01)

        await asyncio.gather(*(asyncio.create_task(encode(caller)) for caller in ["many"] * 20 + ["one"]))
        assert order.index("one") <= 2
        assert not compute._turns_of


async def test_searches_without_a_filter_do_not_wait_for_filters(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, match_rows = threading.Event(), filters.match_rows

    def slow(artifact: Any, filter: Any) -> Any:
        assert gate.wait(60)
        return match_rows(artifact, filter)

    async with opened(built_index) as client:
        assert (await client.post("/search/text", json={"query": "red", "filter": {"color": "red"}})).is_success
        monkeypatch.setattr(filters, "match_rows", slow)
        queries = [{"query": "red", "filter": {"caption": {"contains": f"{i}"}}} for i in range(8)]
        filtered = [asyncio.create_task(client.post("/search/text", json=query)) for query in queries]
        listed = asyncio.create_task(client.get("/items", params={"filter": '{"category": "circle"}'}))
        await asyncio.sleep(0.1)
        plain = await asyncio.wait_for(client.post("/search/text", json={"query": "red"}), 30)
        cached = {"query": "red", "filter": {"color": "red"}}
        known = await asyncio.wait_for(client.post("/search/text", json=cached), 30)
        assert (plain.status_code, known.status_code) == (200, 200)
        assert not any(task.done() for task in [*filtered, listed])
        gate.set()
        assert {(await task).status_code for task in [*filtered, listed]} == {200}


@pytest.mark.parametrize("option", ["filter", "facets"])
async def test_filters_and_facets_of_a_batch_give_way_to_the_filter_of_another_request(
    built_index: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    gate, order, match_rows = threading.Event(), list[str](), filters.match_rows

    def wait(name: str) -> None:
        order.append(name)
        assert name == "single" or gate.wait(60)

    def match(artifact: Any, filter: Any) -> Any:
        wait(filter["caption"]["contains"])
        return match_rows(artifact, filter)

    def count(*_: Any) -> tuple[dict[str, Any], bool]:
        wait("batch")
        return {}, True

    monkeypatch.setattr("app.search.engine.count_facets", count)
    monkeypatch.setattr(filters, "match_rows", match)
    async with opened(built_index) as client:
        options: dict[str, Any] = {
            "facets": lambda number: ["color"],
            "filter": lambda number: {"caption": {"contains": "batch"}, "color": {"not": f"{number}"}},
        }
        queries = [{"query": f"red {number}", option: options[option](number)} for number in range(8)]
        batch = asyncio.create_task(client.post("/search/batch", json={"queries": queries}))
        await until(lambda: bool(order))
        await asyncio.sleep(0.2)  # all queries of the batch have been encoded
        single = {"query": "red", "filter": {"caption": {"contains": "single"}}}
        other = asyncio.create_task(client.post("/search/text", json=single))
        await asyncio.sleep(0.2)
        gate.set()
        assert [(await each).status_code for each in (other, batch)] == [200, 200]
        assert order.index("single") <= 2, "at most two queries of the batch came first"
        assert order.count("batch") == 8


async def test_the_thread_of_filters_is_shared_out_between_callers() -> None:
    thread, order, gate = FairThreads(1, "dcar-test"), list[str](), threading.Event()

    def work(caller: str, seconds: float) -> None:
        assert gate.wait(60)
        time.sleep(seconds)
        order.append(caller)

    async def call(caller: str, seconds: float) -> None:
        current_caller.set(caller)
        await thread.run(work, caller, seconds)

    greedy = [asyncio.create_task(call("greedy", 0.02)) for _ in range(8)]
    await asyncio.sleep(0.05)
    modest = [asyncio.create_task(call("modest", 0.001)) for _ in range(8)]
    given_up = asyncio.create_task(call("given up", 0))
    await asyncio.sleep(0.05)
    given_up.cancel()
    gate.set()
    await asyncio.gather(*greedy, *modest)
    assert order == ["greedy", *["modest"] * 8, *["greedy"] * 7]
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 // 0)
    gate.clear()
    last = [asyncio.create_task(call("last", 0)) for _ in range(2)]
    await asyncio.sleep(0.05)
    asyncio.get_running_loop().call_later(0.1, gate.set)
    await asyncio.to_thread(thread.shutdown, cancel_futures=True)
    assert [task.cancelled() for task in (await asyncio.wait(last, timeout=5))[0]].count(True) == 1
