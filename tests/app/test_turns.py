"""Turns of decoding processes and asynchronous work are shared out between callers, and memory by images."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from PIL import Image

from app.core.callers import current_caller, request_id
from app.core.turns import Decoders, FairQueue, FairTurns
from dcar_core.images import ALL_FORMATS, MAX_PIXELS
from dcar_core.images.workers import Convert, DecodeWorker, Limits
from tests.support import conversions
from tests.support.images import encoded


async def test_the_caller_and_then_the_request_that_had_least_is_next() -> None:
    queue, loop = FairQueue(), asyncio.get_running_loop()

    def put(caller: str, request: str) -> None:
        current_caller.set(caller)
        request_id.set(request)
        queue.put(caller + request, loop.create_future())

    def take(cost: float) -> str:
        turn = queue.take()
        assert turn is not None
        queue.end(turn, cost)
        return str(turn.item)

    for place in ("a1", "a1", "a1", "a2", "a2"):
        put(*place)
    assert [take(5), take(1), take(1)] == ["a1", "a2", "a2"]
    put("b", "1")
    put("b", "1")
    put("a", "3")
    assert [take(1) for _ in range(5)] == ["b1", "a1", "b1", "a3", "a1"], "new ones begin with what others have had"
    put("a", "1")
    queue.waiting[0].future.cancel()
    assert queue.take() is None


async def test_turns_of_a_caller_are_limited_and_pass_over_one_that_gives_up() -> None:
    turns, running, most = FairTurns(3, 2), list[str](), set[tuple[int, int]]()

    async def work(caller: str) -> None:
        current_caller.set(caller)
        async with turns.turn():
            running.append(caller)
            most.add((len(running), running.count("many")))
            try:
                await asyncio.sleep(0.01)
            finally:
                running.remove(caller)

    tasks = [asyncio.create_task(work(caller)) for caller in ["many"] * 9 + ["one", "two"]]
    await asyncio.sleep(0)
    for task in tasks[:5]:  # two of them have begun
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (max(all for all, _ in most), max(own for _, own in most)) == (3, 2)
    assert not turns.running


@pytest.fixture
async def decoders(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Decoders]:
    monkeypatch.setattr("app.core.turns.available_cores", lambda: 2)
    decoders = Decoders(MAX_PIXELS)
    yield decoders
    decoders.close()


def send(decoders: Decoders, caller: str, tenths: int) -> asyncio.Task[None]:
    """Send an image for a caller, whose decoding takes so many tenths of a second."""

    async def run() -> None:
        current_caller.set(caller)
        await decoders.run(conversions.sleep, encoded(Image.new("L", (tenths, 1))), MAX_PIXELS, ALL_FORMATS)

    return asyncio.create_task(run())


async def test_one_caller_leaves_workers_to_the_others(decoders: Decoders) -> None:
    flood = [send(decoders, "flood", 30) for _ in range(20)]
    await asyncio.sleep(0)
    await send(decoders, "honest", 1)
    assert not any(task.done() for task in flood), "at once, though 18 images wait"
    for task in flood:
        task.cancel()


async def test_large_images_take_turns(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    running, counts, run = list[object](), list[int](), DecodeWorker.run

    def noted(self: DecodeWorker, convert: Convert, data: bytes, limits: Limits) -> object:
        is_large = limits.expected is None
        running.extend([self] * is_large)
        counts.append(len(running))
        try:
            return run(self, convert, data, limits)
        finally:
            del running[:is_large]

    monkeypatch.setattr(DecodeWorker, "run", noted)
    monkeypatch.setattr("app.core.turns.MEMORY", 1)
    await asyncio.gather(*(send(decoders, caller, 2) for caller in ("one", "one", "one", "two", "three")))
    assert (max(counts), len(counts)) == (2, 10)
