"""The path of every search: a query becomes a plan, a vector, ranked rows and items.

- A search uses one `Snapshot` from beginning to end, whatever is published meanwhile.
- It awaits nothing but its `Compute`. The base class waits for nothing, so `Index` needs no event loop.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from app.core.settings import Settings
from app.search import pair_scoring
from app.search.compute import Compute
from app.search.errors import InvalidQueryError
from app.search.facets import Facet, count_facets
from app.search.plan import Plan, compose, make_plan
from app.search.query import Match, Query, SearchResults, normalize
from app.search.rank import judge, rank
from app.search.rows import filter_rows, group_field, mask_key, rank_groups, row_vectors
from app.search.snapshots import Snapshot, load_snapshot
from app.search.sorting import Found, sort_matches
from dcar_core.serving import encoder_cache
from dcar_core.serving.encoder import TextRow, encode_text_rows
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ImageError
from index_jobs.index.versions import open_current, open_version, published_index
from index_jobs.row_filter import RowFilter

MAX_PAGE_BYTES = 64 * 2**10  # of the texts of a page that is cached
_BATCH = 64  # texts that are encoded at a time


async def search(
    compute: Compute, snapshot: Snapshot, query: Query, image: bytes | None, settings: Settings
) -> SearchResults:
    """Return the matches of a query.

    Args:
        image: the file of an image that belongs to the query.
        settings: limits of re-ranking, explanations and paging.

    Raises:
        ImageError: the image cannot be read; the message is the reason.
        SearchError: the search failed.
    """
    started = time.perf_counter()
    facets: dict[str, Facet] | None = None
    plan = make_plan(snapshot, query, settings, has_image=image is not None)
    if not snapshot.artifact.rows:
        if image is not None:
            await compute.image(snapshot, image, query.crop)  # a broken one is an error
        facets = {name: [] for name in query.facets} or None
        count = 0 if query.sort else None
        return SearchResults(0, [], offset=query.offset, min_score=plan.min_score, facets=facets, count=count)
    vector, is_cached = await _query_vector(compute, snapshot, plan, image)
    allowed = await find_rows(compute, snapshot, query.filter)
    key = plan.page_key(vector)
    results: SearchResults | None = snapshot.pages.use(key)
    if results is None:
        results = await _find(compute, snapshot, plan, vector, allowed, settings)
        if key is not None and sum(match.item.text_bytes for match in results.matches) <= MAX_PAGE_BYTES:
            snapshot.pages.keep(key, results)
    if query.facets and not query.sort:
        given = query.facets, query.filter, plan.group_by, vector, plan.min_score
        facets, has_exact_facets = await compute.run("filter", count_facets, snapshot, *given)
        results = replace(results, facets=facets, has_exact_facets=has_exact_facets)
    return replace(results, is_cached=is_cached, took_ms=(time.perf_counter() - started) * 1000, fields=query.fields)


async def find_rows(compute: Compute, snapshot: Snapshot, filter: dict[str, Any] | None) -> RowFilter | None:
    """Return the rows that fulfil a filter; None if there is no filter or no row."""
    if not filter or not snapshot.artifact.rows:
        return None
    allowed = snapshot.masks.use(mask_key(filter))
    if allowed is None:
        allowed = await compute.run("filter", filter_rows, snapshot, filter)
    return allowed


async def _query_vector(compute: Compute, snapshot: Snapshot, plan: Plan, image: bytes | None) -> tuple[Floats, bool]:
    """Return the vector (E,) of the query, and True if all of its embeddings were cached."""
    query, weights = plan.query, plan.query.weights
    texts = [(w, text) for w, text in ((weights.text, query.query), (-weights.without, query.without)) if text]
    embeddings = await compute.query_texts(snapshot, [text for _, text in texts])
    if plan.is_judged and weights.text:  # a text alone
        return embeddings[0]
    parts = [(weight, vector) for (weight, _), (vector, _) in zip(texts, embeddings, strict=True)]
    is_cached = all(cached for _, cached in embeddings)
    if image is not None:
        vector, is_image_cached = await compute.image(snapshot, image, query.crop)
        parts.append((weights.image, vector))
        is_cached &= is_image_cached
    for weight, rows in ((weights.more, plan.more_rows), (-weights.less, plan.less_rows)):
        if rows:
            parts.append((weight, (await compute.run("search", row_vectors, snapshot.artifact, rows)).mean(0)))
    return compose(parts), is_cached and bool(query.query or image)


async def _find(
    compute: Compute, snapshot: Snapshot, plan: Plan, vector: Floats, allowed: RowFilter | None, settings: Settings
) -> SearchResults:
    query = plan.query
    with compute.timed("search"):  # sorting, which may take long, is in the thread of filters
        given = _find_matches, snapshot, plan, vector, allowed
        ranked, facts = await compute.run("filter" if query.sort else "search", *given)
    if plan.rerank_depth > query.offset:
        with compute.timed("rerank"):
            best, rest = ranked[: plan.rerank_depth], ranked[plan.rerank_depth :]
            ranked = await pair_scoring.rerank(compute, snapshot, query.query, best) + rest
        await compute.run("search", _describe, snapshot, plan, ranked, allowed)
    page = ranked[query.offset : plan.end]
    if query.explain:
        with compute.timed("explain"):
            await pair_scoring.explain(compute, snapshot, query.query, vector, page[: settings.explain_results])
    has_next = len(ranked) > plan.end and plan.end + query.k <= settings.max_window
    following = plan.end if has_next else None
    return SearchResults(
        snapshot.version, page, offset=query.offset, next_offset=following, min_score=plan.min_score, **facts
    )


def _find_matches(snapshot: Snapshot, plan: Plan, vector: Floats, allowed: RowFilter | None) -> Found:
    """Return the matches up to the next page, those of the page with items, and other fields of the results."""
    import faiss

    faiss.omp_set_num_threads(1)  # of this thread: one query gains nothing, and the encoder needs the cores
    if plan.query.sort:
        ranked, facts = sort_matches(snapshot, plan, vector, allowed)
    else:
        ranked = rank_rows(snapshot, plan, vector, allowed)
        cutoff = judge(snapshot.artifact, plan, ranked)
        nothing_fits = cutoff is not None and all(match.level != "likely" for match in ranked)
        facts = {"cutoff": cutoff, "nothing_fits": nothing_fits}
    _describe(snapshot, plan, ranked, allowed)
    return ranked, facts


def rank_rows(snapshot: Snapshot, plan: Plan, vector: Floats, allowed: RowFilter | None) -> list[Match]:
    """Return the ranked rows, or the best row of each group, up to the next page."""
    if not plan.group_by:
        return rank(snapshot.artifact, vector, plan, plan.depth, allowed)
    groups = group_field(snapshot, plan.group_by)
    if plan.excluded_rows:  # a mask costs less: excluded rows widen the search
        allowed = groups.outside(groups.codes[np.fromiter(plan.excluded_rows, np.int64)], allowed)
        plan = replace(plan, excluded_rows=frozenset())
    return rank_groups(partial(rank, snapshot.artifact, vector, plan), plan.depth, groups, allowed)


def _describe(snapshot: Snapshot, plan: Plan, ranked: list[Match], allowed: RowFilter | None) -> None:
    """Add items and groups to the matches of the page."""
    item, page = snapshot.artifact.item, ranked[plan.query.offset : plan.end]
    for match in page:
        match.item, match.folded = item(match.row), [item(row).id for row in match.near]
    if plan.group_by:
        groups = group_field(snapshot, plan.group_by).shown([match.row for match in page], allowed)
        for match, group in zip(page, groups, strict=True):
            match.group = group


class Index:
    """One version of an index, with its model, opened in this process. Many threads may share it.

    Attributes:
        snapshot: the version; see `Snapshot`.
    """

    def __init__(self, snapshot: Snapshot, settings: Settings) -> None:
        self.snapshot = snapshot
        self._settings, self._compute = settings, Compute()

    @classmethod
    def open(cls, path: str | Path, *, device: str = "auto", runtime: str = "", version: int | None = None) -> "Index":
        """Open a version of an index.

        Args:
            path: directory or URL of the published index.
            device: auto, cpu, cuda, cuda:1 or mps.
            runtime: of the encoder; see `Encoder.load`. Default: auto if the encoder was exported here before, else
                PyTorch.
            version: its number. Default: the current one.

        Raises:
            DcarError: the index or its checkpoint is missing or broken.
        """
        index = published_index(path, version)
        if not runtime:
            artifact = open_current(index) if version is None else open_version(index, version)
            is_cached = encoder_cache.has_entry(artifact.checkpoint, artifact.manifest.spec.fingerprint, device)
            runtime = "auto" if is_cached else "torch"
        settings = Settings.model_construct(index=index, device=device, runtime=runtime)  # not of the environment
        return cls(load_snapshot(settings.index, settings, version=version, warm_up=False), settings)

    def search(self, query: str = "", *, image: str | Path | bytes | None = None, **options: Any) -> SearchResults:
        """Return the matches of a text, an image, items of the gallery, or all of them.

        Args:
            query: what the image shows.
            image: an image file, or its bytes.
            options: the other fields of `Query`: k, filter, more_like, without, hybrid, rerank, ...

        Raises:
            ImageError: the image cannot be read.
            SearchError: the search failed; an `InvalidQueryError` names the field.
        """
        try:
            checked = Query(query=query, **options)
        except ValidationError as error:
            fault = error.errors()[0]
            field = ".".join(str(place) for place in fault["loc"]) or "query"
            message = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden" and fault["loc"] == (field,):
                message = f"unknown option; there are: {', '.join(sorted(Query.model_fields))}"
            raise InvalidQueryError(field, message) from None
        try:
            data = Path(image).read_bytes() if isinstance(image, str | Path) else image
            steps = search(self._compute, self.snapshot, checked, data, self._settings)
            steps.send(None)  # it waits for nothing, so it needs no event loop
        except StopIteration as end:
            results: SearchResults = end.value
            return results
        except (OSError, ImageError) as error:
            if isinstance(image, str | Path):
                reason = error.strerror if isinstance(error, OSError) else error
                raise ImageError(f"{image}: {reason}") from error
            raise
        raise RuntimeError("the search waits for something")

    def search_each(self, queries: Sequence[str], **options: Any) -> Iterator[SearchResults]:
        """Yield the matches of each text, as `search` finds them; the texts are encoded in batches."""
        for start in range(0, len(queries), _BATCH):
            batch = queries[start : start + _BATCH]
            rows = [TextRow(self.snapshot.encoder, normalize(query)) for query in batch]
            self._compute.encoded = {row.text: vector for row, vector in zip(rows, encode_text_rows(rows), strict=True)}
            yield from (self.search(query, **options) for query in batch)
