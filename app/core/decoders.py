"""Decoding of images in worker processes, shared out between callers.

- Every worker decodes one image within its limits: see `dcar_core.images.workers`.
- Callers, and then their requests, take turns by the time of their images. One caller, however many images it sends,
  leaves `_SPARE` workers to the others.
- Most images share `MEMORY` each. A larger one gets the memory of the largest image; each caller can have one of these
  at a time, and all callers `_LARGE`.
"""

from collections.abc import Set
from dataclasses import replace
from typing import Any

from app.core.fair_queue import Turn
from app.core.threads import FairThreads
from dcar_core.images import ImageFormat
from dcar_core.images.workers import Convert, DecodeWorker, LargeImageError, Limits
from dcar_core.util.machine import available_cores

_SPARE = 2  # workers that one caller leaves to the others
_LARGE = 2  # large images at a time
MEMORY = 96 * 2**20  # of an image that shares the memory with others: a photo of 12 megapixels takes 48 MB
_LARGE_MEMORY = 64 * 2**20  # of a large one, beside four bytes for each of the most pixels


class Decoders:
    """Decode images in processes, in turns; each starts when it is first needed. max_pixels: of the largest image."""

    def __init__(self, max_pixels: int) -> None:
        share = min(4, available_cores())
        self.workers = [DecodeWorker() for _ in range(share + _SPARE)]
        self._idle = [*self.workers]
        self._threads = FairThreads(len(self.workers), "dcar-decode", share, self._has_memory)
        self._large_memory = _LARGE_MEMORY + 4 * max_pixels

    def start(self) -> None:
        """Start the worker of the first image."""
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
            return await self._threads.run_item("usual", self._decode, convert, data, limits)
        except LargeImageError:
            limits = replace(limits, memory=self._large_memory, expected=None)
            return await self._threads.run_item("large", self._decode, convert, data, limits)

    def _decode(self, convert: Convert, data: bytes, limits: Limits) -> Any:
        worker = self._idle.pop()
        try:
            return worker.run(convert, data, limits).result
        finally:
            self._idle.append(worker)

    def _has_memory(self, turn: Turn) -> bool:
        large = [other.caller for other in self._threads.turns.running if other.item == "large"]
        return turn.item != "large" or (len(large) < _LARGE and turn.caller not in large)
