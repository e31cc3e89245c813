"""Facets: how often each value of a field occurs among the rows that a query allows.

- A number with many values is counted in ranges of about equal size. Each value can be used as a condition of a filter.
- A list counts once for each of its values. Rows without a value are not counted.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from app.search.hits import Hits, vector_candidates
from app.search.plan import Plan
from app.search.rows import GroupField, field_values, group_field, is_exact_index
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.row_filter import RowFilter

MAX_VALUES = 100  # of one field; the most frequent
MAX_SCORED = 10_000  # rows that are compared with a min_score
MAX_CACHED_BYTES = 256 * 2**10  # of one facet; its values may be long texts
_SINGLE_NUMBERS = 20  # different numbers up to which each is counted
_RANGES = 10


class FacetValue(TypedDict):
    """A value of a field, and the number of items that have it; for numbers perhaps a range, {"gte": 1, "lt": 5}."""

    value: Annotated[Any, Field(examples=["cat face"])]
    count: Annotated[int, Field(examples=[9])]


Facet = list[FacetValue]


def count_facets(
    snapshot: Snapshot, names: Sequence[str], allowed: RowFilter | None, filter_key: str, group_by: str
) -> dict[str, Facet]:
    """Return the facets of the allowed rows. They are cached.

    Args:
        filter_key: names the filter of the allowed rows, "" for all rows.

    Raises:
        InvalidQueryError: there is no such field.
    """
    groups = group_field(snapshot, group_by) if group_by else None
    mask, facets = snapshot.artifact.live if allowed is None else allowed.mask, dict[str, Facet]()
    for name in names:
        key = name, filter_key, group_by
        facet = snapshot.facets.use(key)
        if facet is None:
            facet = count_values(snapshot.artifact, name, mask, groups)
            if 4 * len(str(facet)) <= MAX_CACHED_BYTES:
                snapshot.facets.keep(key, facet)
        facets[name] = facet
    return facets


def facets_of(snapshot: Snapshot, plan: Plan, vector: Floats, hits: Hits | None) -> tuple[dict[str, Facet], bool]:
    """Return the facets of a plan, and False if they are approximate.

    With a `min_score`, those of the best `MAX_SCORED` rows count that reach it, as the index finds them.

    Args:
        hits: of a sorted plan.
    """
    artifact = snapshot.artifact
    if not artifact.rows:
        return {name: [] for name in plan.facets}, True
    if hits is not None and hits.matched is not None:
        counted, is_exact = hits.matched, hits.is_exact
    elif plan.min_score is None:
        return count_facets(snapshot, plan.facets, plan.allowed, plan.filter_key, plan.group_by), True
    else:
        found, _ = vector_candidates(artifact, vector, min(MAX_SCORED, artifact.rows), plan.allowed)
        counted = found.rows[found.reach(plan.min_score)]
        is_exact = len(counted) < MAX_SCORED and is_exact_index(artifact)
    mask = np.zeros(artifact.rows, np.bool_)
    mask[counted] = True
    groups = group_field(snapshot, plan.group_by) if plan.group_by else None
    return {name: count_values(artifact, name, mask, groups) for name in plan.facets}, is_exact


def count_values(
    artifact: IndexVersion, name: str, mask: Mask, groups: GroupField | None = None, limit: int = MAX_VALUES
) -> Facet:
    """Return the values of a field with their counts, the most frequent first; ranges in their order.

    Args:
        mask: rows that are counted, bool (rows,).
        groups: count groups instead of rows.
    """
    rows = np.flatnonzero(mask)
    chosen = field_values(artifact, name, "facets").filter(pa.array(mask))
    is_list = pa.types.is_list(chosen.type)
    if is_list:
        rows = rows[pc.list_parent_indices(chosen).to_numpy()]
        chosen = pc.list_flatten(chosen)
    present = pc.is_valid(chosen).to_numpy(zero_copy_only=False)
    chosen, rows = chosen.drop_null(), rows[present]
    owners = rows if groups is None else groups.codes[rows]
    if is_list or groups is not None:  # a list may repeat a value, and a group has several rows
        pairs = pa.table({"value": chosen, "owner": owners}).group_by(["value", "owner"]).aggregate([])
        chosen, owners = pairs["value"], pairs["owner"].to_numpy()
    if pa.types.is_floating(chosen.type) or pa.types.is_integer(chosen.type):
        numbers = chosen.to_numpy()
        is_finite = np.isfinite(numbers)
        if len(np.unique(numbers[is_finite])) > _SINGLE_NUMBERS:
            return _count_ranges(numbers[is_finite], owners[is_finite])
    counted = pc.value_counts(chosen)
    if len(counted) > limit:  # of texts, perhaps millions
        table = pa.table({"count": counted.field("counts"), "text": counted.field("values")})
        counted = counted.take(pc.select_k_unstable(table, limit, [("count", "descending"), ("text", "ascending")]))
    facet = [FacetValue(value=entry["values"], count=entry["counts"]) for entry in counted.to_pylist()]
    return sorted(facet, key=lambda entry: (-entry["count"], str(entry["value"])))


def _count_ranges(numbers: Any, owners: Rows) -> Facet:
    """Return ranges between deciles, with the number of different owners in each; the last one includes its end."""
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, _RANGES + 1), method="nearest"))
    places = np.minimum(np.searchsorted(edges, numbers, "right"), len(edges) - 1) - 1
    keys = np.sort(owners * len(edges) + places)  # np.unique takes many times longer
    counts = np.bincount(keys[np.diff(keys, prepend=-1) > 0] % len(edges), minlength=len(edges) - 1)
    facet: Facet = []
    for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        end = "lte" if high == edges[-1] else "lt"
        facet.append(FacetValue(value={"gte": low, end: high}, count=count))
    return facet
