"""Items of a published index: a memory-mapped Arrow file with one row for each vector.

- Record batches have one fixed size, but for the last.
- One column holds the row numbers sorted by id. A binary search in it finds an id
  without loading a table.
- Metadata is stored twice: as JSON, to be shown, and as a typed column for each field,
  to be filtered by.
- A field gets the narrowest type that holds all of its values: bool, int64, float64,
  string, or a list of strings. Values of incompatible types, and objects, become text.
  Galleries with very many fields get columns for the most frequent ones only.
"""

import json
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.util.arrays import Rows
from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import atomic_writer, canonical_json

logger = logging.getLogger(__name__)

BATCH = 65_536
SIZE_COLUMNS = ["width", "height"]  # of the upright image in pixels, null if unknown
COLUMNS = [
    "id",
    "caption",
    "category",
    "location",
    "offset",
    "size",
    "metadata",
    *SIZE_COLUMNS,
]
_BY_ID = "by_id"  # row numbers in the order of the ids
_TYPES = {
    **dict.fromkeys([*COLUMNS, _BY_ID], pa.string()),
    **dict.fromkeys(["offset", "size", _BY_ID], pa.int64()),
    **dict.fromkeys(SIZE_COLUMNS, pa.int32()),
}
_FIELD = "field:"  # prefix of a metadata field's column
BUILT_IN_FIELDS = ("id", "caption", "category")
# the field of when a picture was taken, which its file tells unless the metadata do
TAKEN = "taken"
MAX_FIELDS = 256
_TEXT = pa.string()
_LIST = pa.list_(pa.string())


def infer_types(metadata: pa.ChunkedArray) -> dict[str, pa.DataType]:
    """Return the types of the most frequent fields of a column of JSON objects, by
    their sorted names.
    """
    frequency = Counter[str]()
    types = dict[str, pa.DataType]()
    for record in _records(metadata):
        for name, value in record.items():
            if value is not None:
                frequency[name] += 1
                value_type = type_of(value)
                types[name] = common_type(types.get(name, value_type), value_type)
    kept = [name for name, _ in frequency.most_common(MAX_FIELDS)]
    if len(kept) < len(frequency):
        logger.warning(
            "of %d metadata fields, filters accept the %d most frequent",
            len(frequency),
            len(kept),
        )
    return {name: types[name] for name in sorted(kept)}


def field_names(metadata: pa.ChunkedArray) -> set[str]:
    """Return the names of all fields, those without a column included."""
    return {name for record in _records(metadata) for name in record}


def _records(metadata: pa.ChunkedArray) -> Iterator[dict[str, Any]]:
    for chunk in metadata.chunks:
        for text in chunk.to_pylist():
            yield json.loads(text)


def as_scanned(metadata: str, scanned: str) -> str:
    """Return an item's metadata as a scan of its gallery finds them: without a `taken`
    that is of the file alone.
    """
    if TAKEN not in metadata or TAKEN in json.loads(scanned):
        return metadata
    return canonical_json(
        {name: value for name, value in json.loads(metadata).items() if name != TAKEN}
    ).decode()


def _metadata_json(record: Mapping[str, Any]) -> str:
    """Return an item's fields that are not built in, as they are stored."""
    metadata = {
        name: value for name, value in record.items() if name not in BUILT_IN_FIELDS
    }
    return canonical_json(metadata).decode()


def type_of(value: Any) -> pa.DataType:
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
    """Return True if values of two Arrow types keep their types in one field: equal
    types, or both numbers.
    """
    return first == second or {first, second} == {"int64", "double"}


def typed_array(values: list[Any], target: pa.DataType) -> pa.Array:
    """Return values of types that a type holds, null where they are None."""
    if target == _TEXT:
        values = [
            v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for v in values
        ]
    elif target == pa.float64():
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, target)


def _replaced(
    arrays: list[pa.Array],
    rows: Rows,
    values: list[Any],
    target: pa.DataType,
) -> list[pa.Array]:
    """Return the batches of a column as a type, with other values in some rows,
    ascending.
    """
    replaced = []
    start = 0
    for array in arrays:
        if array.type != target:
            array = typed_array(array.to_pylist(), target)
        low, high = np.searchsorted(rows, [start, start + len(array)])
        if low < high:
            order = np.arange(len(array))
            order[rows[low:high] - start] = len(array) + np.arange(high - low)
            array = pa.concat_arrays(
                [array, typed_array(values[low:high], target)]
            ).take(pa.array(order))
        replaced.append(array)
        start += len(array)
    return replaced


def take_rows(table: pa.Table, rows: Rows) -> pa.Table:
    """Return the chosen rows of a table, ascending, batch by batch.

    Arrow's own `take` joins a whole column of text first. That copies the table for a
    few rows, and fails for more than 2 GiB of text.
    """
    if (np.diff(rows) < 0).any():
        raise ValueError("rows must ascend")
    first = int(rows[0]) if len(rows) else 0
    chosen = []
    start = first
    for batch in table.slice(
        first, int(rows[-1]) + 1 - first if len(rows) else 0
    ).to_batches():
        low, high = np.searchsorted(rows, [start, start + len(batch)])
        if low < high:
            chosen.append(batch.take(pa.array(rows[low:high] - start)))
        start += len(batch)
    return pa.Table.from_batches(chosen, table.schema)


def write_items(path: Path, table: pa.Table, rows: Rows) -> None:
    """Write the chosen rows of a gallery's table, ascending."""
    columns = table.select(COLUMNS)
    by_id = (
        pc.sort_indices(take_rows(columns.select(["id"]), rows)["id"])
        .to_numpy()
        .astype(np.int64)
    )
    types = infer_types(columns["metadata"])
    schema = columns.schema.append(pa.field(_BY_ID, pa.int64()))
    for name, field_type in types.items():
        schema = schema.append(pa.field(_FIELD + name, field_type))
    with atomic_writer(path) as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(rows), BATCH):
            batch = take_rows(columns, rows[start : start + BATCH]).combine_chunks()
            records = list(_records(batch["metadata"]))
            batch = batch.append_column(_BY_ID, pa.array(by_id[start : start + BATCH]))
            for name, field_type in types.items():
                values = [record.get(name) for record in records]
                batch = batch.append_column(
                    _FIELD + name, typed_array(values, field_type)
                )
            writer.write_table(batch, max_chunksize=BATCH)


class Items:
    """A memory-mapped items file. Safe for concurrent readers."""

    def __init__(self, path: Path) -> None:
        try:
            # The map outlives the file's name, so a version may be removed while it is
            # served.
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                self._batches = [
                    reader.get_batch(i) for i in range(reader.num_record_batches)
                ]
                self._schema = reader.schema
            names = self._schema.names
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        types = {
            name: self._schema.field(name).type for name in _TYPES if name in names
        }
        if types != _TYPES or any(len(batch) != BATCH for batch in self._batches[:-1]):
            raise ArtifactError(f"{path} is not an items file of this version")
        # Of every item, memory-mapped, by the names in `COLUMNS`; a table would make a
        # new object at each look.
        self.columns = {
            name: pa.chunked_array([b.column(name) for b in self._batches], types[name])
            for name in types
        }

    def __len__(self) -> int:
        return len(self.columns["id"])

    @cached_property
    def fields(self) -> dict[str, pa.DataType]:
        """Arrow types of the fields that `column` accepts, by name."""
        metadata = {
            f.name.removeprefix(_FIELD): f.type
            for f in self._schema
            if f.name.startswith(_FIELD)
        }
        return metadata | dict.fromkeys(BUILT_IN_FIELDS, pa.string())

    def column(self, name: str) -> pa.ChunkedArray:
        """Return all rows of one of the `fields`, memory-mapped."""
        column = name if name in BUILT_IN_FIELDS else _FIELD + name
        return pa.chunked_array(
            [batch.column(column) for batch in self._batches], self.fields[name]
        )

    def field_table(self) -> pa.Table:
        """Return the columns of the `fields`, memory-mapped."""
        return pa.table({name: self.column(name) for name in self.fields})

    def table(self, rows: Rows | None = None) -> pa.Table:
        """Return all rows, or some, ascending, with the columns that `write_items`
        needs.
        """
        table = pa.Table.from_batches(self._batches, self._schema).select(COLUMNS)
        return table if rows is None else take_rows(table, rows)

    def write_changed(
        self,
        path: Path,
        records: Mapping[int, Mapping[str, Any]],
        changed: Set[str],
    ) -> None:
        """Write these items with other fields in some rows, as `write_items` would;
        other columns are copied.

        records: by row, all of its fields, `caption` and `category` included. changed:
        names of those that may differ.
        """
        rows = np.array(sorted(records), np.int64)
        fields = [records[row] for row in rows.tolist()]
        columns = {
            name: [batch.column(name) for batch in self._batches]
            for name in self._schema.names
        }
        for name in {"caption", "category"} & changed:
            texts = [record.get(name, "") for record in fields]
            columns[name] = _replaced(columns[name], rows, texts, _TEXT)
        metadata = [_metadata_json(record) for record in fields]
        columns["metadata"] = _replaced(columns["metadata"], rows, metadata, _TEXT)
        for name in sorted(changed - {*BUILT_IN_FIELDS}):
            values = [record.get(name) for record in fields]
            before = columns.pop(_FIELD + name, [])
            if not before and len(columns) >= len(_TYPES) + MAX_FIELDS:
                continue
            after = self._changed_field(before, rows, values)
            # the last value may be gone
            if any(array.null_count < len(array) for array in after):
                columns[_FIELD + name] = after
        schema = pa.schema([(name, arrays[0].type) for name, arrays in columns.items()])
        with atomic_writer(path) as file, pa.ipc.new_file(file, schema) as writer:
            for arrays in zip(*columns.values(), strict=True):
                writer.write_batch(pa.RecordBatch.from_arrays([*arrays], schema=schema))

    def _changed_field(
        self,
        before: list[pa.Array],
        rows: Rows,
        values: list[Any],
    ) -> list[pa.Array]:
        """Return the batches of a field with other values in some rows, in the
        narrowest type that holds both. A new field has no batches before.
        """
        types = [array.type for array in before[:1]]
        types += [type_of(value) for value in values if value is not None]
        if not types:
            return []
        target = reduce(common_type, types)
        if not before:
            before = [pa.nulls(len(batch), target) for batch in self._batches]
        return _replaced(before, rows, values, target)

    def row_of(self, item_id: str) -> int | None:
        """Return the row of an id, or None, by binary search over UTF-8 bytes, which is
        Arrow's sort order.
        """
        target = item_id.encode(errors="surrogatepass")
        ids = self.columns["id"]
        order = self.columns[_BY_ID]

        def id_at(rank: int) -> bytes:
            return bytes(ids[order[rank].as_py()].as_buffer())

        rank = bisect_left(range(len(self)), target, key=id_at)
        if rank < len(self) and id_at(rank) == target:
            return int(order[rank].as_py())
        return None
