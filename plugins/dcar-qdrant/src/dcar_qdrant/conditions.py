"""Filters of `store.filters` as conditions of Qdrant.

- A stored point has every field of its row: null where the item has none, so that null
  is told from an empty list.
- `contains` and ranges of texts have no counterpart: such filters become lists of row
  numbers.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from qdrant_client import models

from dcar_core.util.arrays import Rows
from dcar_core.util.files import replace_surrogates
from index_jobs.row_filter import EMPTY_IS_MISSING, RowFilter

_RANGES = frozenset({"gt", "gte", "lt", "lte"})
_EXACT = 2**53  # integers below are exact as floats, which ranges are
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NUMBERS = frozenset({"int64", "double"})
_NOTHING = models.Filter(must=[models.HasIdCondition(has_id=[])])


class _NoCounterpartError(Exception):
    """Qdrant has no such condition."""


def payload_keys(names: Iterable[str]) -> dict[str, str]:
    """Return the key of each field: its name, unless that may be a path in Qdrant's
    syntax.
    """
    return {
        name: name if _PLAIN.fullmatch(name) else f"field-{number}"
        for number, name in enumerate(names)
    }


def to_conditions(
    rows: RowFilter,
    fields: Mapping[str, Sequence[str]],
    count: int,
) -> models.Filter:
    """Return the conditions of rows. fields: key and Arrow type of each stored field.
    count: of stored rows.
    """
    try:
        if 2 * len(rows.excluded) > count:
            raise _NoCounterpartError  # it takes less to name the others
        stored: list[Any] | None = (
            [_all_of(rows.filter, fields)] if rows.filter else None
        )
    except (_NoCounterpartError, TypeError, AttributeError):
        # or a field has got values of another type since
        hidden = np.flatnonzero(~rows.mask)
        if 2 * len(hidden) > count:
            return models.Filter(must=[_rows(np.flatnonzero(rows.mask))])
        return models.Filter(must_not=[_rows(hidden)])
    condition = models.Filter(
        must=stored, must_not=[_rows(rows.excluded)] if len(rows.excluded) else None
    )
    if len(rows.included):
        return models.Filter(should=[condition, _rows(rows.included)])
    return condition


def _rows(rows: Rows) -> models.HasIdCondition:
    return models.HasIdCondition(has_id=rows.tolist())


def _all_of(
    filter: Mapping[str, Any], fields: Mapping[str, Sequence[str]]
) -> models.Filter:
    parts: list[Any] = []
    for field, condition in filter.items():
        if field == "$or":
            parts.append(
                models.Filter(should=[_all_of(part, fields) for part in condition])
            )
        else:
            key, kind = fields.get(field, ("", ""))
            parts.append(_condition(field, key, kind, condition))
    return models.Filter(must=parts)


def _condition(field: str, key: str, kind: str, condition: Any) -> models.Filter:
    if not isinstance(condition, dict):
        return _one_of(
            field,
            key,
            kind,
            condition if isinstance(condition, list) else [condition],
        )
    parts: list[Any] = []
    for name, operand in condition.items():
        if name == "not":
            parts.append(
                models.Filter(must_not=[_condition(field, key, kind, operand)])
            )
        elif name == "in":
            parts.append(_one_of(field, key, kind, operand))
        elif name not in _RANGES:
            raise _NoCounterpartError
    if ranges := {
        name: operand for name, operand in condition.items() if name in _RANGES
    }:
        parts.append(_range(key, kind, ranges))
    return models.Filter(must=parts)


def _one_of(field: str, key: str, kind: str, values: Sequence[Any]) -> models.Filter:
    """Return the condition that a field has one of some values; key is "" if no stored
    row has the field.
    """
    present = [value for value in values if value is not None]
    is_null = None in values or (field in EMPTY_IS_MISSING and "" in present)
    if not key:
        return models.Filter() if is_null else _NOTHING
    parts: list[Any] = (
        [models.IsNullCondition(is_null=models.PayloadField(key=key))]
        if is_null
        else []
    )
    if kind == "double":
        parts += [_range(key, kind, {"gte": value, "lte": value}) for value in present]
    elif kind == "bool":
        if not all(isinstance(value, bool) for value in present):
            raise _NoCounterpartError
        parts += [
            models.FieldCondition(key=key, match=models.MatchValue(value=value))
            for value in present
        ]
    elif kind == "int64":
        present = [
            int(value)
            for value in present
            if -(2**63) <= value < 2**63 and value == int(value)
        ]
    else:
        present = [replace_surrogates(value) for value in present]
    if present and kind not in ("double", "bool"):
        parts.append(models.FieldCondition(key=key, match=models.MatchAny(any=present)))
    return models.Filter(should=parts) if parts else _NOTHING


def _range(key: str, kind: str, bounds: Mapping[str, Any]) -> Any:
    if not key:
        return _NOTHING
    if kind not in _NUMBERS or not all(
        _is_exact(bound, kind) for bound in bounds.values()
    ):
        raise _NoCounterpartError
    if kind == "int64":  # servers cut off the fraction of a bound
        bounds = {
            name: math.floor(bound) if name in ("gt", "lte") else math.ceil(bound)
            for name, bound in bounds.items()
        }
    return models.FieldCondition(
        key=key,
        range=models.Range(**{name: float(bound) for name, bound in bounds.items()}),
    )


def _is_exact(bound: Any, kind: str) -> bool:
    return abs(bound) < _EXACT or (
        kind == "double" and isinstance(bound, float) and math.isfinite(bound)
    )
