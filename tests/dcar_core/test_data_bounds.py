"""Small files that would fill the memory, or never end, are refused with the bound that they exceed."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar_core.data import records
from dcar_core.data.records import read_records
from dcar_core.util.errors import DataError


def read(file: Path) -> int:
    return sum(1 for _ in read_records(str(file), lambda: file.open("rb"), infer_types=True))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_without_end_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"list{suffix}"
    good = {".jsonl": json.dumps({"image": "a.png"}), ".csv": "image,caption"}[suffix]
    file.write_text(f"{good}\n" + "x" * (records.MAX_LINE + 1))
    with pytest.raises(DataError, match=rf"list{suffix}, line 2: longer than 16,000,000 characters"):
        read(file)


def test_a_table_of_too_many_columns_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text("image," + ",".join(f"c{number}" for number in range(200_000)) + "\na.png\n")
    with pytest.raises(DataError, match="has 200,001 columns; at most 10,000 are read"):
        read(file)


def test_a_file_of_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_ROWS", 2)
    file = tmp_path / "list.csv"
    file.write_text("image\na.png\nb.png\n")
    assert read(file) == 2
    file.write_text("image\na.png\nb.png\nc.png\n")
    with pytest.raises(DataError, match="more than 2 rows; split it"):
        read(file)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x" * 50_000] * 1000),
        pa.array([["x" * 50_000]] * 1000),
        pa.array([{"text": "x" * 50_000}] * 1000),
        pa.array([str(number).zfill(50_000) for number in range(1000)]),
    ],
    ids=["texts", "lists", "objects", "different texts"],
)
def test_a_parquet_file_that_unpacks_to_far_more_is_refused(
    column: pa.Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table({"image": ["a.png"] * 1000, "caption": column}), file, compression="zstd")
    assert file.stat().st_size < 100_000
    assert read(file) == 1000
    monkeypatch.setattr(records, "MAX_UNPACKED", 40 << 20)
    with pytest.raises(
        DataError, match=r"list\.parquet unpacks to [\d,]+ bytes or more; .* 41,943,040 are read; split it"
    ):
        read(file)
