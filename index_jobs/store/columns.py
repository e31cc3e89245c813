"""Metadata in JSON to typed Arrow columns, one for each field.

- A field's type is the narrowest that holds all of its values: bool, int64, float64, string, or a list of strings.
  Values that do not go together, or are objects, become text.
- Galleries with very many fields get columns for the most frequent ones.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

logger = logging.getLogger(__name__)

MOST_FIELDS = 256
_TEXT = pa.string()
_LIST = pa.list_(pa.string())


@dataclass(frozen=True)
class Fields:
    """The fields of a gallery's metadata with their Arrow types, by name."""

    types: dict[str, pa.DataType]

    @classmethod
    def of(cls, metadata: pa.ChunkedArray) -> "Fields":
        """Look through a column of JSON objects."""
        seen: Counter[str] = Counter()
        types: dict[str, pa.DataType] = {}
        for record in _records(metadata):
            for name, value in record.items():
                if value is None:
                    continue
                seen[name] += 1
                kind = _type(value)
                known = types.get(name, kind)
                types[name] = kind if kind == known else common(known, kind)
        kept = [name for name, _ in seen.most_common(MOST_FIELDS)]
        if len(kept) < len(seen):
            logger.warning("items have %d metadata fields; filters know the %d most frequent", len(seen), len(kept))
        return cls({name: types[name] for name in sorted(kept)})

    def arrays(self, metadata: pa.ChunkedArray) -> dict[str, pa.Array]:
        """The columns of a part of the gallery, null where a field is missing."""
        records = list(_records(metadata))
        return {
            name: pa.array([_cast(record.get(name), kind) for record in records], kind)
            for name, kind in self.types.items()
        }


def _records(metadata: pa.ChunkedArray) -> Iterator[dict[str, Any]]:
    for chunk in metadata.chunks:
        for text in chunk.to_pylist():
            yield json.loads(text)


def _type(value: Any) -> pa.DataType:
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if -(2**63) <= value < 2**63 else _TEXT
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return _LIST
    return _TEXT


def common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The narrowest type for the values of both."""
    numbers = (pa.int64(), pa.float64())
    return pa.float64() if one in numbers and other in numbers else _TEXT


def converted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as a type that is wider than its own."""
    return pa.chunked_array([[_cast(value, kind) for value in chunk.to_pylist()] for chunk in column.chunks], kind)


def _cast(value: Any, kind: pa.DataType) -> Any:
    if value is None or (kind != _TEXT and not (kind == pa.float64() and isinstance(value, int))):
        return value
    if kind == pa.float64():
        return float(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
