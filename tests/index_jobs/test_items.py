"""Rows of a table that is larger than what Arrow takes from at once."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index_jobs.gallery.scan import SCHEMA
from index_jobs.store import items

BATCHES, ROWS, TEXT = 32, 4, 2**18  # 32 MiB of texts


def large_table() -> pa.Table:
    metadata = json.dumps({"about": "y" * TEXT})
    batches = [
        pa.RecordBatch.from_pylist([
            dict.fromkeys(SCHEMA.names, 0)
            | dict.fromkeys(("caption", "category", "location", "name"), "")
            | {"id": f"{number:08}", "metadata": metadata}
            for number in range(start, start + ROWS)
        ], SCHEMA)
        for start in range(0, BATCHES * ROWS, ROWS)
    ]  # fmt: skip
    table = pa.Table.from_batches(batches, SCHEMA)
    for name in items.SIZE_COLUMNS:
        table = table.append_column(name, pa.nulls(len(table), pa.int32()))
    return table


@pytest.mark.parametrize("rows", [[], [0], [19], [3, 4], [0, 1, 7, 8, 19], [*range(20)], [5, 6, 7, 8, 9]])
def test_take_rows_returns_the_rows_that_arrow_takes(rows: list[int]) -> None:
    columns = {"text": pa.chunked_array([[str(i) for i in part] for part in np.split(np.arange(20), [3, 3, 8, 19])])}
    columns["number"] = pa.chunked_array([[*range(11)], [*range(11, 20)]])
    table = pa.table(columns)
    taken = items.take_rows(table, np.array(rows, np.int64))
    assert taken.to_pylist() == table.take(pa.array(rows, pa.int64())).to_pylist()


def test_rows_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must ascend"):
        items.take_rows(pa.table({"number": [1, 2, 3]}), np.array([0, 2, 1]))


def test_no_column_is_joined_for_a_part_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined, texts of 2 GiB are more than Arrow holds, and every batch costs as much as all."""
    monkeypatch.setattr(items, "_BATCH", ROWS)
    table, rows = large_table(), np.delete(np.arange(BATCHES * ROWS), 7)
    before, pool = pa.default_memory_pool(), pa.system_memory_pool()
    assert pool.max_memory() < 8 * ROWS * TEXT  # unused so far
    try:
        pa.set_memory_pool(pool)
        items.write_items(tmp_path / "items.arrow", table, rows)
        part = items.Items(tmp_path / "items.arrow").table(np.array([5, 6, 100]))
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 8 * ROWS * TEXT
    assert part["id"].to_pylist() == ["00000005", "00000006", "00000101"]
