"""Training reads what describes a gallery for the index: Parquet lists, metadata tables, webdataset tars."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar_core.data import load_split, load_splits
from dcar_core.util.errors import DataError
from index_jobs.gallery.scan import scan
from tests.support.images import png

ROWS: list[dict[str, Any]] = [
    {"file_name": f"{n}.png", "caption": f"image {n}", "category": "even" if n % 2 == 0 else "odd"} for n in range(40)
]


def write_images(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for row in ROWS:
        (folder / row["file_name"]).write_bytes(png())


def captions(path: Path) -> set[str]:
    """All captions that training reads, over all splits."""
    datasets, _ = load_splits(path)
    assert list(datasets) == ["train", "val", "test"]
    return {sample.caption for data in datasets.values() for sample in data.samples}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_gallery_with_metadata_is_a_data_set(suffix: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    table = tmp_path / f"metadata{suffix}"
    if suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".csv":
        lines = ["file_name,caption,category", *(",".join(row.values()) for row in ROWS)]
        table.write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), table)
    assert captions(tmp_path) == set(scan(tmp_path).table["caption"].to_pylist())


def test_a_folder_of_tars_is_a_data_set(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard:04}.tar", "w") as tar:
            for row in ROWS[shard::2]:
                stem = row["file_name"].removesuffix(".png")
                for suffix, data in (("png", png()), ("json", json.dumps({**row, "file_name": None}).encode())):
                    member = tarfile.TarInfo(f"{stem}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, BytesIO(data))
    assert captions(tmp_path) == set(scan(tmp_path).table["caption"].to_pylist())


def test_a_parquet_list_is_a_data_set(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{**row, "split": "train" if n else "val", "negatives": ["other"]} for n, row in enumerate(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    training, _ = load_split(tmp_path / "list.parquet", "train")
    assert len(training) == len(ROWS) - 1
    assert training.samples[0].negatives == ("other",)
    (tmp_path / "list.parquet").rename(tmp_path / "pairs.parquet")
    assert len(load_split(tmp_path, "train")[0]) == len(ROWS) - 1
    (tmp_path / "pairs.parquet").unlink()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    assert len(load_split(tmp_path, "train")[0]) + len(load_split(tmp_path, "val")[0]) == len(ROWS)


def test_annotations_take_precedence_over_a_gallerys_metadata(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:30]))
    training, validation = load_split(tmp_path, "train")[0], load_split(tmp_path, "val")[0]
    assert {sample.image for sample in (*training.samples, *validation.samples)} == {
        row["file_name"] for row in ROWS[:30]
    }
    with pytest.raises(DataError, match="has no test pairs; it has train"):
        load_split(tmp_path, "test")


def test_rows_without_a_caption_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{**row, "caption": None} if n % 4 == 0 else row for n, row in enumerate(ROWS)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, reports = load_splits(tmp_path)
    assert sum(report.counts["empty captions, left out"] for report in reports.values()) == 10
    (tmp_path / "metadata.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    _, reports = load_splits(tmp_path)
    assert sum(report.counts["empty captions, left out"] for report in reports.values()) == 10


def test_a_parquet_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"train\.parquet is not a parquet file"):
        load_split(tmp_path, "train")
    pq.write_table(pa.Table.from_pylist([{"caption": "a"}]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no column file_name or image or path, which every row needs; it has caption"):
        load_split(tmp_path, "train")
    pq.write_table(pa.Table.from_pylist([{"img": "a.png", "text": "a"}]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="path, which every row needs; it has img, text"):
        load_split(tmp_path, "train")
    pq.write_table(pa.Table.from_pylist([{"image": "a.png", "caption": "a"}]), tmp_path / "train.parquet")
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[4:40] = b"\xff" * 36
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.parquet is damaged, or cannot be read: .+"):
        load_split(tmp_path, "train")


def test_a_binary_column_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "caption": ["a"], "category": [b"cat"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 1: field 'category' must be one text, not \"b'cat'\""):
        load_split(tmp_path, "train")
