"""The work of all requests: one model thread with a queue, a cache of embeddings, and threads for what blocks.

    text  -> cache or model thread (batched)
    image -> hash -> cache, or decoding process -> model thread (batched)

- The event loop only waits. Threads of searches are shared out between callers. Filters have one of their own, so an
  expensive one delays no search without a filter. Images of the gallery have theirs: it may be a slow disk or another
  machine, and no search waits for it.
- Encoders that share a backbone share its forward passes: see `dcar_core.encoder.encoder`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import partial
from typing import Any, Literal, TypeVar

from app.core.decoders import Decoders
from app.core.fair_queue import FairTurns
from app.core.metrics import Metrics, Stage
from app.core.settings import Settings
from app.core.threads import ComputeThreads, FairThreads, run_in_new_thread
from app.search.errors import UnavailableError
from app.search.pair_scoring import Compute
from app.search.query import Crop
from app.search.snapshots import Snapshot
from app.service.batching import Batcher, BatchGroup, SharedTasks
from app.service.embedding_cache import EmbeddingCache, cache_key, rounded
from dcar_core.encoder.encoder import ImageRow, TextRow, encode_image_rows, encode_text_rows
from dcar_core.images import ALL_FORMATS, MAX_PIXELS, ImageFormat
from dcar_core.images.workers import Convert
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, ImageError, ImageFault
from dcar_core.util.machine import available_cores

T = TypeVar("T")
Place = Literal["search", "filter"]  # kinds of blocking work

_IMAGE_THREADS = 8
_QUICK_BYTES = 256 * 2**10  # of a file that is hashed in the event loop, in less time than a thread takes to begin


class SharedCompute:
    """What all searches share. One per process."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.cache = EmbeddingCache(settings, metrics)
        self.metrics = metrics
        self.computations: SharedTasks[tuple[Floats, bool]] = SharedTasks()
        threads = min(4, available_cores())
        self._threads = {
            "search": FairThreads(threads, "dcar-search", ahead=threads),
            "filter": FairThreads(1, "dcar-filter"),
        }
        self.batcher = Batcher(max_batch=settings.batch_size, max_wait_s=settings.batch_wait_ms / 1000, metrics=metrics)
        self.image_threads = ComputeThreads(_IMAGE_THREADS, "dcar-image")
        self.chunk_turn = FairTurns(1, 1).turn  # held while one chunk of many images is in the model's queue
        self._pixel_threads = ComputeThreads(threads, "dcar-pixels")  # hash files, and resize what PyTorch is to resize
        self._decoders = Decoders(settings.max_pixels)
        self._query_limits = settings.max_pixels, frozenset(map(ImageFormat, settings.image_formats))

    def start(self) -> None:
        self.batcher.start()
        self._decoders.start()

    async def close(self) -> None:
        """Finish the accepted work of the model, then release threads and connections. Images are given up."""
        await self.batcher.close()
        await self.cache.close()
        self._threads["search"].shutdown()
        self._decoders.close()
        for threads in (self._threads["filter"], self._pixel_threads, self.image_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def texts(self, snapshot: Snapshot, texts: Sequence[str]) -> list[tuple[Floats, bool]]:
        """Return the vectors (E,) of normalized texts, each with True if it was cached."""
        if len(texts) == 1:  # the usual case, without the cost of gather
            return [await self.text(snapshot, texts[0])]
        return await asyncio.gather(*(self.text(snapshot, text) for text in texts))

    async def text(self, snapshot: Snapshot, text: str) -> tuple[Floats, bool]:
        """Return the vector (E,) of a normalized text, and True if it was cached."""
        row = TextRow(snapshot.encoder, text)

        async def embed() -> list[Floats]:
            return await self.batcher.submit(_group(row, encode_text_rows), [row])

        key = cache_key(row.encoder.fingerprint, "text", text.encode())
        return await self._cached(key, row.encoder.dim, embed)

    async def image(self, snapshot: Snapshot, data: bytes, crop: Crop | None = None) -> tuple[Floats, bool]:
        """Return the vector (E,) of an image file, or of a part of it, and True if it was cached. Raise ImageError."""
        encoder = snapshot.encoder

        async def embed() -> list[Floats]:
            pixels = await self._decode_pixels(data, snapshot.preprocess, crop, is_query=True)
            row = ImageRow(encoder, pixels)
            return await self.batcher.submit(_group(row, encode_image_rows), [row])

        make_key = partial(cache_key, encoder.fingerprint, "image", data)
        key = make_key() if len(data) <= _QUICK_BYTES else await self._pixel_threads.run(make_key)
        key += "" if crop is None else f":{crop.x},{crop.y},{crop.width},{crop.height}"
        return await self._cached(key, encoder.dim, embed)

    async def decode(self, data: bytes, convert: Convert, *, is_query: bool = False) -> Any:
        """Return what `convert` makes of an image file in a decoding process, or raise ImageError.

        Images of the gallery have the limits of the index job. Raise UnavailableError if the process was killed.
        """
        limits = self._query_limits if is_query else (MAX_PIXELS, ALL_FORMATS)
        try:
            with self.metrics.timed("decode"):
                return await self._decoders.run(convert, data, *limits)
        except ImageError as error:
            if error.fault != ImageFault.UNREADABLE:
                raise
            raise UnavailableError(f"The image was not decoded: {error}", retry_after_s=1) from None

    async def _decode_pixels(
        self, data: bytes, preprocess: Preprocess, crop: Crop | None = None, *, is_query: bool = False
    ) -> Pixels:
        decoded: Pixels = await self.decode(
            data, preprocess.decoder(None if crop is None else crop.box), is_query=is_query
        )
        return decoded if preprocess.resizer == "pillow" else await self._pixel_threads.run(preprocess.finish, decoded)

    async def gallery_pixels(self, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Pixels]:
        """Return the images that are still in the gallery, by row and in their order."""

        async def read(row: int) -> Pixels | None:
            try:
                data = await self.image_threads.run(snapshot.artifact.image_bytes, row)
                return await self._decode_pixels(data, snapshot.encoder.preprocess)
            except (ArtifactError, ImageError, OSError):
                return None

        images = zip(rows, await asyncio.gather(*map(read, rows)), strict=True)
        return {row: pixels for row, pixels in images if pixels is not None}

    async def run(self, place: Place, call: Callable[..., T], *args: Any) -> T:
        """Return what a call returns that blocks."""
        return await self._threads[place].run(call, *args)

    async def run_beside_model(self, call: Callable[[Compute], T]) -> T:
        """Return what a call returns that has the model work more than once, in a thread of its own."""
        compute = _WaitingCompute(self)
        try:
            return await run_in_new_thread(copy_context().run, call, compute)
        finally:
            compute.cancel()

    async def _cached(self, key: str, dim: int, embed: Callable[[], Awaitable[list[Floats]]]) -> tuple[Floats, bool]:
        """Return the vector of `key`, and True if it was cached. Equal queries in progress share one computation."""
        vector = self.cache.peek(key)
        if vector is not None:
            return vector, True

        async def find_or_embed() -> tuple[Floats, bool]:
            with self.metrics.timed("cache"):
                vector = await self.cache.get(key, dim)
            if vector is not None:
                return vector, True
            with self.metrics.span("encode"):
                (vector,) = await embed()
            self.cache.put(key, vector)
            return rounded(vector), False

        return await self.computations.run(key, find_or_embed)


def _group(row: TextRow | ImageRow, encode: Callable[[Any], Floats]) -> BatchGroup:
    return BatchGroup(id(row.encoder.runtime), encode)  # encoders on one backbone share its runtime


_CALLS = BatchGroup("calls", lambda payloads: [call(*args) for call, args in payloads])


class _WaitingCompute(Compute):
    """The `Compute` of a thread, which waits for the model's queue. Once cancelled, it raises CancelledError."""

    def __init__(self, shared: SharedCompute) -> None:
        self._shared, self._loop, self._is_cancelled = shared, asyncio.get_running_loop(), False
        self._waiting: asyncio.Task[Any] | None = None

    def timed(self, stage: Stage) -> AbstractContextManager[None]:
        return self._shared.metrics.timed(stage)

    def model(self, call: Callable[..., T], *args: Any) -> T:
        return self._wait(self._submit(call, args))

    def gallery_pixels(self, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Pixels]:
        return self._wait(self._shared.gallery_pixels(snapshot, rows))

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def _submit(self, call: Callable[..., T], args: Sequence[Any]) -> T:
        async with self._shared.chunk_turn():
            (result,) = await self._shared.batcher.submit(_CALLS, [(call, args)])
        return result  # type: ignore[return-value]

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        async def cancellable() -> T:
            if self._is_cancelled:
                work.close()
                raise asyncio.CancelledError
            self._waiting = asyncio.current_task()
            return await work

        return asyncio.run_coroutine_threadsafe(cancellable(), self._loop).result()
