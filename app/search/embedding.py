"""Whatever a query consists of, as vectors of one encoder.

    text  ------------------------> cache? -> model thread (batched)
    image -> hash --> cache? -> decode in a pool -> model thread (batched)

- The event loop only waits: decoding and the model have their threads.
- Encoders that share a backbone share its forward passes too, whatever domain a query is for: see
  `dcar_core.serving.multi_adapter_batch`.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.threads import compute
from app.search.batching import Batcher, Flights, Lane, Vector
from app.search.embedding_cache import VectorCache, cache_key, rounded
from app.search.snapshots import Snapshot
from dcar_core.images import Container, inspect
from dcar_core.util.arrays import Pixels
from dcar_core.util.cpu_features import available_cores

if TYPE_CHECKING:  # torch takes seconds
    from dcar_core.model.preprocess import Preprocess
    from dcar_core.serving.encoder import Encoder

T = TypeVar("T")

_LARGE = 2**23  # pixels held; pictures beyond are decoded one at a time, and no other waits for them
_HASHED_AT_ONCE = 64 * 2**10  # bytes, some 0.1 ms


class Embedder:
    """Turns texts and pictures into vectors; one per process."""

    def __init__(self, settings: Settings, cache: VectorCache, metrics: Metrics) -> None:
        self._cache = cache
        self._metrics = metrics
        self._flights: Flights[tuple[Vector, bool]] = Flights()
        self._batcher = Batcher(
            max_batch=settings.batch_size,
            max_wait_s=settings.batch_wait_ms / 1000,
            max_queue_s=settings.max_queue_ms / 1000,
            metrics=metrics,
        )
        self._pool = ThreadPoolExecutor(
            min(4, available_cores()), thread_name_prefix="dcar-decode", initializer=compute
        )
        self._large = ThreadPoolExecutor(1, thread_name_prefix="dcar-decode-large", initializer=compute)
        self._max_pixels = settings.max_pixels

    def start(self) -> None:
        """Begin to work; must be called with the event loop running."""
        self._batcher.start()

    async def close(self) -> None:
        """Finish what was accepted, then let threads and connections go."""
        await self._batcher.close()
        await self._cache.close()
        self._pool.shutdown()
        self._large.shutdown()

    def require_room(self) -> None:
        """See `Batcher.require_room`."""
        self._batcher.require_room()

    def require_room_for(self, snapshot: Snapshot, text: str) -> None:
        """As `require_room`, for a text that may be remembered. Asked before anything is begun for a search: under
        overload most of what the service does is to refuse, and that takes time from those it accepted."""
        if not self._batcher.full or self._cache.shared:
            return
        encoder = snapshot.encoder
        key = cache_key(encoder.fingerprint, "text", text.encode())
        if key not in self._flights and self._cache.peek(key, encoder.dim, counted=False) is None:
            self._batcher.require_room()

    async def text(self, snapshot: Snapshot, text: str) -> tuple[Vector, bool]:
        """The vector (E,) of a normalised text, and whether it was remembered."""
        encoder = snapshot.encoder

        async def embed() -> Vector:
            from dcar_core.serving.multi_adapter_batch import TextRow, encode_text_rows

            return await self._batcher.submit(Lane(_lane(encoder, "text"), encode_text_rows), TextRow(encoder, text))

        return await self._remembered(cache_key(encoder.fingerprint, "text", text.encode()), encoder.dim, embed)

    async def picture(self, snapshot: Snapshot, data: bytes) -> tuple[Vector, bool]:
        """The vector (E,) of a picture's file, and whether it was remembered.

        Raises:
            ImageError: it cannot be read; the message is the reason.
        """
        encoder = snapshot.encoder

        async def embed() -> Vector:
            (vector,) = await self.pixels(snapshot, [await self.decode(data, snapshot.preprocess, self._max_pixels)])
            return vector

        return await self._remembered(await self._image_key(encoder.fingerprint, data), encoder.dim, embed)

    async def weighted(self, snapshot: Snapshot, text: str, factors: Vector) -> Vector:
        """A text's vectors (C, E) under several weights of its tokens, factors (C, n). Not remembered."""
        from dcar_core.serving.multi_adapter_batch import TextRow, encode_text_rows

        lane = Lane(_lane(snapshot.encoder, "text"), encode_text_rows)
        rows = [TextRow(snapshot.encoder, text, each) for each in factors]
        return np.stack(await self._batcher.submit_all(lane, rows))

    async def pixels(self, snapshot: Snapshot, pictures: Sequence[Pixels]) -> list[Vector]:
        """The vectors (E,) of decoded pictures. Not remembered."""
        from dcar_core.serving.multi_adapter_batch import ImageRow, encode_image_rows

        lane = Lane(_lane(snapshot.encoder, "image"), encode_image_rows)
        rows = [ImageRow(snapshot.encoder, each) for each in pictures]
        return await self._batcher.submit_all(lane, rows)

    async def decode(self, data: bytes, preprocess: "Preprocess", max_pixels: int = sys.maxsize) -> Pixels:
        """uint8 (3, S, S), from a picture's file.

        Args:
            max_pixels: see `Container.require_cost`; unlimited for images of the gallery, which the index job checked.

        Raises:
            ImageError: it cannot be read.
        """
        with self._metrics.timed("decode"):
            decoded = await self._in_pool(_decode_unless_large, data, preprocess, max_pixels)
            if isinstance(decoded, Container):
                return await asyncio.get_running_loop().run_in_executor(self._large, _decode, decoded, preprocess)
            return decoded

    async def with_model(self, call: Callable[..., Vector], *args: Any) -> Vector:
        """Anything else that needs the model, in its thread, when its turn has come."""
        return await self._batcher.submit(_CALLS, (call, args))

    async def _image_key(self, fingerprint: str, data: bytes) -> str:
        """Hashing a large picture takes milliseconds, too long for the event loop."""
        if len(data) <= _HASHED_AT_ONCE:
            return cache_key(fingerprint, "image", data)
        return await self._in_pool(cache_key, fingerprint, "image", data)

    async def _remembered(self, key: str, dim: int, compute: Callable[[], Awaitable[Vector]]) -> tuple[Vector, bool]:
        """Equal queries in flight share one computation."""
        known = self._cache.peek(key, dim)
        if known is not None:
            return known, True

        async def start() -> tuple[Vector, bool]:
            with self._metrics.timed("cache"):
                known = await self._cache.get(key, dim)
            if known is not None:
                return known, True
            self._batcher.require_room()  # before a picture is decoded for nothing
            vector = await compute()
            self._cache.put(key, vector)
            return rounded(vector), False

        return await self._flights.run(key, start)

    async def _in_pool(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *args)


def _lane(encoder: "Encoder", kind: str) -> tuple[int, str]:
    return id(encoder.runtime), kind  # which those of one backbone share


_CALLS = Lane("calls", lambda payloads: [call(*args) for call, args in payloads])


def _decode_unless_large(data: bytes, preprocess: "Preprocess", max_pixels: int) -> "Pixels | Container":
    """Return the pixels, or the checked file of an image that must wait for the thread of large images."""
    container = inspect(data)
    container.require_cost(max_pixels)
    return container if container.cost > _LARGE else _decode(container, preprocess)


def _decode(container: Container, preprocess: "Preprocess") -> Pixels:
    return preprocess(container)
