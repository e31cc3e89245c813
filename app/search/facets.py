"""Facets: how often each value of a field occurs among the rows that a query allows.

- A number with many values is counted in ranges of about equal size. Each value can be used as a condition of a filter.
- A list counts once for each of its values. Rows without a value are not counted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.search.rows import GroupField, field_values, filter_rows, group_field, mask_key
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.index.index_version import IndexVersion

MAX_VALUES = 100  # of one field; the most frequent
MAX_SCORED = 10_000  # rows that are compared with a min_score
MAX_CACHED_BYTES = 256 * 2**10  # of one facet; its values may be long texts
_SINGLE_NUMBERS = 20  # different numbers up to which each is counted
_RANGES = 10

Facet = list[dict[str, Any]]


def count_facets(
    snapshot: Snapshot,
    names: Sequence[str],
    filter: dict[str, Any] | None,
    group_by: str,
    vector: Floats | None = None,
    min_score: float | None = None,
) -> tuple[dict[str, Facet], bool]:
    """Return the facets of the rows that fulfil a filter, and False if they are approximate. They are cached.

    Args:
        vector: of the query, (E,). With a `min_score`, those of the best `MAX_SCORED` rows count that reach it, as the
            index finds them.

    Raises:
        InvalidQueryError: there is no such field, or the filter does not fit the index.
    """
    artifact = snapshot.artifact
    allowed = filter_rows(snapshot, filter) if filter else None
    groups = group_field(snapshot, group_by) if group_by else None
    if vector is None or min_score is None:
        facets: dict[str, Facet] = {}
        for name in names:
            key = name, mask_key(filter) if filter else "", group_by
            facet = snapshot.facets.use(key)
            if facet is None:
                facet = count_values(artifact, name, artifact.live if allowed is None else allowed.mask, groups)
                if 4 * len(str(facet)) <= MAX_CACHED_BYTES:
                    snapshot.facets.keep(key, facet)
            facets[name] = facet
        return facets, True
    scores, rows = artifact.search(vector[None], min(MAX_SCORED, artifact.rows), allowed)
    reached = rows[0][(rows[0] >= 0) & (scores[0].round(6) >= min_score)]
    scored = np.zeros(artifact.rows, np.bool_)
    scored[reached] = True
    is_exact = len(reached) < MAX_SCORED and is_exact_index(artifact)
    return {name: count_values(artifact, name, scored, groups) for name in names}, is_exact


def is_exact_index(artifact: IndexVersion) -> bool:
    """Return True if searches find every row that reaches a score."""
    return {artifact.manifest.kind, *(addition.kind for addition in artifact.manifest.additions)} == {"Flat"}


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
    facet = [{"value": entry["values"], "count": entry["counts"]} for entry in counted.to_pylist()]
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
        facet.append({"value": {"gte": low, end: high}, "count": count})
    return facet
