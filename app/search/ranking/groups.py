"""Groups of rows that share the value of a field, such as the images of one product.

- A row without a value is a group of its own.
- Each group is ranked by its best row. The search goes on among rows of other groups until there are enough.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from app.search.errors import InvalidQueryError
from app.search.ranking.rank import RankedRow
from app.search.ranking.rows import field_values
from app.search.snapshots import Snapshot, drop_oldest
from dcar_core.util.arrays import Mask, Rows
from index_jobs.store.artifact import Artifact

_MAX_CACHED = 8  # fields of one version
_MAX_CACHED_BYTES = 512 * 2**20  # of all of them; one of different texts takes about 80 bytes an item
_ROWS_PER_GROUP = 4  # rows requested at first for each group


@dataclass(frozen=True, slots=True)
class GroupField:
    """The groups of all rows.

    Attributes:
        codes: number of each row's group, int64 (rows,).
        values: value of each numbered group; rows without a value have higher numbers.
        counts: number of live rows of each numbered group.
    """

    codes: Rows
    values: list[Any]
    counts: Rows

    def value(self, row: int) -> Any:
        """Return the row's value; None without one."""
        code = int(self.codes[row])
        return self.values[code] if code < len(self.values) else None

    def sizes(self, rows: list[int], mask: Mask | None) -> list[int]:
        """Return the number of rows in the group of each row, among those of the mask; None for all live rows."""
        counts = self.counts if mask is None else np.bincount(self.codes[mask], minlength=len(self.values))
        return [int(counts[code]) if code < len(self.values) else 1 for code in self.codes[rows].tolist()]

    def first_rows(self, rows: Rows) -> Rows:
        """Return the first row of each group, in the order of the given rows."""
        _, places = np.unique(self.codes[rows], return_index=True)
        return rows[np.sort(places)]

    def outside(self, codes: Rows, mask: Mask | None) -> Mask:
        """Return the rows of a mask, None for all rows, that are in none of the numbered groups, bool (rows,)."""
        others = ~np.isin(self.codes, codes)
        return others if mask is None else others & mask


def read_groups(artifact: Artifact, name: str) -> GroupField:
    """Return a field's groups.

    Raises:
        InvalidQueryError: there is no such field, or it holds lists.
    """
    column = field_values(artifact, name, "group_by")
    if pa.types.is_list(column.type):
        raise InvalidQueryError("group_by", f"{name!r} has several values per item; name a field with one")
    encoded = column.dictionary_encode().combine_chunks()
    values = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    alone = np.flatnonzero(codes < 0)
    codes[alone] = len(values) + alone
    counts = np.bincount(codes[artifact.live], minlength=len(values))[: len(values)]
    return GroupField(codes, values, counts)


def group_field(snapshot: Snapshot, name: str) -> GroupField:
    """Return a field's groups, as `read_groups` does. Those of recent fields, and of the index's own, are cached.

    Raises:
        InvalidQueryError: there is no such field, or it holds lists.
    """
    groups = snapshot.groups.get(name)
    if groups is None:
        groups = snapshot.groups[name] = read_groups(snapshot.artifact, name)
        count = max(1, min(_MAX_CACHED, _MAX_CACHED_BYTES // (80 * len(groups.codes))))
        drop_oldest(snapshot.groups, count, kept=snapshot.artifact.manifest.group_field)
    return groups


def rank_groups(
    search: Callable[[int, Mask | None], list[RankedRow]], count: int, groups: GroupField, mask: Mask | None
) -> list[RankedRow]:
    """Return the best row of each of the `count` best groups, best first.

    Args:
        search: returns the given number of best rows of a mask.
    """
    best: dict[int, RankedRow] = {}
    remaining = mask
    while len(best) < count:
        rows = search(_ROWS_PER_GROUP * (count - len(best)), remaining)
        for ranked in rows:
            best.setdefault(int(groups.codes[ranked.row]), ranked)
        if not rows:
            break
        remaining = groups.outside(np.fromiter(best, np.int64), mask)
    return list(best.values())[:count]
