"""Batching of queries and sharing of computations, with plain functions in place of the model."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from app.search.errors import NotReadyError, OverloadedError
from app.service import batching
from app.service.batching import Batcher, BatchGroup, SharedTasks
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError


class Panic(BaseException):
    """As libraries in Rust raise it."""


class Recorder:
    """The function of a group: records its batches, can be held back, and fails on some payloads."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()

    def __call__(self, payloads: list[Any]) -> Floats:
        self.batches.append(list(payloads))
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(5)
        if any(payload == "bad" for payload in payloads):
            raise DataError("bad")
        if "panic" in payloads:
            raise Panic
        return np.array([[np.nan if payload == "nan" else len(payload), 1] for payload in payloads], np.float32)


async def _held(batcher: Batcher, group: BatchGroup, recorder: Recorder) -> asyncio.Task[Floats]:
    """Keep the model thread busy, so following queries queue up."""
    recorder.gate.clear()
    task = asyncio.create_task(batcher.submit(group, "first"))
    while not recorder.batches:
        await asyncio.sleep(0.001)
    return task


async def _submit(batcher: Batcher, group: BatchGroup, payloads: list[str]) -> list[asyncio.Task[Floats]]:
    tasks = [asyncio.create_task(batcher.submit(group, payload)) for payload in payloads]
    await asyncio.sleep(0)
    return tasks


async def test_queries_that_arrive_during_a_forward_pass_form_the_next_batch() -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=3, max_wait_s=0)
    batcher.start()
    group = BatchGroup("text", recorder)
    first = await _held(batcher, group, recorder)
    rest = await _submit(batcher, group, ["a", "bb", "ccc", "dddd"])
    recorder.gate.set()
    assert [int(v[0]) for v in await asyncio.gather(first, *rest)] == [5, 1, 2, 3, 4]
    assert recorder.batches == [["first"], ["a", "bb", "ccc"], ["dddd"]]
    assert len(recorder.threads) == 1
    await batcher.close()


async def test_groups_do_not_share_batches_and_keep_their_order() -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=8, max_wait_s=0)
    batcher.start()
    text, image = BatchGroup("text", recorder), BatchGroup("image", recorder)
    first = await _held(batcher, text, recorder)
    tasks = []
    for group, payload in [(text, "t1"), (image, "i1"), (text, "t2"), (image, "i2")]:
        tasks += await _submit(batcher, group, [payload])
    recorder.gate.set()
    await asyncio.gather(first, *tasks)
    assert recorder.batches[1:] == [["t1", "t2"], ["i1", "i2"]]
    await batcher.close()


@pytest.mark.parametrize("poison", ["bad", "nan"])
async def test_a_bad_query_fails_alone(poison: str) -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=8, max_wait_s=0)
    batcher.start()
    group = BatchGroup("text", recorder)
    first = await _held(batcher, group, recorder)
    rest = await _submit(batcher, group, ["a", "bb", poison, "dddd", "eeeee"])
    recorder.gate.set()
    await first
    outcomes = await asyncio.gather(*rest, return_exceptions=True)
    assert isinstance(outcomes.pop(2), DataError)
    assert [int(v[0]) for v in outcomes if isinstance(v, np.ndarray)] == [1, 2, 4, 5]
    await batcher.close()


@pytest.mark.parametrize("found", [[], [None]], ids=["too few", "no vector"])
async def test_an_invalid_output_fails_its_caller_and_not_the_next(found: list[Any]) -> None:
    batcher = Batcher(max_batch=8, max_wait_s=0)
    batcher.start()
    with pytest.raises((RuntimeError, TypeError)):
        await asyncio.wait_for(batcher.submit(BatchGroup("broken", lambda payloads: found), "first"), 5)
    assert (await asyncio.wait_for(batcher.submit(BatchGroup("text", Recorder()), "after"), 5))[0] == 5
    await batcher.close()


async def test_a_panic_fails_its_query_alone_and_ends_nothing() -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=4, max_wait_s=0)
    batcher.start()
    group = BatchGroup("text", recorder)
    first = await _held(batcher, group, recorder)
    rest = await _submit(batcher, group, ["a", "panic", "ccc"])
    recorder.gate.set()
    outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
    assert isinstance(outcomes[2], RuntimeError)
    assert "Panic" in str(outcomes[2])
    assert [int(each[0]) for each in (outcomes[1], outcomes[3]) if isinstance(each, np.ndarray)] == [1, 3]
    assert (await batcher.submit(group, "next"))[0] == 4
    assert batcher.fault is None
    await batcher.close()
    assert batcher.fault == "The queue of the model has stopped."


async def test_a_forward_pass_without_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=4, max_wait_s=0)
    batcher.start()
    first = await _held(batcher, BatchGroup("text", recorder), recorder)
    assert batcher.fault is None
    monkeypatch.setattr(batching, "_STUCK_S", 0)
    assert "not answered" in str(batcher.fault)
    recorder.gate.set()
    await first
    assert batcher.fault is None
    await batcher.close()


async def test_a_cancelled_query_takes_no_place_in_a_batch() -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=8, max_wait_s=0)
    batcher.start()
    group = BatchGroup("text", recorder)
    first = await _held(batcher, group, recorder)
    queued, stays, behind = await _submit(batcher, group, ["gone", "stays", "gone as well"])
    queued.cancel()
    behind.cancel()
    first.cancel()  # its batch is running
    await asyncio.sleep(0)
    recorder.gate.set()
    assert (await stays)[0] == 5
    assert recorder.batches == [["first"], ["stays"]]
    await batcher.close()


async def test_cancelled_queries_do_not_count_as_backlog() -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=8, max_wait_s=0, max_queue_s=0.5)
    batcher.start()
    group = BatchGroup("text", recorder)
    first = await _held(batcher, group, recorder)
    batcher._seconds_per_query["text"] = 1.0  # seconds a query
    (waits,) = await _submit(batcher, group, ["waits"])
    for refused in (batcher.submit(group, "another"), batcher.submit_all(group, ["and", "others"])):
        with pytest.raises(OverloadedError):
            await refused
    waits.cancel()
    recorder.gate.set()
    await first
    assert (await batcher.submit(group, "again"))[0] == 5, "cancelled work must not count"
    await batcher.close()


async def test_the_cost_of_a_query_is_its_share_of_a_batch() -> None:
    def slowly(payloads: list[str]) -> Floats:
        time.sleep(0.2)
        return np.ones((len(payloads), 2), np.float32)

    batcher = Batcher(max_batch=32, max_wait_s=0, max_queue_s=0.5)
    batcher.start()
    group = BatchGroup("text", slowly)
    await batcher.submit_all(group, ["part"] * 20)  # a hundredth of a second each
    await asyncio.gather(*(batcher.submit(group, "another") for _ in range(20)))
    await batcher.close()


async def test_close_finishes_accepted_queries_and_refuses_new_ones() -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=1, max_wait_s=0)
    batcher.start()
    group = BatchGroup("text", recorder)
    first = await _held(batcher, group, recorder)
    rest = await _submit(batcher, group, ["a", "bb"])
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    with pytest.raises(NotReadyError):
        await batcher.submit(group, "late")
    recorder.gate.set()
    await closing
    assert [int((await task)[0]) for task in (first, *rest)] == [5, 1, 2]


async def test_a_busy_batcher_waits_for_more_queries_and_an_idle_one_starts_at_once() -> None:
    recorder, batcher = Recorder(), Batcher(max_batch=8, max_wait_s=0.5)
    batcher.start()
    group = BatchGroup("text", recorder)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await batcher.submit(group, "alone")
    assert loop.time() - began < 0.25
    first = await _held(batcher, group, recorder)
    pair = await _submit(batcher, group, ["a", "bb"])
    recorder.gate.set()
    await asyncio.gather(first, *pair)
    early = await _submit(batcher, group, ["early"])
    await asyncio.sleep(0.05)
    late = await _submit(batcher, group, ["late"])
    await asyncio.gather(*early, *late)
    assert recorder.batches[-1] == ["early", "late"]
    await batcher.close()


@pytest.mark.slow
async def test_two_sets_of_callers_that_would_alternate_share_one_batch() -> None:
    """The next batch waits for the callers of the last one, and starts as soon as all of them are back."""
    # A pass takes longer than the wait, which counts from the end of the pass.
    recorder, batcher = Recorder(), Batcher(max_batch=8, max_wait_s=0.2)
    batcher.start()

    def slow(payloads: list[Any]) -> Floats:
        time.sleep(0.25)
        return recorder(payloads)

    group = BatchGroup("text", slow)

    async def caller(name: str) -> None:
        for _ in range(5):
            await batcher.submit(group, name)

    callers = [asyncio.create_task(caller(name)) for name in "abcd"]
    await asyncio.sleep(0.38)  # during the second pass
    callers += [asyncio.create_task(caller(name)) for name in "efg"]
    await asyncio.gather(*callers)
    assert [len(batch) for batch in recorder.batches[2:5]] == [7, 7, 7]
    loop, took = asyncio.get_running_loop(), []
    for name in ("alone", "again", "still"):  # only the first one waits for the others
        began = loop.time()
        await batcher.submit(group, name)
        took.append(loop.time() - began)
    assert took[0] > 0.36 > max(took[1:])
    await batcher.close()


async def test_the_queries_of_one_request_are_accepted_together() -> None:
    """An idle service accepts a request of any size, however slow single queries were."""

    def slowly(payloads: list[str]) -> Floats:
        time.sleep(0.1)
        return np.ones((len(payloads), 2), np.float32)

    batcher = Batcher(max_batch=32, max_wait_s=0, max_queue_s=0.5)
    batcher.start()
    group = BatchGroup("image", slowly)
    await batcher.submit(group, "alone")  # its measured cost is a tenth of a second
    parts = asyncio.create_task(batcher.submit_all(group, ["part"] * 20))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):  # two seconds of work are expected
        await batcher.submit(group, "another")
    assert len(await parts) == 20
    assert len(await batcher.submit_all(group, ["part"] * 20)) == 20
    await batcher.close()


async def test_callers_with_one_key_share_a_computation_and_its_failure() -> None:
    shared_tasks: SharedTasks[int] = SharedTasks()
    started = 0

    async def compute() -> int:
        nonlocal started
        started += 1
        await asyncio.sleep(0.01)
        return 7

    async def fail() -> int:
        await asyncio.sleep(0.01)
        raise DataError("no")

    assert await asyncio.gather(*(shared_tasks.run("a", compute) for _ in range(5))) == [7] * 5
    assert started == 1
    outcomes = await asyncio.gather(*(shared_tasks.run("b", fail) for _ in range(3)), return_exceptions=True)
    assert [type(each) for each in outcomes] == [DataError] * 3
    assert not shared_tasks._tasks


async def test_a_shared_task_is_cancelled_when_its_last_waiter_leaves() -> None:
    shared_tasks: SharedTasks[int] = SharedTasks()
    ended: list[str] = []

    async def compute() -> int:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return 7

    one = asyncio.create_task(shared_tasks.run("a", compute))
    two = asyncio.create_task(shared_tasks.run("a", compute))
    await asyncio.sleep(0)
    one.cancel()
    assert await two == 7
    assert not ended
    three = asyncio.create_task(shared_tasks.run("a", compute))
    await asyncio.sleep(0.01)
    three.cancel()
    await asyncio.sleep(0)
    four = asyncio.create_task(shared_tasks.run("a", compute))  # does not join the cancelled task
    await asyncio.sleep(0.01)
    assert "a" in shared_tasks, "the fourth can be joined, although the third has ended since it started"
    assert await four == 7
    assert ended == ["cancelled"]
    assert not shared_tasks._tasks
