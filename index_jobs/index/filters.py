"""Filters on items' fields, evaluated to a mask of rows.

filter     {field: condition, ...}      all must hold; a field is id, caption, category
                                        or a metadata field
           {"$or": [filter, ...]}       one of them must hold
condition  value | [value, ...]         equal to it, or to one of them; null: the item
                                        has no such field
           {"in": [...], "gt" "gte" "lt" "lte": value, "contains": text,
            "not": condition}           all must hold

An item without the field meets no condition except `null` and `not`. An empty caption
or category counts as missing. A field that holds a list meets a condition if one of its
members does.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.util.arrays import Mask, Rows
from dcar_core.util.errors import DataError, list_fields
from dcar_core.util.files import replace_surrogates
from index_jobs.index.index_version import IndexVersion
from index_jobs.row_filter import EMPTY_IS_MISSING, RowFilter

_RANGES = {"gt": "greater", "gte": "greater_equal", "lt": "less", "lte": "less_equal"}
_OR = "$or"
_MAX_CONDITIONS = 64  # each one reads every item, and cannot be interrupted
# characters of "contains"; the automaton of a longer one may not fit the memory that it
# may use
_MAX_SUBSTRING = 256
_OPERATORS = '"in", "not", "contains", "gt", "gte", "lt", "lte"'
_INT64 = range(-(2**63), 2**63)
_MAX_FLOAT = int(sys.float_info.max)
_TYPE_NAMES = {
    "bool": "true or false",
    "int64": "whole numbers",
    "double": "numbers",
    "string": "texts",
}


class FilterError(DataError):
    """A condition that cannot be evaluated; `field` is the one at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def match_rows(index: IndexVersion, filter: Mapping[str, Any]) -> Mask:
    """Return the live items that meet every condition, bool (rows,). Raise FilterError
    for a wrong or long filter.
    """
    _require_few(filter)
    return _match_all(index, filter)


def filter_rows(index: IndexVersion, filter: Mapping[str, Any]) -> RowFilter:
    """Return the live items that meet every condition, whose mask is made when it is
    first read; see `match_rows`.
    """
    _require_few(filter)
    if not index.computed.keys().isdisjoint(condition_fields(filter)):
        return RowFilter.of_mask(_match_all(index, filter))
    changed = index.changed
    included = changed[_match_all(index, filter, changed)]
    excluded = np.union1d(changed, index.removed)
    return RowFilter(lambda: match_rows(index, filter), filter, excluded, included)


def match_column(column: pa.ChunkedArray, condition: Any, field: str) -> Mask:
    """Return the rows of a column that meet a condition, bool (rows,). Raise
    FilterError if it does not fit.
    """
    if isinstance(condition, list):
        return _match_values(column, condition, field)
    if not isinstance(condition, dict):
        return _match_values(column, [condition], field)
    if not condition:
        raise FilterError(
            field, f"is empty; give a value, a list of values, or one of {_OPERATORS}"
        )
    mask = np.ones(len(column), np.bool_)
    ranges = dict[str, Any]()
    for name, operand in condition.items():
        if name == "not":
            mask &= ~match_column(column, operand, field)
        elif name == "in" and isinstance(operand, list):
            mask &= _match_values(column, operand, field)
        elif name == "contains":
            mask &= _match_substring(column, operand, field)
        elif name in _RANGES:
            ranges[name] = operand
        elif name == "in":
            raise FilterError(field, '"in" takes a list of values')
        else:
            raise FilterError(
                field, f"unknown operator {name[:40]!r}; use {_OPERATORS}"
            )
    return mask & _match_ranges(column, ranges, field) if ranges else mask


def _require_few(filter: Mapping[str, Any]) -> None:
    for number, field in enumerate(condition_fields(filter)):
        if number == _MAX_CONDITIONS:
            raise FilterError(
                field,
                f"at most {_MAX_CONDITIONS} conditions in all; a list of values is one",
            )


def condition_fields(filter: Mapping[str, Any]) -> Iterator[str]:
    """Yield the field of each condition, those in "$or" and "not" included."""
    for field, condition in filter.items():
        if field == _OR:
            for part in condition if isinstance(condition, list) else ():
                yield from (
                    condition_fields(part)
                    if isinstance(part, dict) and part
                    else (_OR,)
                )
        elif isinstance(condition, dict):
            for name, operand in condition.items():
                yield from (
                    condition_fields({field: operand}) if name == "not" else (field,)
                )
        else:
            yield field


def _match_all(
    index: IndexVersion,
    filter: Mapping[str, Any],
    rows: Rows | None = None,
) -> Mask:
    """Return which rows meet every condition; of all rows, or of some, ascending."""
    mask = index.live.copy() if rows is None else index.live[rows]
    for field, condition in filter.items():
        if field == _OR:
            parts = condition if isinstance(condition, list) else []
            if not parts or not all(isinstance(part, dict) for part in parts):
                raise FilterError(_OR, "takes a list of filters; one of them must hold")
            mask &= np.logical_or.reduce(
                [_match_all(index, part, rows) for part in parts]
            )
            continue
        if field not in index.fields:
            raise FilterError(
                field, f"no item has this field; there are: {list_fields(index.fields)}"
            )
        mask &= match_column(index.column(field, rows), condition, field)
    return mask


def _match_values(column: pa.ChunkedArray, values: list[Any], field: str) -> Mask:
    member_type = _member_type(column)
    targets = [
        _checked_value(value, member_type, field)
        for value in values
        if value is not None
    ]
    if member_type == pa.int64():
        targets = [
            int(value)
            for value in targets
            if _INT64.start <= value < _INT64.stop and value == int(value)
        ]
    mask = np.zeros(len(column), np.bool_)
    if None in values:
        mask = _to_mask(column.is_null()) | ~_is_present(column, field)
    if targets:
        members, parents = _members(column)
        is_match = _to_mask(
            pc.is_in(members, value_set=pa.array(targets, members.type))
        )
        mask |= _any_member(is_match, parents, len(column))
    return mask


def _match_substring(column: pa.ChunkedArray, text: Any, field: str) -> Mask:
    if not isinstance(text, str) or _member_type(column) != pa.string():
        raise FilterError(field, '"contains" takes a text, and a field of texts')
    if len(text) > _MAX_SUBSTRING:
        raise FilterError(
            field,
            f'"contains" takes at most {_MAX_SUBSTRING} characters, not {len(text)}',
        )
    members, parents = _members(column)
    is_match = _to_mask(
        pc.match_substring(members, replace_surrogates(text), ignore_case=True)
    )
    return _any_member(is_match & _is_present(members, field), parents, len(column))


def _match_ranges(column: pa.ChunkedArray, ranges: dict[str, Any], field: str) -> Mask:
    """Match bounds; of a list, one member must lie within all of them."""
    member_type = _member_type(column)
    members, parents = _members(column)
    mask = _is_present(members, field)
    for name, bound in ranges.items():
        if member_type == pa.bool_() or isinstance(bound, bool | None):
            raise FilterError(
                field,
                f"{name!r} takes a number or a text, and a field of numbers or texts",
            )
        bound = _checked_value(bound, member_type, field)
        if isinstance(bound, float):
            compared = members.cast(pa.float64(), safe=False)
        else:
            compared = members
        mask &= _to_mask(
            pc.call_function(_RANGES[name], [compared, pa.scalar(bound, compared.type)])
        )
    return _any_member(mask, parents, len(column))


def _is_present(members: pa.ChunkedArray, field: str) -> Mask:
    """Return False where an empty text means a missing value."""
    if field in EMPTY_IS_MISSING:
        return _to_mask(pc.not_equal(members, ""))
    return np.ones(len(members), np.bool_)


def _checked_value(value: Any, member_type: pa.DataType, field: str) -> Any:
    if member_type == pa.bool_():
        fits = isinstance(value, bool)
    elif member_type == pa.string():
        fits = isinstance(value, str)
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits:
        raise FilterError(
            field,
            f"values are {_TYPE_NAMES[str(member_type)]}, not {json.dumps(value)[:40]}",
        )
    if isinstance(value, int) and (member_type == pa.float64() or value not in _INT64):
        return float(max(-_MAX_FLOAT, min(value, _MAX_FLOAT)))
    return replace_surrogates(value) if isinstance(value, str) else value


def _member_type(column: pa.ChunkedArray) -> pa.DataType:
    return column.type.value_type if pa.types.is_list(column.type) else column.type


def _members(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, Rows | None]:
    """Return all values, and for a column of lists the row of each value."""
    if not pa.types.is_list(column.type):
        return column, None
    column = pa.chunked_array([column.combine_chunks()], column.type)
    return pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()


def _to_mask(values: pa.ChunkedArray) -> Mask:
    mask: Mask = pc.fill_null(values, False).to_numpy().astype(np.bool_, copy=False)
    return mask


def _any_member(is_match: Mask, parents: Rows | None, count: int) -> Mask:
    """Return the rows with a matching member, bool (count,)."""
    if parents is None:
        return is_match
    mask = np.zeros(count, np.bool_)
    mask[parents[is_match]] = True
    return mask
