"""Typed Arrow columns from metadata in JSON, one for each field.

- A field gets the narrowest type that holds all of its values: bool, int64, float64, string, or a list of strings.
  Values of incompatible types, and objects, become text.
- Galleries with very many fields get columns for the most frequent ones only.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

logger = logging.getLogger(__name__)

MAX_FIELDS = 256
_TEXT = pa.string()
_NUMBER_LIKE = re.compile(r"[-+$€£¥\s]*\d[\d.,' ]*([%€$£¥]|[a-zA-Z]{1,3})?")  # 10,50 or $12 or 12 EUR
_LIST = pa.list_(pa.string())


@dataclass(frozen=True)
class FieldTypes:
    """Arrow types of a gallery's metadata fields, by name.

    number_texts: fields in which every text looks like a number, such as "10,50" or "$12", each with one of the texts.
    """

    types: dict[str, pa.DataType]
    number_texts: dict[str, str]

    @classmethod
    def infer(cls, metadata: pa.ChunkedArray) -> "FieldTypes":
        """Infer the types from a column of JSON objects."""
        frequency: Counter[str] = Counter()
        types: dict[str, pa.DataType] = {}
        examples: dict[str, str] = {}  # of fields in which every text looks like a number
        for record in _records(metadata):
            for name, value in record.items():
                if value is None:
                    continue
                frequency[name] += 1
                value_type = _type_of(value)
                if isinstance(value, str) and (name in examples or name not in types):
                    if _NUMBER_LIKE.fullmatch(value):
                        examples[name] = examples.get(name, "") if value.isdecimal() else value
                    else:
                        examples.pop(name, None)
                types[name] = common_type(types.get(name, value_type), value_type)
        kept = [name for name, _ in frequency.most_common(MAX_FIELDS)]
        if len(kept) < len(frequency):
            logger.warning(
                "items have %d metadata fields; filters accept the %d most frequent ones", len(frequency), len(kept)
            )
        number_texts = {name: examples[name] for name in kept if examples.get(name)}
        return cls({name: types[name] for name in sorted(kept)}, number_texts)

    def arrays(self, metadata: pa.ChunkedArray) -> dict[str, pa.Array]:
        """Return the columns of a part of the gallery, null where a field is missing."""
        records = list(_records(metadata))
        return {
            name: pa.array([_cast(record.get(name), field_type) for record in records], field_type)
            for name, field_type in self.types.items()
        }


def field_names(metadata: pa.ChunkedArray) -> set[str]:
    """Return the names of all fields, those without a column included."""
    return {name for record in _records(metadata) for name in record}


def _records(metadata: pa.ChunkedArray) -> Iterator[dict[str, Any]]:
    for chunk in metadata.chunks:
        for text in chunk.to_pylist():
            yield json.loads(text)


def _type_of(value: Any) -> pa.DataType:
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if -(2**63) <= value < 2**63 else _TEXT
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return _LIST
    return _TEXT


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """Return the narrowest type that holds the values of two types."""
    if first == second:
        return first
    numbers = (pa.int64(), pa.float64())
    return pa.float64() if first in numbers and second in numbers else _TEXT


def fit_one_field(first: str, second: str) -> bool:
    """Return True if values of two Arrow types keep their types in one field: equal types, or both numbers."""
    return first == second or {first, second} == {"int64", "double"}


def cast_column(column: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([[_cast(value, target) for value in chunk.to_pylist()] for chunk in column.chunks], target)


def _cast(value: Any, target: pa.DataType) -> Any:
    if value is None or (target != _TEXT and not (target == pa.float64() and isinstance(value, int))):
        return value
    if target == pa.float64():
        return float(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
