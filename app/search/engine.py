"""The path of every search: a query becomes a plan, a vector, ranked rows and items.

- A search uses one `Snapshot` from beginning to end, whatever is published meanwhile.
- It awaits nothing but its `Compute`. With `Direct` it needs no event loop: see `app.search.index`.
"""

import time
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

from app.core.settings import Settings
from app.search import pair_scoring
from app.search.compute import Compute
from app.search.plan import Plan, compose, make_plan
from app.search.query import Explanation, Match, Query, SearchResults
from app.search.ranking.facets import count_facets
from app.search.ranking.groups import group_field, rank_groups
from app.search.ranking.levels import Levels, find_levels
from app.search.ranking.rank import RankedRow, rank
from app.search.ranking.rows import filter_mask, mask_key, row_vectors
from app.search.snapshots import Snapshot, drop_oldest
from dcar_core.util.arrays import Floats, Mask

_QUICK_DEPTH = 50  # results of a search that may run in the event loop, or be cached
_MAX_RANKINGS = 1000  # cached for one version, about 8 kB each
_CACHED_OPTIONS = frozenset(
    {"query", "k", "offset", "hybrid", "min_score", "more_like", "less_like"}  # in `Plan.ranking_key`
    | {"without", "weights", "crop", "fields", "facets", "rerank", "explain"}  # in the vector, or not in the ranking
)


async def search(
    compute: Compute,
    snapshot: Snapshot,
    query: Query,
    image: bytes | None,
    settings: Settings,
) -> SearchResults:
    """Return the matches of a query.

    Args:
        image: the file of an image that belongs to the query.
        settings: limits of re-ranking, explanations, paging and the cache of rankings.

    Raises:
        ImageError: the image cannot be read; the message is the reason.
        SearchError: the search failed.
    """
    started = time.perf_counter()
    plan = make_plan(snapshot, query, settings, has_image=image is not None)
    if not snapshot.artifact.rows:
        if image is not None:
            await compute.image(snapshot, image, query.crop)  # a broken one is an error
        none: dict[str, list[dict[str, Any]]] = {name: [] for name in query.facets}
        return SearchResults(0, [], offset=query.offset, min_score=plan.min_score, facets=none or None)
    vector, is_cached = await _query_vector(compute, snapshot, plan, image)
    mask = await find_mask(compute, snapshot, query.filter)
    ranked, levels, matches = await _rank(compute, snapshot, plan, vector, mask, settings)
    explanations: list[Explanation | None] = []
    if plan.rerank_depth > query.offset:
        with compute.timed("rerank"):
            best, rest = ranked[: plan.rerank_depth], ranked[plan.rerank_depth :]
            ranked = await pair_scoring.rerank(compute, snapshot, query.query, best) + rest
    page = ranked[query.offset : plan.end]
    if query.explain:
        with compute.timed("explain"):
            explained = page[: settings.explain_results]
            explanations = await pair_scoring.explain(compute, snapshot, query.query, vector, explained)
    if matches is None:
        matches = await compute.run("search", _matches, snapshot, plan, page, levels, mask, explanations)
    facets, has_exact_facets = None, True
    if query.facets:
        count = partial(count_facets, snapshot, query.facets, vector, query.filter)
        facets, has_exact_facets = await compute.run("filter", count, plan.min_score, plan.group_by)
    has_next = len(ranked) > plan.end and plan.end + query.k <= settings.max_window
    return SearchResults(
        version=snapshot.version,
        matches=matches,
        is_cached=is_cached,
        took_ms=(time.perf_counter() - started) * 1000,
        offset=query.offset,
        next_offset=plan.end if has_next else None,
        min_score=plan.min_score,
        cutoff=levels.cutoff,
        nothing_fits=levels.none_fits(ranked),
        fields=query.fields,
        facets=facets,
        has_exact_facets=has_exact_facets,
    )


async def find_mask(compute: Compute, snapshot: Snapshot, filter: dict[str, Any] | None) -> Mask | None:
    """Return the rows that fulfil a filter; None if there is no filter or no row."""
    if not filter or not snapshot.artifact.rows:
        return None
    mask = snapshot.masks.get(mask_key(filter))
    if mask is None:
        mask = await compute.run("filter", filter_mask, snapshot, filter)
    return mask


async def _query_vector(compute: Compute, snapshot: Snapshot, plan: Plan, image: bytes | None) -> tuple[Floats, bool]:
    """Return the vector (E,) of the query, and True if all of its embeddings were cached."""
    query, weights = plan.query, plan.query.weights
    texts = [
        (weight, text) for weight, text in ((weights.text, query.query), (-weights.without, query.without)) if text
    ]
    embeddings = await compute.query_texts(snapshot, [text for _, text in texts])
    parts = [(weight, vector) for (weight, _), (vector, _) in zip(texts, embeddings, strict=True)]
    is_cached = all(cached for _, cached in embeddings)
    if image is not None:
        vector, is_image_cached = await compute.image(snapshot, image, query.crop)
        parts.append((weights.image, vector))
        is_cached &= is_image_cached
    for weight, rows in ((weights.more, plan.more_rows), (-weights.less, plan.less_rows)):
        if rows:
            vectors = await compute.run("search", row_vectors, snapshot.artifact, rows)
            parts.append((weight, vectors.mean(0)))
    return compose(parts), is_cached and bool(query.query or image)


async def _rank(
    compute: Compute, snapshot: Snapshot, plan: Plan, vector: Floats, mask: Mask | None, settings: Settings
) -> tuple[list[RankedRow], Levels, list[Match] | None]:
    """Return the ranked rows up to the next page, the limits of their levels, and the matches of this page.

    The matches are None if re-ranking or explanations are still to change them. Only short rankings without groups are
    cached, of queries without other options than `_CACHED_OPTIONS`. A search that takes less time than handing it to a
    thread runs here.
    """
    query = plan.query
    is_final = not (plan.rerank_depth or query.explain)
    is_plain = not plan.group_by and query.model_fields_set <= _CACHED_OPTIONS
    is_short = plan.end <= _QUICK_DEPTH and is_plain
    is_quick = is_short and snapshot.is_quick and not plan.words_weight
    key = plan.ranking_key(vector) if is_short else None
    cached = snapshot.rankings.get(key)

    def find() -> tuple[list[RankedRow], Levels, list[Match] | None]:
        if cached is None:
            _use_one_faiss_thread()
            ranked = rank_rows(snapshot, plan, vector, mask)
            levels = find_levels(snapshot.artifact, plan, ranked)
        else:
            ranked, levels = cached
        page = ranked[query.offset : plan.end]
        return ranked, levels, _matches(snapshot, plan, page, levels, mask) if is_final else None

    with compute.timed("search"):
        found = find() if is_quick or cached is not None else await compute.run("search", find)
    if key is not None and cached is None:
        snapshot.rankings[key] = found[:2]
        drop_oldest(snapshot.rankings, min(settings.cache_size, _MAX_RANKINGS))
    return found


def rank_rows(snapshot: Snapshot, plan: Plan, vector: Floats, mask: Mask | None) -> list[RankedRow]:
    """Return the ranked rows, or the best row of each group, up to the next page."""
    if not plan.group_by:
        return rank(snapshot.artifact, vector, plan, plan.depth, mask)
    groups = group_field(snapshot, plan.group_by)
    if plan.excluded_rows:  # a mask costs less: excluded rows widen the search
        mask = groups.outside(groups.codes[[*plan.excluded_rows]], mask)
        plan = replace(plan, excluded_rows=frozenset())
    return rank_groups(partial(rank, snapshot.artifact, vector, plan), plan.depth, groups, mask)


def _matches(
    snapshot: Snapshot,
    plan: Plan,
    page: list[RankedRow],
    levels: Levels,
    mask: Mask | None,
    explanations: list[Explanation | None] | None = None,
) -> list[Match]:
    """Return the results of a page; explanations belong to the first of them."""
    item, rows = snapshot.artifact.item, [each.row for each in page]
    groups: list[tuple[Any, int]] = []
    if plan.group_by:
        field = group_field(snapshot, plan.group_by)
        groups = [(field.value(row), size) for row, size in zip(rows, field.sizes(rows, mask), strict=True)]
    return [
        Match(
            item=item(each.row),
            score=each.score,
            level=levels.of(each),
            folded=[item(row).id for row in each.folded],
            rerank_score=each.rerank_score,
            explanation=explanation,
            text_score=each.text_score,
            group=group,
        )
        for each, explanation, group in zip_longest(page, explanations or [], groups)
    ]


def _use_one_faiss_thread() -> None:
    """One query gains nothing from more threads, which would take cores from the encoder. The setting is per thread."""
    import faiss

    faiss.omp_set_num_threads(1)
