"""Results as they are sent: hits become dicts, whose types document the API and are the
source of truth for clients.

- A field that the query did not ask for is absent, not null.
- Facets tell how often each value of a field occurs among the rows that a query allows.
  A number with many values is counted in ranges of about equal size, a time by its
  year, a list once for each of its values, and a row without a value not at all. Each
  value can be used as a condition of a filter.
"""

import math
import re
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic needs these before Python 3.12
)
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from typing_extensions import TypedDict

from app.search.errors import InvalidQueryError
from app.search.hits import Hits, Level, find_hits, vector_candidates
from app.search.pair_scoring import Compute, ResultExplanation, explain, rerank
from app.search.query import Plan
from app.search.served_version import (
    GroupField,
    ResultGroup,
    ServedVersion,
    field_values,
    group_field,
    is_exact_index,
)
from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.index.index_version import IndexVersion, Item

MAX_PAGE_BYTES = 64 * 2**10  # of the texts of a page that is cached
MAX_VALUES = 100  # of one facet; the most frequent
MAX_SCORED = 10_000  # rows whose values are counted with a min_score
_SINGLE_NUMBERS = 20  # different numbers up to which each is counted
_RANGES = 10
_TIME = r"^\d{4}-\d\d-\d\dT"
_ABSOLUTE = re.compile(r"/|\\|file:|[A-Za-z]:[/\\]")


class Result(TypedDict):
    """One result. score: cosine of query and item, at most 1.

    level: likely if the score reaches `cutoff`, or if the item contains the words of a
        hybrid query; possible if it is high but no item has the query's words, or the
        query is an image; or if there is no `cutoff`; else unlikely.
    width, height: of the upright image in pixels; null if the index does not know them.
    text_score: share of the query's words that the item contains, about 1 for all of
    them, more in short texts; hybrid
        results are sorted by both scores.
    rerank_score: `score` plus that of the second stage; re-ranked results are sorted by
    it. folded: ids of near-duplicates that this result stands for. metadata: the
    requested `fields` that the item has.
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


class FacetValue(TypedDict):
    """A value of a field, and the number of items that have it; of numbers and times
    perhaps {"gte": 1, "lt": 5}.
    """

    value: Annotated[Any, Field(examples=["cat face"])]
    count: Annotated[int, Field(examples=[9])]


class SearchResponse(TypedDict):
    """Results, best first or sorted, and the index version that produced them.

    nothing_fits: true if a cut-off is known for the query and no result is likely, on
    this page or before it. cutoff: the score of a likely result; absent without
    calibration, and unless a text or an image alone is searched. next_offset: start of
    the next page; absent on the last page. min_score: the lowest score, if one was set.
    facets: the most frequent values of the requested fields. facets_approximate: true
    if `min_score` was applied to an approximate index, or to more items than are
    counted. count: number of matches of a sorted search, or of their groups.
    count_approximate: true if an approximate index may
        have missed some, or if only the best 10,000 are sorted.
    """

    index_version: int
    query_id: NotRequired[
        Annotated[
            str,
            Field(
                description=(
                    "names the search in feedback; absent unless it is collected"
                )
            ),
        ]
    ]
    took_ms: Annotated[
        float, Field(description="milliseconds from the parsed query to the results")
    ]
    cached: Annotated[
        bool, Field(description="true if the query's embedding came from the cache")
    ]
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


def cached_page(served: ServedVersion, plan: Plan, vector: Floats) -> Page | None:
    """Return a page that was made before."""
    key = plan.page_key(vector)
    return None if key is None else served.pages.use(key)


def answer(
    served: ServedVersion,
    plan: Plan,
    vector: Floats,
    compute: Compute | None = None,
) -> Page:
    """Return a page of results, and cache it.

    Args:
        vector: of the query, (E,); see `query_vector`.
        compute: runs the model for `rerank` and `explain`. Default: in this thread.

    Raises:
        SearchError: the index keeps no vectors or words, or images are missing.
    """
    import faiss

    # of this thread: one query gains nothing, and the encoder needs the cores
    faiss.omp_set_num_threads(1)
    compute = compute or Compute()
    hits = find_hits(served, plan, vector)
    if plan.rerank_depth > plan.offset:
        hits = rerank(compute, served, plan, hits)
    page = make_page(served, plan, vector, hits)
    if plan.explained:
        explain(compute, served, plan, vector, hits, page[0]["results"])
    if page[1] <= MAX_PAGE_BYTES and (key := plan.page_key(vector)) is not None:
        served.pages.keep(key, page)
    return page


def make_page(served: ServedVersion, plan: Plan, vector: Floats, hits: Hits) -> Page:
    """Return the page of a plan's hits. Raise InvalidQueryError if its texts take more
    than the plan's `max_bytes`.
    """
    item = served.index.item
    positions = range(plan.offset, min(plan.end, len(hits.rows)))
    rows = hits.rows[plan.offset : plan.end].tolist()
    items = [item(row) for row in rows]
    size = sum(
        item.text_bytes + (item.metadata_bytes if plan.fields else 0) for item in items
    )
    if size > plan.max_bytes:
        message = (
            f"the texts and metadata take more than {plan.max_bytes // 2**10:,} KiB; "
        )
        raise InvalidQueryError(
            "k", message + "request fewer results at a time, or leave `fields` out"
        )
    results = [
        _result(plan, hits, position, item)
        for position, item in zip(positions, items, strict=True)
    ]
    for name in served.index.computed.keys() & {*plan.fields}:
        column = served.index.column(name, hits.rows[plan.offset : plan.end])
        for result, values in zip(results, column.to_pylist(), strict=True):
            result["metadata"] |= {name: values} if values else {}
    if plan.group_by:
        groups = group_field(served, plan.group_by).shown(rows, plan.allowed)
    else:
        groups = []
    for result, group in zip(results, groups, strict=False):
        result["group"] = group
    for result, position in zip(
        results,
        positions if hits.folded else (),
        strict=False,
    ):
        if len(near := hits.folded[position]):
            result["folded"] = [item(row).id for row in near.tolist()]
            size += sum(map(len, result["folded"]))
    body: SearchResponse = {
        "index_version": served.version,
        "took_ms": 0.0,
        "cached": False,
        "nothing_fits": hits.nothing_fits,
        "results": results,
    }
    if plan.next_offset is not None and len(hits.rows) > plan.end:
        body["next_offset"] = plan.next_offset
    if plan.min_score is not None:
        body["min_score"] = plan.min_score
    if hits.likely < math.inf:
        body["cutoff"] = hits.likely
    if hits.count is not None:
        body["count"] = hits.count
        if not hits.is_exact:
            body["count_approximate"] = True
    if plan.facets:
        body["facets"], is_exact = facets_of(served, plan, vector, hits)
        size += sum(
            len(str(entry["value"]))
            for facet in body["facets"].values()
            for entry in facet
        )
        if not is_exact:
            body["facets_approximate"] = True
    return body, size


def _result(plan: Plan, hits: Hits, position: int, item: Item) -> Result:
    """Return the result at a position of the hits. Scores have six digits."""
    result: Result = {
        "rank": position + 1,
        "id": item.id,
        "score": round(hits.cosines[position].item(), 6),
        "level": hits.level(position),
        "caption": item.caption,
        "category": item.category,
        "image_url": image_url(plan.items_path, item.id),
        "width": item.width,
        "height": item.height,
    }
    if plan.fields:
        metadata = public_metadata(item)
        wanted = metadata if "*" in plan.fields else plan.fields
        result["metadata"] = {
            name: metadata[name] for name in wanted if name in metadata
        }
    if plan.words_weight:
        result["text_score"] = round(hits.text_scores[position].item(), 6)
    if (score := hits.rerank_scores.get(hits.rows[position].item())) is not None:
        result["rerank_score"] = round(score, 6)
    return result


def image_url(items_path: str, item_id: str) -> str:
    return f"{items_path}/{quote(item_id, safe='')}/image"


def public_metadata(item: Item) -> dict[str, Any]:
    """Return the metadata of an item. An absolute `file_name`, as in a list of files,
    is cut to its last part.
    """
    metadata = item.metadata
    path = metadata.get("file_name")
    if not isinstance(path, str) or not _ABSOLUTE.match(path):
        return metadata
    name = re.split(r"[/\\]", path)[-1]
    return {
        field: name if value == path else value for field, value in metadata.items()
    }


def facets_of(
    served: ServedVersion,
    plan: Plan,
    vector: Floats,
    hits: Hits,
) -> tuple[dict[str, list[FacetValue]], bool]:
    """Return the facets of a plan, and False if they are approximate.

    With a `min_score`, those of the best `MAX_SCORED` rows count that reach it, as the
    index finds them.
    """
    index = served.index
    if not index.rows:
        return {name: [] for name in plan.facets}, True
    mask = index.live if plan.allowed is None else plan.allowed.mask
    rows = hits.matched
    is_exact = hits.is_exact
    if rows is None and plan.min_score is not None:
        near = vector_candidates(
            index,
            vector,
            min(MAX_SCORED, index.rows),
            plan.allowed,
        )
        rows = near.rows[near.reach(plan.min_score)]
        is_exact = len(rows) < MAX_SCORED and is_exact_index(index)
    if rows is not None:
        mask = np.zeros(index.rows, np.bool_)
        mask[rows] = True
    groups = group_field(served, plan.group_by) if plan.group_by else None
    return {
        name: count_values(index, name, mask, groups) for name in plan.facets
    }, is_exact


def count_values(
    index: IndexVersion,
    name: str,
    mask: Mask,
    groups: GroupField | None = None,
    limit: int = MAX_VALUES,
) -> list[FacetValue]:
    """Return the values of a field with their counts, the most frequent first; ranges
    and years in order.

    Args:
        mask: rows that are counted, bool (rows,).
        groups: count groups instead of rows.
    """
    rows = np.flatnonzero(mask)
    chosen = field_values(index, name, "facets").filter(pa.array(mask))
    is_list = pa.types.is_list(chosen.type)
    if is_list:
        rows = rows[pc.list_parent_indices(chosen).to_numpy()]
        chosen = pc.list_flatten(chosen)
    present = pc.is_valid(chosen).to_numpy(zero_copy_only=False)
    chosen = chosen.drop_null()
    rows = rows[present]
    are_times = _are_times(chosen[:1]) and _are_times(chosen)
    if are_times:
        chosen = pc.utf8_slice_codeunits(chosen, 0, 4)
    owners = rows if groups is None else groups.codes[rows]
    # a list may repeat a value, and a group has several rows
    if is_list or groups is not None:
        pairs = (
            pa.table({"value": chosen, "owner": owners})
            .group_by(["value", "owner"])
            .aggregate([])
        )
        chosen = pairs["value"]
        owners = pairs["owner"].to_numpy()
    if pa.types.is_floating(chosen.type) or pa.types.is_integer(chosen.type):
        numbers = chosen.to_numpy()
        is_finite = np.isfinite(numbers)
        if len(np.unique(numbers[is_finite])) > _SINGLE_NUMBERS:
            return _count_ranges(numbers[is_finite], owners[is_finite])
    counted = pc.value_counts(chosen)
    if len(counted) > limit:  # of texts, perhaps millions
        table = pa.table(
            {"count": counted.field("counts"), "text": counted.field("values")}
        )
        counted = counted.take(
            pc.select_k_unstable(
                table,
                limit,
                [("count", "descending"), ("text", "ascending")],
            )
        )
    if are_times:
        years = sorted(
            counted.to_pylist(), key=lambda entry: entry["values"], reverse=True
        )
        return [
            FacetValue(value=_within(entry["values"]), count=entry["counts"])
            for entry in years
        ]
    facet = [
        FacetValue(value=entry["values"], count=entry["counts"])
        for entry in counted.to_pylist()
    ]
    return sorted(facet, key=lambda entry: (-entry["count"], str(entry["value"])))


def _within(year: str) -> dict[str, str]:
    return {"gte": year, "lt": f"{int(year) + 1:04}"}


def _are_times(values: pa.ChunkedArray) -> bool:
    return bool(
        pa.types.is_string(values.type)
        and pc.all(pc.match_substring_regex(values, _TIME)).as_py()
    )


def _count_ranges(numbers: Any, owners: Rows) -> list[FacetValue]:
    """Return ranges between deciles, with the number of different owners in each; the
    last one includes its end.
    """
    edges = np.unique(
        np.quantile(numbers, np.linspace(0, 1, _RANGES + 1), method="nearest")
    )
    positions = np.minimum(np.searchsorted(edges, numbers, "right"), len(edges) - 1) - 1
    keys = np.sort(owners * len(edges) + positions)  # np.unique takes many times longer
    counts = np.bincount(
        keys[np.diff(keys, prepend=-1) > 0] % len(edges), minlength=len(edges) - 1
    )
    facet: list[FacetValue] = []
    for low, high, count in zip(
        edges[:-1].tolist(),
        edges[1:].tolist(),
        counts.tolist(),
        strict=True,
    ):
        end = "lte" if high == edges[-1] else "lt"
        facet.append(FacetValue(value={"gte": low, end: high}, count=count))
    return facet
