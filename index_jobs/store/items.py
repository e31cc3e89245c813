"""Items of a published index: a memory-mapped Arrow file with one row for each vector.

- Record batches have one fixed size, so a division finds the batch of a row.
- One column holds the row numbers sorted by id. A binary search in it finds an id without loading a table.
- Metadata is stored twice: as JSON, to be shown, and as a typed column for each field, to be filtered by.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.util.arrays import Rows
from dcar_core.util.errors import ArtifactError, DataError
from dcar_core.util.files import atomic_writer
from index_jobs.checks import check_file_once
from index_jobs.store.columns import FieldTypes

_BATCH = 65_536
SIZE_COLUMNS = ["width", "height"]  # of the upright image in pixels, null if unknown; older files lack them
COLUMNS = ["id", "caption", "category", "location", "offset", "size", "metadata", *SIZE_COLUMNS]
_BY_ID = "by_id"  # row numbers in the order of the ids
_TYPES = {
    **dict.fromkeys([*COLUMNS, _BY_ID], pa.string()),
    **dict.fromkeys(["offset", "size", _BY_ID], pa.int64()),
    **dict.fromkeys(SIZE_COLUMNS, pa.int32()),
}
_FIELD = "field:"  # prefix of a metadata field's column
BUILT_IN_FIELDS = ("id", "caption", "category")


def take_rows(table: pa.Table, rows: Rows) -> pa.Table:
    """Return the chosen rows of a table, ascending, batch by batch.

    Arrow's own `take` joins a whole column of text first. That copies the table for a few rows, and fails for more than
    2 GiB of text.
    """
    if (np.diff(rows) < 0).any():
        raise ValueError("rows must ascend")
    first = int(rows[0]) if len(rows) else 0
    chosen, start = [], first
    for batch in table.slice(first, int(rows[-1]) + 1 - first if len(rows) else 0).to_batches():
        low, high = np.searchsorted(rows, [start, start + len(batch)])
        chosen.append(batch.take(pa.array(rows[low:high] - start)))
        start += len(batch)
    return pa.Table.from_batches(chosen, table.schema)


def write_items(path: Path, table: pa.Table, rows: Rows) -> FieldTypes:
    """Write the chosen rows of a gallery's table, ascending, and return the types of their fields."""
    columns = table.select(COLUMNS)
    by_id = pc.sort_indices(take_rows(columns.select(["id"]), rows)["id"]).to_numpy().astype(np.int64)
    fields = FieldTypes.infer(columns["metadata"])
    schema = columns.schema.append(pa.field(_BY_ID, pa.int64()))
    for name, field_type in fields.types.items():
        schema = schema.append(pa.field(_FIELD + name, field_type))
    with atomic_writer(path) as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(rows), _BATCH):
            batch = take_rows(columns, rows[start : start + _BATCH]).combine_chunks()
            values = fields.arrays(batch["metadata"])
            batch = batch.append_column(_BY_ID, pa.array(by_id[start : start + _BATCH]))
            for name in fields.types:
                batch = batch.append_column(_FIELD + name, values[name])
            writer.write_table(batch, max_chunksize=_BATCH)
    return fields


class Items:
    """A memory-mapped items file. Safe for concurrent readers."""

    def __init__(self, path: Path) -> None:
        try:
            # The map outlives the file's name, so a version may be removed while it is served.
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
                self._schema = reader.schema
            names = self._schema.names
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        self._missing = [name for name in SIZE_COLUMNS if name not in names]
        types = {name: self._schema.field(name).type for name in _TYPES if name in names}
        if {**dict.fromkeys(self._missing, pa.int32()), **types} != _TYPES or any(
            len(batch) != _BATCH for batch in self._batches[:-1]
        ):
            raise ArtifactError(f"{path} is not an items file of this version")
        # Cached, because a batch creates a new object for a column each time.
        self._cells = {name: [batch.column(name) for batch in self._batches] for name in types}
        self._cells |= {name: [pa.nulls(len(batch)) for batch in self._batches] for name in self._missing}
        self._count = sum(len(batch) for batch in self._batches)
        check_file_once(path, self._check)

    def _check(self) -> None:
        """Raise ValueError for a wrong offset, text or row number. Arrow trusts them, and one would end the process."""
        for batch, by_id in zip(self._batches, self._cells[_BY_ID], strict=True):
            batch.validate(full=True)
            rows = by_id.to_numpy()
            if len(rows) and not 0 <= rows.min() <= rows.max() < self._count:
                raise ValueError(f"a row number is not in 0..{self._count - 1}")

    def __len__(self) -> int:
        return self._count

    @cached_property
    def fields(self) -> dict[str, str]:
        """Arrow types of the fields that `column` accepts, by name."""
        metadata = {f.name.removeprefix(_FIELD): str(f.type) for f in self._schema if f.name.startswith(_FIELD)}
        return metadata | dict.fromkeys(BUILT_IN_FIELDS, "string")

    def column(self, name: str) -> pa.ChunkedArray:
        """Return all rows of one field, memory-mapped."""
        column = self._schema.get_field_index(name if name in BUILT_IN_FIELDS else _FIELD + name)
        if column < 0:
            raise DataError(f"no item has the field {name!r}; there are: {', '.join(sorted(self.fields))}")
        field_type = self._schema.field(column).type
        return pa.chunked_array([batch.column(column) for batch in self._batches], field_type)

    def table(self, rows: Rows | None = None) -> pa.Table:
        """Return all rows, or some, ascending, with the columns that `write_items` needs."""
        table = pa.Table.from_batches(self._batches, self._schema)
        for name in self._missing:
            table = table.append_column(name, pa.nulls(len(self), pa.int32()))
        table = table.select(COLUMNS)
        return table if rows is None else take_rows(table, rows)

    def cell(self, row: int, column: str) -> Any:
        if not 0 <= row < self._count:
            raise IndexError(f"row {row} is not in 0..{self._count - 1}")
        return self._cells[column][row // _BATCH][row % _BATCH].as_py()

    def row_of(self, item_id: str) -> int | None:
        """Return the row of an id, or None, by binary search over UTF-8 bytes, which is Arrow's sort order."""
        try:
            target = item_id.encode()
        except UnicodeEncodeError:
            return None
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            row = self.cell(middle, _BY_ID)
            candidate = self.cell(row, "id").encode()
            if candidate == target:
                return int(row)
            low, high = (middle + 1, high) if candidate < target else (low, middle)
        return None
