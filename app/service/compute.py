"""The work of all requests: one model thread with a queue, a cache of embeddings, and threads for what blocks.

    text  -> cache or model thread (batched)
    image -> hash -> cache, or decoding process -> model thread (batched)

- The event loop only waits. Filters have one thread, shared out between callers, so an expensive one delays no search
  without a filter. Images of the gallery have their own threads: it may be a slow disk or another machine, and no
  search waits for it.
- Encoders that share a backbone share its forward passes: see `dcar_core.serving.multi_encoder_batch`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from app.core.decoders import Decoders
from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.threads import ComputeThreads, FairThread, run_in_new_thread
from app.search.compute import Place
from app.search.errors import UnavailableError
from app.search.query import Crop
from app.search.snapshots import Snapshot
from app.service.batching import Batcher, BatchGroup, SharedTasks, together
from app.service.embedding_cache import MemoryCache, cache_key, rounded
from dcar_core.images import ALL_FORMATS, MAX_PIXELS, ImageFormat
from dcar_core.images.workers import Convert
from dcar_core.model.preprocess import Preprocess, decode_part
from dcar_core.serving.encoder import Encoder
from dcar_core.serving.multi_encoder_batch import ImageRow, TextRow, encode_image_rows, encode_text_rows
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, ImageError, ImageFault
from dcar_core.util.machine import available_cores

T = TypeVar("T")

_IMAGE_THREADS = 8
_MAX_HASHED_INLINE = 64 * 2**10  # bytes that the event loop hashes itself, in about 0.1 ms


class SharedCompute:
    """The `Compute` of all searches. One per process."""

    def __init__(self, settings: Settings, cache: MemoryCache, metrics: Metrics) -> None:
        self._cache = cache
        self._metrics = metrics
        self._computations: SharedTasks[tuple[Floats, bool]] = SharedTasks()
        self._batcher = Batcher(
            max_batch=settings.batch_size,
            max_wait_s=settings.batch_wait_ms / 1000,
            max_queue_s=settings.max_queue_ms / 1000,
            metrics=metrics,
        )
        self.require_room = self._batcher.require_room
        threads = min(4, available_cores())
        self._search_threads = ComputeThreads(threads, "dcar-search")
        self._filter_thread = FairThread("dcar-filter")
        self.image_threads = ThreadPoolExecutor(_IMAGE_THREADS, "dcar-image")
        self.chunk_turn = asyncio.Semaphore(1)  # together, concurrent requests have one chunk in the model's queue
        self.timed = metrics.timed
        self._pixel_threads = ComputeThreads(threads, "dcar-pixels")  # hash files, and resize what PyTorch is to resize
        self._decoders = Decoders(settings.max_pixels)
        self._max_pixels = settings.max_pixels
        self._formats = frozenset(map(ImageFormat, settings.image_formats))

    def start(self) -> None:
        self._batcher.start()
        self._decoders.start()

    async def close(self) -> None:
        """Finish the accepted work of the model, then release threads and connections. Images are given up."""
        await self._batcher.close()
        await self._cache.close()
        self._search_threads.shutdown()
        self._filter_thread.shutdown(cancel_futures=True)
        self._decoders.close()
        for threads in (self._pixel_threads, self.image_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def fault(self) -> str | None:
        """Why queries are not encoded; None if they are."""
        return self._batcher.fault

    async def query_texts(self, snapshot: Snapshot, texts: Sequence[str]) -> list[tuple[Floats, bool]]:
        """Return the vectors (E,) of normalized texts, in one forward pass, each with True if it was cached."""
        if len(texts) == 1:  # the usual case, without the cost of gather
            return [await self.text(snapshot, texts[0])]
        return await asyncio.gather(*(self.text(snapshot, text) for text in texts))

    async def text(self, snapshot: Snapshot, text: str) -> tuple[Floats, bool]:
        """Return the vector (E,) of a normalized text, and True if it was cached."""
        encoder = snapshot.encoder

        def embed() -> asyncio.Future[Floats]:
            return self._batcher.begin(_group(encoder, "text"), TextRow(encoder, text))

        key = cache_key(encoder.fingerprint, "text", text.encode())
        return await self._cached(key, encoder.dim, embed, at_once=not self._cache.is_shared)

    async def image(self, snapshot: Snapshot, data: bytes, crop: Crop | None = None) -> tuple[Floats, bool]:
        """Return the vector (E,) of an image file, or of a part of it, and True if it was cached.

        Raises:
            ImageError: the file cannot be read; the message is the reason.
        """
        encoder = snapshot.encoder

        async def embed() -> Floats:
            pixels = await self._decode_pixels(data, snapshot.preprocess, crop, is_query=True)
            (vector,) = await self.pixels(snapshot, [pixels])
            return vector

        key = await self._image_key(encoder.fingerprint, data)
        key += "" if crop is None else f":{crop.x:g},{crop.y:g},{crop.width:g},{crop.height:g}"
        return await self._cached(key, encoder.dim, embed)

    async def texts(self, snapshot: Snapshot, texts: Sequence[str]) -> list[Floats]:
        """Return the vectors (E,) of normalized texts. Not cached."""
        rows = [TextRow(snapshot.encoder, each) for each in texts]
        return await self._batcher.submit_all(_group(snapshot.encoder, "text"), rows)

    async def weighted_text(self, snapshot: Snapshot, text: str, factors: Floats) -> Floats:
        """Return the vectors (C, E) of a text under C weightings of its tokens, factors (C, n). Not cached."""
        rows = [TextRow(snapshot.encoder, text, each) for each in factors]
        return np.stack(await self._batcher.submit_all(_group(snapshot.encoder, "text"), rows))

    async def pixels(self, snapshot: Snapshot, images: Sequence[Pixels]) -> list[Floats]:
        """Return the vectors (E,) of decoded images. Not cached."""
        rows = [ImageRow(snapshot.encoder, each) for each in images]
        return await self._batcher.submit_all(_group(snapshot.encoder, "image"), rows)

    async def decode(self, data: bytes, convert: Convert, *, is_query: bool = False) -> Any:
        """Return what `convert` makes of an image file in a decoding process.

        Args:
            is_query: apply the limits of query images; images of the gallery have those of the index job.

        Raises:
            ImageError: the file cannot be read.
            UnavailableError: the decoding process was killed.
        """
        limits = (self._max_pixels, self._formats) if is_query else (MAX_PIXELS, ALL_FORMATS)
        try:
            with self._metrics.timed("decode"):
                return await self._decoders.run(convert, data, *limits)
        except ImageError as error:
            if error.fault != ImageFault.UNREADABLE:
                raise
            raise UnavailableError(f"The image was not decoded: {error}", retry_after_s=1) from None

    async def _decode_pixels(
        self, data: bytes, preprocess: Preprocess, crop: Crop | None = None, *, is_query: bool = False
    ) -> Pixels:
        convert: Convert = preprocess.decode
        if crop is not None:
            convert = partial(decode_part, preprocess=preprocess, box=crop.box)
        decoded: Pixels = await self.decode(data, convert, is_query=is_query)
        return decoded if preprocess.resizer == "pillow" else await self._pixel_threads.run(preprocess.finish, decoded)

    async def gallery_pixels(self, snapshot: Snapshot, rows: Sequence[int]) -> dict[int, Pixels]:
        """Return the images that are still in the gallery, by row and in their order."""

        async def read(row: int) -> Pixels | None:
            loop = asyncio.get_running_loop()
            try:
                data = await loop.run_in_executor(self.image_threads, snapshot.artifact.image_bytes, row)
                return await self._decode_pixels(data, snapshot.encoder.preprocess)
            except (ArtifactError, ImageError, OSError):
                return None

        images = zip(rows, await asyncio.gather(*map(read, rows)), strict=True)
        return {row: pixels for row, pixels in images if pixels is not None}

    async def run(self, place: Place, call: Callable[..., T], *args: Any) -> T:
        """Return what a call returns that blocks; one that loads a model gets a thread of its own."""
        match place:
            case "search":
                return await self._search_threads.run(call, *args)
            case "filter":
                return await self._filter_thread.run(call, *args)
            case "load":
                return await run_in_new_thread(call, *args)
            case "model":
                result: Any = await self._batcher.submit(_CALLS, (call, args))
                return result  # type: ignore[no-any-return]

    async def _image_key(self, fingerprint: str, data: bytes) -> str:
        if len(data) <= _MAX_HASHED_INLINE:
            return cache_key(fingerprint, "image", data)
        return await self._pixel_threads.run(cache_key, fingerprint, "image", data)

    async def _cached(
        self, key: str, dim: int, embed: Callable[[], Awaitable[Floats]], *, at_once: bool = False
    ) -> tuple[Floats, bool]:
        """Return the vector of `key`, and True if it was cached. Equal queries in progress share one computation.

        Args:
            at_once: call `embed` before anything else runs, so that other requests find its query in the queue.
        """
        vector = self._cache.peek(key)
        if vector is not None:
            return vector, True
        begun = embed() if at_once and key not in self._computations else None

        async def find_or_embed() -> tuple[Floats, bool]:
            with self._metrics.timed("cache"):
                vector = await self._cache.get(key, dim)
            if vector is not None:
                return vector, True
            with together():
                if begun is None:
                    self._batcher.require_room()  # before an image is decoded
                vector = await (begun or embed())
            self._cache.put(key, vector)
            return rounded(vector), False

        return await self._computations.run(key, find_or_embed)


def _group(encoder: Encoder, kind: Literal["text", "image"]) -> BatchGroup:
    key = id(encoder.runtime), kind  # encoders on one backbone share its runtime
    return BatchGroup(key, encode_text_rows if kind == "text" else encode_image_rows)


_CALLS = BatchGroup("calls", lambda payloads: [call(*args) for call, args in payloads])
