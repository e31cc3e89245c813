"""Rows of a snapshot: the masks of filters, vectors, the values of fields, and groups of rows that share a value.

- A group is for example the images of one product. A row without a value is a group of its own.
- Each group is ranked by its best row. The search goes on among rows of other groups until there are enough.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.search.errors import InvalidQueryError, UnsupportedQueryError
from app.search.query import Match
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError, DataError, StoreUnavailableError
from index_jobs.selection import EMPTY_IS_MISSING, NO_ROWS, Allowed, Selection, to_mask
from index_jobs.store import filters
from index_jobs.store.artifact import Artifact

_ROWS_PER_GROUP = 4  # rows requested at first for each group
_MAX_VALUE_BYTES = 4096  # of a group; a batch of 32 queries shows 6,400 groups
_LONG_BYTES = 256  # mean length from which values are sorted to number them, which takes no memory


def mask_key(filter: dict[str, Any]) -> str:
    """Return the key of a filter in `Snapshot.masks`."""
    return hashlib.sha256(json.dumps(filter, sort_keys=True).encode()).hexdigest()


def filter_rows(snapshot: Snapshot, filter: dict[str, Any]) -> Allowed:
    """Return the rows that fulfil a filter: a mask, or conditions where the engine keeps the fields.

    Raise InvalidQueryError if it does not fit the index.
    """
    artifact = snapshot.artifact
    find = filters.match_rows if artifact.manifest.spec.is_local else filters.select_rows
    try:
        return snapshot.masks.find(mask_key(filter), lambda: find(artifact, filter))
    except filters.FilterError as error:
        raise InvalidQueryError(f"filter.{error.field}", error.message) from None


def filter_mask(snapshot: Snapshot, filter: dict[str, Any]) -> Mask:
    """Return the rows that fulfil a filter, bool (rows,), as `filter_rows`."""
    return to_mask(filter_rows(snapshot, filter))


def row_vectors(artifact: Artifact, rows: Rows | list[int]) -> Floats:
    """Return the stored vectors, float32 (m, E). Raise UnsupportedQueryError if this kind of index keeps none."""
    try:
        return artifact.vectors(np.asarray(rows, np.int64))
    except StoreUnavailableError:
        raise
    except ArtifactError as error:
        message = f"This query needs the vectors of items, and the index does not keep them: {error}"
        raise UnsupportedQueryError(message) from None


def field_values(artifact: Artifact, name: str, option: str, rows: Rows | None = None) -> pa.ChunkedArray:
    """Return a field of every row, or of some, ascending; null where an item has none.

    An empty caption or category counts as missing. Raise InvalidQueryError if there is no such field; `option` is the
    part of the query that names it.
    """
    try:
        column = artifact.column(name, rows)
    except DataError as error:
        raise InvalidQueryError(option, str(error)) from None
    return pc.if_else(pc.equal(column, ""), None, column) if name in EMPTY_IS_MISSING else column


@dataclass(frozen=True, slots=True)
class GroupField:
    """The groups of all rows. Their values, which may be long texts, are read when they are shown.

    Attributes:
        codes: number of each row's group, int64 (rows,).
        counts: number of live rows of each group that has a value; rows without one have higher numbers.
    """

    artifact: Artifact
    name: str
    codes: Rows
    counts: Rows

    def codes_of(self, rows: Rows) -> Rows:
        """Return the number of each row's group."""
        return self.codes[rows]

    def shown(self, rows: list[int], allowed: Allowed | None) -> list[dict[str, Any]]:
        """Return the value of each row's group, None without one, and its number of allowed rows, None for all."""
        counts = self.counts
        if allowed is not None:
            counts = np.bincount(self.codes[to_mask(allowed)], minlength=len(counts))
        different = np.unique(np.array(rows, np.int64))
        values = dict(
            zip(different.tolist(), _single_values(self.artifact, self.name, different).to_pylist(), strict=True)
        )
        return [
            {"value": values[row], "count": int(counts[code]) if code < len(self.counts) else 1}
            for row, code in zip(rows, self.codes[rows].tolist(), strict=True)
        ]

    def outside(self, codes: Rows, allowed: Allowed | None) -> Allowed:
        """Return the allowed rows, None for all rows, that are in none of the numbered groups."""
        others = ~np.isin(self.codes, codes)
        return others if allowed is None else others & to_mask(allowed)


class StoredGroups:
    """The groups of a field that the engine keeps, as `GroupField`, for one request. Only rows that it meets are read.

    A group's number is the place of its value among those met; a row without a value adds its own to that of all rows.
    """

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        self._snapshot, self._artifact, self._name = snapshot, snapshot.artifact, name
        self._total = self._artifact.rows
        self._values = _single_values(self._artifact, name, NO_ROWS).combine_chunks()

    def codes_of(self, rows: Rows) -> Rows:
        order = np.argsort(rows)
        encoded = _single_values(self._artifact, self._name, rows[order]).dictionary_encode().combine_chunks()
        self._values = pa.concat_arrays([self._values, encoded.dictionary]).unique()
        numbers = pc.index_in(encoded.dictionary, self._values).to_numpy()
        codes: Rows = rows + self._total
        present = order[encoded.is_valid().to_numpy(zero_copy_only=False)]
        codes[present] = numbers[encoded.indices.drop_null().to_numpy()]
        return codes

    def shown(self, rows: list[int], allowed: Allowed | None) -> list[dict[str, Any]]:
        given, codes = self._selection(allowed), self.codes_of(np.array(rows, np.int64))
        numbers, values = self._values_of(codes)
        counted = given.added
        counts = self._artifact.stored_counts(self._name, values, given)
        if counts is None:
            counted = np.flatnonzero(given.mask & filters.match_rows(self._artifact, {self._name: values}))
        others = Counter(self.codes_of(counted).tolist())
        groups = {
            code: {"value": value, "count": (counts or {}).get(value, 0) + others[code]}
            for code, value in zip(numbers, values, strict=True)
        }
        return [groups.get(code, {"value": None, "count": 1}) for code in codes.tolist()]

    def outside(self, codes: Rows, allowed: Allowed | None) -> Allowed:
        given, alone = self._selection(allowed), codes[codes >= self._total] - self._total
        condition = {self._name: {"not": self._values_of(codes)[1]}}

        def make_mask() -> Mask:
            mask = given.mask & filters.match_rows(self._artifact, condition)
            mask[alone] = False
            return mask

        added = given.added[~np.isin(self.codes_of(given.added), codes)]
        return Selection(make_mask, (*given.filters, condition), np.union1d(given.hidden, alone), added)

    def _selection(self, allowed: Allowed | None) -> Selection:
        selection = filter_rows(self._snapshot, {}) if allowed is None else allowed
        assert isinstance(selection, Selection)
        return selection

    def _values_of(self, codes: Rows) -> tuple[list[int], list[Any]]:
        """Return the numbers of groups that have a value, and their values."""
        numbers = np.unique(codes[codes < self._total])
        return numbers.tolist(), self._values.take(pa.array(numbers)).to_pylist()


Groups = GroupField | StoredGroups


def first_rows(groups: Groups, rows: Rows) -> Rows:
    """Return the first row of each group, in the order of the given rows."""
    _, places = np.unique(groups.codes_of(rows), return_index=True)
    return rows[np.sort(places)]


def group_field(snapshot: Snapshot, name: str) -> Groups:
    """Return a field's groups. Raise InvalidQueryError if there is no such field, or if it holds lists."""
    if not snapshot.artifact.manifest.spec.is_local:
        return StoredGroups(snapshot, name)

    def read() -> GroupField:
        artifact = snapshot.artifact
        _single_values(artifact, name, NO_ROWS)  # raises
        column = _short_values(artifact.column(name), name)
        is_missing = pc.equal(column, "").fill_null(True) if name in EMPTY_IS_MISSING else column.is_null()
        if column.nbytes > _LONG_BYTES * len(column):  # a dictionary would copy them, more than once
            codes = pc.rank(column, tiebreaker="dense").to_numpy().astype(np.int64) - 1
        else:
            encoded = column.dictionary_encode().combine_chunks()
            codes = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        count, alone = int(codes.max(initial=-1)) + 1, np.flatnonzero(is_missing.to_numpy())
        codes[alone] = count + alone
        return GroupField(artifact, name, codes, np.bincount(codes[artifact.live], minlength=count)[:count])

    groups: GroupField = snapshot.groups.find(name, read)
    return groups


def _single_values(artifact: Artifact, name: str, rows: Rows | None = None) -> pa.ChunkedArray:
    column = field_values(artifact, name, "group_by", rows)
    if pa.types.is_list(column.type):
        raise InvalidQueryError("group_by", f"{name!r} has several values per item; name a field with one")
    return _short_values(column, name)


def _short_values(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Return the column. Raise InvalidQueryError if it has a text that is too long for a group."""
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if is_text and (pc.max(pc.binary_length(column)).as_py() or 0) > _MAX_VALUE_BYTES:
        raise InvalidQueryError(
            "group_by", f"{name!r} has values of over {_MAX_VALUE_BYTES:,} bytes; name another field"
        )
    return column


def rank_groups(
    search: Callable[[int, Allowed | None], list[Match]], count: int, groups: Groups, allowed: Allowed | None
) -> list[Match]:
    """Return the best row of each of the `count` best groups. search: returns so many of the best allowed rows."""
    best: dict[int, Match] = {}
    remaining = allowed
    while (found := len(best)) < count:
        rows = search(_ROWS_PER_GROUP * (count - found), remaining)
        codes = groups.codes_of(np.array([ranked.row for ranked in rows], np.int64))
        for code, ranked in zip(codes.tolist(), rows, strict=True):
            best.setdefault(code, ranked)
        if len(best) == found:
            break
        remaining = groups.outside(np.fromiter(best, np.int64), allowed)
    return list(best.values())[:count]
