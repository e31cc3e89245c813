"""The searches of the service: the steps of `app.search`, within limits on the work in progress.

- At most `max_pending` searches are in progress; more are refused at once. Each search has a deadline, and cancelled
  work is skipped. Images of items have the same limits; their thumbnails are made by the processes that decode images.
- The event loop only waits. Callers take turns in the threads of searches. What looks at all items, such as a filter,
  has a thread of its own, so it delays no other search.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from app.core.callers import current_caller
from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.turns import FairThreads, run_in_new_thread
from app.search.errors import BatchQueryError, ImageUnavailableError, SearchError, UnavailableError
from app.search.pair_scoring import Compute
from app.search.query import MAX_TEXT_BYTES, Query, make_plan, query_vector, row_of
from app.search.results import Page, answer, cached_page
from app.search.served_version import Recent, ServedVersion, mask_key
from app.service.encoding import QueryEncoder
from dcar_core.images import sniff_format
from dcar_core.images.decoding import ThumbnailFormat, make_thumbnail
from dcar_core.util.arrays import Floats, Pixels
from dcar_core.util.errors import ArtifactError, ImageError, ImageFault
from dcar_core.util.machine import available_cores

T = TypeVar("T")
Work = Literal["search", "filter"]  # what blocks
PendingKind = Literal["searches", "pictures"]

_THUMBNAILS = 1000  # in memory, of some 20 kB


class Retriever:
    """Search versions of indexes. One per process."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
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
        return [(kind, sum(count for (other, _), count in counts if other == kind)) for kind in get_args(PendingKind)]

    def require_room(self, count: int = 1, kind: PendingKind = "searches") -> None:
        """Raise UnavailableError unless the caller may have so much more work in progress."""
        most, own = self._settings.max_pending, self._pending[kind, current_caller.get()]
        share = max(most // 2, min(most, self._settings.max_queries))  # of one caller
        if dict(self.pending())[kind] + count > most or own + count > share:
            self._metrics.refused.labels("queue_full").inc()
            raise UnavailableError("The service is busy.", retry_after_s=1)

    @asynccontextmanager
    async def _admitted(self, count: int = 1, kind: PendingKind = "searches") -> AsyncIterator[None]:
        """Count work in progress. Raise UnavailableError if there is too much of it, or if it takes too long."""
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
            raise UnavailableError("The search took too long and was cancelled.", retry_after_s=1) from None
        finally:
            self._pending[own] -= count
            self._pending += Counter()  # forgets who has none

    async def run(self, work: Work, call: Callable[..., T], *args: Any) -> T:
        """Return what a call returns that blocks."""
        return await self._threads[work].run(call, *args)

    async def search(
        self, served: ServedVersion, query: Query, image: bytes | None = None, items_path: str = "/items"
    ) -> Page:
        """Return the results of a query; see `app.search`."""
        async with self._admitted():
            return await self._search(served, query, image, items_path, MAX_TEXT_BYTES)

    async def search_batch(
        self, served: ServedVersion, queries: Sequence[tuple[Query, bytes | None]], items_path: str
    ) -> list[Page]:
        """Return the results of queries with their images. Raise BatchQueryError if one search failed."""
        max_bytes = MAX_TEXT_BYTES // len(queries)
        async with self._admitted(len(queries)):
            searches = (self._search(served, query, image, items_path, max_bytes) for query, image in queries)
            return _all_or_error(await asyncio.gather(*searches, return_exceptions=True))

    async def _search(
        self, served: ServedVersion, query: Query, image: bytes | None, items_path: str, max_bytes: int
    ) -> Page:
        started, encoder = time.perf_counter(), self.encoder
        make = partial(make_plan, has_image=image is not None, items_path=items_path, max_bytes=max_bytes)
        if query.filter and served.masks.use(mask_key(query.filter)) is None:  # all items are looked at
            plan = await self.run("filter", make, served, query, self._settings)
        else:
            plan = make(served, query, self._settings)
        texts = [encoder.text(served, text) for _, text in plan.texts]
        embedded = [await texts[0]] if len(texts) == 1 else await asyncio.gather(*texts)  # which takes longer
        if image is not None:
            embedded = [*embedded, await encoder.image(served, image, query.crop)]
        compose = partial(query_vector, served, plan, [vector for vector, _ in embedded])
        vector = await self.run("search", compose) if plan.examples else compose()
        page = cached_page(served, plan, vector)
        if page is None:
            make_page = partial(answer, served, plan, vector)
            with self._metrics.timed("search"):
                if plan.explained or plan.rerank_depth:
                    page = await self._run_beside_model(make_page)
                else:  # sorts and facets may take long
                    page = await self.run("filter" if plan.sort or plan.facets else "search", make_page)
        is_cached = bool(embedded) and all(was_cached for _, was_cached in embedded)
        milliseconds = round((time.perf_counter() - started) * 1000, 2)
        return {**page[0], "took_ms": milliseconds, "cached": is_cached}, page[1]

    async def _run_beside_model(self, call: Callable[[Compute], T]) -> T:
        """Return what a call returns that has the model work more than once, in a thread of its own."""
        compute = _WaitingCompute(self.encoder)
        try:
            return await run_in_new_thread(copy_context().run, call, compute)
        finally:
            compute.is_cancelled = True

    async def embed(self, served: ServedVersion, inputs: Sequence[str | bytes]) -> list[Floats]:
        """Return the vectors (E,) of normalized texts and image files. Raise BatchQueryError if one has none.

        They are taken in parts as large as a batch of searches, which count and end as such a batch does.
        """
        embed, outcomes = self.encoder, list[tuple[Floats, bool] | BaseException]()
        embedded = list[tuple[Floats, bool]]()
        for start in range(0, len(inputs), size := self._settings.max_queries):
            part = inputs[start : start + size]
            async with self._admitted(len(part)):
                outcomes += await asyncio.gather(
                    *(embed.text(served, x) if isinstance(x, str) else embed.image(served, x) for x in part),
                    return_exceptions=True,
                )
            embedded = _all_or_error(outcomes)
        return [vector for vector, _ in embedded]

    async def image(
        self, served: ServedVersion, item_id: str, side: int | None, thumbnail_format: ThumbnailFormat
    ) -> tuple[str, bytes]:
        """Return a name that changes with an item's image, and its file or a thumbnail of it.

        An image that takes too much memory to decode is returned as it is.

        Args:
            side: pixels that a thumbnail's longer side has at most; None for the file.

        Raises:
            SearchError: there is no such item, or its image is gone.
        """
        row, index, threads = row_of(served, item_id), served.index, self.encoder.image_threads
        with suppress(ArtifactError, ImageError, OSError):
            async with self._admitted(kind="pictures"):
                name = await threads.run(index.image_key, row)
                name += "" if side is None else f"_{side}.{thumbnail_format}"
                if (thumbnail := self._thumbnails.use(name)) is not None:
                    return name, thumbnail
                data = await threads.run(index.image_bytes, row)
                if side is not None:
                    make = partial(make_thumbnail, side=side, thumbnail_format=thumbnail_format)
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
        """Raise ImageError if an image may not become an item's, by the limits of queries and of index jobs."""
        async with self._admitted(kind="pictures"):
            await self.encoder.decode(data, served.encoder.preprocess.decoder(), is_query=True)

    async def examine(self, call: Callable[..., T], *args: Any) -> T:
        """Call a function that looks at all rows of an index; one is called at a time."""
        async with self._admitted():
            return await self.run("filter", call, *args)


class _WaitingCompute(Compute):
    """The `Compute` of a thread, which waits for the model's queue. Once cancelled, it raises CancelledError."""

    def __init__(self, encoder: QueryEncoder) -> None:
        self._encoder, self._loop, self.is_cancelled = encoder, asyncio.get_running_loop(), False

    def model(self, call: Callable[..., Any], *args: Any) -> Any:
        return self._wait(self._encoder.call(call, *args))

    def gallery_pixels(self, served: ServedVersion, rows: Sequence[int]) -> dict[int, Pixels]:
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
