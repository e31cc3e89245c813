"""The searches of the service: the steps of `app.search`, within limits on the work in
progress.

    text   -> cache, Redis, or model thread (batched)                   -> vector
    image  -> hash -> cache, Redis, or decoding process -> model thread -> vector
    vector -> search thread -> page

- At most `max_pending` searches are in progress; more are refused at once. Each search
  has a deadline, and cancelled work is skipped. Images of items have the same limits;
  their thumbnails are made by the processes that decode images.
- The event loop plans and waits. Callers take turns in the threads of searches.
  Filters, sorts and facets, which look at all items, have a thread of their own, so
  they delay no other search.
- Equal queries at the same time are encoded once, which is cancelled when the last
  waiter leaves. Encoders that share a backbone share its forward passes: see
  `dcar_core.encoder.state`.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from app.core.callers import current_caller
from app.core.metrics import Metrics
from app.core.redis import RedisCache
from app.core.settings import Settings
from app.core.turns import (
    Batcher,
    ComputeThreads,
    Decoders,
    FairThreads,
    FairTurns,
    SharedTasks,
    run_in_new_thread,
)
from app.search.errors import (
    BatchQueryError,
    ImageUnavailableError,
    SearchError,
    UnavailableError,
)
from app.search.pair_scoring import Compute
from app.search.query import (
    MAX_TEXT_BYTES,
    Crop,
    Query,
    make_plan,
    query_vector,
    row_of,
)
from app.search.results import Page, answer, cached_page
from app.search.served_version import Recent, ServedVersion, mask_key
from dcar_core.encoder.encoder import Encoder
from dcar_core.images import ALL_FORMATS, MAX_PIXELS, sniff_format
from dcar_core.images.decoding import ThumbnailFormat, make_thumbnail
from dcar_core.images.workers import Convert
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, ImageError, ImageFault
from dcar_core.util.machine import available_cores

T = TypeVar("T")
Work = Literal["search", "filter"]  # what blocks
PendingKind = Literal["searches", "pictures"]

_IMAGE_THREADS = 8
# of a file that is hashed in the event loop, in less time than a thread takes to begin
_QUICK_BYTES = 256 * 2**10
_THUMBNAILS = 1000  # in memory, of some 20 kB


def _call_each(
    calls: list[tuple[Callable[..., Floats], Sequence[Any]]],
) -> list[Floats]:
    return [call(*args) for call, args in calls]


class QueryEncoder:
    """Encode the queries of all requests. One per process."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._vectors = Recent[Hashable, Floats](settings.cache_size)
        url = settings.redis_url
        self._redis = (
            RedisCache(url.get_secret_value(), settings.cache_ttl_s) if url else None
        )
        self.computations = SharedTasks[tuple[Floats, bool]]()
        self.batcher = Batcher(
            max_batch=settings.batch_size,
            max_wait_s=settings.batch_wait_ms / 1000,
            metrics=metrics,
        )
        # the gallery may be on a slow disk
        self.image_threads = ComputeThreads(_IMAGE_THREADS, "dcar-image")
        self._pixel_threads = ComputeThreads(
            min(4, available_cores()), "dcar-pixels"
        )  # hash files, and resize for PyTorch
        # held while one chunk of many images is in the model's queue
        self._chunk_turn = FairTurns(1, 1).turn
        self._decoders = Decoders(settings.max_pixels)
        self._query_limits = settings.max_pixels, frozenset(settings.image_formats)

    async def close(self) -> None:
        """Finish the accepted work of the model, then release threads. Images are given
        up.
        """
        await self.batcher.close()
        if self._redis is not None:
            await self._redis.close()
        self._decoders.close()
        for threads in (self._pixel_threads, self.image_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def text(self, served: ServedVersion, text: str) -> tuple[Floats, bool]:
        """Return the vector (E,) of a normalized text, and True if it was cached."""
        encoder = served.encoder

        async def embed() -> Floats:
            return await self.batcher.submit(
                encoder.runtime.encode_texts, (encoder.state, text)
            )

        return await self._find(encoder, text, embed)

    async def image(
        self,
        served: ServedVersion,
        data: bytes,
        crop: Crop | None = None,
    ) -> tuple[Floats, bool]:
        """Return the vector (E,) of an image file, or of a part of it, and True if it
        was cached. Raise ImageError.
        """
        encoder = served.encoder

        async def embed() -> Floats:
            pixels = await self._pixels(data, served.preprocess, crop, is_query=True)
            return await self.batcher.submit(
                encoder.runtime.encode_images, (encoder.state, pixels)
            )

        quick = len(data) <= _QUICK_BYTES
        if quick:
            digest = hashlib.sha256(data)
        else:
            digest = await self._pixel_threads.run(hashlib.sha256, data)
        return await self._find(encoder, (digest.hexdigest(), crop), embed)

    async def _find(
        self,
        encoder: Encoder,
        query: Hashable,
        embed: Callable[[], Awaitable[Floats]],
    ) -> tuple[Floats, bool]:
        """Return the vector of a query, and True if it was cached."""
        key = encoder.fingerprint, query
        vector = self._vectors.use(key)
        is_cached = True

        async def find() -> tuple[Floats, bool]:
            if self._redis is not None:
                stored = await self._redis.get(*key, encoder.dim)
            else:
                stored = None
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
        """Return what a call of the model for a few images or texts returns; all who
        have many of these take turns.
        """
        async with self._chunk_turn():
            return await self.batcher.submit(_call_each, (call, args))

    async def decode(
        self,
        data: bytes,
        convert: Convert,
        *,
        is_query: bool = False,
    ) -> Any:
        """Return what `convert` makes of an image file in a decoding process, or raise
        ImageError.

        Images of the gallery have the limits of the index job. Raise UnavailableError
        if the process was killed.
        """
        limits = self._query_limits if is_query else (MAX_PIXELS, ALL_FORMATS)
        try:
            with self._metrics.stages["decode"].time():
                return await self._decoders.run(convert, data, *limits)
        except ImageError as error:
            if error.fault != ImageFault.UNREADABLE:
                raise
            raise UnavailableError(
                f"The image was not decoded: {error}", retry_after_s=1
            ) from None

    async def _pixels(
        self,
        data: bytes,
        preprocess: Preprocess,
        crop: Crop | None = None,
        *,
        is_query: bool = False,
    ) -> Pixels:
        decoder = preprocess.decoder(None if crop is None else crop.box)
        decoded: Pixels = await self.decode(data, decoder, is_query=is_query)
        if preprocess.resizer == "pillow":
            return decoded
        return await self._pixel_threads.run(preprocess.finish, decoded)

    async def gallery_pixels(
        self,
        served: ServedVersion,
        rows: Sequence[int],
    ) -> dict[int, Pixels]:
        """Return the images that are still in the gallery, by row and in their
        order.
        """

        async def read(row: int) -> Pixels | None:
            try:
                data = await self.image_threads.run(served.index.image_bytes, row)
                return await self._pixels(data, served.encoder.preprocess)
            except (ArtifactError, ImageError, OSError):
                return None

        images = zip(rows, await asyncio.gather(*map(read, rows)), strict=True)
        return {row: pixels for row, pixels in images if pixels is not None}


class Retriever:
    """Search versions of indexes. One per process."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self.encoder = QueryEncoder(settings, metrics)
        threads = min(4, available_cores())
        self._threads: dict[Work, FairThreads] = {
            "search": FairThreads(threads, "dcar-search", ahead=threads),
            "filter": FairThreads(1, "dcar-filter"),
        }
        self._thumbnails = Recent[str, bytes](_THUMBNAILS)
        self._pending = Counter[tuple[PendingKind, str]]()  # of each caller
        self.start = self.encoder.batcher.start

    async def close(self) -> None:
        await self.encoder.close()
        self._threads["search"].shutdown()
        self._threads["filter"].shutdown(wait=False, cancel_futures=True)

    def pending(self) -> list[tuple[PendingKind, int]]:
        """Return how much of each kind is in progress."""
        counts = self._pending.items()
        return [
            (kind, sum(count for (other, _), count in counts if other == kind))
            for kind in get_args(PendingKind)
        ]

    def require_room(self, count: int = 1, kind: PendingKind = "searches") -> None:
        """Raise UnavailableError unless the caller may have so much more work in
        progress.
        """
        most = self._settings.max_pending
        own = self._pending[kind, current_caller.get()]
        share = max(most // 2, min(most, self._settings.max_queries))  # of one caller
        if dict(self.pending())[kind] + count > most or own + count > share:
            self._metrics.refused.labels("queue_full").inc()
            raise UnavailableError("The service is busy.", retry_after_s=1)

    @asynccontextmanager
    async def _admitted(
        self,
        count: int = 1,
        kind: PendingKind = "searches",
    ) -> AsyncIterator[None]:
        """Count work in progress. Raise UnavailableError if there is too much of it, or
        if it takes too long.
        """
        self.require_room(count, kind)
        own = kind, current_caller.get()
        self._pending[own] += count
        deadline = asyncio.timeout(self._settings.deadline_ms / 1000)
        try:
            async with deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            self._metrics.refused.labels("late").inc()
            raise UnavailableError(
                "The search took too long and was cancelled.", retry_after_s=1
            ) from None
        finally:
            self._pending[own] -= count
            self._pending += Counter()  # forgets who has none

    async def run(self, work: Work, call: Callable[..., T], *args: Any) -> T:
        """Return what a call returns that blocks."""
        return await self._threads[work].run(call, *args)

    async def search(
        self,
        served: ServedVersion,
        query: Query,
        image: bytes | None = None,
        items_path: str = "/items",
    ) -> Page:
        """Return the results of a query; see `app.search`."""
        async with self._admitted():
            return await self._search(served, query, image, items_path, MAX_TEXT_BYTES)

    async def search_batch(
        self,
        served: ServedVersion,
        queries: Sequence[tuple[Query, bytes | None]],
        items_path: str,
    ) -> list[Page]:
        """Return the results of queries with their images. Raise BatchQueryError if one
        search failed.
        """
        max_bytes = MAX_TEXT_BYTES // len(queries)
        async with self._admitted(len(queries)):
            searches = (
                self._search(served, query, image, items_path, max_bytes)
                for query, image in queries
            )
            return _all_or_error(
                await asyncio.gather(*searches, return_exceptions=True)
            )

    async def _search(
        self,
        served: ServedVersion,
        query: Query,
        image: bytes | None,
        items_path: str,
        max_bytes: int,
    ) -> Page:
        started = time.perf_counter()
        encoder = self.encoder
        make = partial(
            make_plan,
            has_image=image is not None,
            items_path=items_path,
            max_bytes=max_bytes,
        )
        # all items are looked at
        if query.filter and served.masks.use(mask_key(served, query.filter)) is None:
            plan = await self.run("filter", make, served, query, self._settings)
        elif "@" in query.query + query.without:
            # perhaps a name whose members are not known yet
            plan = await self.run("search", make, served, query, self._settings)
        else:
            plan = make(served, query, self._settings)
        texts = [encoder.text(served, text) for _, text in plan.texts]
        # which takes longer
        embedded = [await texts[0]] if len(texts) == 1 else await asyncio.gather(*texts)
        if image is not None:
            embedded = [*embedded, await encoder.image(served, image, query.crop)]
        compose = partial(
            query_vector,
            served,
            plan,
            [vector for vector, _ in embedded],
        )
        vector = await self.run("search", compose) if plan.examples else compose()
        page = cached_page(served, plan, vector)
        if page is None:
            make_page = partial(answer, served, plan, vector)
            with self._metrics.stages["search"].time():
                if plan.explained or plan.rerank_depth:
                    page = await self._run_beside_model(make_page)
                else:  # sorts and facets may take long
                    page = await self.run(
                        "filter" if plan.sort or plan.facets else "search", make_page
                    )
        is_cached = bool(embedded) and all(was_cached for _, was_cached in embedded)
        milliseconds = round((time.perf_counter() - started) * 1000, 2)
        return {**page[0], "took_ms": milliseconds, "cached": is_cached}, page[1]

    async def _run_beside_model(self, call: Callable[[Compute], T]) -> T:
        """Return what a call returns that has the model work more than once, in a
        thread of its own.
        """
        compute = _WaitingCompute(self.encoder)
        try:
            return await run_in_new_thread(copy_context().run, call, compute)
        finally:
            compute.is_cancelled = True

    async def embed(
        self,
        served: ServedVersion,
        inputs: Sequence[str | bytes],
    ) -> list[Floats]:
        """Return the vectors (E,) of normalized texts and image files. Raise
        BatchQueryError if one has none.

        They are taken in parts as large as a batch of searches, which count and end as
        such a batch does.
        """
        embed = self.encoder
        outcomes = list[tuple[Floats, bool] | BaseException]()
        embedded = list[tuple[Floats, bool]]()
        for start in range(0, len(inputs), size := self._settings.max_queries):
            part = inputs[start : start + size]
            async with self._admitted(len(part)):
                outcomes += await asyncio.gather(
                    *(
                        (
                            embed.text(served, x)
                            if isinstance(x, str)
                            else embed.image(served, x)
                        )
                        for x in part
                    ),
                    return_exceptions=True,
                )
            embedded = _all_or_error(outcomes)
        return [vector for vector, _ in embedded]

    async def image(
        self,
        served: ServedVersion,
        item_id: str,
        side: int | None,
        thumbnail_format: ThumbnailFormat,
    ) -> tuple[str, bytes]:
        """Return a name that changes with an item's image, and its file or a thumbnail
        of it.

        An image that takes too much memory to decode is returned as it is.

        Args:
            side: pixels that a thumbnail's longer side has at most; None for the file.

        Raises:
            SearchError: there is no such item, or its image is gone.
        """
        row = row_of(served, item_id)
        index = served.index
        threads = self.encoder.image_threads
        with suppress(ArtifactError, ImageError, OSError):
            async with self._admitted(kind="pictures"):
                name = await threads.run(index.image_key, row)
                name += "" if side is None else f"_{side}.{thumbnail_format}"
                if (thumbnail := self._thumbnails.use(name)) is not None:
                    return name, thumbnail
                data = await threads.run(index.image_bytes, row)
                if side is not None:
                    make = partial(
                        make_thumbnail,
                        side=side,
                        thumbnail_format=thumbnail_format,
                    )
                    try:
                        data = await self.encoder.decode(data, make)
                        self._thumbnails.keep(name, data)
                    except ImageError as error:
                        if error.fault != ImageFault.TOO_LARGE:
                            raise
                if sniff_format(data) is not None:
                    return name, data
        raise ImageUnavailableError

    async def check_image(self, served: ServedVersion, data: bytes) -> None:
        """Raise ImageError if an image may not become an item's, by the limits of
        queries and of index jobs.
        """
        async with self._admitted(kind="pictures"):
            await self.encoder.decode(
                data,
                served.encoder.preprocess.decoder(),
                is_query=True,
            )

    async def examine(self, call: Callable[..., T], *args: Any) -> T:
        """Call a function that looks at all rows of an index; one is called at a
        time.
        """
        async with self._admitted():
            return await self.run("filter", call, *args)


class _WaitingCompute(Compute):
    """The `Compute` of a thread, which waits for the model's queue. Once cancelled, it
    raises CancelledError.
    """

    def __init__(self, encoder: QueryEncoder) -> None:
        self._encoder = encoder
        self._loop = asyncio.get_running_loop()
        self.is_cancelled = False

    def model(self, call: Callable[..., Any], *args: Any) -> Any:
        return self._wait(self._encoder.call(call, *args))

    def gallery_pixels(
        self,
        served: ServedVersion,
        rows: Sequence[int],
    ) -> dict[int, Pixels]:
        return self._wait(self._encoder.gallery_pixels(served, rows))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self.is_cancelled:
            work.close()
            raise asyncio.CancelledError
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _all_or_error(outcomes: Sequence[T | BaseException]) -> list[T]:
    results: list[T] = []
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, SearchError | ImageError):
            raise BatchQueryError(number, outcome)
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results
