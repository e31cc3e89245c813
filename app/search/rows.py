"""Rows of a snapshot: the masks of filters, vectors, the values of fields, their order, and groups that share a value.

A group is for example the images of one product. A row without a value is a group of its own.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from app.search.errors import InvalidQueryError, UnsupportedQueryError
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import ArtifactError, DataError, StoreUnavailableError
from index_jobs.index import filters
from index_jobs.index.index_version import IndexVersion
from index_jobs.row_filter import EMPTY_IS_MISSING, NO_ROWS, RowFilter

_MAX_VALUE_BYTES = 4096  # of a group; a batch of 32 queries shows 6,400 groups
_LONG_BYTES = 256  # mean length from which values are sorted to number them, which takes no memory


def mask_key(filter: dict[str, Any]) -> str:
    """Return the key of a filter in `Snapshot.masks`."""
    return hashlib.sha256(json.dumps(filter, sort_keys=True).encode()).hexdigest()


def filter_rows(snapshot: Snapshot, filter: dict[str, Any], key: str = "") -> RowFilter:
    """Return the rows that fulfil a filter. Raise InvalidQueryError if it does not fit the index.

    key: the filter's `mask_key`, if it is known.
    """
    artifact = snapshot.artifact

    def find() -> RowFilter:
        rows = filters.filter_rows(artifact, filter)
        if artifact.manifest.spec.is_local:  # every search reads the mask: make it here
            _ = rows.mask
        return rows

    try:
        return snapshot.masks.find(key or mask_key(filter), find)
    except filters.FilterError as error:
        raise InvalidQueryError(f"filter.{error.field}", error.message) from None


def row_vectors(artifact: IndexVersion, rows: Rows | list[int]) -> Floats:
    """Return the stored vectors, float32 (m, E). Raise UnsupportedQueryError if this kind of index keeps none."""
    try:
        return artifact.vectors(np.asarray(rows, np.int64))
    except StoreUnavailableError:
        raise
    except ArtifactError as error:
        message = f"This query needs the vectors of items, and the index does not keep them: {error}"
        raise UnsupportedQueryError(message) from None


def is_exact_index(artifact: IndexVersion) -> bool:
    """Return True if searches find every row that reaches a score."""
    return {artifact.manifest.kind, *(addition.kind for addition in artifact.manifest.additions)} == {"Flat"}


def field_values(artifact: IndexVersion, name: str, option: str, rows: Rows | None = None) -> pa.ChunkedArray:
    """Return a field of every row, or of some, ascending; null where an item has none.

    An empty caption or category counts as missing. Raise InvalidQueryError if there is no such field; `option` is the
    part of the query that names it.
    """
    try:
        column = artifact.column(name, rows)
    except DataError as error:
        raise InvalidQueryError(option, str(error)) from None
    return pc.if_else(pc.equal(column, ""), None, column) if name in EMPTY_IS_MISSING else column


class ResultGroup(TypedDict):
    """The value of `group_by` that a result stands for. count: number of its items that fulfil the filter."""

    value: Annotated[Any, Field(examples=["WX-300"])]
    count: Annotated[int, Field(examples=[5])]


@dataclass(frozen=True, slots=True)
class GroupField:
    """The groups of all rows. Their values, which may be long texts, are read when they are shown.

    Attributes:
        codes: number of each row's group, int64 (rows,).
        counts: number of live rows of each group that has a value; rows without one have higher numbers.
    """

    artifact: IndexVersion
    name: str
    codes: Rows
    counts: Rows

    def shown(self, rows: list[int], allowed: RowFilter | None) -> list[ResultGroup]:
        """Return the value of each row's group, None without one, and its number of allowed rows, None for all."""
        counts = self.counts
        if allowed is not None:
            counts = np.bincount(self.codes[allowed.mask], minlength=len(counts))
        different = np.unique(np.array(rows, np.int64))
        shown = field_values(self.artifact, self.name, "group_by", different).to_pylist()
        values = dict(zip(different.tolist(), shown, strict=True))
        return [
            {"value": values[row], "count": int(counts[code]) if code < len(self.counts) else 1}
            for row, code in zip(rows, self.codes[rows].tolist(), strict=True)
        ]

    def outside(self, codes: Rows, allowed: RowFilter | None) -> RowFilter:
        """Return the allowed rows, None for all rows, that are in none of the numbered groups."""
        return (allowed or self.artifact.live_rows).without(np.flatnonzero(np.isin(self.codes, codes)))


def first_places(codes: Rows) -> Rows:
    """Return the place of the first row of each group, ascending, from the group of each row."""
    _, places = np.unique(codes, return_index=True)
    return np.sort(places)


def group_field(snapshot: Snapshot, name: str) -> GroupField:
    """Return a field's groups. Raise InvalidQueryError if no item has it, or if it holds lists or long texts."""

    def read() -> GroupField:
        artifact = snapshot.artifact
        kind = field_values(artifact, name, "group_by", NO_ROWS).type
        if pa.types.is_list(kind):
            raise InvalidQueryError("group_by", f"{name!r} has several values per item; name a field with one")
        column = artifact.column(name)
        if pa.types.is_string(kind) and (pc.max(pc.binary_length(column)).as_py() or 0) > _MAX_VALUE_BYTES:
            message = f"{name!r} has values of over {_MAX_VALUE_BYTES:,} bytes; name another field"
            raise InvalidQueryError("group_by", message)
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


@dataclass(frozen=True)
class SortOrder:
    """The order of a field. places: of each row, int32 (rows,); rows of equal value share one."""

    places: Rows

    @cached_property
    def rows(self) -> Rows:
        """All rows in order, int64 (rows,); those of equal value in the order of the index."""
        return np.argsort(self.places, kind="stable")


def sort_order(snapshot: Snapshot, sort: str) -> SortOrder:
    """Return the order of a field, which is cached. Texts are in order regardless of case; "" is missing."""

    def read() -> SortOrder:
        column = field_values(snapshot.artifact, sort.removeprefix("-"), "sort")
        if pa.types.is_string(column.type):
            column = pc.if_else(pc.equal(column, ""), None, pc.utf8_lower(column))
        elif pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        direction = "descending" if sort.startswith("-") else "ascending"
        return SortOrder(pc.rank(column, direction, tiebreaker="dense").to_numpy().astype(np.int32))

    order: SortOrder = snapshot.orders.find(sort, read)
    return order


def list_rows(snapshot: Snapshot, filter: dict[str, Any] | None, sort: str, group_by: str) -> Rows:
    """Return the rows of a listing: those that fulfil a filter, in the order of a field or of the index.

    Args:
        group_by: list the first row of each group; "" for every row.
    """
    allowed = filter_rows(snapshot, filter) if filter else snapshot.artifact.live_rows
    if sort:
        rows = sort_order(snapshot, sort).rows
        rows = rows[allowed.mask[rows]]
    else:
        rows = np.flatnonzero(allowed.mask)
    if group_by and len(rows):
        rows = rows[first_places(group_field(snapshot, group_by).codes[rows])]
    return rows
