"""The query path: from a query to ranked items.

    query -> plan (`planning`) -> vectors of its parts (`embedding`) -> one vector (`query.compose`) -> rows (`ranking`)
    -> re-ranking and explanations, where requested (`pair_scoring`) -> items

- A search that takes less time than handing it to a thread runs in the event loop; all others run in threads.
- A search uses one `Snapshot` from beginning to end, whatever is published meanwhile.
- At most `max_pending` searches are in progress; more are refused at once, like those the batcher has no room for. Each
  search has a deadline, and cancelled work is skipped.
- Images of items have the same limits and their own threads: a gallery may be a slow disk or another machine, and no
  search waits for it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.threads import ComputeThreads
from app.search.batching import Admission
from app.search.embedding import Embedder
from app.search.embedding_cache import MemoryCache
from app.search.errors import BatchQueryError, SearchError
from app.search.gallery_images import ItemImages
from app.search.pair_scoring import PairScorer
from app.search.planning import Plan, make_plan, matches_of, no_results, rank_rows, ranking_key, row_of
from app.search.query import Explanation, ItemPage, Match, Query, QueryPart, SearchResults, compose
from app.search.ranking.facets import count_facets
from app.search.ranking.groups import group_field
from app.search.ranking.rank import RankedRow
from app.search.ranking.rows import filter_mask, mask_key, row_vectors
from app.search.snapshots import Snapshot, drop_oldest
from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ImageError
from dcar_core.util.machine import available_cores
from index_jobs.store.artifact import Item

T = TypeVar("T")

_QUICK_DEPTH = 50  # results of a search that may run in the event loop, or be cached
_MAX_RANKINGS = 1000  # cached for one version, about 8 kB each
_IMAGE_THREADS = 8


class Retriever:
    """Search snapshots. One per process."""

    def __init__(self, settings: Settings, cache: MemoryCache, metrics: Metrics) -> None:
        self._metrics = metrics
        self._settings = settings
        self._admission = Admission(settings, metrics)
        self._embedder = Embedder(settings, cache, self._metrics)
        threads = min(4, available_cores())
        self._search_threads = ComputeThreads(threads, "dcar-search")
        self._filter_thread = ComputeThreads(1, "dcar-filter")
        self.image_threads = ThreadPoolExecutor(_IMAGE_THREADS, "dcar-image")
        self.require_room = self._embedder.require_room
        self._pairs = PairScorer(self._embedder, self.image_threads)
        self.images = ItemImages(settings, self._embedder, self._admission, self.image_threads)

    @property
    def fault(self) -> str | None:
        """Why no search works; None if they do."""
        return self._embedder.fault

    def start(self) -> None:
        """Begin to work. The event loop must be running."""
        self._embedder.start()

    async def close(self) -> None:
        """Finish the accepted work, then release threads and connections."""
        await self._embedder.close()
        self._search_threads.shutdown()
        self._filter_thread.shutdown(cancel_futures=True)
        self.image_threads.shutdown(wait=False, cancel_futures=True)

    async def search(self, snapshot: Snapshot, query: Query) -> SearchResults:
        """Return the matches of a query.

        Raises:
            ImageError: the image cannot be read; the message is the reason.
            SearchError: the search failed.
        """
        for text in (query.text, query.without_text):
            if text:
                self._embedder.require_room_for(snapshot, text)
        async with self._admission():
            return await self._search(snapshot, query)

    async def search_batch(self, snapshot: Snapshot, queries: Sequence[Query]) -> list[SearchResults]:
        """Return the matches of several queries, all from one version. Raise BatchQueryError if one search failed."""
        has_long_queries = any(query.options.rerank or query.options.explain for query in queries)
        slots = asyncio.Semaphore(1 if has_long_queries else len(queries))  # all at once they would fill the queue
        filter_turn = asyncio.Lock()

        async def search(query: Query) -> SearchResults:
            async with slots:
                return await self._search(snapshot, query, filter_turn)

        async with self._admission(len(queries)):
            outcomes = await asyncio.gather(*map(search, queries), return_exceptions=True)
        return _all_or_error(outcomes)

    async def embed(self, snapshot: Snapshot, inputs: Sequence[str | bytes]) -> list[Floats]:
        """Return the vectors (E,) of normalised texts and image files. Raise BatchQueryError if one has none."""
        async with self._admission(len(inputs)):
            embed = self._embedder
            outcomes = await asyncio.gather(
                *(embed.text(snapshot, x) if isinstance(x, str) else embed.image(snapshot, x) for x in inputs),
                return_exceptions=True,
            )
        return [vector for vector, _ in _all_or_error(outcomes)]

    async def item(self, snapshot: Snapshot, item_id: str) -> Item:
        """Return an item. Raise ItemNotFoundError if no item has this id."""
        return await self._search_threads.run(snapshot.artifact.item, row_of(snapshot, item_id))

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
            return await self._search_threads.run(list_items, await self._mask(snapshot, filter, asyncio.Lock()))

    async def examine(self, call: Callable[..., T], *args: Any) -> T:
        """Call a function that looks at all rows of a snapshot; one is called at a time."""
        async with self._admission():
            return await self._filter_thread.run(call, *args)

    async def _search(self, snapshot: Snapshot, query: Query, filter_turn: asyncio.Lock | None = None) -> SearchResults:
        started = time.perf_counter()
        options, turn = query.options, filter_turn or asyncio.Lock()
        if not snapshot.artifact.rows:
            if query.image is not None:
                await self._embedder.image(snapshot, query.image, options.crop)  # a broken one is an error
            return no_results(query)
        plan = make_plan(snapshot, query, self._settings)
        vector, is_cached = await self._query_vector(snapshot, plan)
        mask = await self._mask(snapshot, options.filter, turn)
        ranked, matches = await self._rank(snapshot, plan, vector, mask)
        if plan.rerank_depth > options.offset:
            with self._metrics.timed("rerank"):
                best, rest = ranked[: plan.rerank_depth], ranked[plan.rerank_depth :]
                ranked = await self._pairs.rerank(snapshot, query.text, best) + rest
        page = ranked[options.offset : plan.end]
        explanations: list[Explanation | None] = []
        if options.explain:
            with self._metrics.timed("explain"):
                explained = page[: self._settings.explain_results]
                explanations = await self._pairs.explain(snapshot, query.text, vector, explained)
        if matches is None:
            matches = await self._search_threads.run(matches_of, snapshot, plan, page, mask, explanations)
        facets, has_exact_facets = None, True
        if options.facets:
            count = partial(count_facets, snapshot, options.facets, vector, options.filter)
            async with turn:
                facets, has_exact_facets = await self._filter_thread.run(count, plan.min_score, plan.group_by)
        has_next = len(ranked) > plan.end and plan.end + options.k <= self._settings.max_window
        return SearchResults(
            version=snapshot.version,
            matches=matches,
            is_cached=is_cached,
            took_ms=(time.perf_counter() - started) * 1000,
            offset=options.offset,
            next_offset=plan.end if has_next else None,
            min_score=plan.min_score,
            fields=options.fields,
            facets=facets,
            has_exact_facets=has_exact_facets,
        )

    async def _query_vector(self, snapshot: Snapshot, plan: Plan) -> tuple[Floats, bool]:
        """Return the vector (E,) of the query, and True if all of its embeddings were cached."""
        weights, query = plan.options.weights, plan.query
        weighted = [(weights.text, query.text), (-weights.without, query.without_text)]
        texts = [(weight, text) for weight, text in weighted if text]
        if len(texts) == 1:  # the usual case, without the cost of gather
            embeddings = [await self._embedder.text(snapshot, texts[0][1])]
        else:  # in one forward pass
            embeddings = await asyncio.gather(*(self._embedder.text(snapshot, text) for _, text in texts))
        parts = [QueryPart(weight, vector) for (weight, _), (vector, _) in zip(texts, embeddings, strict=True)]
        is_cached = all(cached for _, cached in embeddings)
        if query.image is not None:
            vector, is_image_cached = await self._embedder.image(snapshot, query.image, query.options.crop)
            parts.append(QueryPart(weights.image, vector))
            is_cached &= is_image_cached
        for weight, rows in ((weights.more, plan.more_rows), (-weights.less, plan.less_rows)):
            if rows:
                vectors = await self._search_threads.run(row_vectors, snapshot.artifact, rows)
                parts.append(QueryPart(weight, vectors.mean(0)))
        return compose(parts), is_cached and bool(query.text or query.image)

    async def _mask(self, snapshot: Snapshot, filter: dict[str, Any] | None, turn: asyncio.Lock) -> Mask | None:
        """Return the rows that fulfil a filter; None if there is no filter or no row.

        Masks are computed in one thread, so an expensive filter delays no search without a filter.

        Args:
            turn: shared by the queries of one request, so the request queues one filter, or count of facets, at a time.
        """
        if not filter or not snapshot.artifact.rows:
            return None
        mask = snapshot.masks.get(mask_key(filter))
        if mask is None:
            async with turn:
                mask = await self._filter_thread.run(filter_mask, snapshot, filter)
        return mask

    async def _rank(
        self, snapshot: Snapshot, plan: Plan, vector: Floats, mask: Mask | None
    ) -> tuple[list[RankedRow], list[Match] | None]:
        """Return the ranked rows up to the next page, and the matches of this page.

        The matches are None if re-ranking or explanations are still to change them. Only short rankings without a
        filter, folding or groups are cached.
        """
        options = plan.options
        is_final = not (plan.rerank_depth or options.explain)
        is_short = plan.end <= _QUICK_DEPTH and not (options.filter or options.fold or plan.group_by)
        is_quick = is_short and snapshot.is_quick and not plan.hybrid
        key = ranking_key(plan, vector) if is_short else None
        cached = snapshot.rankings.get(key)

        def search() -> tuple[list[RankedRow], list[Match] | None]:
            _use_one_faiss_thread()
            ranked = rank_rows(snapshot, plan, vector, mask) if cached is None else cached
            return ranked, matches_of(snapshot, plan, ranked[options.offset : plan.end], mask) if is_final else None

        with self._metrics.timed("search"):
            found = search() if is_quick or cached is not None else await self._search_threads.run(search)
        if key is not None and cached is None:
            snapshot.rankings[key] = found[0]
            drop_oldest(snapshot.rankings, min(self._settings.cache_size, _MAX_RANKINGS))
        return found


def _all_or_error(outcomes: Sequence[T | BaseException]) -> list[T]:
    results: list[T] = []
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, SearchError | ImageError):
            raise BatchQueryError(number, outcome)
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


def _use_one_faiss_thread() -> None:
    """One query gains nothing from more threads, which would take cores from the encoder. The setting is per thread."""
    import faiss

    faiss.omp_set_num_threads(1)
