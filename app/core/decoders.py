"""Decoding of images in worker processes, shared out between callers.

- Every worker decodes one image within its limits: see `dcar_core.images.workers`.
- Callers, and then their requests, take turns by the time of their images. One caller, however many images it sends,
  leaves `_SPARE` workers to the others.
- Most images share `MEMORY` each. A larger one gets the memory of the largest image; each caller can have one of these
  at a time, and all callers `_LARGE`.
"""

import asyncio
from collections.abc import Set
from contextlib import suppress
from dataclasses import replace
from typing import Any

from app.core.fair_queue import FairTurns, Turn
from app.core.threads import ComputeThreads
from dcar_core.images import ImageFormat
from dcar_core.images.workers import Convert, DecodeWorker, LargeImageError, Limits
from dcar_core.util.machine import available_cores

_SPARE = 2  # workers that one caller leaves to the others
_LARGE = 2  # large images at a time
MEMORY = 96 * 2**20  # of an image that shares the memory with others: a photo of 12 megapixels takes 48 MB
_LARGE_MEMORY = 64 * 2**20  # of a large one, beside four bytes for each of the most pixels


class Decoders:
    """Decode images in processes, in turns. max_pixels: of the largest image."""

    def __init__(self, max_pixels: int) -> None:
        share = min(4, available_cores())
        self._idle = [DecodeWorker() for _ in range(share + _SPARE)]
        self.workers = list(self._idle)
        self._threads = ComputeThreads(len(self._idle), "dcar-decode")
        self._large_memory = _LARGE_MEMORY + 4 * max_pixels
        self._turns = FairTurns(len(self._idle), share, self._has_memory)

    def start(self) -> None:
        """Start one worker; images start further ones as they are needed, one ahead."""
        self._threads.submit(self._idle[-1].start)

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()

    async def run(self, convert: Convert, data: bytes, max_pixels: int, formats: Set[ImageFormat]) -> Any:
        """Return what `convert` makes of an image file, when its turn has come. Raise ImageError if it has none."""
        limits = Limits(MEMORY, max_pixels=max_pixels, formats=formats, expected=MEMORY)
        try:
            return await self._run_in_turn(convert, data, limits)
        except LargeImageError:
            limits = replace(limits, memory=self._large_memory, expected=None)
            return await self._run_in_turn(convert, data, limits)

    async def _run_in_turn(self, convert: Convert, data: bytes, limits: Limits) -> Any:
        loop, turn = asyncio.get_running_loop(), await self._turns.begin(limits.expected is None)
        worker = self._idle.pop()
        work = self._threads.submit(worker.run, convert, data, limits)
        work.add_done_callback(lambda _: self._end_soon(loop, turn, worker))  # a caller that gives up does not stop it
        if self._idle and not self._idle[-1].is_started:
            self._threads.submit(self._idle[-1].start)  # the next image need not wait for it
        return (await asyncio.wrap_future(work)).result

    def _has_memory(self, turn: Turn) -> bool:
        large = [other.caller for other in self._turns.running if other.item]
        return not turn.item or (len(large) < _LARGE and turn.caller not in large)

    def _end_soon(self, loop: asyncio.AbstractEventLoop, turn: Turn, worker: DecodeWorker) -> None:
        def end() -> None:
            self._idle.append(worker)
            self._turns.end(turn)

        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end)
