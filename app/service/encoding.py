"""Vectors of texts and images: from a cache, or from the model, whose forward passes all requests share.

    text  -> cache, Redis, or model thread (batched)
    image -> hash -> cache, Redis, or decoding process -> model thread (batched)

- Equal queries at the same time share one computation, which is cancelled when its last waiter leaves.
- Encoders that share a backbone share its forward passes: see `dcar_core.encoder.state`.
"""

import asyncio
import contextlib
import hashlib
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.turns import ComputeThreads, Decoders, FairQueue, FairTurns, Turn, supervise
from app.search.errors import UnavailableError
from app.search.query import Crop
from app.search.served_version import Recent, ServedVersion
from app.service.redis_cache import RedisCache
from dcar_core.encoder.encoder import Encoder
from dcar_core.encoder.state import ImageRow, TextRow, encode_image_rows, encode_text_rows
from dcar_core.images import ALL_FORMATS, MAX_PIXELS
from dcar_core.images.workers import Convert
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, DataError, ImageError, ImageFault
from dcar_core.util.machine import available_cores

T = TypeVar("T")
Run = Callable[[list[Any]], Floats | list[Floats]]  # takes N payloads, returns N arrays

_IMAGE_THREADS = 8
_QUICK_BYTES = 256 * 2**10  # of a file that is hashed in the event loop, in less time than a thread takes to begin


class SharedTasks(Generic[T]):
    """Share one computation among all callers that use the same key at the same time."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[T]] = {}
        self._waiters = Counter[asyncio.Task[T]]()

    def __len__(self) -> int:
        return len(self._tasks)

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


class Batcher:
    """Run queries, batch after batch, in the one thread that owns the model.

    - Queries that arrive during a forward pass form the next batch. An idle batcher starts at once; under load it waits
      a few milliseconds for the callers of the last batch to return.
    - A batch that raises is halved until the faulty query is alone, so one bad query fails by itself.
    - Callers, and then their requests, take turns in a batch: one query of each, and then a second one of each.
    """

    def __init__(self, *, max_batch: int, max_wait_s: float, metrics: Metrics | None = None) -> None:
        self._max_batch, self._max_wait = max_batch, max_wait_s
        self._metrics = metrics or Metrics()
        self._queue = FairQueue()  # of pairs: a group, which is a key and a function, and a payload of it
        self._has_arrived = asyncio.Event()
        self._expected_size: dict[Hashable, int] = {}  # of a group: queries that ran or waited when a batch ended
        self._last_end = -math.inf  # of the last forward pass
        self._is_closing = False
        self._thread = ComputeThreads(1, "dcar-model")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work. The event loop must be running."""
        self._worker = asyncio.create_task(supervise("batcher", self._work, self._metrics), name="dcar-batcher")

    def submit(self, key: Hashable, run: Run, payload: Any) -> asyncio.Future[Floats]:
        """Queue a query; those with the same key and function may share a pass. Return what `run` makes of it.

        Raise UnavailableError if the service shuts down.
        """
        if self._is_closing:
            raise UnavailableError("The service is shutting down.")
        future: asyncio.Future[Floats] = asyncio.get_running_loop().create_future()
        self._queue.put(((key, run), payload), future)
        self._has_arrived.set()
        return future

    async def close(self) -> None:
        """Finish the accepted work, then end the thread."""
        self._is_closing = True
        self._has_arrived.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while self._queue.waiting or not self._is_closing:
            if self._queue.waiting:
                await self._wait_for_more()
                await self._run(self._next_batch())  # not bound to a name here: it would keep a replaced model alive
            else:
                self._has_arrived.clear()
                await self._has_arrived.wait()

    async def _wait_for_more(self) -> None:
        """Wait, for `max_wait_s` at most, until the batch is as large as the last one of its group."""
        first = self._queue.waiting[0]
        group = first.item[0]
        wanted = min(self._expected_size.get(group, 1), self._max_batch)
        remaining = max(first.arrived, self._last_end) + self._max_wait - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0, remaining)):
                while self._waiting(group) < wanted and remaining > 0 and not self._is_closing:
                    self._has_arrived.clear()
                    await self._has_arrived.wait()

    def _waiting(self, group: Hashable) -> int:
        return sum(turn.item[0] == group and not turn.future.done() for turn in self._queue.waiting)

    def _next_batch(self) -> list[Turn]:
        """Take the next turn and those of its group that follow; each counts as one."""
        batch = list[Turn]()

        def fits(turn: Turn) -> bool:
            return not batch or turn.item[0] == batch[0].item[0]

        while len(batch) < self._max_batch and (turn := self._queue.take(fits)) is not None:
            self._queue.end(turn, cost=1)
            batch.append(turn)
        return batch

    async def _run(self, batch: list[Turn]) -> None:
        if not batch:  # all queries were cancelled
            return
        group = batch[0].item[0]
        started = time.monotonic()
        outcomes = await self._thread.run(_forward, group[1], [turn.item[1] for turn in batch])
        self._last_end = time.monotonic()
        for turn, outcome in zip(batch, outcomes, strict=True):
            if turn.future.done():
                continue
            if isinstance(outcome, Exception):
                turn.future.set_exception(outcome)
            else:
                turn.future.set_result(outcome)
        self._metrics.forward_pass([turn.arrived for turn in batch], started, self._last_end)
        self._expected_size[group] = len(batch) + self._waiting(group)


def _forward(run: Run, payloads: list[Any]) -> list[Floats | Exception]:
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


def _call_each(calls: list[tuple[Callable[..., Floats], Sequence[Any]]]) -> list[Floats]:
    return [call(*args) for call, args in calls]


class QueryEncoder:
    """Encode the queries of all requests. One per process."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._vectors = Recent[Hashable, Floats](settings.cache_size)
        url = settings.redis_url
        self._redis = RedisCache(url.get_secret_value(), settings.cache_ttl_s) if url else None
        self.computations = SharedTasks[tuple[Floats, bool]]()
        self.batcher = Batcher(max_batch=settings.batch_size, max_wait_s=settings.batch_wait_ms / 1000, metrics=metrics)
        self.image_threads = ComputeThreads(_IMAGE_THREADS, "dcar-image")  # the gallery may be on a slow disk
        self._pixel_threads = ComputeThreads(
            min(4, available_cores()), "dcar-pixels"
        )  # hash files, and resize for PyTorch
        self._chunk_turn = FairTurns(1, 1).turn  # held while one chunk of many images is in the model's queue
        self._decoders = Decoders(settings.max_pixels)
        self._query_limits = settings.max_pixels, frozenset(settings.image_formats)

    async def close(self) -> None:
        """Finish the accepted work of the model, then release threads. Images are given up."""
        await self.batcher.close()
        if self._redis is not None:
            await self._redis.close()
        self._decoders.close()
        for threads in (self._pixel_threads, self.image_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def text(self, served: ServedVersion, text: str) -> tuple[Floats, bool]:
        """Return the vector (E,) of a normalized text, and True if it was cached."""
        encoder = served.encoder

        async def embed() -> Floats:  # encoders on one backbone share its runtime
            row = TextRow(encoder.runtime, encoder.state, text)
            return await self.batcher.submit(id(encoder.runtime), encode_text_rows, row)

        return await self._find(encoder, text, embed)

    async def image(self, served: ServedVersion, data: bytes, crop: Crop | None = None) -> tuple[Floats, bool]:
        """Return the vector (E,) of an image file, or of a part of it, and True if it was cached. Raise ImageError."""
        encoder = served.encoder

        async def embed() -> Floats:
            pixels = await self._pixels(data, served.preprocess, crop, is_query=True)
            row = ImageRow(encoder.runtime, encoder.state, pixels)
            return await self.batcher.submit(id(encoder.runtime), encode_image_rows, row)

        quick = len(data) <= _QUICK_BYTES
        digest = hashlib.sha256(data) if quick else await self._pixel_threads.run(hashlib.sha256, data)
        return await self._find(encoder, (digest.hexdigest(), crop), embed)

    async def _find(
        self, encoder: Encoder, query: Hashable, embed: Callable[[], Awaitable[Floats]]
    ) -> tuple[Floats, bool]:
        """Return the vector of a query, and True if it was cached."""
        key = encoder.fingerprint, query
        vector, is_cached = self._vectors.use(key), True

        async def find() -> tuple[Floats, bool]:
            stored = await self._redis.get(*key, encoder.dim) if self._redis is not None else None
            vector = await embed() if stored is None else stored
            self._vectors.keep(key, vector)
            if stored is None and self._redis is not None:
                self._redis.put(*key, vector)
            return vector, stored is not None

        if vector is None:
            vector, is_cached = await self.computations.run(key, find)
        self._metrics.lookups.labels("hit" if is_cached else "miss").inc()
        return vector, is_cached

    async def call(self, call: Callable[..., Floats], *args: Any) -> Floats:
        """Return what a call of the model for a few images or texts returns; all who have many of these take turns."""
        async with self._chunk_turn():
            return await self.batcher.submit("calls", _call_each, (call, args))

    async def decode(self, data: bytes, convert: Convert, *, is_query: bool = False) -> Any:
        """Return what `convert` makes of an image file in a decoding process, or raise ImageError.

        Images of the gallery have the limits of the index job. Raise UnavailableError if the process was killed.
        """
        limits = self._query_limits if is_query else (MAX_PIXELS, ALL_FORMATS)
        try:
            with self._metrics.timed("decode"):
                return await self._decoders.run(convert, data, *limits)
        except ImageError as error:
            if error.fault != ImageFault.UNREADABLE:
                raise
            raise UnavailableError(f"The image was not decoded: {error}", retry_after_s=1) from None

    async def _pixels(
        self, data: bytes, preprocess: Preprocess, crop: Crop | None = None, *, is_query: bool = False
    ) -> Pixels:
        decoder = preprocess.decoder(None if crop is None else crop.box)
        decoded: Pixels = await self.decode(data, decoder, is_query=is_query)
        return decoded if preprocess.resizer == "pillow" else await self._pixel_threads.run(preprocess.finish, decoded)

    async def gallery_pixels(self, served: ServedVersion, rows: Sequence[int]) -> dict[int, Pixels]:
        """Return the images that are still in the gallery, by row and in their order."""

        async def read(row: int) -> Pixels | None:
            try:
                data = await self.image_threads.run(served.index.image_bytes, row)
                return await self._pixels(data, served.encoder.preprocess)
            except (ArtifactError, ImageError, OSError):
                return None

        images = zip(rows, await asyncio.gather(*map(read, rows)), strict=True)
        return {row: pixels for row, pixels in images if pixels is not None}
