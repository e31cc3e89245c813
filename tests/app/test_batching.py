"""Batches of queries, and turns of callers at batches, threads and decoding
processes.
"""

import asyncio
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from app.api.responses import to_problem
from app.core.callers import current_caller, request_id
from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.turns import (
    Batcher,
    ClosedError,
    Decoders,
    FairQueue,
    FairThreads,
    FairTurns,
)
from app.search.served_version import ServedVersion
from app.service.retriever import QueryEncoder
from dcar_core.images import ALL_FORMATS, MAX_PIXELS
from dcar_core.images.workers import Convert, DecodeWorker, Limits
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError
from tests.support import conversions
from tests.support.images import encoded


class Panic(BaseException):
    """As libraries in Rust raise it."""


class Recorder:
    """The function of a group: records its batches, can be held back, and fails on some
    payloads.
    """

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
        return np.array(
            [[np.nan if payload == "nan" else len(payload), 1] for payload in payloads],
            np.float32,
        )


class Bench(Recorder):
    """A batcher at work, and the recorder that answers its queries."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.batcher = Batcher(**{"max_batch": 8, "max_wait_s": 0, **given})
        self.batcher.start()

    async def one(self, payload: str, run: Recorder | None = None) -> Floats:
        return await self.batcher.submit(run or self, payload)

    async def held(self) -> asyncio.Task[Floats]:
        """Keep the model thread busy, so following queries queue up."""
        self.gate.clear()
        task = asyncio.create_task(self.one("first"))
        while not self.batches:
            await asyncio.sleep(0.001)
        return task

    async def submit(
        self,
        *payloads: str,
        run: Recorder | None = None,
    ) -> list[asyncio.Task[Floats]]:
        tasks = [asyncio.create_task(self.one(payload, run)) for payload in payloads]
        await asyncio.sleep(0)
        return tasks


@pytest.fixture
async def bench() -> AsyncIterator[Callable[..., Bench]]:
    """Return a function that starts a batcher."""
    made: list[Bench] = []

    def make(**given: Any) -> Bench:
        made.append(Bench(**given))
        return made[-1]

    yield make
    for each in made:
        await each.batcher.close()


async def test_queries_of_a_group_that_arrive_during_a_forward_pass_form_the_next_batch(
    bench: Callable[..., Bench],
) -> None:
    made = bench(max_batch=3)
    images = Recorder()
    first = await made.held()
    tasks = []
    images.batches = made.batches
    for run, payload in [
        (None, "a"),
        (images, "i1"),
        (None, "bb"),
        (images, "i2"),
        (None, "ccc"),
        (None, "dddd"),
    ]:
        tasks += await made.submit(payload, run=run)
    made.gate.set()
    assert [int(v[0]) for v in await asyncio.gather(first, *tasks)] == [
        5,
        1,
        2,
        2,
        2,
        3,
        4,
    ]
    assert made.batches == [
        ["first"],
        ["a", "bb", "ccc"],
        ["i1", "i2"],
        ["dddd"],
    ]
    assert made.threads == images.threads


@pytest.mark.parametrize(
    ("poison", "error"),
    [
        ("bad", DataError),
        ("nan", DataError),
        ("panic", RuntimeError),
    ],
)
async def test_a_bad_query_fails_alone(
    bench: Callable[..., Bench],
    poison: str,
    error: type[Exception],
) -> None:
    made = bench()
    first = await made.held()
    rest = await made.submit("a", "bb", poison, "dddd", "eeeee")
    made.gate.set()
    await first
    outcomes = await asyncio.gather(*rest, return_exceptions=True)
    assert isinstance(outcomes.pop(2), error)
    assert [int(v[0]) for v in outcomes if isinstance(v, np.ndarray)] == [1, 2, 4, 5]
    assert (await made.one("next"))[0] == 4


async def test_an_invalid_output_fails_its_caller_and_a_failure_of_the_batcher_nobody(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    made = bench(metrics=metrics)
    for found in ([], [None]):
        with pytest.raises((RuntimeError, TypeError)):
            await made.batcher.submit(lambda _, found=found: found, "first")  # type: ignore[misc]
    monkeypatch.setattr("app.core.turns.RESTART_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "stages", None)
        assert (await made.one("after"))[0] == 5
        await asyncio.sleep(0)
    assert (await asyncio.wait_for(made.one("later"), 5))[0] == 5
    assert (
        metrics.registry.get_sample_value(
            "dcar_task_failures_total", {"task": "batcher"}
        )
        == 1
    )


async def test_an_idle_batcher_starts_at_once(bench: Callable[..., Bench]) -> None:
    async with asyncio.timeout(5):
        await bench(max_wait_s=60).one("alone")


async def test_a_busy_batcher_waits_for_the_callers_of_the_last_batch(
    bench: Callable[..., Bench],
) -> None:
    """From the end of its pass, which took longer than the wait."""
    made = bench(max_wait_s=0.5)
    first = await made.held()
    waiting = await made.submit("a")
    await asyncio.sleep(0.6)
    made.gate.set()
    await first
    await asyncio.gather(*waiting, *await made.submit("again"))
    assert made.batches == [["first"], ["a", "again"]]


async def test_waits_in_vain_become_rare_until_one_pays(
    bench: Callable[..., Bench],
) -> None:
    batcher = bench(max_wait_s=0.2).batcher
    ends = threading.Semaphore(0)
    sizes = list[int]()
    waits = list[bool]()

    def run(payloads: list[str]) -> Floats:
        sizes.append(len(payloads))
        assert ends.acquire(timeout=5)
        return np.ones((len(payloads), 1), np.float32)

    async def begun(count: int) -> None:
        while len(sizes) < count:
            await asyncio.sleep(0.001)

    running: asyncio.Future[Any] = batcher.submit(run, "first")
    # a query waits while another one runs, whose caller returns once
    for number in range(1, 9):
        await begun(number)
        waiting = batcher.submit(run, "next")
        began = time.monotonic()
        ends.release()
        await running
        returned = [batcher.submit(run, "again")] if number == 7 else []
        await begun(number + 1)
        waits.append(time.monotonic() - began > 0.1)
        running = asyncio.gather(waiting, *returned)
    ends.release()
    await running
    assert waits == [True, False, True, False, False, False, False, True]
    assert sizes == [1, 1, 1, 1, 1, 1, 1, 2, 1]


async def test_close_finishes_what_is_accepted_and_still_wanted(
    bench: Callable[..., Bench],
) -> None:
    made = bench(max_batch=1)
    first = await made.held()
    (*rest, gone) = await made.submit("a", "bb", "gone")
    closing = asyncio.create_task(made.batcher.close())
    gone.cancel()
    await asyncio.sleep(0)
    with pytest.raises(ClosedError) as late:
        await made.one("late")
    assert to_problem(late.value).status == 503
    made.gate.set()
    await closing
    assert [int(vector[0]) for vector in await asyncio.gather(first, *rest)] == [
        5,
        1,
        2,
    ]
    assert made.batches == [["first"], ["a"], ["bb"]]


async def test_callers_take_turns_whatever_one_of_them_sends(
    bench: Callable[..., Bench],
) -> None:
    made = bench(max_batch=4)
    images = Recorder()
    waiting = [await made.held()]

    async def submit(caller: str, *payloads: str, run: Recorder | None = None) -> None:
        current_caller.set(caller)
        waiting.extend(await made.submit(*payloads, run=run))

    await submit("a", *(f"a{number}" for number in range(10)))
    await submit("b", "b0", "b1")
    await submit("c", "c0", run=images)
    await submit("d", "d0")
    made.gate.set()
    await asyncio.gather(*waiting)
    assert made.batches[1:3] == [["a0", "b0", "d0", "a1"], ["b1", "a2", "a3", "a4"]]
    assert made.batches[3:] == [["a5", "a6", "a7", "a8"], ["a9"]]
    assert images.batches == [["c0"]]


@pytest.mark.parametrize("seed", range(2))
async def test_nobody_ever_gets_the_vector_of_another_text(seed: int) -> None:
    """Through cache, shared computations and batches, with deadlines, cancellations and
    batches that fail.
    """
    rng = random.Random(seed)

    def encode(texts: list[tuple[None, str]]) -> Floats:
        time.sleep(rng.random() / 500)
        if any(text == "bad" for _, text in texts):
            raise DataError("bad")
        return np.array([vector_of(text) for _, text in texts])

    def vector_of(text: str) -> Floats:
        vector = (
            np.random.default_rng(zlib.crc32(text.encode()))
            .normal(size=8)
            .astype(np.float32)
        )
        return vector / np.linalg.norm(vector)

    settings = Settings(
        index=Path("unused"),
        cache_size=5,
        batch_size=4,
        batch_wait_ms=1,
    )
    encoder = QueryEncoder(settings, Metrics())
    runtime = SimpleNamespace(encode_texts=encode)
    served = cast(
        ServedVersion,
        SimpleNamespace(
            encoder=SimpleNamespace(fingerprint="f", dim=8, runtime=runtime, state=None)
        ),
    )
    outcomes = Counter[str]()

    async def ask(text: str) -> None:
        await asyncio.sleep(rng.random() / 2)
        try:
            async with asyncio.timeout(rng.choice([0.001, 0.01, 5])):
                vector, _ = await encoder.text(served, text)
        except (TimeoutError, DataError) as error:
            outcomes[type(error).__name__] += 1
        else:
            np.testing.assert_array_equal(vector, vector_of(text))
            outcomes["answered"] += 1

    encoder.batcher.start()
    tasks = [
        asyncio.create_task(ask(rng.choice(["bad", *"abcdefghijklmnop"])))
        for _ in range(400)
    ]
    for task in rng.sample(tasks, 60):
        asyncio.get_running_loop().call_later(rng.random() / 2, task.cancel)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    await encoder.close()
    assert not [error for error in ended if isinstance(error, Exception)]
    assert len([error for error in ended if error is not None]) <= 60, (
        "one that is cancelled takes nobody along"
    )
    assert outcomes["answered"] > 100
    assert outcomes["TimeoutError"]
    assert outcomes["DataError"]
    assert not len(encoder.computations)


async def test_the_caller_and_then_the_request_that_had_least_is_next() -> None:
    queue = FairQueue()
    loop = asyncio.get_running_loop()

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
    assert take(5) == "a1"
    assert take(1) == "a2"
    assert take(1) == "a2"
    put("b", "1")
    put("b", "1")
    put("a", "3")
    assert [take(1) for _ in range(5)] == [
        "b1",
        "a1",
        "b1",
        "a3",
        "a1",
    ], "new ones begin with what others have had"
    for place in ("b1", "b1", "a1", "a1", "c1"):
        put(*place)
    for turn in (queue.waiting[2], queue.waiting[4]):
        turn.future.cancel()
    assert take(5) == "b1"
    assert take(9) == "a1"
    put("c", "1")
    put("c", "1")
    assert [take(1), take(1)] == ["c1", "b1"], "one that gave up begins anew"
    queue.waiting[0].future.cancel()
    assert queue.take() is None


async def test_turns_of_a_caller_are_limited_and_pass_over_one_that_gives_up() -> None:
    turns = FairTurns(3, 2)
    running = list[str]()
    most = set[tuple[int, int]]()

    async def work(caller: str) -> None:
        current_caller.set(caller)
        async with turns.turn():
            running.append(caller)
            most.add((len(running), running.count("many")))
            try:
                await asyncio.sleep(0.01)
            finally:
                running.remove(caller)

    tasks = [
        asyncio.create_task(work(caller)) for caller in ["many"] * 9 + ["one", "two"]
    ]
    await asyncio.sleep(0)
    for task in tasks[:5]:  # two of them have begun
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert max(all for all, _ in most) == 3
    assert max(own for _, own in most) == 2
    assert not turns.running


async def test_the_thread_of_filters_is_shared_out_between_callers() -> None:
    thread = FairThreads(1, "dcar-test")
    order = list[str]()
    gate = threading.Event()

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
    thread.shutdown()


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
        await decoders.run(
            conversions.sleep,
            encoded(Image.new("L", (tenths, 1))),
            MAX_PIXELS,
            ALL_FORMATS,
        )

    return asyncio.create_task(run())


async def test_one_caller_leaves_workers_to_the_others(decoders: Decoders) -> None:
    flood = [send(decoders, "flood", 30) for _ in range(20)]
    await asyncio.sleep(0)
    await send(decoders, "honest", 1)
    assert not any(task.done() for task in flood), "at once, though 18 images wait"
    for task in flood:
        task.cancel()


async def test_large_images_take_turns(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = list[object]()
    counts = list[int]()
    run = DecodeWorker.run

    def noted(
        self: DecodeWorker,
        convert: Convert,
        data: bytes,
        limits: Limits,
    ) -> object:
        is_large = limits.expected is None
        running.extend([self] * is_large)
        counts.append(len(running))
        try:
            return run(self, convert, data, limits)
        finally:
            del running[:is_large]

    monkeypatch.setattr(DecodeWorker, "run", noted)
    monkeypatch.setattr("app.core.turns.MEMORY", 1)
    await asyncio.gather(
        *(send(decoders, caller, 2) for caller in ("one", "one", "one", "two", "three"))
    )
    assert max(counts) == 2
    assert len(counts) == 10
