"""The items of a published index: an Arrow file, memory-mapped, with a row for each vector.

- Rows lie in record batches of one fixed size, so that a row is found by a division.
- A permutation that sorts the ids is a column of its own: an id is found by binary search, with nothing to load and no
  table in memory.
- Metadata lies there twice: whole, as JSON, to be shown, and a typed column for each field, to be filtered by.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dcar_core.util.errors import ArtifactError, DataError
from dcar_core.util.files import atomic_writer
from index_jobs.store.columns import Fields

_BATCH = 65_536
COLUMNS = ["id", "caption", "category", "location", "offset", "size", "metadata"]
_BY_ID = "by_id"  # row numbers in the order of the ids
_FIELD = "field:"  # before the name of a metadata field
_FILTERED = ("id", "caption", "category")


def taken(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """The chosen rows of a table, ascending, taken batch by batch.

    Arrow's own `take` joins a whole column of texts first: that costs all of the table for a few of its rows, and fails
    where the texts are more than 2 GiB.

    Raises:
        ValueError: the rows do not ascend.
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


def write_items(path: Path, table: pa.Table, rows: NDArray[np.int64]) -> None:
    """Write the chosen rows of a gallery's table, ascending.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    columns = table.select(COLUMNS)
    by_id = pc.sort_indices(taken(columns.select(["id"]), rows)["id"]).to_numpy().astype(np.int64)
    fields = Fields.of(columns["metadata"])
    schema = columns.schema.append(pa.field(_BY_ID, pa.int64()))
    for name, kind in fields.types.items():
        schema = schema.append(pa.field(_FIELD + name, kind))
    with atomic_writer(path) as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(rows), _BATCH):
            part = taken(columns, rows[start : start + _BATCH]).combine_chunks()
            values = fields.arrays(part["metadata"])
            part = part.append_column(_BY_ID, pa.array(by_id[start : start + _BATCH]))
            for name in fields.types:
                part = part.append_column(_FIELD + name, values[name])
            writer.write_table(part, max_chunksize=_BATCH)


class Items:
    """A memory-mapped items file. Safe for concurrent readers."""

    def __init__(self, path: Path) -> None:
        """Open.

        Raises:
            ArtifactError: the file is missing or no items file.
        """
        try:
            # The map outlives the file's name, so a version may be removed while it is served.
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
                self._schema = reader.schema
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        own = [*COLUMNS, _BY_ID]
        if not {*own} <= {*self._schema.names} or any(len(batch) != _BATCH for batch in self._batches[:-1]):
            raise ArtifactError(f"{path} is no items file of this version")
        # Taken out once: a batch makes a new object of a column each time it is asked for one.
        self._cells = {name: [batch.column(name) for batch in self._batches] for name in own}
        self._count = sum(len(batch) for batch in self._batches)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def fields(self) -> dict[str, str]:
        """The names that `column` knows, with their Arrow types."""
        own = dict.fromkeys(_FILTERED, "string")
        given = {f.name.removeprefix(_FIELD): str(f.type) for f in self._schema if f.name.startswith(_FIELD)}
        return given | own

    def column(self, name: str) -> pa.ChunkedArray:
        """All rows of one field, memory-mapped.

        Raises:
            DataError: no such field; the message lists the known ones.
        """
        place = self._schema.get_field_index(name if name in _FILTERED else _FIELD + name)
        if place < 0:
            raise DataError(f"no item has the field {name!r}; there are: {', '.join(sorted(self.fields))}")
        kind = self._schema.field(place).type
        return pa.chunked_array([batch.column(place) for batch in self._batches], kind)

    def table(self, rows: NDArray[np.int64]) -> pa.Table:
        """Some rows, ascending, with all that `write_items` asks for."""
        return taken(pa.Table.from_batches(self._batches).select(COLUMNS), rows)

    def value(self, row: int, column: str) -> Any:
        """One cell.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= row < self._count:
            raise IndexError(f"row {row} is not in 0..{self._count - 1}")
        return self._cells[column][row // _BATCH][row % _BATCH].as_py()

    def row_of(self, item_id: str) -> int | None:
        """The row of an id, by binary search over UTF-8 bytes, the order that Arrow sorts in."""
        try:
            wanted = item_id.encode()
        except UnicodeEncodeError:
            return None
        low, high = 0, self._count
        while low < high:
            middle = (low + high) // 2
            row = self.value(middle, _BY_ID)
            found = self.value(row, "id").encode()
            if found == wanted:
                return int(row)
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return None
