"""The searches of the service: the steps of `app.search`, within limits on the work in progress.

- At most `max_pending` searches are in progress; more are refused at once. Each search has a deadline, and cancelled
  work is skipped.
- Images of items have the same limits. Their thumbnails are made by the processes that decode images, and the last ones
  used are kept in memory.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.search.errors import BatchQueryError, ImageUnavailableError, SearchError
from app.search.plan import MAX_TEXT_BYTES, Plan, make_plan, query_vector, require_sortable, row_of
from app.search.query import Query
from app.search.results import Page, answer, cached_page
from app.search.rows import list_rows, mask_key
from app.search.snapshots import Recent, Snapshot
from app.service.batching import Admission
from app.service.compute import Place, SharedCompute
from dcar_core.images import sniff_format
from dcar_core.images.decoding import ThumbnailFormat, make_thumbnail
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ArtifactError, ImageError, ImageFault
from index_jobs.index.index_version import Item

T = TypeVar("T")

_THUMBNAIL_BYTES = 64 * 2**20


class RecentBytes(Recent[str, bytes]):
    """A cache of the entries that were used last, up to `size` bytes together. One thread uses it."""

    total = 0

    def keep(self, key: str, value: bytes) -> None:
        self.total += len(value) - len(self.pop(key, b""))
        self[key] = value
        while self.total > self.size:
            self.total -= len(self.pop(next(iter(self))))


class Retriever:
    """Search snapshots. One per process."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._admission = Admission(settings, metrics)
        self.compute = SharedCompute(settings, metrics)
        self.start, self.close = self.compute.start, self.compute.close
        self.require_room = self._admission.require_room
        self.image_threads = self.compute.image_threads
        self._thumbnails = RecentBytes(_THUMBNAIL_BYTES)

    @property
    def fault(self) -> str | None:
        """Why no search works; None if they do."""
        return self.compute.batcher.fault

    async def search(
        self, snapshot: Snapshot, query: Query, image: bytes | None = None, items_path: str = "/items"
    ) -> Page:
        """Return the results of a query; see `app.search`."""
        async with self._admission():
            return await self._search(snapshot, query, image, items_path, MAX_TEXT_BYTES)

    async def search_batch(
        self, snapshot: Snapshot, queries: Sequence[tuple[Query, bytes | None]], items_path: str
    ) -> list[Page]:
        """Return the results of queries with their images. Raise BatchQueryError if one search failed."""
        has_long_queries = any(query.rerank or query.explain for query, _ in queries)
        slots = asyncio.Semaphore(1 if has_long_queries else len(queries))  # their images take memory
        max_bytes = MAX_TEXT_BYTES // len(queries)

        async def search(query: Query, image: bytes | None) -> Page:
            async with slots:
                return await self._search(snapshot, query, image, items_path, max_bytes)

        async with self._admission(len(queries)):
            outcomes = await asyncio.gather(*(search(*each) for each in queries), return_exceptions=True)
        return _all_or_error(outcomes)

    async def _search(
        self, snapshot: Snapshot, query: Query, image: bytes | None, items_path: str, max_bytes: int
    ) -> Page:
        started, compute = time.perf_counter(), self.compute
        make = partial(make_plan, has_image=image is not None, items_path=items_path, max_bytes=max_bytes)
        if query.filter and snapshot.masks.use(mask_key(query.filter)) is None:  # all items are looked at
            plan = await compute.run("filter", make, snapshot, query, self._settings)
        else:
            plan = make(snapshot, query, self._settings)
        embeddings = await compute.texts(snapshot, [text for _, text in plan.texts])
        is_cached, picture = all(cached for _, cached in embeddings), None
        if image is not None:
            picture, is_picture_cached = await compute.image(snapshot, image, plan.crop)
            is_cached &= is_picture_cached
        parts = snapshot, plan, [vector for vector, _ in embeddings], picture
        vector = await compute.run("search", query_vector, *parts) if plan.examples else query_vector(*parts)
        page = None if plan.facets else cached_page(snapshot, plan, vector)
        if page is None:
            page = await self._answer(snapshot, plan, vector)
        milliseconds = round((time.perf_counter() - started) * 1000, 2)
        is_cached &= bool(query.query or image)
        return {**page[0], "took_ms": milliseconds, "cached": is_cached}, page[1]

    async def _answer(self, snapshot: Snapshot, plan: Plan, vector: Floats) -> Page:
        if plan.explained or plan.rerank_depth:
            return await self.compute.run_beside_model(partial(answer, snapshot, plan, vector))
        place: Place = "filter" if plan.sort or plan.facets else "search"  # which may take long
        with self._metrics.timed("search"):
            return await self.compute.run(place, answer, snapshot, plan, vector)

    async def embed(self, snapshot: Snapshot, inputs: Sequence[str | bytes]) -> list[Floats]:
        """Return the vectors (E,) of normalized texts and image files. Raise BatchQueryError if one has none."""
        async with self._admission(len(inputs)):
            embed = self.compute
            outcomes = await asyncio.gather(
                *(embed.text(snapshot, x) if isinstance(x, str) else embed.image(snapshot, x) for x in inputs),
                return_exceptions=True,
            )
        return [vector for vector, _ in _all_or_error(outcomes)]

    async def items(
        self,
        snapshot: Snapshot,
        filter: dict[str, Any] | None,
        offset: int,
        count: int,
        sort: str = "",
        group_by: str | None = None,
    ) -> tuple[int, list[Item]]:
        """Return the number of items that fulfil a filter, the first one of each group, and a page of them.

        Args:
            sort: as of a query; "" for the order of the index.
            group_by: "" for every item, None for the index's own field.
        """
        if not snapshot.artifact.rows:
            return 0, []
        if sort:
            require_sortable(snapshot, sort)
        name = snapshot.artifact.manifest.spec.group_field if group_by is None else group_by

        def list_items() -> tuple[int, list[Item]]:
            rows = list_rows(snapshot, filter, sort, name)
            return len(rows), [snapshot.artifact.item(int(row)) for row in rows[offset : offset + count]]

        async with self._admission():
            return await self.compute.run("filter" if sort or filter else "search", list_items)

    async def image(self, snapshot: Snapshot, item_id: str) -> tuple[str, bytes]:
        """Return a hash of an item's image, and its file. Raise ItemNotFoundError or ImageUnavailableError."""
        row = row_of(snapshot, item_id)

        def read() -> tuple[str, bytes]:
            data = snapshot.artifact.image_bytes(row)
            return hashlib.blake2b(data, digest_size=16).hexdigest(), data

        with suppress(ArtifactError, OSError):
            async with self._admission(kind="pictures"):
                digest, data = await self.image_threads.run(read)
                if sniff_format(data) is not None:
                    return digest, data
        raise ImageUnavailableError

    async def check_image(self, snapshot: Snapshot, data: bytes) -> None:
        """Raise ImageError if an image may not become an item's, by the limits of queries and of index jobs."""
        async with self._admission(kind="pictures"):
            await self.compute.decode(data, snapshot.encoder.preprocess.decoder(), is_query=True)

    async def thumbnail(
        self, snapshot: Snapshot, item_id: str, side: int, thumbnail_format: ThumbnailFormat
    ) -> tuple[str, bytes]:
        """Return a name that changes with an item's image, and a thumbnail of it, from the cache or made now.

        An image that takes too much memory to decode is returned as it is. Errors are those of `image`.

        Args:
            side: pixels that its longer side has at most.
        """
        row, artifact = row_of(snapshot, item_id), snapshot.artifact

        try:
            async with self._admission(kind="pictures"):
                name = f"{await self.image_threads.run(artifact.image_key, row)}_{side}.{thumbnail_format}"
                data = self._thumbnails.use(name)
                if data is None:
                    source = await self.image_threads.run(artifact.image_bytes, row)
                    try:
                        make = partial(make_thumbnail, side=side, thumbnail_format=thumbnail_format)
                        data = await self.compute.decode(source, make)
                        self._thumbnails.keep(name, data)
                    except ImageError as error:
                        if error.fault != ImageFault.TOO_LARGE:
                            raise
                        data = source
                return name, data
        except (ArtifactError, ImageError, OSError):
            raise ImageUnavailableError from None

    async def examine(self, call: Callable[..., T], *args: Any) -> T:
        """Call a function that looks at all rows of a snapshot; one is called at a time."""
        async with self._admission():
            return await self.compute.run("filter", call, *args)


def _all_or_error(outcomes: Sequence[T | BaseException]) -> list[T]:
    results: list[T] = []
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, SearchError | ImageError):
            raise BatchQueryError(number, outcome)
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results
