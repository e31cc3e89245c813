"""Galleries and their metadata in every form, the types of values, and errors about
broken ones.
"""

import datetime
import io
import json
import os
import shutil
import unicodedata
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar_core.data.records import MAX_LINE
from dcar_core.images import formats
from dcar_core.util.errors import DataError
from index_jobs.gallery.locations import open_image
from index_jobs.gallery.metadata import read_gallery_records
from index_jobs.gallery.scan import scan
from tests.support.files import (
    jsonl,
    tar_bytes,
    write_file,
    write_jsonl,
    write_rows,
    write_tar,
)
from tests.support.galleries import rows_of
from tests.support.images import png


def test_signatures_tell_changed_images_from_changed_captions_and_places(
    tiny_gallery: Path, tmp_path: Path
) -> None:
    root = Path(
        shutil.copytree(tiny_gallery, tmp_path / "g", copy_function=shutil.copy2)
    )
    before = scan(tiny_gallery)
    moved = scan(root)
    assert moved.table["id"] == before.table["id"]
    assert moved.vectors_signature == before.vectors_signature
    lines = (
        (root / "metadata.jsonl")
        .read_text()
        .replace("a red circle", "a crimson circle")
    )
    (root / "metadata.jsonl").write_text(lines)
    captioned = scan(root)
    assert captioned.vectors_signature == before.vectors_signature
    assert captioned.content_signature != before.content_signature
    listed = write_jsonl(
        tmp_path / "list.jsonl", {"file_name": str(root / "circle" / "red.png")}
    )
    alone = scan(listed)
    os.utime(root / "circle" / "red.png", ns=(1, 1))
    assert scan(root).vectors_signature != before.vectors_signature
    assert scan(listed).vectors_signature != alone.vectors_signature


JPEGS = ["a.jfif", "b.JFIF", "c.jpe", "d.jpeg", "e.jpg", "f.pjpeg"]


@pytest.mark.parametrize("names", [JPEGS, ["a.heic", "b.HEIF", "c.hif"]])
def test_images_are_known_by_their_suffix_and_hidden_files_left_out(
    names: list[str], tmp_path: Path
) -> None:
    for name in (*names, ".b.png", ".hidden/c.png", "notes.txt", "d.pdf"):
        write_file(tmp_path / name, png())
    assert scan(tmp_path).table["name"].to_pylist() == names


def test_tar_members_are_read_in_place_with_their_siblings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = {
        "x/2.png": png("blue"),
        "x/2.json": b'{"caption": "blue thing", "source": "here", "score": 0.5}',
        "x/1.png": png("green"),
        "x/1.txt": b"green thing\n",
        "x/1.cls": b"7",
        "x/._1.png": b"what macOS writes beside each file",
        "readme.md": b"no picture",
    }
    write_tar(tmp_path / "shard.tar", members)
    gallery = scan(tmp_path)
    rows = rows_of(gallery)
    assert list(rows) == ["shard.tar/x/1.png", "shard.tar/x/2.png"]
    assert rows["shard.tar/x/1.png"]["caption"] == "green thing"
    assert rows["shard.tar/x/1.png"]["category"] == "7"
    assert rows["shard.tar/x/2.png"]["metadata"]["source"] == "here"
    for row, color in zip(rows.values(), ("green", "blue"), strict=True):
        file, size = open_image(
            gallery.root,
            row["location"],
            row["offset"],
            row["size"],
        )
        with file:
            assert file.read(size) == png(color)
    assert scan(tmp_path / "shard.tar").table["id"] == gallery.table["id"]
    described = {
        "file_name": "2.png",
        "caption": "a sea",
        "attributes": ["wide"],
        "split": "test",
    }
    write_jsonl(tmp_path / "metadata.jsonl", described, {"file_name": "gone.png"})
    joined = rows_of(scan(tmp_path))["shard.tar/x/2.png"]
    assert (joined["caption"], joined["metadata"]["attributes"]) == (
        "a sea",
        ["wide"],
    ), "by its bare name"
    assert "/metadata.jsonl name no image here, such as gone.png" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["file_name", "image", "path"])
def test_lists_keep_their_order_ids_and_columns(
    tmp_path: Path,
    kind: str,
    column: str,
) -> None:
    outside = write_file(tmp_path / "outside" / "z.png", png())
    write_file(tmp_path / "lists" / "b.png", png())
    path = tmp_path / "lists" / f"list.{kind}"
    write_rows(
        path,
        [
            {
                column: str(outside),
                "id": "last",
                "caption": "z",
                "category": "k",
                "path": str(outside),
            },
            {
                column: "./b.png",
                "id": "",
                "caption": "b",
                "category": "",
                "path": "./b.png",
            },
        ],
    )
    first, second = scan(path).table.to_pylist()
    assert first["location"] == str(outside)
    assert first["id"] == "last"
    assert first["caption"] == "z"
    assert second["location"] == "b.png"
    assert len(second["id"]) == 20
    assert second["caption"] == "b"
    assert json.loads(second["metadata"])["path"] == "./b.png"


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def described(**fields: str) -> dict[str, bytes]:
    return {"a.png": png(), "metadata.jsonl": jsonl({"file_name": "a.png", **fields})}


A = {"a.png": png()}
BAD: list[tuple[dict[str, bytes], str, str]] = [
    (
        {"notes.txt": b"x"},
        "",
        "is empty: no file or tar member with one of the suffixes",
    ),
    ({"metadata.jsonl": jsonl({"file_name": "a.png"})}, "", "is empty"),
    ({}, "nowhere", "nowhere does not exist"),
    (A, "a.png", "is not a gallery; give a folder"),
    (
        {"l.jsonl": jsonl({"filename": "a.png", "caption": "a"})},
        "l.jsonl",
        (
            "no column file_name or image or path or url with image paths; it has"
            " filename, caption"
        ),
    ),
    ({"l.csv": b"file_name,caption\n"}, "l.csv", "has no rows"),
    (
        {"l.parquet": parquet(image=[{"bytes": png(), "path": "a.png"}])},
        "l.parquet",
        "row 1: image is empty or not",
    ),
    ({"l.csv": b"file_name,caption\n,x\n"}, "l.csv", "row 2: file_name is empty"),
    ({"l.jsonl": jsonl(["a.png"])}, "l.jsonl", "line 1: must be an object, not a list"),
    (
        {"l.jsonl": jsonl({"path": "x/../../a.png"})},
        "l.jsonl",
        "is outside of the list's folder",
    ),
    (
        {
            "l.jsonl": jsonl(
                {"path": "a.png", "id": 7},
                {"path": "b.png"},
                {"path": "c.png", "id": "7"},
            )
        },
        "l.jsonl",
        "such as '7' by a.png and c.png",
    ),
    (
        {"l.jsonl": jsonl({"path": "a.png"}, {"path": "./a.png"})},
        "l.jsonl",
        "by a.png and a.png; list an image once",
    ),
    *(
        (described(id=each), "", r"cannot be part of a URL.*; give another")
        for each in ("shop/7/image", "7/similar", "a\nb", "..", "x" * 1025)
    ),
    ({"g.tar.gz": tar_bytes(A, "w:gz")}, "", "is empty"),
    ({"g.tar": tar_bytes(A, "w:gz")}, "g.tar", "is not a whole uncompressed tar"),
    (
        {"g.tar": tar_bytes({**A, "b.png": bytes(4000)})[:2500]},
        "g.tar",
        r"at [ab]\.png: ",
    ),
    (
        {"sub/a.png": png(), "metadata.jsonl": jsonl({"file_name": "other/a.png"})},
        "",
        "no row of .*metadata.jsonl names an image of this gallery",
    ),
    (
        A | {"metadata.jsonl": jsonl({"file_name": "a.png"}, {"file_name": "./a.png"})},
        "",
        "rows 1 and 2 both describe ./a.png",
    ),
    (described() | {"metadata.csv": b"file_name\na.png\n"}, "", "both exist; keep one"),
    (
        A | {"metadata.jsonl": jsonl({"file": "a"})},
        "",
        "row 1: no file_name; the columns are file",
    ),
    ({"\udcff.png": png()}, "", "is not UTF-8; rename the file"),
]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("folder", ""),
        ("tar", "shard.tar"),
        ("tar", ""),
    ],
)
def test_files_that_are_not_read_are_counted(
    kind: str,
    place: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        formats,
        "IMAGE_SUFFIXES",
        formats.IMAGE_SUFFIXES - formats.HEIC_SUFFIXES,
    )
    others = (
        "b.svg",
        "c.SVG",
        "d.mp4",
        "e.pef",
        "._f.svg",
        "notes.txt",
        "b.heic",
        "c.HIF",
        "g.pdf",
    )
    files = {"a.png": png(), **dict.fromkeys(others, b"")}
    if kind == "tar":
        write_tar(tmp_path / "shard.tar", files)
    else:
        for name, content in files.items():
            write_file(tmp_path / name, content)
    assert len(scan(tmp_path / place)) == 1
    assert "not read: 1 .heic, 1 .hif, 1 .mp4, 1 .pdf, 1 .pef, 2 .svg; " in caplog.text
    assert "notes" not in caplog.text


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-20", "0", ""], [1, -20, 0, None]),
        (["1", "2.5", "", "-0.25"], [1.0, 2.5, None, -0.25]),
        (["1e-05", "2.5e+20", "3", ""], [1e-05, 2.5e20, 3.0, None]),
        (
            [
                str(2**63 - 1),
                str(-(2**63)),
                "",
                "1",
            ],
            [2**63 - 1, -(2**63), None, 1],
        ),
        (["", "", "", ""], [None] * 4),
        (["true", "FALSE", "", "True"], [True, False, None, True]),
        (["true", "1", "", "x"], ["true", "1", None, "x"]),
        (["1.5", "true", "", "2"], ["1.5", "true", None, "2"]),
        (
            ['[""new"", ""sale""]', "[]", "", '[""x""]'],
            [["new", "sale"], [], None, ["x"]],
        ),
        (['[""new""', "[1]", "", '{""a"": 1}'], ['["new"', "[1]", None, '{"a": 1}']),
        *(
            (["1", "2", cell, ""], ["1", "2", cell, None])
            for cell in (
                "007",
                "+1",
                "1_000",
                "1,5",
                "1e5",
                "0x1",
                "inf",
                "nan",
                "x",
                " 1",
                ".5",
                "5.",
                "\u0661",
                str(2**63),
                "9" * 5000,
            )
        ),
    ],
)
def test_column_of_one_type_keeps_its_type(
    cells: list[str],
    values: list[Any],
    tmp_path: Path,
) -> None:
    lines = [f'{i}.png,7,7,7,"{cell}"\n' for i, cell in enumerate(cells)]
    path = write_file(
        tmp_path / "l.csv",
        ("file_name,id,caption,category,n\n" + "".join(lines)).encode(),
    )
    records = [record for _, record in read_gallery_records(str(path))]
    assert [record["n"] for record in records] == values
    assert [type(record["n"]) for record in records] == [
        type(value) for value in values
    ]
    assert {
        record[name] for record, name in product(records, ("id", "caption", "category"))
    } == {"7"}


GREEN_CSV = b"file_name,caption\na.png,a green cat\n"
GREEN_JSON = b'{"a": {"file_name": "a.png", "positive": "a green cat"}}'


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train.csv": b"id_code,diagnosis\na,2\n"}, "it has id_code, diagnosis"),
        ({"metadata.csv": GREEN_CSV, "pairs.json": GREEN_JSON}, ""),
        (
            {"a.csv": GREEN_CSV, "b.csv": GREEN_CSV},
            "a.csv is not read as metadata; call it metadata.csv",
        ),
        (
            {"metadata.csv": b"file_name,title\na.png | gone.png,a green cat\n"},
            "their title is taken as one",
        ),
    ],
)
def test_tables_that_are_not_read_are_named(
    tables: dict[str, bytes],
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, content in {"a.png": png(), **tables}.items():
        write_file(tmp_path / name, content)
    caplog.set_level("INFO")
    (row,) = scan(tmp_path).table.to_pylist()
    assert row["caption"] == ("a green cat" if "metadata.csv" in tables else "")
    assert said in caplog.text


def test_folder_without_metadata_uses_its_annotations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("images/a.png", "images/b.png", "c.png", "d.png"):
        write_file(tmp_path / name, png())
    entry = {
        "file_name": "a",
        "positive": "a red car",
        "negative": [],
        "class_name": "car",
    }
    write_file(
        tmp_path / "train.json",
        json.dumps({"a": entry, "gone": entry | {"file_name": "gone"}}).encode(),
    )
    rows = [
        {"image": "c.png", "caption": "one", "category": "x"},
        {"image": "c.png", "caption": "two"},
    ]
    write_file(tmp_path / "val.jsonl", "\n".join(map(json.dumps, rows)).encode())
    found = rows_of(scan(tmp_path))
    assert {name: (row["caption"], row["category"]) for name, row in found.items()} == {
        "c.png": ("one", "x"),
        "d.png": ("", ""),
        "images/a.png": ("a red car", "car"),
        "images/b.png": ("", "images"),
    }
    assert found["c.png"]["metadata"]["captions"] == ["one", "two"]
    assert "captions" not in found["images/a.png"]["metadata"]
    write_file(tmp_path / "train.json", b'{"a": 7}')
    assert {row["caption"] for row in rows_of(scan(tmp_path)).values()} == {""}
    assert "captions and categories are not taken from the annotations" in caplog.text
    (tmp_path / "train.json").unlink()
    for name in ("a_train.json", "b_train.json"):
        write_file(tmp_path / name, b"{}")
    assert len(rows_of(scan(tmp_path))) == 4
    assert "several files for train" in caplog.text
    write_file(
        tmp_path / "metadata.jsonl", b'{"file_name": "d.png", "caption": "its own"}'
    )
    assert {row["caption"] for row in rows_of(scan(tmp_path)).values()} == {
        "",
        "its own",
    }


NFD = unicodedata.normalize("NFD", "Früh/Stück.png")
LISTS: dict[str, tuple[str, bytes | str, list[dict[str, Any]]]] = {
    "columns of training": (
        "l.csv",
        (
            'file_name,captions,class_name\na.png,"[""one, or"", ""two""]",x\nb.png,one'
            " | two,y\nc.png,,\n"
        ),
        [
            {"caption": "one, or", "category": "x", "captions": ["one, or", "two"]},
            {"caption": "one"},
            {"caption": ""},
        ],
    ),
    "several captions": (
        "l.jsonl",
        jsonl(
            {"path": "a.png", "captions": ["", "two"]},
            {"path": "b.png", "caption": ["one", "two"]},
            {"path": "c.png", "caption": "own", "captions": ["other"]},
        ),
        [
            {"caption": "two"},
            {"caption": "one", "captions": ["one", "two"]},
            {"caption": "own"},
        ],
    ),
    "a path of Windows": (
        "l.csv",
        "path\nFrüh\\Stück.png\n",
        [{"location": "Früh/Stück.png"}],
    ),
    "a path of macOS": ("l.csv", f"path\n{NFD}\n", [{"location": "Früh/Stück.png"}]),
    "a decomposed path of no file": (
        "l.csv",
        b"path\nno\xcc\x88.png\n",
        [{"location": "no\u0308.png"}],
    ),
    "semicolons": (
        "l.csv",
        "path;caption;n\r\na.png;red, round;1,5",
        [{"caption": "red, round", "n": "1,5"}],
    ),
    "tabs": (
        "l.csv",
        "path\tcaption\tn\r\na.png\tred, round\t1,5",
        [{"caption": "red, round", "n": "1,5"}],
    ),
    "a header in capitals": (
        "l.csv",
        'Image; Caption;CATEGORY ;Price\n1.png; "a red; round cup";cup;9\n',
        [
            {
                "location": "1.png",
                "caption": "a red; round cup",
                "category": "cup",
                "Price": 9,
            }
        ],
    ),
    "a name in capitals beside its own": (
        "l.csv",
        "ID,id,path,Url\nx,y,1.png,here\n",
        [{"ID": "x", "id": "y", "location": "1.png", "url": "here"}],
    ),
    "blanks around cells": (
        "l.csv",
        "path , caption , brand , n\na.png , red , Acme , 9 \n",
        [{"location": "a.png", "caption": "red", "brand": "Acme", "n": 9}],
    ),
    "titles instead of captions": (
        "l.csv",
        "path,title,name\na.png,red cup,A 7\nb.png,,B 8\n",
        [{"caption": "red cup"}, {"caption": "B 8"}],
    ),
    "one product a row": (
        "l.csv",
        "path,id,sku,caption\na.png|b.png,p,7,cup\n",
        [
            {
                "location": name,
                "file_name": name,
                "id": i,
                "sku": 7,
                "caption": "cup",
            }
            for name, i in (("a.png", "p"), ("b.png", "p-2"))
        ],
    ),
    "columns without a name": (
        "l.csv",
        ",,Unnamed: 0,path,n,\n0,0,7,a.png,9,0\n",
        [{"Unnamed: 0": 7, "n": 9, "": None}],
    ),
    "halves of surrogate pairs": (
        "l.jsonl",
        (
            r'{"path": "b\udcff.png", "caption": "x\ud800y", "\udfff": ["\uDABC", {"a":'
            r' "\ud83d\ude00"}]}'
        ),
        [
            {
                "location": "b\ufffd.png",
                "caption": "x\ufffdy",
                "\ufffd": ["\ufffd", {"a": "\U0001f600"}],
            }
        ],
    ),
    "values that JSON lacks": (
        "l.parquet",
        parquet(
            path=["a.png"],
            caption=[None],
            price=[Decimal("9.50")],
            score=[float("nan")],
            when=[datetime.datetime(2024, 1, 2, 8)],
            day=[datetime.date(2024, 1, 2)],
            tags=[["x"]],
        ),
        [
            {
                "caption": "",
                "price": 9.5,
                "score": None,
                "when": "2024-01-02T08:00:00",
                "day": "2024-01-02",
                "tags": ["x"],
            }
        ],
    ),
    "texts beside images of a tar": (
        "t.tar",
        tar_bytes(
            {
                "0.png": png(),
                "0.txt": b"one\n\n two \n",
                "1.png": png(),
                "1.txt": b"alone\n",
                "2.png": png(),
                "2.json": rb'{"caption": "x\ud800y"}',
            }
        ),
        [
            {"caption": "one", "captions": ["one", "two"]},
            {"caption": "alone"},
            {"caption": "x\ufffdy"},
        ],
    ),
}


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    LISTS.values(),
    ids=LISTS,
)
def test_lists_of_many_forms_are_read(
    name: str,
    content: bytes | str,
    wanted: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    write_file(tmp_path / "Früh" / "Stück.png", png())  # one code point for each letter
    path = write_file(
        tmp_path / name, content if isinstance(content, bytes) else content.encode()
    )
    rows = [
        row["metadata"] | {name: row[name] for name in row if name != "metadata"}
        for row in rows_of(scan(path)).values()
    ]
    assert [
        {key: row.get(key) for key in each}
        for row, each in zip(rows, wanted, strict=True)
    ] == wanted


def nested(levels: int) -> str:
    return f'{{"path": "{levels}.png", "n": {"[" * levels}{"]" * levels}}}'


BAD_TABLES: list[tuple[str, bytes | str, str]] = [
    (
        "l.parquet",
        parquet(
            path=["a", "b"], day=pa.array([0, 253_402_300_800_000], pa.timestamp("ms"))
        ),
        r"l\.parquet is damaged .*out of range",
    ),
    (
        "l.parquet",
        parquet(
            path=["a"],
            text=pa.Array.from_buffers(
                pa.string(),
                1,
                pa.array([b"\xff"]).buffers(),
            ),
        ),
        r"l\.parquet is damaged .*'utf-8' codec",
    ),
    (
        "l.jsonl",
        f'{{"path": "a.png"}}\n{{"path": "b.png", "n": {"9" * 5000}}}',
        r"l\.jsonl, line 2: not JSON",
    ),
    ("l.jsonl", nested(100_000), r"l\.jsonl, line 1: not JSON"),
    ("l.jsonl", nested(800), r"800\.png.* nested levels|line 1: not JSON"),
    (
        "l.jsonl",
        f"{nested(99)}\n{nested(100)}",
        r"metadata of 100\.png have more than 100 nested levels; flatten them",
    ),
    (
        "l.jsonl",
        f'{{"path": "a.png", "n": {list(range(20_000))}, "price": 1}}',
        r"the metadata of a\.png take 106 KiB as JSON, at most 64",
    ),
    (
        "l.jsonl",
        f'{{"path": "a.png", "caption": "{"x" * 10_001}"}}',
        r"caption or category of a\.png has 10,001 characters, at most 10,000",
    ),
    ("l.csv", f"path,n\na.png,1\nb.png,{'9' * 200_000}", r"l\.csv, line 3 is not CSV"),
    ("l.csv", "pathx;y, z\na.png;b\n", r"no column .*; it has pathx;y, z"),
    (
        "l.csv",
        "path;size\na.png;9;9\n",
        r"line 2: more cells .* quote a text that has ';'",
    ),
    *(
        (
            "l.csv",
            "path;caption\na.png;Früh\n".encode(each),
            r"is not UTF-8 .*; save it as UTF-8 \(in Excel: Save As, ",
        )
        for each in ("cp1252", "utf-16")
    ),
    *(
        (
            "t.tar",
            tar_bytes({"a.png": png(), "a.json": b'{"n": ' + text + b"}"}),
            r"t\.tar, a\.json: its \.json cannot be read",
        )
        for text in (b"9" * 5000, b"[" * 100_000 + b"]" * 100_000)
    ),
    (
        "t.tar",
        tar_bytes({"a.png": png(), "a.txt": b"a\n" * (MAX_LINE // 2 + 1)}),
        r"t\.tar, a\.txt: its \.txt has 16,000,002 bytes; at most 16,000,000 are read",
    ),
    ("metadata.jsonl", "", r"metadata\.jsonl has no rows; fill or remove it"),
    (
        "metadata.csv",
        "file_name,caption\n",
        r"metadata\.csv has no rows; fill or remove it",
    ),
    (
        "pairs.csv",
        "image,text\na.png,a\n",
        r"no field caption or captions; it has image, text",
    ),
    (
        "pairs.jsonl",
        jsonl(
            *({"image": "a.png", "caption": "a"},) * 4,
            {"image": "x.jpg"},
            {"caption": "nothing"},
        ),
        r"line 5: no field caption .*2 of 6 rows cannot be used; at most 10%",
    ),
]


BAD += [
    (
        A | {name: content if isinstance(content, bytes) else content.encode()},
        name if name[1] == "." else "",
        says,
    )
    for name, content, says in BAD_TABLES
]


@pytest.mark.parametrize(("files", "place", "says"), BAD)
def test_bad_gallery_is_an_error_with_a_remedy(
    files: dict[str, bytes],
    place: str,
    says: str,
    tmp_path: Path,
) -> None:
    for name, content in files.items():
        write_file(tmp_path / name, content)
    with pytest.raises(DataError, match=says):
        scan(tmp_path / place)


def test_annotations_that_lack_rows_or_images_describe_the_others(
    tmp_path: Path,
) -> None:
    names = ["owls/barn_owl.png", *(f"{number}.png" for number in range(20))]
    for name in names:
        write_file(tmp_path / name, png())
    table = [
        {"image": name, "caption": f"an {name}", "category": "a", "split": "train"}
        for name in names[1:]
    ]
    elsewhere = {"image": "other/b.png", "caption": "blue", "split": "val"}
    write_jsonl(
        tmp_path / "pairs.jsonl",
        *table,
        elsewhere,
        {"image": "x.jpg", "split": "train"},
    )
    rows = rows_of(scan(tmp_path))
    assert [row["caption"] for row in rows.values()] == [
        f"an {name}" for name in sorted(names[1:])
    ] + [""]
    owl = rows[names[0]]
    assert (owl["category"], owl["metadata"]["title"]) == (
        "owls",
        "barn owl",
    ), "as its path describes it"
    write_file(tmp_path / "moved" / "a.png", png())
    write_jsonl(tmp_path / "moved" / "pairs.jsonl", elsewhere)
    assert rows_of(scan(tmp_path / "moved"))["a.png"]["caption"] == "", (
        "no split has an image"
    )
