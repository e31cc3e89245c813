"""The searches of the service: `app.search.engine` within limits on the work in progress.

- At most `max_pending` searches are in progress; more are refused at once, like those the batcher has no room for. Each
  search has a deadline, and cancelled work is skipped.
- Images of items have the same limits.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.search import engine
from app.search.errors import BatchQueryError, SearchError
from app.search.plan import row_of
from app.search.query import ItemPage, Query, SearchResults
from app.search.ranking.groups import group_field
from app.search.snapshots import Snapshot
from app.service.batching import Admission, together
from app.service.compute import SharedCompute
from app.service.embedding_cache import MemoryCache
from app.service.gallery_images import ItemImages
from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ImageError
from index_jobs.store.artifact import Item

T = TypeVar("T")


class Retriever:
    """Search snapshots. One per process."""

    def __init__(self, settings: Settings, cache: MemoryCache, metrics: Metrics) -> None:
        self._settings = settings
        self._admission = Admission(settings, metrics)
        self.compute = SharedCompute(settings, cache, metrics)
        self.start, self.close = self.compute.start, self.compute.close
        self.require_room = self.compute.require_room
        self.images = ItemImages(settings, self.compute, self._admission)

    @property
    def fault(self) -> str | None:
        """Why no search works; None if they do."""
        return self.compute.fault

    async def search(self, snapshot: Snapshot, query: Query, image: bytes | None = None) -> SearchResults:
        """Return the matches of a query; see `engine.search`."""
        async with self._admission():
            return await engine.search(self.compute, snapshot, query, image, self._settings)

    async def search_batch(
        self, snapshot: Snapshot, queries: Sequence[tuple[Query, bytes | None]]
    ) -> list[SearchResults]:
        """Return the matches of queries with their images. Raise BatchQueryError if one search failed."""
        has_long_queries = any(query.rerank or query.explain for query, _ in queries)
        slots = asyncio.Semaphore(1 if has_long_queries else len(queries))  # all at once they would fill the queue

        async def search(query: Query, image: bytes | None) -> SearchResults:
            async with slots:
                return await engine.search(self.compute, snapshot, query, image, self._settings)

        async with self._admission(len(queries)):
            with together():
                outcomes = await asyncio.gather(*(search(*each) for each in queries), return_exceptions=True)
        return _all_or_error(outcomes)

    async def embed(self, snapshot: Snapshot, inputs: Sequence[str | bytes]) -> list[Floats]:
        """Return the vectors (E,) of normalized texts and image files. Raise BatchQueryError if one has none."""
        async with self._admission(len(inputs)):
            embed = self.compute
            with together():
                outcomes = await asyncio.gather(
                    *(embed.text(snapshot, x) if isinstance(x, str) else embed.image(snapshot, x) for x in inputs),
                    return_exceptions=True,
                )
        return [vector for vector, _ in _all_or_error(outcomes)]

    async def item(self, snapshot: Snapshot, item_id: str) -> Item:
        """Return an item. Raise ItemNotFoundError if no item has this id."""
        return await self.compute.run("search", snapshot.artifact.item, row_of(snapshot, item_id))

    async def items(
        self,
        snapshot: Snapshot,
        filter: dict[str, Any] | None,
        offset: int,
        count: int,
        order: Rows | None = None,
        group_by: str | None = None,
    ) -> ItemPage:
        """Return a page of the items that fulfil a filter, the first one of each group.

        Args:
            order: all rows in the wanted order; None for the order of the index.
            group_by: "" for every item, None for the index's own field.

        Raises:
            InvalidQueryError: the filter or `group_by` does not fit the index.
        """
        name = snapshot.artifact.manifest.group_field if group_by is None else group_by

        def list_items(mask: Mask | None) -> ItemPage:
            chosen = snapshot.artifact.live if mask is None else mask
            rows = np.flatnonzero(chosen) if order is None else order[chosen[order]]
            if name and len(rows):
                rows = group_field(snapshot, name).first_rows(rows)
            items = [snapshot.artifact.item(int(row)) for row in rows[offset : offset + count]]
            next_offset = offset + count if len(rows) > offset + count else None
            return ItemPage(snapshot.version, len(rows), items, next_offset)

        async with self._admission():
            mask = await engine.find_mask(self.compute, snapshot, filter)
            return await self.compute.run("search", list_items, mask)

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
