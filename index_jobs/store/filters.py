"""Conditions on items' fields, as a search is given them, to the rows that fulfil them.

filter     {field: condition, ...}                  all must hold; a field is id, caption, category or any of metadata
           {"$or": [filter, ...]}                   one of them must hold
condition  value | [value, ...]                     equal to it, or to one of them; null: the item has no such field
           {"in": [...], "gt" "gte" "lt" "lte": value, "contains": text, "not": condition}    all must hold

An item without the field fulfils no condition but `null` and `not`; an empty caption or category is none. A field that
holds a list fulfils a condition when one of its members does.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Mask
from dcar_core.util.errors import DataError
from dcar_core.util.json_text import replace_surrogates

if TYPE_CHECKING:
    import pyarrow as pa

    from index_jobs.store.artifact import Artifact

_RANGES = {"gt": "greater", "gte": "greater_equal", "lt": "less", "lte": "less_equal"}
_OR = "$or"
_MOST = 64  # conditions: each looks at every item, and cannot be stopped
_CONDITIONS = '"in", "not", "contains", "gt", "gte", "lt", "lte"'
_INTS = range(-(2**63), 2**63)  # of int64
_EMPTY_IS_NONE = frozenset({"caption", "category"})
_WORDS = {"bool": "true or false", "int64": "whole numbers", "double": "numbers", "string": "texts"}


class FilterError(DataError):
    """A condition that cannot be checked; `field` is the one at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def matching(artifact: "Artifact", filter: Mapping[str, Any]) -> Mask:
    """bool (rows,): the items that fulfil every condition and were not removed.

    Raises:
        FilterError: no item has such a field, a condition does not fit it, or there are too many.
    """
    for number, field in enumerate(_conditions(filter)):
        if number == _MOST:
            raise FilterError(field, f"at most {_MOST} conditions in all; a list of values is one")
    return _matching(artifact, filter)


def _conditions(filter: Mapping[str, Any]) -> Iterator[str]:
    """The field of each condition, those in "$or" and "not" too."""
    for field, condition in filter.items():
        if field == _OR:
            for each in condition if isinstance(condition, list) else ():
                yield from _conditions(each) if isinstance(each, dict) and each else (_OR,)
        elif isinstance(condition, dict):
            for name, operand in condition.items():
                yield from _conditions({field: operand}) if name == "not" else (field,)
        else:
            yield field


def _matching(artifact: "Artifact", filter: Mapping[str, Any]) -> Mask:
    mask = artifact.live.copy()
    for field, condition in filter.items():
        if field == _OR:
            mask &= _one_of(artifact, condition)
            continue
        try:
            column = artifact.column(field)
        except DataError:
            known = ", ".join(sorted(artifact.fields))
            raise FilterError(field, f"no item has this field; there are: {known}") from None
        mask &= _fulfilled(column, condition, field)
    return mask


def _one_of(artifact: "Artifact", filters: Any) -> Mask:
    if not isinstance(filters, list) or not filters or not all(isinstance(each, dict) for each in filters):
        raise FilterError(_OR, "takes a list of filters, of which one must hold")
    mask = np.zeros(artifact.rows, np.bool_)
    for each in filters:
        mask |= _matching(artifact, each)
    return mask


def _fulfilled(column: "pa.ChunkedArray", condition: Any, field: str) -> Mask:
    if isinstance(condition, list):
        return _among(column, condition, field)
    if not isinstance(condition, dict):
        return _among(column, [condition], field)
    if not condition:
        raise FilterError(field, f"is empty; give a value, a list of values, or one of {_CONDITIONS}")
    mask, ranges = np.ones(len(column), np.bool_), dict[str, Any]()
    for name, operand in condition.items():
        if name == "not":
            mask &= ~_fulfilled(column, operand, field)
        elif name == "in" and isinstance(operand, list):
            mask &= _among(column, operand, field)
        elif name == "contains":
            mask &= _containing(column, operand, field)
        elif name in _RANGES:
            ranges[name] = operand
        elif name == "in":
            raise FilterError(field, '"in" takes a list of values')
        else:
            raise FilterError(field, f"{name[:40]!r} is none of {_CONDITIONS}")
    return mask & _within(column, ranges, field) if ranges else mask


def _among(column: "pa.ChunkedArray", values: list[Any], field: str) -> Mask:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = _member_type(column)
    wanted = [_fitting(value, kind, field) for value in values if value is not None]
    if kind == pa.int64():
        wanted = [int(value) for value in wanted if _INTS.start <= value < _INTS.stop and value == int(value)]
    mask = np.zeros(len(column), np.bool_)
    if None in values:
        mask |= _bools(column.is_null())
        if field in _EMPTY_IS_NONE:
            mask |= _bools(pc.equal(column, ""))
    if kind == pa.float64() and 0 in wanted:
        wanted += [0.0, -0.0]  # equal, but not to is_in
    if wanted:
        members, parents = _members(column)
        mask |= _any(_bools(pc.is_in(members, value_set=pa.array(wanted, members.type))), parents, len(column))
    return mask


def _containing(column: "pa.ChunkedArray", text: Any, field: str) -> Mask:
    """Upper and lower case are the same."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not isinstance(text, str) or _member_type(column) != pa.string():
        raise FilterError(field, '"contains" takes a text, and a field of texts')
    members, parents = _members(column)
    found = pc.match_substring(members, replace_surrogates(text), ignore_case=True)
    return _any(_bools(found) & _there(members, field), parents, len(column))


def _within(column: "pa.ChunkedArray", ranges: dict[str, Any], field: str) -> Mask:
    """Of a list, one member must lie within all bounds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = _member_type(column)
    members, parents = _members(column)
    mask = _there(members, field)
    for name, bound in ranges.items():
        if kind == pa.bool_() or isinstance(bound, bool | None):
            raise FilterError(field, f"{name!r} takes a number or a text, and a field of such")
        bound = _fitting(bound, kind, field)
        if kind == pa.int64():
            name, bound = _whole(name, bound)
        mask &= _bools(pc.call_function(_RANGES[name], [members, pa.scalar(bound, members.type)]))
    return _any(mask, parents, len(column))


def _there(members: "pa.ChunkedArray", field: str) -> Mask:
    """False where an empty text means that there is none."""
    import pyarrow.compute as pc

    return _bools(pc.not_equal(members, "")) if field in _EMPTY_IS_NONE else np.ones(len(members), np.bool_)


def _whole(name: str, bound: float) -> tuple[str, int]:
    """A condition on whole numbers, the bound one too: beyond 2^53 a float would stand for several of them."""
    if math.isnan(bound):
        return "gt", _INTS.stop - 1  # nothing is
    up = name in {"gt", "gte"}
    if _INTS.start <= bound < _INTS.stop:
        return name, math.floor(bound) if name in {"gt", "lte"} else math.ceil(bound)
    everything = (bound < 0) == up
    if everything:
        return ("gte", _INTS.start) if up else ("lte", _INTS.stop - 1)
    return ("gt", _INTS.stop - 1) if up else ("lt", _INTS.start)


def _fitting(value: Any, kind: "pa.DataType", field: str) -> Any:
    """The value, if a field of this type can have it."""
    import pyarrow as pa

    if kind == pa.bool_():
        fits = isinstance(value, bool)
    elif kind == pa.string():
        fits = isinstance(value, str)
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits:
        raise FilterError(field, f"its values are {_WORDS[str(kind)]}, which {json.dumps(value)[:40]} is not")
    if isinstance(value, str):
        return replace_surrogates(value)
    beyond = isinstance(value, int) and value not in _INTS
    return _as_float(value) if kind == pa.float64() or (kind == pa.int64() and beyond) else value


def _as_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _member_type(column: "pa.ChunkedArray") -> "pa.DataType":
    import pyarrow as pa

    return column.type.value_type if pa.types.is_list(column.type) else column.type


def _members(column: "pa.ChunkedArray") -> tuple["pa.ChunkedArray", NDArray[np.int64] | None]:
    """All values, and for a column of lists the row that each is from."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_list(column.type):
        return column, None
    column = pa.chunked_array([column.combine_chunks()], column.type)
    return pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()


def _bools(found: "pa.ChunkedArray") -> Mask:
    import pyarrow.compute as pc

    mask: Mask = pc.fill_null(found, False).to_numpy().astype(np.bool_, copy=False)
    return mask


def _any(found: Mask, parents: NDArray[np.int64] | None, count: int) -> Mask:
    if parents is None:
        return found
    mask = np.zeros(count, np.bool_)
    mask[parents[found]] = True
    return mask
