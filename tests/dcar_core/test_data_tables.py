"""Pairs from CSV, JSONL and tars: nothing of a file is left out in silence."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar_core.data import load_split, load_splits
from dcar_core.util.errors import DataError
from tests.support.images import write_image


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_webdataset_tars_hold_pairs(tmp_path: Path) -> None:
    png = write_image(tmp_path / "x" / "red.png").read_bytes()
    tar(tmp_path / "train-0000.tar", {"0.png": png, "0.txt": b"a red square\nall red", "1.png": png, "2.txt": b"no"})
    row = json.dumps({"caption": "red", "category": "square", "negatives": ["blue"]}).encode()
    tar(tmp_path / "train-0001.tar", {"./0.png": png, "./0.json": row})
    tar(tmp_path / "val.tar", {"v/0.png": png, "v/0.txt": b"for validation", "v/0.cls": b"square\n"})
    data, report = load_split(tmp_path, "train", image_policy="skip")
    assert [(s.image, s.caption) for s in data.samples] == [
        ("train-0000.tar/0.png", "a red square"),
        ("train-0000.tar/0.png", "all red"),
        ("train-0001.tar/0.png", "red"),
    ]
    assert (data.samples[2].category, data.samples[2].negatives) == ("square", ("blue",))
    assert data.read(data.samples[2].image) == png
    assert report.names["tar samples without a caption, left out"] == ["train-0000.tar/1"]
    assert report.names["tar samples without an image, left out"] == ["train-0000.tar/2"]
    (validation,) = load_split(tmp_path, "val")[0].samples
    assert (validation.caption, validation.category) == ("for validation", "square")
    assert len(load_split(tmp_path / "val.tar", "val")[0]) == 1


def test_image_of_a_sample_is_the_one_without_a_suffix(tmp_path: Path) -> None:
    png = write_image(tmp_path / "x" / "red.png").read_bytes()
    tar(tmp_path / "train.tar", {"0.depth.png": b"depth", "0.png": png, "0.mask.png": b"mask", "0.txt": b"red"})
    data, report = load_split(tmp_path, "train", image_policy="skip")
    assert [sample.image for sample in data.samples] == ["train.tar/0.png"]
    assert report.names["tar samples with several images, one of which was taken"] == ["0.png"]


def test_caption_ends_with_its_line(tmp_path: Path) -> None:
    png = write_image(tmp_path / "x" / "red.png").read_bytes()
    text = "a red\u2028square\r\nall\x85red\n".encode()
    tar(tmp_path / "train.tar", {"0.png": png, "0.txt": text})
    assert len(load_split(tmp_path, "train")[0].samples) == 2


def test_captions_are_read_where_the_caption_is_empty(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("image,caption,captions\na.png,,x|y\nb.png,z,\n")
    (tmp_path / "val.jsonl").write_text(json.dumps({"image": "a.png", "caption": " ", "captions": ["x", "y"]}) + "\n")
    for split, wanted in (("train", ["x", "y", "z"]), ("val", ["x", "y"])):
        data, report = load_split(tmp_path, split, image_policy="ignore")
        assert [sample.caption for sample in data.samples] == wanted
        assert set(report.counts) == {"pairs without a negative"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('a.png,"a red owl\nb.png,a blue owl\nc.png,"a ""green"" owl"\n', r"line 2 is not CSV: .* quote not closed"),
        ('a.png,red\nb.png,"a blue owl\nc.png,green\n', r"line 3 is not CSV: .* quote not closed"),
        ('a.png,"a ""red"" owl"\nb.png,"a" blue owl\n', r"line 3 is not CSV"),
    ],
)
def test_unclosed_quote_swallows_no_rows(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "train.csv").write_text("image,caption\n" + rows)
    with pytest.raises(DataError, match=message):
        load_split(tmp_path, "train", image_policy="ignore")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("image,caption,caption\na.png,x,y\n")
    with pytest.raises(DataError, match="two columns named 'caption'"):
        load_split(tmp_path, "train", image_policy="ignore")
    (tmp_path / "train.csv").write_text("image,caption,note,note\na.png,x,y,z\n")  # never read
    assert len(load_split(tmp_path, "train", image_policy="ignore")[0].samples) == 1


def test_unused_columns_can_hold_anything(tmp_path: Path) -> None:
    row = {"image": "a.png", "caption": "a cat"}
    rows = [row | {"captions": 5}, row | {"image": "b.png", "captions": [{}], "note": [1]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_split(tmp_path, "train", image_policy="ignore")[0].samples) == 2


def test_images_inside_of_a_parquet_file_are_named(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": [{"bytes": b"x", "path": "a.png"}], "caption": ["red"]}), tmp_path / "train.parquet"
    )
    with pytest.raises(DataError, match=r"train.parquet holds the images themselves; write them to files"):
        load_split(tmp_path, "train")


def test_class_name_is_preferred_to_its_number(tmp_path: Path) -> None:
    png = write_image(tmp_path / "x" / "red.png").read_bytes()
    row = json.dumps({"caption": "red", "class_name": "square"}).encode()
    tar(tmp_path / "train.tar", {"0.png": png, "0.json": row, "0.cls": b"17"})
    assert load_split(tmp_path, "train")[0].samples[0].category == "square"


def test_compressed_tars_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"unpack train\.tar\.gz"):
        load_splits(tmp_path, ("train",))


def test_a_bad_row_is_left_out_and_named(tmp_path: Path) -> None:
    rows = [json.dumps({"image": f"{n}.png", "caption": f"number {n}"}) for n in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, '{"image": "x.png"}', "{"]))
    splits, reports = load_splits(tmp_path, image_policy="ignore")
    assert sum(map(len, splits.values())) == 20
    first, second = reports["train"].names["rows that cannot be used, left out"]
    assert first.startswith("line 21: field 'caption' is missing")
    assert second.startswith("line 22: not JSON")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_every_form_hold_pairs(suffix: str, tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "a red car", "category": "007"}]
    if suffix == ".csv":
        (tmp_path / "train.csv").write_text("image,caption,category\na.png,a red car,007\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    data, _ = load_split(tmp_path, "train", image_policy="ignore")
    assert [(s.image, s.caption, s.category) for s in data.samples] == [("a.png", "a red car", "007")]
