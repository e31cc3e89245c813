"""Decoding of images in worker processes, shared out between callers.

- Every worker decodes one image within its limits: see `dcar_core.images.workers`.
- Whose turn it is: the image of the caller, and then of the request, whose images have taken the least time while some
  of them were waiting. One caller, however many images it sends, leaves `_SPARE` workers to the others.
- A caller's next request is expected to wait for its requests in progress, by the mean seconds of its last images.
- Most images share `_MEMORY` each. A larger one gets the memory of the largest image; each caller can have one of these
  at a time, and all callers `_LARGE`.
"""

import asyncio
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from app.core.logs import request_id
from app.core.rate_limit import current_caller
from app.core.threads import ComputeThreads
from dcar_core.images import ImageFormat
from dcar_core.images.workers import Convert, DecodeWorker, LargeImageError, Limits
from dcar_core.util.machine import available_cores

_NEWEST_WEIGHT = 0.1  # of a caller's last image in the mean of their seconds
_MEANS = 1000  # callers whose means are kept
_FEW = 8  # requests of a caller that may wait, however long its images take
_SPARE = 2  # workers that one caller leaves to the others
_LARGE = 2  # large images at a time
_MEMORY = 96 * 2**20  # of an image that shares the memory with others: a photo of 12 megapixels takes 48 MB
_LARGE_MEMORY = 64 * 2**20  # of a large one, beside four bytes for each of the most pixels


@dataclass(eq=False, slots=True)
class _Turn:
    """The place of an image in the queue. worker: set when its turn comes."""

    is_large: bool
    worker: asyncio.Future[DecodeWorker]
    caller: str = field(default_factory=current_caller.get)
    request: str | None = field(default_factory=request_id.get)
    started: float = 0.0


class Decoders:
    """Decode images in processes, in turns. max_pixels: of the largest image."""

    def __init__(self, max_pixels: int) -> None:
        self._share = min(4, available_cores())
        self._workers = [DecodeWorker() for _ in range(self._share + _SPARE)]
        self._idle = list(self._workers)
        self._threads = ComputeThreads(len(self._workers), "dcar-decode")
        self._large_memory = _LARGE_MEMORY + 4 * max_pixels
        self._waiting: list[_Turn] = []
        self._running: list[_Turn] = []
        self._is_closed = False
        self._spent: dict[tuple[str, str | None], float] = {}  # seconds of (caller, request), and of (caller, None)
        self._mean_s: dict[str, float] = {}  # by caller, the one with the newest image last

    def start(self) -> None:
        """Start one worker; images start further ones as they are needed, one ahead."""
        self._threads.submit(self._idle[-1].start)

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def expected_wait(self) -> float:
        """Return the seconds until this caller's next request would have its turn; 0 while few are in progress."""
        caller = current_caller.get()
        requests = {turn.request for turn in (*self._waiting, *self._running) if turn.caller == caller}
        return len(requests) * self._mean_s.get(caller, 0.0) / self._share if len(requests) >= _FEW else 0.0

    async def run(self, convert: Convert, data: bytes, max_pixels: int, formats: Set[ImageFormat]) -> Any:
        """Return what `convert` makes of an image file, when its turn has come. Raise ImageError if it has none."""
        limits = Limits(_MEMORY, max_pixels=max_pixels, formats=formats, expected=_MEMORY)
        try:
            return await self._run_in_turn(convert, data, limits)
        except LargeImageError:
            limits = replace(limits, memory=self._large_memory, expected=None)
            return await self._run_in_turn(convert, data, limits)

    async def _run_in_turn(self, convert: Convert, data: bytes, limits: Limits) -> Any:
        loop = asyncio.get_running_loop()
        turn = _Turn(limits.expected is None, loop.create_future())
        self._waiting.append(turn)
        self._start_next()
        try:
            worker = await turn.worker
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:
                self._end(turn)
            raise
        work = self._threads.submit(worker.run, convert, data, limits)
        work.add_done_callback(lambda _: self._end_soon(loop, turn))  # a caller that gives up does not stop it
        return (await asyncio.wrap_future(work)).result

    def _start_next(self) -> None:
        if self._is_closed:
            return
        while self._idle and (ready := list(filter(self._may_start, self._waiting))):
            turn = min(ready, key=self._spent_by)
            self._waiting.remove(turn)
            self._running.append(turn)
            turn.started = monotonic()
            turn.worker.set_result(self._idle.pop())
        if self._running and self._idle and not self._idle[-1].is_started:
            self._threads.submit(self._idle[-1].start)  # the next image need not wait for it

    def _spent_by(self, turn: _Turn) -> tuple[float, float]:
        return self._spent.get((turn.caller, None), 0.0), self._spent.get((turn.caller, turn.request), 0.0)

    def _may_start(self, turn: _Turn) -> bool:
        if turn.worker.done():  # its caller has given up
            return False
        own = [other for other in self._running if other.caller == turn.caller]
        large = [other for other in self._running if other.is_large]
        if turn.is_large and (len(large) >= _LARGE or any(other in own for other in large)):
            return False
        return len(own) < self._share

    def _end_soon(self, loop: asyncio.AbstractEventLoop, turn: _Turn) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._end, turn)

    def _end(self, turn: _Turn) -> None:
        self._running.remove(turn)
        self._idle.append(turn.worker.result())
        left = [*self._waiting, *self._running, turn]
        keys = {(other.caller, request) for other in left for request in (other.request, None)}
        self._spent = {key: self._spent.get(key, 0.0) for key in keys}
        took = monotonic() - turn.started
        self._spent[turn.caller, turn.request] += took
        self._spent[turn.caller, None] += took
        mean = self._mean_s.pop(turn.caller, 0.0)
        self._mean_s[turn.caller] = mean + _NEWEST_WEIGHT * (took - mean)
        if len(self._mean_s) > _MEANS:
            del self._mean_s[next(iter(self._mean_s))]
        self._start_next()
