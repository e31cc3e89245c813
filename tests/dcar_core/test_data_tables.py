"""Pairs from CSV, JSONL, Parquet and tars, and files that cannot be used: named, with none left out in silence."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar_core.data import Annotations, Sample, records
from dcar_core.data.records import read_records
from dcar_core.util.errors import DataError
from tests.support.commands import dcar
from tests.support.files import write_file, write_json, write_jsonl, write_rows, write_tar
from tests.support.images import png

ROWS: list[dict[str, Any]] = [
    {"file_name": f"{n}.png", "caption": f"image {n}", "category": "even" if n % 2 == 0 else "odd"} for n in range(40)
]
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
COCO = r"entry 'images': must be an object; docs/how-to/prepare-data\.md shows how to convert COCO"
HEAD = "image,caption\n"


def samples(path: Path, split: str = "train") -> list[Sample]:
    return Annotations(path).load(split, "ignore")[0].samples


def test_webdataset_tars_hold_pairs(tmp_path: Path) -> None:
    image = png()
    lines = "a red\u2028square\r\nall\x85red\n".encode()  # two lines: a caption may have other signs that end one
    first = {
        "0.depth.png": b"depth",
        "0.png": image,
        "0.mask.png": b"mask",
        "0.txt": lines,
        "1.png": image,
        "2.txt": b"-",
    }
    write_tar(tmp_path / "train-0000.tar", first)
    row = json.dumps({"caption": "red", "class_name": "square", "negatives": ["blue"]}).encode()
    write_tar(tmp_path / "train-0001.tar", {"./0.png": image, "./0.json": row, "./0.cls": b"17"})
    write_tar(tmp_path / "val.tar", {"v/0.png": image, "v/0.txt": b"for validation", "v/0.cls": b"square\n"})
    data, report = Annotations(tmp_path).load("train", "skip")
    assert [(s.image, s.caption) for s in data.samples] == [
        ("train-0000.tar/0.png", "a red square"),
        ("train-0000.tar/0.png", "all red"),
        ("train-0001.tar/0.png", "red"),
    ]
    assert (data.samples[2].category, data.samples[2].negatives) == ("square", ("blue",)), "the name, not its number"
    assert data.read(data.samples[2].image) == image
    assert report.names["captions that are empty or missing, left out"] == ["train-0000.tar/1.png"]
    assert report.names["tar samples without an image, left out"] == ["train-0000.tar/2"]
    (validation,) = Annotations(tmp_path).load("val")[0].samples
    assert (validation.caption, validation.category) == ("for validation", "square")
    assert len(Annotations(tmp_path / "val.tar").load("val")[0]) == 1


def test_annotations_take_precedence_over_a_gallerys_metadata(tmp_path: Path) -> None:
    write_rows(tmp_path / "metadata.jsonl", ROWS)
    write_rows(tmp_path / "train.parquet", ROWS[:30])
    images = {sample.image for split in ("train", "val") for sample in samples(tmp_path, split)}
    assert images == {row["file_name"] for row in ROWS[:30]}
    with pytest.raises(DataError, match="has no test pairs; it has train"):
        Annotations(tmp_path).load("test")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_form_gives_the_same_pairs(suffix: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "caption": "a", "split": "train", "category": "007", "negatives": ["b", "c"]},
        {"image": "a.png", "caption": "a, again", "split": "training", "category": "007", "negatives": None},
        {"image": "b.png", "caption": "b", "split": "validation", "category": None, "negatives": ["d"]},
        {"image": "c.png", "caption": "c", "split": "extra", "category": None, "negatives": None},
    ]
    if suffix == ".csv":
        rows = [row | {"negatives": cell} for row, cell in zip(rows, ("b | c", "", '["d"]', ""), strict=True)]
    write_rows(tmp_path / f"pairs{suffix}", rows)
    assert samples(tmp_path) == [Sample("a.png", "a", "007", "", ("b", "c")), Sample("a.png", "a, again", "007")]
    data, report = Annotations(tmp_path).load("val", "ignore")
    assert data.samples == [Sample("b.png", "b", negatives=("d",))]
    assert report.counts["pairs of the split 'extra', left out"] == 1
    assert Annotations(tmp_path).splits() == ["train", "val"]


def test_fields_of_other_kinds_are_read_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("image,caption,captions\na.png,,x|y\nb.png,z,\n")
    write_jsonl(tmp_path / "val.jsonl", {"image": "a.png", "caption": " ", "captions": ["x", "y"]})
    row = {"image": "a.png", "caption": "z"}
    write_jsonl(tmp_path / "test.jsonl", row | {"captions": 5}, row | {"image": "b.png", "captions": [{}], "note": [1]})
    for split, wanted in (("train", ["x", "y", "z"]), ("val", ["x", "y"]), ("test", ["z", "z"])):
        data, report = Annotations(tmp_path).load(split, "ignore")
        assert [sample.caption for sample in data.samples] == wanted
        assert not [what for what in report.counts if "left out" in what or "cannot be used" in what]
    cells = [("a", "red | fast"), ("b", "[3]"), ("c", '["red", "two | doors"]')]
    write_rows(tmp_path / "train.csv", [{"image": name, "caption": name, "attributes": cell} for name, cell in cells])
    assert [sample.attributes for sample in samples(tmp_path)] == [(), (), ("red", "two | doors")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", "[]", "must hold an object"),
        ("train.json", '{"k": {"file_name": "a.png"}}', "entry 'k': no field caption or captions"),
        ("train.json", '{"k": {"positive": "a"}}', "entry 'k': field 'image' is missing"),
        ("train.json", '{"k": {"file_name": "a.png", "positive": {"a": 1}}}', "'caption' must be text or a list of"),
        ("train.json", "{}", "has no train pairs in train.json; it needs pairs"),
        ("train.json", '{"k": {"file_name": "a.png", "positive": " "}}', "no train pairs that can be used"),
        ("train.json", "\udcff", "is not JSON in UTF-8"),
        ("train.json", '{"images": [{"filename": "1.jpg"}]}', COCO),
        ("train.json", DEEP, r"train\.json.*nested too deeply"),
        (
            "train.jsonl",
            '{"image": "a.png", "caption": "a", "split": "val"}',
            r"of another split, such as 'a\.png' \(val\)",
        ),
        ("pairs.jsonl", '{"image": "a.png", "caption": "a"}\n{', r"line 2: not JSON"),
        ("pairs.jsonl", '{"caption": "a"}', r"line 1: no field file_name or image or path; it has caption"),
        ("pairs.jsonl", '{"image": 12, "caption": "a"}', "field 'image' must be text, not 12"),
        ("pairs.jsonl", '{"image": "a.png"}', r"line 1: no field caption or captions; it has image"),
        (
            "pairs.jsonl",
            '{"image": "a.png", "caption": "a", "category": ["a"]}',
            r"'category' must be one text, not \[",
        ),
        ("pairs.csv", "image,caption,split\na.png,a,train\nb.png,b,\n", r"1 pairs have no split, such as 'b\.png'"),
        ("pairs.csv", "image,caption,split\na.png,one, two,train\n", r"line 2: more cells than the header"),
        ("train.csv", HEAD + 'a.png,"a red owl\nb.png,"a ""green"" owl"\n', r"line 2 is not CSV: .* quote not closed"),
        ("train.csv", HEAD + 'a.png,"a ""red"" owl"\nb.png,"a" blue owl\n', r"line 3 is not CSV"),
        ("train.csv", "image,caption,caption\na.png,x,y\n", "two columns named 'caption'"),
        ("train.csv", "Picture,Text\na.png,a\n", "no field file_name or image or path; it has Picture, Text"),
        ("notes.txt", "a", r"needs pairs\.csv"),
        ("cars_test.json", '{"a": {"file_name": "a", "positive": "a"}}', "has no train pairs; it has test"),
    ],
)
def test_bad_annotations_are_named_with_their_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        Annotations(tmp_path).load("train", "ignore")


def test_directory_without_annotations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no val pairs; it needs pairs\.csv, "):
        Annotations(tmp_path).load("val")
    with pytest.raises(DataError, match="does not exist"):
        Annotations(tmp_path / "gone").load("val")
    write_json(tmp_path / "train.json", {"a": {"file_name": "a.png", "positive": "a red car"}})
    for split in ("test", "val"):  # one pair, and it is needed for training
        with pytest.raises(DataError, match=f"has no {split} pairs; it has train"):
            Annotations(tmp_path).load(split)
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"read from \.json, \.jsonl, \.csv, \.parquet, \.tar"):
        Annotations(tmp_path / "a.xml").load("val")


def test_csv_signs_names_and_empty_rows(tmp_path: Path) -> None:
    for content in (
        "image;caption;split\na.png;x;train\n",
        "path,caption,split\na.png,x,train\n",
        "image,caption,split\na.png,x,train\n,,\n,,\n",
    ):
        (tmp_path / "train.csv").write_text(content)
        assert [(sample.image, sample.caption) for sample in samples(tmp_path)] == [("a.png", "x")]


def test_parquet_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file, good = tmp_path / "train.parquet", pa.table({"image": ["a.png"], "caption": ["a"]})
    pq.write_table(good, file)
    damaged = file.read_bytes()
    for content, message in (
        (b"not parquet", r"train\.parquet is damaged or no Parquet file"),
        (damaged[:4] + b"\xff" * 36 + damaged[40:], r"train\.parquet is damaged or no Parquet file, after row 0: .+"),
        (
            pa.table([["a.png"], ["a"], ["b"]], ["image", "caption", "caption"]),
            "has two columns named 'caption'; rename",
        ),
        ({"caption": ["a"]}, "no field file_name or image or path; it has caption"),
        ({"img": ["a.png"], "text": ["a"]}, "path; it has img, text"),
        ({"image": [{"bytes": b"x", "path": "a.png"}], "caption": ["a"]}, "field 'image' must be text, not"),
        (
            {"image": ["a.png"], "caption": ["a"], "category": [b"cat"]},
            "row 1: field 'category' must be one text, not \"b'cat'\"",
        ),
    ):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            pq.write_table(pa.table(content), file)
        with pytest.raises(DataError, match=message):
            Annotations(tmp_path).load("train")


def test_a_bad_row_is_left_out_and_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", *ROWS, {"image": "x.png"})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{")
    splits, reports = Annotations(tmp_path).load_all(None, "ignore")
    assert sum(map(len, splits.values())) == 40
    first, second = reports["train"].names["rows that cannot be used, left out"]
    assert first.startswith("line 41: no field caption")
    assert second.startswith("line 42: not JSON")


def count(file: Path) -> int:
    return sum(1 for _ in read_records(str(file), lambda: file.open("rb"), infer_types=True))


def test_files_without_bounds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "x" * (records.MAX_LINE + 1)
    for name, content in (("l.jsonl", '{"image": "a.png"}\n' + line), ("l.csv", "image,caption\n" + line)):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}, line 2: longer than 16,000,000 characters"):
            count(tmp_path / name)
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table({"image": ["a.png"] * 100_000}), file)
    assert count(file) == 100_000
    monkeypatch.setattr(records, "MAX_PACKED_ROWS", 50_000)
    with pytest.raises(DataError, match=r"list\.parquet has 100,000 rows in [\d,]+ bytes, at most 50,000"):
        count(file)
    pq.write_table(pa.table({"image": [f"{number}.png" for number in range(100_000)]}), file)
    assert count(file) == 100_000


def test_the_check_names_every_fault(tiny_data: Path, tmp_path: Path) -> None:
    rows = [
        {"image": "red.png", "caption": "a red square", "split": "train", "category": "square"},
        {"image": "red.png", "caption": "a square that goes " + "on and " * 80 + "on", "split": "train"},
        {"image": "cut.png", "caption": "a square", "split": "train"},
        {"image": "gone.png", "caption": "a square nobody has", "split": "train", "category": "square"},
    ]
    write_jsonl(tmp_path / "pairs.jsonl", *rows)
    photo = (tiny_data / "square" / "red.png").read_bytes()
    write_file(tmp_path / "photos" / "red.png", photo)
    write_file(tmp_path / "photos" / "cut.png", photo[: len(photo) // 2])
    done = dcar("data", "check", tmp_path, "--images", tmp_path / "photos")
    assert done.returncode == 1
    for line in (
        "train: 2 pairs, 1 images, 1 categories",
        " 1 pairs without a category",
        " 1 splits with one category only",
        " 1 captions longer than the context's 77 tokens, cut",
        r" 1 images missing, left out: gone\.png",
        r" 1 images broken, left out: cut\.png \(",
    ):
        assert re.search(line, done.stdout), line
    assert "2 images cannot be used: set --images" in done.stderr
    done = dcar("data", "check", tmp_path, "--annotations-only", "--context", "0")
    assert (done.returncode, "missing" in done.stdout) == (0, False)
