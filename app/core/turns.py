"""Work beside the event loop, shared out between callers: turns, threads, batches,
decoding, background tasks.

- The next turn is the caller's that has had the least time (or turns), and then the
  request's. A new caller begins with the least that another one has had, so nobody is
  passed over for ever.
- Concurrent queries share the forward passes of a `Batcher`, and equal ones one
  computation of `SharedTasks`.
- Images are decoded in processes within limits, see `dcar_core.images.workers`. Most
  may take `MEMORY`. A larger one gets the memory of the largest image; each caller can
  have one of these at a time, and all callers `_LARGE`.
"""

import asyncio
import logging
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Generic, TypeVar

import numpy as np

from app.core.callers import current_caller, request_id
from app.core.metrics import Metrics
from dcar_core.images import ImageFormat
from dcar_core.images.workers import Convert, DecodeWorker, LargeImageError, Limits
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError
from dcar_core.util.machine import available_cores

T = TypeVar("T")
Run = Callable[[list[Any]], Floats | list[Floats]]  # takes N payloads, returns N arrays
logger = logging.getLogger(__name__)

RESTART_S = 1.0  # before a background task that failed begins again
ENDS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
# of an image that shares the memory with others: a photo of 12 megapixels takes 48 MB
MEMORY = 96 * 2**20
# of a large one, beside four bytes for each of the most pixels
_LARGE_MEMORY = 64 * 2**20
_LARGE = 2  # large images at a time
_SPARE = 2  # decoding processes that one caller leaves to the others
_NICE = 5


class ClosedError(Exception):
    """No more work is taken."""


@dataclass(eq=False, slots=True)
class Turn:
    """A place in a queue. It is given up by cancelling its future."""

    item: Any
    future: asyncio.Future[Any]
    keys: tuple[tuple[str, ...], ...]  # of its caller, and of the caller's request
    arrived: float = field(default_factory=monotonic)
    started: float = 0.0


class FairQueue:
    """A queue of the turns that wait, and of those that have begun. For one event
    loop.
    """

    def __init__(self) -> None:
        # by a caller, and by a caller's request
        self._had: dict[tuple[str, ...], float] = {}
        self._left = Counter[tuple[str, ...]]()  # turns that have not ended
        self.waiting: list[Turn] = []
        self.running: list[Turn] = []

    def put(self, item: Any, future: asyncio.Future[Any]) -> Turn:
        """Queue an item of the current caller and request."""
        caller = current_caller.get()
        request = request_id.get()
        turn = Turn(item, future, ((caller,), (caller, request)))
        for key in turn.keys:
            if not self._left[key]:
                peers = (
                    had
                    for other, had in self._had.items()
                    if len(other) == len(key) and other[:-1] == key[:-1]
                )
                self._had[key] = min(peers, default=0.0)
            self._left[key] += 1
        self.waiting.append(turn)
        return turn

    def take(self, may_start: Callable[[Turn], bool] = lambda _: True) -> Turn | None:
        """Begin the next turn of those that may start; None if there is none."""
        for turn in [turn for turn in self.waiting if turn.future.cancelled()]:
            self.waiting.remove(turn)
            self._leave(turn, 0.0)
        ready = filter(may_start, self.waiting)
        following = min(
            ready, key=lambda turn: [self._had[key] for key in turn.keys], default=None
        )
        if following is not None:
            self.waiting.remove(following)
            self.running.append(following)
            following.started = monotonic()
        return following

    def end(self, turn: Turn, cost: float | None = None) -> None:
        """End a turn that has begun. cost: what it counts; the seconds since its
        beginning by default.
        """
        self.running.remove(turn)
        self._leave(turn, monotonic() - turn.started if cost is None else cost)

    def _leave(self, turn: Turn, cost: float) -> None:
        for key in turn.keys:
            self._had[key] += cost
            self._left[key] -= 1
            if not self._left[key]:
                del self._left[key], self._had[key]


class FairTurns(FairQueue):
    """Turns of asynchronous work. slots: turns at a time; per_caller: of one caller."""

    def __init__(self, slots: int, per_caller: int) -> None:
        super().__init__()
        self._slots = slots
        self._per_caller = per_caller

    async def begin(self) -> Turn:
        """Wait for a turn, which the caller has to end."""
        turn = self.put(None, asyncio.get_running_loop().create_future())
        self._start()
        try:
            await turn.future
        except asyncio.CancelledError:
            if not turn.future.cancelled():  # it has begun
                self.end(turn)
            raise
        return turn

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it."""
        turn = await self.begin()
        try:
            yield
        finally:
            self.end(turn)

    def end(self, turn: Turn, cost: float | None = None) -> None:
        super().end(turn, cost)
        self._start()

    def _start(self) -> None:
        while (
            len(self.running) < self._slots
            and (turn := self.take(self._may_start)) is not None
        ):
            turn.future.set_result(None)

    def _may_start(self, turn: Turn) -> bool:
        return (
            sum(other.keys[0] == turn.keys[0] for other in self.running)
            < self._per_caller
        )


class ComputeThreads(ThreadPoolExecutor):
    """Threads of one kind of work, which give way to the event loop. `run` waits for a
    call in one of them.
    """

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name, _give_way)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self, call, *args)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(_NICE)


class FairThreads(ComputeThreads):
    """Threads that callers, and then their requests, use in turns.

    Args:
        per_caller: turns of one caller at a time; all by default.
        ahead: turns that begin before a thread is free, so that no thread waits for the
            event loop between two calls.
    """

    def __init__(
        self,
        count: int,
        name: str,
        *,
        per_caller: int | None = None,
        ahead: int = 0,
    ) -> None:
        super().__init__(count, name)
        self._turns = FairTurns(count + ahead, per_caller or count + ahead)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        loop = asyncio.get_running_loop()
        turn = await self._turns.begin()

        # not when the caller gives up, which stops no call that has begun
        def end(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._turns.end, turn)

        done = self.submit(call, *args)
        done.add_done_callback(end)
        return await asyncio.wrap_future(done)


async def run_in_new_thread(call: Callable[..., T], *args: object) -> T:
    """Run rare heavy work, such as loading a model, in a thread that ends with it.

    OpenMP keeps workers for each thread that ever computed, and idle ones slowed
    PyTorch by a fifth.
    """
    thread = ComputeThreads(1, "dcar-once")
    try:
        return await thread.run(call, *args)
    finally:
        thread.shutdown(wait=False)


class Decoders:
    """Decode images in processes, in turns; each starts when it is first needed.
    max_pixels: of the largest image.
    """

    def __init__(self, max_pixels: int) -> None:
        share = min(4, available_cores())
        self._workers = [DecodeWorker() for _ in range(share + _SPARE)]
        self._idle = [*self._workers]
        self._threads = FairThreads(len(self._workers), "dcar-decode", per_caller=share)
        self._large_memory = _LARGE_MEMORY + 4 * max_pixels
        self._large_turns = FairTurns(_LARGE, 1)

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    async def run(
        self,
        convert: Convert,
        data: bytes,
        max_pixels: int,
        formats: Set[ImageFormat],
    ) -> Any:
        """Apply `convert` to an image file in turn. Raise ImageError if it fails."""
        limits = Limits(MEMORY, max_pixels=max_pixels, formats=formats, expected=MEMORY)
        try:
            return await self._threads.run(self._decode, convert, data, limits)
        except LargeImageError:
            limits = replace(limits, memory=self._large_memory, expected=None)
            async with self._large_turns.turn():
                return await self._threads.run(self._decode, convert, data, limits)

    def _decode(self, convert: Convert, data: bytes, limits: Limits) -> Any:
        worker = self._idle.pop()
        try:
            return worker.run(convert, data, limits).result
        finally:
            self._idle.append(worker)


class SharedTasks(Generic[T]):
    """Share one computation among all callers that use the same key at the same
    time.
    """

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[T]] = {}
        self._waiters = Counter[asyncio.Task[T]]()

    def __len__(self) -> int:
        return len(self._tasks)

    async def run(
        self,
        key: Hashable,
        start: Callable[[], Coroutine[Any, Any, T]],
    ) -> T:
        """Wait for the running computation of `key`, or begin one with `start()`."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(start())
        self._waiters[task] += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiters[task] -= 1
            if not self._waiters[task]:
                del self._waiters[task], self._tasks[key]
                task.cancel()  # unless it has ended


@dataclass(slots=True)
class _Rhythm:
    """How the callers of a group return. expected: queries that ran or waited when its
    last batch ended.
    """

    expected: int = 1
    pause: int = 0  # waits that are left out after the last one, which did not pay
    left: int = 0  # those to come


class Batcher:
    """Run queries, batch after batch, in the one thread that owns the model.

    - Queries that arrive during a forward pass form the next batch. After a lone query
      it starts at once; else it waits a few milliseconds for the callers of the last
      batch to return, since one larger pass takes less than two. After a wait in which
      most did not return, the next ones are left out: one, then three, at most 63.
    - A batch that raises is halved until the faulty query is alone, so one bad query
      fails by itself.
    - Callers, and then their requests, take turns in a batch: one query of each, and
      then a second one of each.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_wait_s: float,
        metrics: Metrics | None = None,
    ) -> None:
        self._max_batch = max_batch
        self._max_wait = max_wait_s
        self._metrics = metrics or Metrics()
        # of pairs: a function, whose payloads are a group, and a payload
        self._queue = FairQueue()
        self._has_arrived = asyncio.Event()
        # of groups, by a hash that keeps no replaced model alive
        self._rhythms = defaultdict[int, _Rhythm](_Rhythm)
        self._last_end = -math.inf  # of the last forward pass
        self._is_closing = False
        self._thread = ComputeThreads(1, "dcar-model")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work. The event loop must be running."""
        self._worker = asyncio.create_task(
            supervise("batcher", self._work, self._metrics), name="dcar-batcher"
        )

    def submit(self, run: Run, payload: Any) -> asyncio.Future[Floats]:
        """Queue a query; those with the same function may share a pass. Return what
        `run` makes of it.

        Raise ClosedError if the service shuts down.
        """
        if self._is_closing:
            raise ClosedError("The service is shutting down. Try again in 1 s.")
        future: asyncio.Future[Floats] = asyncio.get_running_loop().create_future()
        self._queue.put((run, payload), future)
        self._has_arrived.set()
        return future

    async def close(self) -> None:
        """Finish the accepted work, then end the thread."""
        self._is_closing = True
        self._has_arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while self._queue.waiting or not self._is_closing:
            if self._queue.waiting:
                await self._wait_for_more()
                # not bound to a name here: it would keep a replaced model alive
                await self._run(self._next_batch())
            else:
                self._has_arrived.clear()
                await self._has_arrived.wait()

    async def _wait_for_more(self) -> None:
        """Wait, for `max_wait_s` at most, until the batch is as large as the last one
        of its group.
        """
        first = self._queue.waiting[0]
        run = first.item[0]
        rhythm = self._rhythms[hash(run)]
        present = self._waiting(run)
        wanted = min(rhythm.expected, self._max_batch)
        remaining = max(first.arrived, self._last_end) + self._max_wait - monotonic()
        if present >= wanted or remaining <= 0:
            return
        if rhythm.left:
            rhythm.left -= 1
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(remaining):
                while self._waiting(run) < wanted and not self._is_closing:
                    self._has_arrived.clear()
                    await self._has_arrived.wait()
        has_paid = self._waiting(run) - present >= (wanted - present) / 2
        rhythm.left = rhythm.pause = 0 if has_paid else min(2 * rhythm.pause + 1, 63)

    def _waiting(self, run: Run) -> int:
        return sum(
            turn.item[0] == run and not turn.future.done()
            for turn in self._queue.waiting
        )

    def _next_batch(self) -> list[Turn]:
        """Take the next turn and those of its group that follow; each counts as one."""
        batch = list[Turn]()

        def fits(turn: Turn) -> bool:
            return not batch or turn.item[0] == batch[0].item[0]

        while (
            len(batch) < self._max_batch
            and (turn := self._queue.take(fits)) is not None
        ):
            self._queue.end(turn, cost=1)
            batch.append(turn)
        return batch

    async def _run(self, batch: list[Turn]) -> None:
        if not batch:  # all queries were cancelled
            return
        run = batch[0].item[0]
        started = monotonic()
        outcomes = await self._thread.run(
            _forward,
            run,
            [turn.item[1] for turn in batch],
        )
        self._last_end = monotonic()
        for turn, outcome in zip(batch, outcomes, strict=True):
            if turn.future.done():
                continue
            if isinstance(outcome, Exception):
                turn.future.set_exception(outcome)
            else:
                turn.future.set_result(outcome)
        self._metrics.batches.observe(len(batch))
        self._metrics.stages["encode"].observe(self._last_end - started)
        for turn in batch:
            self._metrics.stages["queue"].observe(started - turn.arrived)
        self._rhythms[hash(run)].expected = len(batch) + self._waiting(run)


def _forward(run: Run, payloads: list[Any]) -> list[Floats | Exception]:
    """Return one outcome per payload. Rows are copied, so a cached row does not keep
    its batch alive.
    """
    try:
        vectors = run(payloads)  # [N, E]
        if len(vectors) != len(payloads):
            raise RuntimeError(f"{len(vectors)} embeddings for {len(payloads)} queries")
        unusable = DataError("The model has no finite embedding for this query.")
        return [
            vector.copy() if np.isfinite(vector).all() else unusable
            for vector in vectors
        ]
    except BaseException as error:
        # a panic of a library in Rust, such as the tokenizer, is no Exception
        if len(payloads) > 1:
            half = len(payloads) // 2
            return _forward(run, payloads[:half]) + _forward(run, payloads[half:])
        if isinstance(error, Exception):
            return [error]
        failure = RuntimeError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        return [failure]


async def supervise(
    name: str,
    run: Callable[[], Awaitable[None]],
    metrics: Metrics,
    *,
    on_failure: Callable[[BaseException], None] = lambda _: None,
) -> None:
    """Run a background loop until it returns. Log and count its failures, and restart
    it after `RESTART_S`.
    """
    while True:
        try:
            return await run()
        except ENDS:
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            logger.exception("the %s failed; restarting it in %g s", name, RESTART_S)
            metrics.task_failures.labels(name).inc()
            on_failure(error)
            await asyncio.sleep(RESTART_S)


async def stop(task: asyncio.Task[None] | None) -> None:
    """Cancel a background task, if there is one, and wait for its end."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
