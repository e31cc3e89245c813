"""Metadata from lists and sidecars, including odd rows, and the types of CSV values."""

import datetime
import json
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar_core.data import Annotations
from dcar_core.data.records import MAX_LINE
from dcar_core.util.errors import DataError
from index_jobs.gallery.metadata import read_gallery_records
from index_jobs.gallery.scan import scan
from tests.support.files import write_file, write_jsonl, write_tar
from tests.support.galleries import rows_of
from tests.support.images import png
from tests.support.versions import Build, file_of


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-20", "0", ""], [1, -20, 0, None]),
        (["1", "2.5", "", "-0.25"], [1.0, 2.5, None, -0.25]),
        (["1e-05", "2.5e+20", "3", ""], [1e-05, 2.5e20, 3.0, None]),
        ([str(2**63 - 1), str(-(2**63)), "", "1"], [2**63 - 1, -(2**63), None, 1]),
        (["", "", "", ""], [None] * 4),
        (["true", "FALSE", "", "True"], [True, False, None, True]),
        (["true", "1", "", "x"], ["true", "1", None, "x"]),
        (["1.5", "true", "", "2"], ["1.5", "true", None, "2"]),
        (['[""new"", ""sale""]', "[]", "", '[""x""]'], [["new", "sale"], [], None, ["x"]]),
        (['[""new""', "[1]", "", '{""a"": 1}'], ['["new"', "[1]", None, '{"a": 1}']),
        *((["1", "2", cell, ""], ["1", "2", cell, None]) for cell in (
            "007", "+1", "1_000", "1,5", "1e5", "0x1", "inf", "nan", "x", " 1", ".5", "5.", "\u0661", str(2**63),
            "9" * 5000,
        )),
    ],
)  # fmt: skip
def test_column_of_one_type_keeps_its_type(cells: list[str], values: list[Any], tmp_path: Path) -> None:
    lines = [f'{i}.png,7,7,7,"{cell}"\n' for i, cell in enumerate(cells)]
    path = write_file(tmp_path / "l.csv", ("file_name,id,caption,category,n\n" + "".join(lines)).encode())
    records = [record for _, record in read_gallery_records(str(path))]
    assert [record["n"] for record in records] == values
    assert [type(record["n"]) for record in records] == [type(value) for value in values]
    assert {record[name] for record in records for name in ("id", "caption", "category")} == {"7"}


def test_captions_and_categories_have_the_column_names_of_training(tmp_path: Path) -> None:
    csv = 'file_name,captions,class_name\na.png,"[""one, or"", ""two""]",x\nb.png,one | two,y\nc.png,,\n'
    rows = rows_of(scan(write_file(tmp_path / "l.csv", csv.encode())))
    assert [rows[name]["caption"] for name in ("a.png", "b.png", "c.png")] == ["one, or", "one", ""]
    assert [rows[name]["category"] for name in ("a.png", "b.png", "c.png")] == ["x", "y", ""]
    assert rows["a.png"]["metadata"]["captions"] == ["one, or", "two"]
    records = (
        {"path": "a.png", "captions": ["", "two"]},
        {"path": "b.png", "caption": "own", "captions": ["other"]},
        {"path": "c.png", "caption": ["one", "two"]},
    )
    rows = rows_of(scan(write_jsonl(tmp_path / "l.jsonl", *records)))
    assert [row["caption"] for row in rows.values()] == ["two", "own", "one"]
    assert rows["c.png"]["metadata"]["captions"] == ["one", "two"]


def test_values_that_json_lacks_become_numbers_null_or_text(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 1, 2, 8)
    values = {"price": Decimal("9.50"), "score": float("nan"), "when": when, "day": when.date(), "tags": ["x"]}
    table = {"path": ["a.png"], "caption": [None], **{name: [value] for name, value in values.items()}}
    pq.write_table(pa.table(table), tmp_path / "l.parquet")
    row = rows_of(scan(tmp_path / "l.parquet"))["a.png"]
    expected = {"price": 9.5, "score": None, "when": "2024-01-02T08:00:00", "day": "2024-01-02", "tags": ["x"]}
    assert (row["caption"], row["metadata"]) == ("", {"file_name": "a.png", "path": "a.png"} | expected)


def test_paths_of_other_systems_are_read(tmp_path: Path) -> None:
    write_file(tmp_path / "Früh" / "Stück.png", png())  # one code point for each letter
    decomposed = unicodedata.normalize("NFD", "Früh/Stück.png")
    assert decomposed != "Früh/Stück.png"
    for name in ("Früh\\Stück.png", decomposed):
        gallery = scan(write_file(tmp_path / "l.csv", f"path\n{name}\n".encode()))
        assert gallery.table["location"].to_pylist() == ["Früh/Stück.png"]
    assert scan(write_file(tmp_path / "l.csv", b"path\nno\xcc\x88.png\n")).table["location"].to_pylist() == [
        "no\u0308.png"
    ]


@pytest.mark.parametrize("sign", [";", "\t"])
def test_columns_may_be_separated_by_other_signs(sign: str, tmp_path: Path) -> None:
    lines = [sign.join(cells) for cells in (("path", "caption", "weight"), ("a.png", "red, round", "10,50"))]
    (row,) = rows_of(scan(write_file(tmp_path / "l.csv", "\r\n".join(lines).encode()))).values()
    assert (row["location"], row["caption"], row["metadata"]["weight"]) == ("a.png", "red, round", "10,50")
    with pytest.raises(DataError, match=r"no column .*; it has .*path"):
        scan(write_file(tmp_path / "l.csv", f"path{sign}x, y\na.png{sign}b\n".encode()))


def test_capitals_and_blanks_in_a_header_make_no_difference(tmp_path: Path) -> None:
    write_file(tmp_path / "1.png", png())
    table = write_file(
        tmp_path / "pairs.csv", b'Image; Caption;CATEGORY ;Split;Price\n1.png; "a red; round cup";cup;test;9\n'
    )
    (sample,) = Annotations(tmp_path).load("test")[0].samples
    assert (sample.image, sample.caption, sample.category) == ("1.png", "a red; round cup", "cup")
    row = rows_of(scan(tmp_path))["1.png"]
    assert (row["caption"], row["category"], row["metadata"]["Price"]) == ("a red; round cup", "cup", 9)
    table.write_text("ID,id,path,Url\nx,y,1.png,here\n")
    ((_, record),) = read_gallery_records(str(table))
    assert record == {"ID": "x", "id": "y", "path": "1.png", "url": "here"}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_table_of_excel_in_another_encoding_says_how_to_save_it(encoding: str, tmp_path: Path) -> None:
    table = write_file(tmp_path / "l.csv", "path;caption\na.png;Früh\n".encode(encoding))
    with pytest.raises(DataError, match=r"is not UTF-8 .*; save it as UTF-8 \(in Excel: Save As, \"CSV UTF-8"):
        scan(table)


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"'])
def test_a_first_line_names_the_sign(first: str, tmp_path: Path) -> None:
    table = write_file(tmp_path / "l.csv", f"{first}\r\npath;a, b\r\na.png;9\r\n".encode())
    assert list(read_gallery_records(str(table))) == [(3, {"path": "a.png", "a, b": 9})]
    table.write_text(f"{first}\npath;size\na.png;9;9\n")
    with pytest.raises(DataError, match=r"line 3: more cells .* quote a text that has ';'"):
        scan(table)


def test_spaces_around_the_cells_of_a_csv_do_not_count(tmp_path: Path) -> None:
    write_file(tmp_path / "a.png", png())
    table = write_file(
        tmp_path / "pairs.csv", b"path , caption , category , brand , size\na.png , red , cup , Acme , 9 \n"
    )
    assert Annotations(tmp_path).load("train", "require")[0].images == ["a.png"]
    row = rows_of(scan(table))["a.png"]
    assert (row["caption"], row["category"]) == ("red", "cup")
    assert row["metadata"] == {"file_name": "a.png", "path": "a.png", "brand": "Acme", "size": 9}


@pytest.mark.parametrize("header", [",Unnamed: 0,path,size", "Unnamed: 0,,path,size, ", ",,Unnamed: 0,path,size,"])
def test_columns_without_a_name_are_left_out(header: str, tmp_path: Path) -> None:
    cells = {"path": "a.png", "size": "9", "Unnamed: 0": "7"}
    row = ",".join(cells.get(column, "0") for column in header.split(","))
    (found,) = rows_of(scan(write_file(tmp_path / "l.csv", f"{header}\n{row}\n".encode()))).values()
    assert found["metadata"] == {"file_name": "a.png", "Unnamed: 0": 7, "path": "a.png", "size": 9}


@pytest.mark.parametrize(("name", "content"), [("metadata.jsonl", b""), ("metadata.csv", b"file_name,caption\n")])
def test_metadata_without_rows_is_an_error(name: str, content: bytes, tmp_path: Path) -> None:
    write_file(tmp_path / "a.png", png())
    write_file(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"{name} has no rows; fill or remove it"):
        scan(tmp_path)


def test_pairs_that_are_no_pairs_are_an_error(tmp_path: Path) -> None:
    write_file(tmp_path / "a.png", png())
    write_file(tmp_path / "pairs.csv", b"image,text\na.png,a\n")
    with pytest.raises(DataError, match=r"has no column caption or captions, .*; it has image, text"):
        scan(tmp_path)


GREEN_CSV = b"file_name,caption\na.png,a green cat\n"
GREEN_JSON = b'{"a": {"file_name": "a.png", "positive": "a green cat"}}'


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train.csv": b"id_code,diagnosis\na,2\n"}, "it has id_code, diagnosis"),
        ({"metadata.csv": b"file_name,price\na.png,9.5\n", "pairs.json": GREEN_JSON}, "captions of pairs.json are not"),
        ({"metadata.csv": GREEN_CSV, "pairs.json": GREEN_JSON}, ""),
        ({"products.csv": GREEN_CSV}, "products.csv describes the images, as it is the only table here"),
        ({"a.csv": GREEN_CSV, "b.csv": GREEN_CSV}, "a.csv is not read: call it metadata.csv (column file_name) or"),
        ({"a.csv": b"file,caption\na.png,green\n"}, "a.csv is not read: call it metadata.csv (column file_name) or"),
        ({"captions.json": GREEN_JSON}, "captions.json is not read: call it pairs.json"),
        ({"a.png.json": GREEN_JSON}, ""),
    ],
)
def test_tables_that_are_not_read_are_named(
    tables: dict[str, bytes], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in {"a.png": png(), **tables}.items():
        write_file(tmp_path / name, content)
    (row,) = scan(tmp_path).table.to_pylist()
    assert row["caption"] == ("a green cat" if "describes" in said or ("metadata.csv" in tables and not said) else "")
    assert said in caplog.text
    assert len(caplog.records) == bool(said)


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    lines = [
        r'{"path": "a.png", "caption": "x\ud800y", "\udfff": ["\uDABC", {"a": "\ud83d\ude00"}]}',
        r'{"path": "b\udcff.png", "caption": "\ud83d\ude00"}',
    ]
    rows = rows_of(scan(write_file(tmp_path / "l.jsonl", "\n".join(lines).encode())))
    assert rows["a.png"]["caption"] == "x\ufffdy"
    assert rows["a.png"]["metadata"]["\ufffd"] == ["\ufffd", {"a": "\U0001f600"}]
    assert rows["b\ufffd.png"]["caption"] == "\U0001f600"
    tar = write_tar(tmp_path / "t.tar", {"a.png": png(), "a.json": rb'{"caption": "x\ud800y"}'})
    assert rows_of(scan(tar))["t.tar/a.png"]["caption"] == "x\ufffdy"


def year_10000(path: Path) -> None:
    days = pa.array([0, 253_402_300_800_000], pa.timestamp("ms"))
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "day": days}), path)


def no_utf8(path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff"]).buffers())
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "text": texts}), path)


def lines(*rows: str) -> Any:
    return lambda path: path.write_text("".join(f"{row}\n" for row in rows))


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("l.parquet", year_10000, r"l\.parquet, row 2: day cannot be read: .*out of range"),
        ("l.parquet", no_utf8, r"l\.parquet, row 2: text cannot be read: 'utf-8' codec"),
        (
            "l.jsonl",
            lines('{"path": "a.png"}', f'{{"path": "b.png", "n": {"9" * 5000}}}'),
            r"l\.jsonl, line 2: not JSON",
        ),
        ("l.jsonl", lines(f'{{"path": "a.png", "n": {"[" * 100_000}{"]" * 100_000}}}'), r"l\.jsonl, line 1: not JSON"),
        (
            "l.jsonl",
            lines(f'{{"path": "a.png", "n": {"[" * 800}{"]" * 800}}}'),
            r"a\.png.* nested levels|line 1: not JSON",
        ),
        (
            "l.jsonl",
            lines(*(f'{{"path": "{name}.png", "n": {"[" * n}{"]" * n}}}' for name, n in (("a", 99), ("b", 100)))),
            r"the metadata of b\.png have more than 100 nested levels; flatten them",
        ),
        ("l.csv", lines("path,n", "a.png,1", f"b.png,{'9' * 200_000}"), r"l\.csv, line 3 is not CSV"),
        (
            "l.jsonl",
            lines(f'{{"path": "a.png", "n": {list(range(20_000))}, "price": 1}}'),
            r"the metadata of a\.png take 106 KiB as JSON, at most 64; the longest field is 'n'",
        ),
        (
            "l.jsonl",
            lines(f'{{"path": "a.png", "caption": "{"x" * 10_001}"}}'),
            r"the caption of a\.png has 10,001 characters, at most 10,000",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named(name: str, make: Any, says: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=says):
        scan(tmp_path / name)


def test_a_sidecar_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for text in (b"9" * 5000, b"[" * 100_000 + b"]" * 100_000):
        tar = write_tar(tmp_path / "t.tar", {"a.png": png(), "a.json": b'{"n": ' + text + b"}"})
        with pytest.raises(DataError, match=r"t\.tar, a\.json: its \.json cannot be read"):
            scan(tar)


def test_a_large_sidecar_is_refused_before_it_is_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "train.tar", {"a.png": png(), "a.txt": b"a\n" * (MAX_LINE // 2 + 1)})
    says = r"its \.txt has 16,000,002 bytes; at most 16,000,000 are read"
    with pytest.raises(DataError, match=rf"train\.tar, a\.txt: {says}"):
        scan(tar)
    with pytest.raises(DataError, match=rf"train\.tar, sample 'a': {says}"):
        Annotations(tmp_path).load("train")


def test_odd_path_fails_one_image_only(build: Build, tmp_path: Path) -> None:
    write_file(tmp_path / "a.png", png())
    rows = [r'{"path": "a.png"}', r'{"path": "b\u0000.png"}', r'{"path": "c\udcff.png"}']
    path = write_file(tmp_path / "l.jsonl", "\n".join(rows).encode())
    done = build(path, max_failed=0.9, workers=0)
    assert (done.count, done.failed) == (1, 2)
    failed = file_of(tmp_path / "index", "failed.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in failed] == ["not a path: embedded null byte", "no such file"]


def test_folder_without_metadata_uses_its_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("images/a.png", "images/b.png", "c.png", "d.png"):
        write_file(tmp_path / name, png())
    entry = {"file_name": "a", "positive": "a red car", "negative": [], "class_name": "car"}
    write_file(tmp_path / "train.json", json.dumps({"a": entry, "gone": entry | {"file_name": "gone"}}).encode())
    rows = [{"image": "c.png", "caption": "one", "category": "x"}, {"image": "c.png", "caption": "two"}]
    write_file(tmp_path / "val.jsonl", "\n".join(map(json.dumps, rows)).encode())
    found = rows_of(scan(tmp_path))
    assert {name: (row["caption"], row["category"]) for name, row in found.items()} == {
        "c.png": ("one", "x"), "d.png": ("", ""), "images/a.png": ("a red car", "car"), "images/b.png": ("", "images"),
    }  # fmt: skip
    assert found["c.png"]["metadata"]["captions"] == ["one", "two"]
    write_file(tmp_path / "train.json", b'{"a": 7}')
    assert {row["caption"] for row in rows_of(scan(tmp_path)).values()} == {""}
    assert "captions and categories are not taken from the annotations" in caplog.text
    (tmp_path / "train.json").unlink()
    for name in ("a_train.json", "b_train.json"):
        write_file(tmp_path / name, b"{}")
    assert len(rows_of(scan(tmp_path))) == 4
    assert "several files for train" in caplog.text
    write_file(tmp_path / "metadata.jsonl", b'{"file_name": "d.png", "caption": "its own"}')
    assert {row["caption"] for row in rows_of(scan(tmp_path)).values()} == {"", "its own"}


def test_a_split_whose_images_are_elsewhere_leaves_the_captions_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_file(tmp_path / "a.png", png())
    write_file(tmp_path / "pairs.csv", b"image,caption,split\na.png,red,train\nother/b.png,blue,val\n")
    assert rows_of(scan(tmp_path))["a.png"]["caption"] == "red"
    assert "has no val pairs that can be used" in caplog.text
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    assert rows_of(scan(tmp_path))["c.png"]["caption"] == ""


def test_each_line_of_a_text_beside_an_image_is_a_caption(tmp_path: Path) -> None:
    members = {"0.png": png(), "0.txt": b"one\n\n two \n", "1.png": png(), "1.txt": b"alone\n"}
    rows = rows_of(scan(write_tar(tmp_path / "a.tar", members)))
    assert [row["caption"] for row in rows.values()] == ["one", "alone"]
    assert [row["metadata"].get("captions") for row in rows.values()] == [["one", "two"], None]


def test_a_bad_row_loses_its_own_caption_and_many_are_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for count in (59, 4):
        for number in range(count):
            write_file(tmp_path / str(count) / f"{number}.png", png())
        good = [{"image": f"{number}.png", "caption": f"number {number}"} for number in range(count)]
        bad = [{"image": "x.jpg"}, {"caption": "nothing"}]
        write_jsonl(tmp_path / str(count) / "pairs.jsonl", *good, *bad[: 1 if count == 59 else 2])
    assert "" not in [row["caption"] for row in rows_of(scan(tmp_path / "59")).values()]
    assert "1 rows of the annotations" in caplog.text
    assert "line 60: field 'caption' is missing" in caplog.text
    with pytest.raises(DataError, match=r"line 5: field 'caption' is missing.*2 of 6 rows cannot be used; at most 10%"):
        scan(tmp_path / "4")


def test_other_columns_of_training_annotations_are_fields_of_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.png", "b/1.png"):
        write_file(tmp_path / name, png())
    table = "image,caption,category,price,id\na/1.png,a red car,cars,9.5,7\na/1.png,an old car,cars,8,8\n"
    write_file(tmp_path / "pairs.csv", (table + "./b/1.png,a cat,cats,3,9\ngone.png,a dog,dogs,4,10\n").encode())
    found = rows_of(scan(tmp_path))
    assert [row["metadata"]["price"] for row in found.values()] == [9.5, 3]
    assert not {"7", "9"} & {row["id"] for row in found.values()}
    assert "1 missing images of the annotations in" in caplog.text
    assert "are left out: gone.png" in caplog.text


def test_other_columns_find_images_that_the_table_names_otherwise(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", unicodedata.normalize("NFD", "a/Käfer.png")):
        write_file(tmp_path / name, png())
    rows = ("/home/me/a/1.png,one,1", "a/2,two,2", unicodedata.normalize("NFC", "a/Käfer.png,three,3"))
    write_file(tmp_path / "pairs.csv", "\n".join(("image,caption,price", *rows)).encode())
    found = rows_of(scan(tmp_path)).values()
    assert {row["caption"]: row["metadata"].get("price") for row in found} == {"one": 1, "two": 2, "three": 3}
    write_file(tmp_path / "metadata.csv", unicodedata.normalize("NFC", "file_name,price\na/Käfer.png,9.5\n").encode())
    assert [row["metadata"].get("price") for row in rows_of(scan(tmp_path)).values()] == [None, None, 9.5]


@pytest.mark.parametrize("table", ["pairs.csv", "metadata.csv"])
def test_images_that_a_table_leaves_out_are_described_by_their_paths(table: str, tmp_path: Path) -> None:
    for name in ("owls/barn_owl.png", "cat.png"):
        write_file(tmp_path / name, png())
    write_file(tmp_path / table, b"file_name,caption,category\ncat.png,a green cat,cats\n")
    rows = rows_of(scan(tmp_path))
    assert (rows["cat.png"]["caption"], rows["cat.png"]["category"]) == ("a green cat", "cats")
    assert (rows["owls/barn_owl.png"]["category"], rows["owls/barn_owl.png"]["metadata"]["title"]) == (
        "owls",
        "barn owl",
    )


def test_the_summary_names_fields_of_text_that_looks_like_numbers(build: Build, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"price": "$12", "weight": "10,50", "year": 1999, "name": "A-3", "size": "12 cm", "zip": "01"},
        {"price": "$9", "weight": "9", "year": 2000, "name": "A-4", "size": "3", "zip": "02"},
    ]
    for row in rows:
        write_file(tmp_path / "photos" / f"{row['year']}.png", png())
    write_jsonl(tmp_path / "photos" / "metadata.jsonl", *(row | {"file_name": f"{row['year']}.png"} for row in rows))
    for _ in range(2):  # published, then up to date
        shown = build(tmp_path / "photos").to_text()
        assert "fields of text that looks like numbers: price ('$9'), size ('12 cm'), weight ('10,50');" in shown
