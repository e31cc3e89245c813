"""From a query to ranked items.

    text  -> normalise ------------------> cache? -> model thread (batched) -\
    image -> hash --> cache? -> decode in a pool --> model thread (batched) --+-> index search in a thread -> items
    item  -> its vector in the index ----------------------------------------/

- The event loop only waits: decoding, the model, the index and the gallery's files each have their threads.
- Each search takes one `Snapshot` and ends on it, whatever is published meanwhile.
- More than `max_pending` searches at a time are refused at once, so a queue cannot grow without end; so is one that the
  batcher could not take up soon. Each search has a deadline, and what is not wanted any more is not computed.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.batching import Batcher, Flights, Lane, Vector
from app.cache import VectorCache, cache_key, rounded
from app.media import media_type
from app.metrics import Metrics
from app.problems import Late, Overloaded, Problem
from app.settings import Settings
from app.snapshots import Snapshot, Snapshots
from dcar_core.errors import ArtifactError, DcarError, ImageError
from index_jobs.artifact import Item

T = TypeVar("T")

_HASHED_AT_ONCE = 64 * 2**10  # bytes, some 0.1 ms


@dataclass(frozen=True, slots=True)
class Match:
    """One result; score is the inner product of unit vectors, the cosine."""

    item: Item
    score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search found, by which version, and whether the query's embedding came from the cache."""

    version: int
    matches: list[Match]
    cached: bool
    took_ms: float


class Retriever:
    """The query path; one per process."""

    def __init__(
        self, settings: Settings, snapshots: Snapshots, cache: VectorCache, metrics: Metrics | None = None
    ) -> None:
        self._snapshots = snapshots
        self._cache = cache
        self._metrics = metrics or Metrics()
        self._max_pending = settings.max_pending
        self._deadline_s = settings.deadline_ms / 1000
        self._pending = 0
        self._flights: Flights[tuple[Vector, bool]] = Flights()
        self._batcher = Batcher(
            max_batch=settings.batch_size,
            max_wait_s=settings.batch_wait_ms / 1000,
            max_queue_s=settings.max_queue_ms / 1000,
            metrics=self._metrics,
        )
        cores = os.cpu_count() or 1
        self._decode_pool = ThreadPoolExecutor(min(4, cores), thread_name_prefix="dcar-decode")
        self._search_pool = ThreadPoolExecutor(
            min(4, cores), thread_name_prefix="dcar-search", initializer=_limit_faiss, initargs=(settings.threads,)
        )

    def start(self) -> None:
        """Begin to work; must be called with the event loop running."""
        self._batcher.start()

    async def close(self) -> None:
        """Finish what was accepted, then let threads and connections go."""
        await self._batcher.close()
        await self._cache.close()
        self._decode_pool.shutdown()
        self._search_pool.shutdown()

    async def search_text(self, text: str, k: int) -> Answer:
        """The k items nearest to a normalised text."""
        async with self._admitted() as began:
            snapshot = self._snapshots.require()
            encoder = snapshot.encoder
            lane = Lane((encoder.fingerprint, "text"), encoder.encode_text)

            async def embed() -> Vector:
                return await self._batcher.submit(lane, text)

            key = cache_key(encoder.fingerprint, "text", text.encode())
            vector, cached = await self._embed(key, encoder.dim, embed)
            return Answer(snapshot.version, await self._search(snapshot, vector, k), cached, _since(began))

    async def search_image(self, data: bytes, k: int) -> Answer:
        """The k items nearest to a picture, given as the bytes of its file.

        Raises:
            ImageError: it cannot be read; the message is the reason.
        """
        async with self._admitted() as began:
            snapshot = self._snapshots.require()
            encoder = snapshot.encoder
            lane = Lane((encoder.fingerprint, "image"), _stacked(encoder.encode_pixels))

            async def embed() -> Vector:
                with self._metrics.timed("decode"):
                    pixels = await self._in(self._decode_pool, _decode, snapshot, data)
                return await self._batcher.submit(lane, pixels)

            key = await self._image_key(encoder.fingerprint, data)
            vector, cached = await self._embed(key, encoder.dim, embed)
            return Answer(snapshot.version, await self._search(snapshot, vector, k), cached, _since(began))

    async def search_item(self, item_id: str, k: int) -> Answer:
        """The k items nearest to one of the gallery's own, without itself."""
        async with self._admitted() as began:
            snapshot = self._snapshots.require()
            row = _row(snapshot, item_id)
            try:
                vector = await self._in(self._search_pool, snapshot.artifact.vector, row)
            except ArtifactError as error:  # a kind of index that keeps no vectors
                raise Problem(409, f"Search by item is not possible: {error}") from None
            matches = await self._search(snapshot, vector, k, without=row)
            return Answer(snapshot.version, matches, False, _since(began))

    async def item(self, item_id: str) -> tuple[int, Item]:
        """An item and the version that knows it."""
        snapshot = self._snapshots.require()
        row = _row(snapshot, item_id)
        return snapshot.version, await self._in(self._search_pool, snapshot.artifact.item, row)

    async def picture(self, item_id: str) -> bytes:
        """The bytes of an item's picture, from the gallery."""
        snapshot = self._snapshots.require()
        row = _row(snapshot, item_id)
        try:
            return await self._in(self._search_pool, snapshot.artifact.image_bytes, row)
        except (ArtifactError, ImageError, OSError):
            raise Problem(404, "The picture of this item is no longer in the gallery.") from None

    async def _image_key(self, fingerprint: str, data: bytes) -> str:
        """Hashing a large picture takes milliseconds, too long for the event loop."""
        if len(data) <= _HASHED_AT_ONCE:
            return cache_key(fingerprint, "image", data)
        return await self._in(self._decode_pool, cache_key, fingerprint, "image", data)

    async def _embed(self, key: str, dim: int, compute: Callable[[], Awaitable[Vector]]) -> tuple[Vector, bool]:
        """The query's vector, and whether it was remembered; equal queries in flight share one computation."""
        known = self._cache.peek(key, dim)
        if known is not None:
            return known, True

        async def start() -> tuple[Vector, bool]:
            with self._metrics.timed("cache"):
                known = await self._cache.get(key, dim)
            if known is not None:
                return known, True
            vector = await compute()
            self._cache.put(key, vector)
            return rounded(vector), False

        return await self._flights.run(key, start)

    async def _search(self, snapshot: Snapshot, vector: Vector, k: int, without: int = -1) -> list[Match]:
        with self._metrics.timed("search"):
            return await self._in(self._search_pool, _lookup, snapshot, vector, k, without)

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *args)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[float]:
        if self._pending >= self._max_pending:
            self._metrics.refused("queue_full")
            raise Overloaded
        self._pending += 1
        self._metrics.pending.inc()
        deadline = asyncio.timeout(self._deadline_s)
        try:
            async with deadline:
                yield time.perf_counter()
        except TimeoutError:
            if not deadline.expired():
                raise
            self._metrics.refused("late")
            raise Late from None
        finally:
            self._pending -= 1
            self._metrics.pending.dec()


def _lookup(snapshot: Snapshot, vector: Vector, k: int, without: int) -> list[Match]:
    artifact = snapshot.artifact
    scores, rows = artifact.search(vector[None], k + (without >= 0))  # [1, k], [1, k]
    found = [(int(r), float(s)) for r, s in zip(rows[0], scores[0], strict=True) if r >= 0 and r != without]
    return [Match(artifact.item(row), score) for row, score in found[:k]]


def _row(snapshot: Snapshot, item_id: str) -> int:
    row = snapshot.artifact.row_of(item_id)
    if row is None:
        raise Problem(404, "There is no such item in the index.", errors=[("id", f"unknown: {item_id[:200]!r}")])
    return row


def _decode(snapshot: Snapshot, data: bytes) -> NDArray[np.uint8]:
    """uint8 (3, S, S). Only kinds that a browser or a camera makes reach the decoders."""
    if not data:
        raise ImageError("the file is empty")
    if media_type(data) is None:
        raise ImageError("not an image, or of a kind that cannot be read")
    try:
        return snapshot.preprocess(data)
    except DcarError:
        raise
    except Exception as error:  # decoders meet hostile bytes; whatever they raise is the picture's fault
        raise ImageError(f"broken: {type(error).__name__}") from error


def _stacked(run: Callable[[NDArray[np.uint8]], Vector]) -> Callable[[list[Any]], Vector]:
    return lambda pixels: run(np.stack(pixels))  # n of (3, S, S) -> (n, 3, S, S) -> (n, E)


def _limit_faiss(threads: int | None) -> None:
    if threads is not None:
        import faiss

        faiss.omp_set_num_threads(threads)


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
