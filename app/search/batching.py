"""Concurrent queries share forward passes, and identical ones share a single computation.

- `Flights`: callers that ask for the same key while it is being computed wait for the same task. When the last one has
  gone away (client closed, deadline), the task is cancelled.
- `Batcher`: one queue, one model thread. While a pass runs, arrivals gather and make the next batch. An idle service
  starts at once. Under load, those whom a pass has answered ask again within milliseconds: the next pass waits for
  them, a short while from the end of the last, and makes one batch of what would else be two that take turns.
- A batch that raises is halved until the culprit is alone: a bad item fails by itself. The same holds for an embedding
  that is not finite.
- A job whose caller is gone before its batch starts is dropped. `close` finishes what was accepted.
- A job that would wait longer than `max_queue_s`, by the pace of the last batches, is refused at once: under overload
  the model goes on with what it can finish in time, and the others hear soon that they should come back.

A `Lane` is what may share a batch: one backbone and one kind of query. N queries of a lane: list of N payloads ->
float32 (N, E).
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.core.metrics import Metrics
from app.core.problems import NotReady, Overloaded
from app.core.threads import compute
from dcar_core.util.errors import DataError

T = TypeVar("T")
Vector = NDArray[np.float32]

_SMOOTH = 0.2  # weight of the newest batch in the pace


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0


class Flights(Generic[T]):
    """Shares one computation among all who ask for the same key at the same time."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._flights

    async def run(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for the computation of `key`, beginning it with `start()` if none is under way."""
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.create_task(start()))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda task: self._landed(key, task))
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                self._landed(key, flight.task)
                flight.task.cancel()

    def _landed(self, key: Hashable, task: asyncio.Task[T]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]


@dataclass(frozen=True, slots=True)
class Lane:
    """Queries that may share a forward pass: equal `key`, same `run`."""

    key: Hashable
    run: Callable[[list[Any]], Vector | list[Vector]] = field(compare=False)


@dataclass(slots=True)
class _Job:
    lane: Lane
    payload: Any
    future: asyncio.Future[Vector]
    arrived: float
    cost: float  # seconds that it will take the model, as far as is known
    context: Any = None  # of the trace that it is part of


class Batcher:
    """Runs the queries of all lanes, batch after batch, in one thread that owns the model."""

    def __init__(
        self, *, max_batch: int, max_wait_s: float, max_queue_s: float = math.inf, metrics: Metrics | None = None
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {max_batch}")
        self._max_batch = max_batch
        self._max_wait = max_wait_s
        self._max_queue = max_queue_s
        self._metrics = metrics or Metrics()
        self._pace: dict[Hashable, float] = {}  # lane -> seconds a query, smoothed
        self._backlog = 0.0  # seconds that the jobs in the queue will take
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._together = asyncio.Event()
        self._closing = False
        self._ended = -math.inf  # the last pass
        self._company: dict[Hashable, int] = {}  # lane -> jobs that were in its last pass, or waited when it ended
        self._missing: tuple[Lane, int] | None = None  # jobs of a lane that the next pass waits for
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcar-model", initializer=compute)
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work; must be called with the event loop running."""
        self._worker = asyncio.create_task(self._work(), name="dcar-batcher")

    async def submit(self, lane: Lane, payload: Any) -> Vector:
        """Embed one query: float32 (E,). Raises what the lane raised for this very item."""
        self.require_room()
        return await self._enqueue(lane, payload)

    async def submit_all(self, lane: Lane, payloads: Sequence[Any]) -> list[Vector]:
        """Embed what one request needs together: admitted or refused as a whole, by what waits already.

        An idle service so takes it on, however many there are and however slow it was before.
        """
        self.require_room()
        return await asyncio.gather(*(self._enqueue(lane, payload) for payload in payloads))

    @property
    def full(self) -> bool:
        """Whether what waits already would keep another job too long."""
        return self._backlog > self._max_queue

    def require_room(self) -> None:
        """Nothing happens when another job would be taken on.

        Raises:
            NotReady: the service ends.
            Overloaded: what waits already would keep it too long.
        """
        if self._closing:
            raise NotReady("The service is shutting down.")
        if self.full:
            self._metrics.refused("queue_time")
            raise Overloaded(self._backlog)

    def _enqueue(self, lane: Lane, payload: Any) -> asyncio.Future[Vector]:
        cost = self._pace.get(lane.key, 0.0)
        future: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(lane, payload, future, time.monotonic(), cost, self._metrics.trace_context()))
        self._backlog += cost
        self._arrived.set()
        if self._missing is not None and self._missing[0] == lane:
            self._missing = lane, self._missing[1] - 1
            if self._missing[1] == 0:
                self._together.set()
        return future

    async def close(self) -> None:
        """Finish every accepted job, then let the thread go."""
        self._closing = True
        self._arrived.set()
        self._together.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while True:
            while self._jobs and self._jobs[0].future.done():  # its caller is gone
                self._backlog -= self._jobs.popleft().cost
            if not self._jobs:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._wait_for_company()
            await self._run(self._take())  # no name for it here: it would keep a replaced model until the next batch

    async def _wait_for_company(self) -> None:
        lane = self._jobs[0].lane
        missing = min(self._company.get(lane.key, 1), self._max_batch) - self._waiting(lane)
        left = max(self._jobs[0].arrived, self._ended) + self._max_wait - time.monotonic()
        if missing <= 0 or left <= 0 or self._closing:
            return
        self._together.clear()
        self._missing = lane, missing
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._together.wait(), left)
        self._missing = None

    def _waiting(self, lane: Lane) -> int:
        return sum(job.lane == lane and not job.future.done() for job in self._jobs)

    def _take(self) -> list[_Job]:
        """The oldest job and those that may join it, oldest first; the others keep their places."""
        batch: list[_Job] = []
        rest: deque[_Job] = deque()
        for job in self._jobs:
            if job.future.done():
                continue
            if len(batch) < self._max_batch and (not batch or job.lane == batch[0].lane):
                batch.append(job)
            else:
                rest.append(job)
        self._jobs = rest
        self._backlog = sum(job.cost for job in rest)
        return batch

    async def _run(self, batch: list[_Job]) -> None:
        if not batch:
            return
        payloads = [job.payload for job in batch]
        began = time.monotonic()
        outcomes: list[Vector | Exception]
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(
                self._thread, _forward, batch[0].lane.run, payloads
            )
        except Exception as error:  # the thread itself failed; each caller must hear of it
            outcomes = [error] * len(batch)
        self._ended = ended = time.monotonic()
        self._metrics.passed(batch, began, ended)
        pace, lane = (ended - began) / len(batch), batch[0].lane
        self._pace[lane.key] = _SMOOTH * pace + (1 - _SMOOTH) * self._pace.get(lane.key, pace)
        self._company[lane.key] = len(batch) + self._waiting(lane)
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.future.done():
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)


def _forward(run: Callable[[list[Any]], Vector | list[Vector]], payloads: list[Any]) -> list[Vector | Exception]:
    """One outcome per payload. Rows are copied, so that a cached one does not keep its whole batch alive."""
    try:
        vectors = run(payloads)  # [n, E]
        if len(vectors) != len(payloads):
            raise RuntimeError(f"{len(vectors)} embeddings for {len(payloads)} queries")
    except Exception as error:
        if len(payloads) == 1:
            return [error]
        half = len(payloads) // 2
        return _forward(run, payloads[:half]) + _forward(run, payloads[half:])
    return [
        vector.copy() if np.isfinite(vector).all() else DataError("The model finds no finite embedding for this query.")
        for vector in vectors
    ]
