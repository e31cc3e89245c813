"""Micro-batching: concurrent queries share forward passes, and identical queries share one computation.

- `SharedTasks`: callers with the same key wait for one task. It is cancelled when its last waiter leaves.
- `Batcher`: one queue and one model thread. Queries that arrive during a forward pass form the next batch. An idle
  batcher starts at once; under load it waits a few milliseconds for the callers of the last batch to return.
- A batch that raises is halved until the faulty query is alone, so one bad query fails by itself.
- Cancelled work is skipped. `close` finishes the accepted work.
- Callers, and then their requests, take turns in a batch: one query of each, and then a second one of each.
- `Admission` bounds the searches in the service by their number and time.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from app.core.fair_queue import FairQueue, Turn
from app.core.metrics import Metrics, PendingKind
from app.core.rate_limit import current_caller
from app.core.settings import Settings
from app.core.supervision import supervise
from app.core.threads import ComputeThreads
from app.search.errors import UnavailableError
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError

T = TypeVar("T")

STUCK_S = 30.0  # of a forward pass; one that may load a model has a thread of its own


class SharedTasks(Generic[T]):
    """Share one computation among all callers that use the same key at the same time."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[T]] = {}
        self._waiters = Counter[asyncio.Task[T]]()

    def __len__(self) -> int:
        return len(self._tasks)

    async def run(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
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


class BatchGroup(NamedTuple):
    """Queries that may share a forward pass: `run` takes N payloads and returns float32 (N, E)."""

    key: Hashable
    run: Callable[[list[Any]], Floats | list[Floats]]


@dataclass(eq=False, slots=True)
class _Job:
    group: BatchGroup
    payload: Any
    arrived: float


class Batcher:
    """Run the queries of all groups, batch after batch, in the one thread that owns the model.

    Args:
        max_batch: queries in one forward pass.
        max_wait_s: longest wait for more queries, under load only.
    """

    def __init__(self, *, max_batch: int, max_wait_s: float, metrics: Metrics | None = None) -> None:
        self._max_batch = max_batch
        self._max_wait = max_wait_s
        self._metrics = metrics or Metrics()
        self._queue = FairQueue()
        self._has_arrived = asyncio.Event()
        self._expected_size: dict[BatchGroup, int] = {}  # jobs that ran or waited when the last batch ended
        self._last_end = -math.inf  # of the last forward pass
        self._is_closing = False
        self._pass_began = math.inf
        self._thread = ComputeThreads(1, "dcar-model")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work. The event loop must be running."""
        self._worker = asyncio.create_task(supervise("batcher", self._work, self._metrics), name="dcar-batcher")

    def submit(self, group: BatchGroup, payloads: Sequence[Any]) -> asyncio.Future[list[Floats]]:
        """Put queries into the queue, and return their vectors (E,), or what `run` raises for one of them alone.

        Raise UnavailableError if the service shuts down.
        """
        if self._is_closing:
            raise UnavailableError("The service is shutting down.")
        now = time.monotonic()
        futures: list[asyncio.Future[Floats]] = [asyncio.get_running_loop().create_future() for _ in payloads]
        for payload, future in zip(payloads, futures, strict=True):
            self._queue.put(_Job(group, payload, now), future)
        self._has_arrived.set()
        return asyncio.gather(*futures)

    @property
    def fault(self) -> str | None:
        """Why queries are not answered; None if they are."""
        if self._worker is None or self._worker.done():
            return "The queue of the model has stopped."
        if time.monotonic() - self._pass_began > STUCK_S:
            return f"The model has not answered for {STUCK_S:g} s."
        return None

    async def close(self) -> None:
        """Finish the accepted work, then end the thread."""
        self._is_closing = True
        self._has_arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while True:
            if self._queue.waiting:
                await self._wait_for_more()
                await self._run(self._next_batch())  # not bound to a name here: it would keep a replaced model alive
            elif self._is_closing:
                return
            else:
                self._has_arrived.clear()
                await self._has_arrived.wait()

    async def _wait_for_more(self) -> None:
        """Wait, for `max_wait_s` at most, until the batch is as large as the last one of its group."""
        group, arrived = self._queue.waiting[0].item.group, self._queue.waiting[0].item.arrived
        wanted = min(self._expected_size.get(group, 1), self._max_batch)
        remaining = max(arrived, self._last_end) + self._max_wait - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0, remaining)):
                while self._waiting(group) < wanted and remaining > 0 and not self._is_closing:
                    self._has_arrived.clear()
                    await self._has_arrived.wait()

    def _waiting(self, group: BatchGroup) -> int:
        return sum(turn.item.group == group and not turn.future.done() for turn in self._queue.waiting)

    def _next_batch(self) -> list[Turn]:
        """Take the next turn and those of its group that follow; each counts as one."""
        batch = list[Turn]()

        def fits(turn: Turn) -> bool:
            return not batch or turn.item.group == batch[0].item.group

        while len(batch) < self._max_batch and (turn := self._queue.take(fits)) is not None:
            self._queue.end(turn, cost=1)
            batch.append(turn)
        return batch

    async def _run(self, batch: list[Turn]) -> None:
        if not batch:  # all queries were cancelled
            return
        group = batch[0].item.group
        self._pass_began = started = time.monotonic()
        try:
            outcomes = await self._thread.run(_forward, group.run, [turn.item.payload for turn in batch])
        finally:
            self._pass_began = math.inf
        self._last_end = time.monotonic()
        for turn, outcome in zip(batch, outcomes, strict=True):
            if turn.future.done():
                continue
            if isinstance(outcome, Exception):
                turn.future.set_exception(outcome)
            else:
                turn.future.set_result(outcome)
        self._metrics.forward_pass([turn.item.arrived for turn in batch], started, self._last_end)
        self._expected_size[group] = len(batch) + self._waiting(group)


def _forward(run: Callable[[list[Any]], Floats | list[Floats]], payloads: list[Any]) -> list[Floats | Exception]:
    """Return one outcome per payload. Rows are copied, so a cached row does not keep its batch alive."""
    try:
        vectors = run(payloads)  # [N, E]
        if len(vectors) != len(payloads):
            raise RuntimeError(f"{len(vectors)} embeddings for {len(payloads)} queries")
        unusable = DataError("The model has no finite embedding for this query.")
        return [vector.copy() if np.isfinite(vector).all() else unusable for vector in vectors]
    except BaseException as error:  # a panic of a library in Rust, such as the tokenizer, is no Exception
        if len(payloads) > 1:
            half = len(payloads) // 2
            return _forward(run, payloads[:half]) + _forward(run, payloads[half:])
        if isinstance(error, Exception):
            return [error]
        failure = RuntimeError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        return [failure]


class Admission:
    """Bounds the number of searches and of image requests in progress, and the time of each."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._pending = Counter[tuple[PendingKind, str]]()  # of each caller

    def require_room(self, count: int = 1, kind: PendingKind = "searches") -> None:
        """Raise UnavailableError unless the caller may have so much more work in progress."""
        most, own = self._settings.max_pending, self._pending[kind, current_caller.get()]
        share = max(most // 2, min(most, self._settings.max_queries))  # of one caller
        total = sum(pending for (other, _), pending in self._pending.items() if other == kind)
        if total + count > most or own + count > share:
            self._metrics.refused.labels("queue_full").inc()
            raise UnavailableError("The service is busy.", retry_after_s=1)

    @asynccontextmanager
    async def __call__(self, count: int = 1, *, kind: PendingKind = "searches") -> AsyncIterator[None]:
        """Count work in progress. Raise UnavailableError if there is too much of it, or if it takes too long."""
        self.require_room(count, kind)
        own = kind, current_caller.get()
        self._pending[own] += count
        self._metrics.pending[kind].inc(count)
        deadline = asyncio.timeout(self._settings.deadline_ms / 1000)
        try:
            async with deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            self._metrics.refused.labels("late").inc()
            raise UnavailableError("The search took too long and was cancelled.", retry_after_s=1) from None
        finally:
            self._pending[own] -= count
            self._pending += Counter()  # forgets who has none
            self._metrics.pending[kind].dec(count)
