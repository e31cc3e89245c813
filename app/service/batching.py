"""Micro-batching: concurrent queries share forward passes, and identical queries share one computation.

- `SharedTasks`: callers with the same key wait for one task. It is cancelled when its last waiter leaves.
- `Batcher`: one queue and one model thread. Queries that arrive during a forward pass form the next batch. An idle
  batcher starts at once; under load it waits a few milliseconds for the callers of the last batch to return.
- A batch that raises is halved until the faulty query is alone, so one bad query fails by itself.
- Cancelled work is skipped. `close` finishes the accepted work.
- A query whose expected wait is longer than `max_queue_s` is refused at once, unless only a few wait for a slow model.
  Those of a batch, and an image that is decoded first, are accepted or refused `together`, by the first.
- Callers take turns: the wait of a query is that for the work which has its turn before, not for all that waits.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from app.core.metrics import Metrics, PendingKind
from app.core.rate_limit import current_caller
from app.core.settings import Settings
from app.core.supervision import supervise
from app.core.threads import ComputeThreads
from app.search.errors import UnavailableError
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError

T = TypeVar("T")

_FEW = 8  # queries that may wait for the model, however slow it is
_STUCK_S = 30.0  # of a forward pass; one that may load a model has a thread of its own
_BUSY = "The service is busy."
_NEWEST_WEIGHT = 0.2  # of the last batch in the smoothed sizes and seconds
_PRIOR = 0.01  # squared share by which sizes must differ before their times say more than the assumption below


_accepted = ContextVar[list[bool] | None]("accepted", default=None)  # not empty: one of the queries together is


@contextmanager
def together() -> Iterator[list[bool]]:
    """Accept or refuse all queries of the tasks begun within as one. The list is empty until they are accepted."""
    accepted = list[bool]() if (outer := _accepted.get()) is None else outer
    token = _accepted.set(accepted)
    try:
        yield accepted
    finally:
        _accepted.reset(token)


class SharedTasks(Generic[T]):
    """Share one computation among all callers that use the same key at the same time."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[T]] = {}
        self._waiters = Counter[asyncio.Task[T]]()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tasks

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


class PassTime:
    """Expected seconds of a forward pass: a fixed part, and a part per query, fitted to the passes so far.

    While all passes were of one size, half of their time is taken as fixed. So a model with a high fixed cost is given
    larger batches, whose times then tell, instead of refusing what a batch would hold.
    """

    def __init__(self) -> None:
        self._means: tuple[float, ...] = ()  # smoothed size, seconds, size squared, size times seconds

    def add(self, size: int, seconds: float) -> None:
        newest = (size, seconds, size * size, size * seconds)
        pairs = zip(self._means or newest, newest, strict=True)
        self._means = tuple(old + _NEWEST_WEIGHT * (new - old) for old, new in pairs)

    def of(self, count: int, passes: int) -> float:
        """Return the expected seconds of `count` queries, with the fixed part of so many passes."""
        if not self._means:
            return 0.0
        size, seconds, squared, product = self._means
        prior = _PRIOR * size * size
        slope = (product - size * seconds + prior * seconds / (2 * size)) / (squared - size * size + prior)
        slope = min(max(slope, 0.0), seconds / size)
        return slope * count + (seconds - slope * size) * passes


class BatchGroup(NamedTuple):
    """Queries that may share a forward pass: `run` takes N payloads and returns float32 (N, E)."""

    key: Hashable
    run: Callable[[list[Any]], Floats | list[Floats]]


@dataclass(eq=False, slots=True)
class _Job:
    group: BatchGroup
    payload: Any
    future: asyncio.Future[Floats]
    arrived: float
    context: Any  # trace context of the request
    caller: str


class Batcher:
    """Run the queries of all groups, batch after batch, in the one thread that owns the model.

    Args:
        max_batch: queries in one forward pass.
        max_wait_s: longest wait for more queries, under load only.
        max_queue_s: longest expected wait for the model and the index; queries beyond it are refused.
        later_wait: returns the expected seconds of the calls in the threads that follow.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_wait_s: float,
        max_queue_s: float = math.inf,
        metrics: Metrics | None = None,
        later_wait: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._later_wait = later_wait
        self._max_batch = max_batch
        self._max_wait = max_wait_s
        self._max_queue = max_queue_s
        self._metrics = metrics or Metrics()
        self._pass_times: dict[BatchGroup, PassTime] = {}
        self._jobs: list[_Job] = []
        self._counts = Counter[BatchGroup]()  # of the jobs in the queue
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

        They are accepted or refused together, by the work that waits already: see `require_room`.
        """
        self.require_room()
        context = self._metrics.trace_context()
        future_of, now = asyncio.get_running_loop().create_future, time.monotonic()
        caller = current_caller.get()
        jobs = [_Job(group, payload, future_of(), now, context, caller) for payload in payloads]
        self._jobs += jobs
        self._counts[group] += len(jobs)
        self._has_arrived.set()
        return asyncio.gather(*(job.future for job in jobs))

    @property
    def fault(self) -> str | None:
        """Why queries are not answered; None if they are."""
        if self._worker is None or self._worker.done():
            return "The queue of the model has stopped."
        if time.monotonic() - self._pass_began > _STUCK_S:
            return f"The model has not answered for {_STUCK_S:g} s."
        return None

    def require_room(self, earlier_wait: float = 0.0) -> None:
        """Raise UnavailableError if a new query is not accepted: it would wait too long, or the service shuts down.

        earlier_wait: expected seconds until the query is in the queue.
        """
        if self._is_closing:
            raise UnavailableError("The service is shutting down.")
        accepted = _accepted.get()
        if not accepted and (backlog := earlier_wait + self._expected_wait()) > self._max_queue:
            self._metrics.refused.labels("queue_time").inc()
            raise UnavailableError(_BUSY, backlog)
        if accepted is not None:
            accepted.append(True)

    def _expected_wait(self) -> float:
        """Return the expected seconds of all work in the queues or, if that is much, of what has its turn before."""
        later = self._later_wait()
        wait = later + self._seconds(self._counts)
        return wait if wait <= self._max_queue / 2 else later + self._seconds(self._counts_before())

    def _seconds(self, counts: Counter[BatchGroup]) -> float:
        """Return the expected seconds of queries, without the fixed part of a pass that has room.

        A few queries for the model do not count, however slow it is.
        """
        waiting = ((self._pass_times.get(group), count) for group, count in counts.items() if counts.total() >= _FEW)
        return sum(each.of(count, count // self._max_batch) for each, count in waiting if each)

    def _counts_before(self) -> Counter[BatchGroup]:
        """Return the numbers of queries that have their turn before a new one of this caller."""
        caller, turns, before = current_caller.get(), Counter[str](), Counter[BatchGroup]()
        last = sum(job.caller == caller for job in self._jobs)
        for job in self._jobs:
            before[job.group] += turns[job.caller] <= last
            turns[job.caller] += 1
        return before

    async def close(self) -> None:
        """Finish the accepted work, then end the thread."""
        self._is_closing = True
        self._has_arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while True:
            self._keep([job for job in self._jobs if not job.future.done()])  # others were cancelled
            if self._jobs:
                await self._wait_for_more()
                await self._run(self._next_batch())  # not bound to a name here: it would keep a replaced model alive
            elif self._is_closing:
                return
            else:
                self._has_arrived.clear()
                await self._has_arrived.wait()

    def _keep(self, jobs: list[_Job]) -> None:
        self._jobs, self._counts = jobs, Counter(job.group for job in jobs)

    async def _wait_for_more(self) -> None:
        """Wait, for `max_wait_s` at most, until the batch is as large as the last one of its group."""
        group = self._jobs[0].group
        wanted = min(self._expected_size.get(group, 1), self._max_batch)
        remaining = max(self._jobs[0].arrived, self._last_end) + self._max_wait - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0, remaining)):
                while self._waiting(group) < wanted and remaining > 0 and not self._is_closing:
                    self._has_arrived.clear()
                    await self._has_arrived.wait()

    def _waiting(self, group: BatchGroup) -> int:
        return sum(job.group == group and not job.future.done() for job in self._jobs)

    def _next_batch(self) -> list[_Job]:
        """Take the first job, and jobs of its group: one of each caller, oldest first, then a second one of each, ...

        The others keep their places, except that those of the first job's caller go to the end.
        """
        jobs = [job for job in self._jobs if not job.future.done()]
        turns, ranked = Counter[str](), list[tuple[int, _Job]]()
        for job in jobs:
            if job.group == jobs[0].group:
                ranked.append((turns[job.caller], job))
                turns[job.caller] += 1
        batch = [job for _, job in sorted(ranked, key=itemgetter(0))[: self._max_batch]]
        chosen = {*batch}
        rest = [job for job in jobs if job not in chosen]
        self._keep(sorted(rest, key=lambda job: job.caller == jobs[0].caller))
        return batch

    async def _run(self, batch: list[_Job]) -> None:
        if not batch:
            return
        group = batch[0].group
        self._pass_began = started = time.monotonic()
        try:
            outcomes = await self._thread.run(_forward, group.run, [job.payload for job in batch])
        finally:
            self._pass_began = math.inf
        self._last_end = time.monotonic()
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.future.done():
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
        self._metrics.forward_pass([(job.arrived, job.context) for job in batch], started, self._last_end)
        self._pass_times.setdefault(group, PassTime()).add(len(batch), self._last_end - started)
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
        self.pending = Counter[PendingKind]()
        self._pending_of = Counter[tuple[PendingKind, str]]()  # of each caller

    @asynccontextmanager
    async def __call__(self, count: int = 1, *, kind: PendingKind = "searches") -> AsyncIterator[None]:
        """Count work in progress. Raise UnavailableError if there is too much of it, or if it takes too long."""
        most, own = self._settings.max_pending, (kind, current_caller.get())
        share = max(most // 2, min(most, self._settings.max_queries))  # of one caller
        if self.pending[kind] + count > most or self._pending_of[own] + count > share:
            self._metrics.refused.labels("queue_full").inc()
            raise UnavailableError(_BUSY, retry_after_s=1)
        self.pending[kind] += count
        self._pending_of[own] += count
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
            self._pending_of[own] -= count
            if not self._pending_of[own]:
                del self._pending_of[own]
            self._metrics.pending[kind].dec(count)
