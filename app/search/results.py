"""Results as they are sent: hits become dicts, whose types document the API and are the source of truth for clients.

A field that the query did not ask for is absent, not null.
"""

import re
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic needs these before Python 3.12
)
from urllib.parse import quote

from pydantic import Field
from typing_extensions import TypedDict

from app.search.errors import InvalidQueryError
from app.search.facets import FacetValue, facets_of
from app.search.hits import Hits, Level, Levels, find_hits
from app.search.pair_scoring import Compute, ResultExplanation, explain, rerank
from app.search.plan import Plan
from app.search.rows import ResultGroup, group_field
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats
from index_jobs.index.index_version import Item

MAX_PAGE_BYTES = 64 * 2**10  # of the texts of a page that is cached
_ABSOLUTE = re.compile(r"/|\\|file:|[A-Za-z]:[/\\]")


class Result(TypedDict):
    """One result. score: cosine of query and item, at most 1.

    level: likely if the score reaches `cutoff`, or if the item contains the words of a hybrid query; possible if it is
        high but no item has the query's words, or if there is no `cutoff`; else unlikely.
    width, height: of the upright image in pixels; null if the index does not know them.
    text_score: share of the query's words that the item contains, about 1 for all of them, more in short texts; hybrid
        results are sorted by both scores.
    rerank_score: `score` plus that of the second stage; re-ranked results are sorted by it.
    folded: ids of near-duplicates that this result stands for. metadata: the requested `fields` that the item has.
    """

    rank: Annotated[int, Field(examples=[1])]
    id: Annotated[str, Field(examples=["1f63f"])]
    score: Annotated[float, Field(examples=[0.4213])]
    level: Annotated[Level, Field(examples=["likely"])]
    caption: Annotated[str, Field(examples=["crying cat"])]
    category: Annotated[str, Field(examples=["cat face"])]
    image_url: Annotated[str, Field(examples=["/items/1f63f/image"])]
    width: Annotated[int | None, Field(examples=[72])]
    height: Annotated[int | None, Field(examples=[72])]
    metadata: NotRequired[dict[str, Any]]
    rerank_score: NotRequired[float]
    text_score: NotRequired[float]
    group: NotRequired[ResultGroup]
    folded: NotRequired[list[str]]
    explanation: NotRequired[ResultExplanation]


class SearchResponse(TypedDict):
    """Results, best first or sorted, and the index version that produced them.

    nothing_fits: true if a cut-off is known for the query and no result is likely, on this page or before it.
    cutoff: the score of a likely result; absent if the index was not calibrated, and for other queries than by text.
    next_offset: start of the next page; absent on the last page. min_score: the cut-off that was applied.
    facets: the most frequent values of the requested fields.
    facets_approximate: true if `min_score` was applied to an approximate index, or to more items than are counted.
    count: number of matches of a sorted search, or of their groups. count_approximate: true if an approximate index may
        have missed some, or if only the best 10,000 are sorted.
    """

    index_version: int
    query_id: NotRequired[
        Annotated[str, Field(description="names the search in feedback; absent unless it is collected")]
    ]
    took_ms: Annotated[float, Field(description="milliseconds from the parsed query to the results")]
    cached: Annotated[bool, Field(description="true if the query's embedding came from the cache")]
    results: list[Result]
    nothing_fits: bool
    cutoff: NotRequired[float]
    next_offset: NotRequired[int]
    min_score: NotRequired[float]
    facets: NotRequired[dict[str, list[FacetValue]]]
    facets_approximate: NotRequired[bool]
    count: NotRequired[Annotated[int, Field(examples=[36])]]
    count_approximate: NotRequired[bool]


Page = tuple[SearchResponse, int]  # and the bytes of the texts in it


def cached_page(snapshot: Snapshot, plan: Plan, vector: Floats) -> Page | None:
    """Return a page that was made before, without facets."""
    key = plan.page_key(vector)
    return None if key is None else snapshot.pages.use(key)


def answer(snapshot: Snapshot, plan: Plan, vector: Floats, compute: Compute | None = None) -> Page:
    """Return a page of results.

    Args:
        vector: of the query, (E,); see `query_vector`.
        compute: runs the model for `rerank` and `explain`. Default: in this thread.

    Raises:
        SearchError: the index keeps no vectors or words, or images are missing.
    """
    import faiss

    faiss.omp_set_num_threads(1)  # of this thread: one query gains nothing, and the encoder needs the cores
    compute, hits, key = compute or Compute(), None, plan.page_key(vector)
    page = None if key is None else snapshot.pages.use(key)
    if page is None:
        with compute.timed("search"):
            hits = find_hits(snapshot, plan, vector)
        if plan.rerank_depth > plan.offset:
            with compute.timed("rerank"):
                hits = rerank(compute, snapshot, plan, hits)
        page = make_page(snapshot, plan, hits)
        if plan.explained:
            with compute.timed("explain"):
                explain(compute, snapshot, plan, vector, hits, page[0]["results"])
        if key is not None and page[1] <= MAX_PAGE_BYTES:
            snapshot.pages.keep(key, page)
    if not plan.facets:
        return page
    facets, is_exact = facets_of(snapshot, plan, vector, hits)
    body: SearchResponse = {**page[0], "facets": facets}
    if not is_exact:
        body["facets_approximate"] = True
    return body, page[1] + sum(len(str(each["value"])) for facet in facets.values() for each in facet)


def make_page(snapshot: Snapshot, plan: Plan, hits: Hits) -> Page:
    """Return the page of a plan's hits. Raise InvalidQueryError if its texts take more than the plan's `max_bytes`."""
    item, places = snapshot.artifact.item, range(plan.offset, min(plan.end, len(hits.found.rows)))
    rows = hits.found.rows[plan.offset : plan.end].tolist()
    items = [item(row) for row in rows]
    size = sum(each.text_bytes + (each.metadata_bytes if plan.fields else 0) for each in items)
    if size > plan.max_bytes:
        message = f"the texts and metadata take more than {plan.max_bytes // 2**10:,} KiB; "
        raise InvalidQueryError("k", message + "request fewer results at a time, or leave `fields` out")
    groups = group_field(snapshot, plan.group_by).shown(rows, plan.allowed) if plan.group_by else []
    results = [_result(plan, hits, place, each) for place, each in zip(places, items, strict=True)]
    for result, group in zip(results, groups, strict=False):
        result["group"] = group
    for result, place in zip(results, places if hits.folded else (), strict=False):
        if len(near := hits.folded[place]):
            result["folded"] = [item(row).id for row in near.tolist()]
            size += sum(map(len, result["folded"]))
    body: SearchResponse = {
        "index_version": snapshot.version,
        "took_ms": 0.0,
        "cached": False,
        "nothing_fits": hits.nothing_fits,
        "results": results,
    }
    if plan.next_offset is not None and len(hits.found.rows) > plan.end:
        body["next_offset"] = plan.next_offset
    if plan.min_score is not None:
        body["min_score"] = plan.min_score
    if hits.levels is not None:
        body["cutoff"] = hits.levels.likely
    if hits.count is not None:
        body["count"] = hits.count
        if not hits.is_exact:
            body["count_approximate"] = True
    return body, size


def _result(plan: Plan, hits: Hits, place: int, item: Item) -> Result:
    """Return the result at a place of the hits. Scores have six digits."""
    row, score, text_score, _ = (part[place].item() for part in hits.found)
    result: Result = {
        "rank": place + 1,
        "id": item.id,
        "score": round(score, 6),
        "level": (hits.levels or Levels()).level_of(score, text_score),
        "caption": item.caption,
        "category": item.category,
        "image_url": image_url(plan.items_path, item.id),
        "width": item.width,
        "height": item.height,
    }
    if plan.fields:
        metadata = public_metadata(item)
        wanted = metadata if "*" in plan.fields else plan.fields
        result["metadata"] = {name: metadata[name] for name in wanted if name in metadata}
    if plan.words_weight:
        result["text_score"] = round(text_score, 6)
    if row in hits.rerank_scores:
        result["rerank_score"] = round(hits.rerank_scores[row], 6)
    return result


def image_url(items_path: str, item_id: str) -> str:
    return f"{items_path}/{quote(item_id, safe='')}/image"


def public_metadata(item: Item) -> dict[str, Any]:
    """Return the metadata of an item. An absolute `file_name`, as in a list of files, is cut to its last part."""
    metadata = item.metadata
    place = metadata.get("file_name")
    if not isinstance(place, str) or not _ABSOLUTE.match(place):
        return metadata
    name = re.split(r"[/\\]", place)[-1]
    return {field: name if value == place else value for field, value in metadata.items()}
