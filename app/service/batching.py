"""Micro-batching: concurrent queries share forward passes, and identical queries share one computation.

- `SharedTasks`: callers with the same key wait for one task. It is cancelled when its last waiter leaves.
- `Batcher`: one queue and one model thread. Queries that arrive during a forward pass form the next batch. An idle
  batcher starts at once; under load it waits a few milliseconds for the callers of the last batch to return.
- A batch that raises is halved until the faulty query is alone, so one bad query fails by itself.
- Cancelled work is skipped. `close` finishes the accepted work.
- A query whose expected wait is longer than `max_queue_s` is refused at once. Those of a batch, and an image that is
  decoded first, are accepted or refused `together`, by the first.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from app.core.metrics import Metrics, PendingKind
from app.core.settings import Settings
from app.core.supervision import ENDS, supervise
from app.core.threads import ComputeThreads
from app.search.errors import NotReadyError, OverloadedError, UnavailableError
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError

T = TypeVar("T")

_STUCK_S = 30.0  # of a forward pass; one that may load a model has a thread of its own
_NEWEST_WEIGHT = 0.2  # of the last batch in the smoothed seconds per query
_accepted = ContextVar[list[bool] | None]("accepted", default=None)  # not empty: one of the queries together is


@contextmanager
def together() -> Iterator[None]:
    """Accept or refuse all queries of the tasks begun within as one."""
    token = _accepted.set([] if (outer := _accepted.get()) is None else outer)
    try:
        yield
    finally:
        _accepted.reset(token)


@dataclass(slots=True)
class _SharedTask(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0


class SharedTasks(Generic[T]):
    """Share one computation among all callers that use the same key at the same time."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, _SharedTask[T]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tasks

    async def run(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for the running computation of `key`, or begin one with `start()`."""
        shared = self._tasks.get(key)
        if shared is None:
            shared = _SharedTask(asyncio.create_task(start()))
            self._tasks[key] = shared
            shared.task.add_done_callback(lambda task: self._forget(key, task))
        shared.waiters += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiters -= 1
            if shared.waiters == 0 and not shared.task.done():
                self._forget(key, shared.task)
                shared.task.cancel()

    def _forget(self, key: Hashable, task: asyncio.Task[T]) -> None:
        shared = self._tasks.get(key)
        if shared is not None and shared.task is task:
            del self._tasks[key]


@dataclass(frozen=True, slots=True)
class BatchGroup:
    """Queries that may share a forward pass: `run` takes N payloads and returns float32 (N, E)."""

    key: Hashable
    run: Callable[[list[Any]], Floats | list[Floats]] = field(compare=False)


@dataclass(slots=True)
class _Job:
    group: BatchGroup
    payload: Any
    future: asyncio.Future[Floats]
    arrived: float
    cost: float  # expected seconds of the model
    context: Any  # trace context of the request

    @property
    def is_cancelled(self) -> bool:
        return self.future.done()


class Batcher:
    """Run the queries of all groups, batch after batch, in the one thread that owns the model.

    Args:
        max_batch: queries in one forward pass.
        max_wait_s: longest wait for more queries, under load only.
        max_queue_s: longest expected wait for the model; queries beyond it are refused.
    """

    def __init__(
        self, *, max_batch: int, max_wait_s: float, max_queue_s: float = math.inf, metrics: Metrics | None = None
    ) -> None:
        self._max_batch = max_batch
        self._max_wait = max_wait_s
        self._max_queue = max_queue_s
        self._metrics = metrics or Metrics()
        self._seconds_per_query: dict[Hashable, float] = {}  # group key -> smoothed
        self._jobs: deque[_Job] = deque()
        self._backlog = 0.0  # expected seconds of all jobs in the queue
        self._has_arrived = asyncio.Event()
        self._batch_is_full = asyncio.Event()
        self._awaited: tuple[BatchGroup, int] | None = None  # group and number of jobs that the next batch waits for
        self._expected_size: dict[Hashable, int] = {}  # group key -> jobs that ran or waited when its last batch ended
        self._last_end = -math.inf  # of the last forward pass
        self._is_closing = False
        self._pass_began = math.inf
        self._thread = ComputeThreads(1, "dcar-model")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work. The event loop must be running."""
        self._worker = asyncio.create_task(supervise("batcher", self._work, self._metrics), name="dcar-batcher")

    async def submit(self, group: BatchGroup, payload: Any) -> Floats:
        """Return the vector (E,) of one query.

        Raises:
            UnavailableError: see `require_room`.
            Exception: raised by the group's `run` for this payload alone.
        """
        return await self.begin(group, payload)

    def begin(self, group: BatchGroup, payload: Any) -> asyncio.Future[Floats]:
        """Put a query into the queue, as `submit` does, and return its future."""
        self.require_room()
        return self._enqueue(group, payload)

    async def submit_all(self, group: BatchGroup, payloads: Sequence[Any]) -> list[Floats]:
        """Return the vectors (E,) of several queries, accepted or refused together by the work that waits already."""
        self.require_room()
        return await asyncio.gather(*(self._enqueue(group, payload) for payload in payloads))

    @property
    def fault(self) -> str | None:
        """Why queries are not answered; None if they are."""
        if self._worker is None or self._worker.done():
            return "The queue of the model has stopped."
        if time.monotonic() - self._pass_began > _STUCK_S:
            return f"The model has not answered for {_STUCK_S:g} s."
        return None

    def require_room(self) -> None:
        """Check that a new query is accepted.

        Raises:
            NotReadyError: the service is shutting down.
            OverloadedError: the query would wait too long.
        """
        if self._is_closing:
            raise NotReadyError("The service is shutting down.")
        accepted = _accepted.get()
        if self._backlog > self._max_queue and not accepted:
            self._metrics.refused.labels("queue_time").inc()
            raise OverloadedError(self._backlog)
        if accepted is not None:
            accepted.append(True)

    async def close(self) -> None:
        """Finish the accepted work, then end the thread."""
        self._is_closing = True
        self._has_arrived.set()
        self._batch_is_full.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    def _enqueue(self, group: BatchGroup, payload: Any) -> asyncio.Future[Floats]:
        cost = self._seconds_per_query.get(group.key, 0.0)
        future: asyncio.Future[Floats] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(group, payload, future, time.monotonic(), cost, self._metrics.trace_context()))
        self._backlog += cost
        self._has_arrived.set()
        if self._awaited is not None and self._awaited[0] == group:
            self._awaited = group, self._awaited[1] - 1
            if self._awaited[1] == 0:
                self._batch_is_full.set()
        return future

    async def _work(self) -> None:
        while True:
            while self._jobs and self._jobs[0].is_cancelled:
                self._backlog -= self._jobs.popleft().cost
            if not self._jobs:
                if self._is_closing:
                    return
                self._has_arrived.clear()
                await self._has_arrived.wait()
                continue
            await self._wait_for_more()
            await self._run(self._next_batch())  # not bound to a name here: it would keep a replaced model alive

    async def _wait_for_more(self) -> None:
        """Wait, for `max_wait_s` at most, until the batch is as large as the last one of its group."""
        group = self._jobs[0].group
        missing = min(self._expected_size.get(group.key, 1), self._max_batch) - self._waiting(group)
        remaining = max(self._jobs[0].arrived, self._last_end) + self._max_wait - time.monotonic()
        if missing <= 0 or remaining <= 0 or self._is_closing:
            return
        self._batch_is_full.clear()
        self._awaited = group, missing
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._batch_is_full.wait(), remaining)
        self._awaited = None

    def _waiting(self, group: BatchGroup) -> int:
        return sum(job.group == group and not job.is_cancelled for job in self._jobs)

    def _next_batch(self) -> list[_Job]:
        """Take the oldest job and the jobs of its group, oldest first; the others keep their places."""
        batch: list[_Job] = []
        remaining: deque[_Job] = deque()
        for job in self._jobs:
            if job.is_cancelled:
                continue
            if len(batch) < self._max_batch and (not batch or job.group == batch[0].group):
                batch.append(job)
            else:
                remaining.append(job)
        self._jobs = remaining
        self._backlog = sum(job.cost for job in remaining)
        return batch

    async def _run(self, batch: list[_Job]) -> None:
        if not batch:
            return
        group, payloads = batch[0].group, [job.payload for job in batch]
        started = time.monotonic()
        outcomes: list[Floats | Exception]
        self._pass_began = started
        try:
            outcomes = await self._thread.run(_forward, group.run, payloads)
        except ENDS:
            raise
        except BaseException as error:  # the thread itself failed; every caller must learn of it
            outcomes = [_as_exception(error)] * len(batch)
        finally:
            self._pass_began = math.inf
        self._last_end = time.monotonic()
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.is_cancelled:
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
        self._metrics.forward_pass([(job.arrived, job.context) for job in batch], started, self._last_end)
        seconds = (self._last_end - started) / len(batch)
        smoothed = self._seconds_per_query.get(group.key, seconds)
        self._seconds_per_query[group.key] = _NEWEST_WEIGHT * seconds + (1 - _NEWEST_WEIGHT) * smoothed
        self._expected_size[group.key] = len(batch) + self._waiting(group)


def _forward(run: Callable[[list[Any]], Floats | list[Floats]], payloads: list[Any]) -> list[Floats | Exception]:
    """Return one outcome per payload. Rows are copied, so a cached row does not keep its batch alive."""
    try:
        vectors = run(payloads)  # [N, E]
        if len(vectors) != len(payloads):
            raise RuntimeError(f"{len(vectors)} embeddings for {len(payloads)} queries")
    except BaseException as error:  # a panic of a library in Rust, such as the tokenizer, is no Exception
        if len(payloads) == 1:
            return [_as_exception(error)]
        half = len(payloads) // 2
        return _forward(run, payloads[:half]) + _forward(run, payloads[half:])
    return [
        vector.copy() if np.isfinite(vector).all() else DataError("The model has no finite embedding for this query.")
        for vector in vectors
    ]


def _as_exception(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


class Admission:
    """Bounds the number of searches and of image requests in progress, and the time of each."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self.pending = Counter[PendingKind]()

    @asynccontextmanager
    async def __call__(self, count: int = 1, *, kind: PendingKind = "searches") -> AsyncIterator[None]:
        """Count work in progress. Raise UnavailableError if there is too much of it, or if it takes too long."""
        if self.pending[kind] + count > self._settings.max_pending:
            self._metrics.refused.labels("queue_full").inc()
            raise OverloadedError
        self.pending[kind] += count
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
            self.pending[kind] -= count
            self._metrics.pending[kind].dec(count)
