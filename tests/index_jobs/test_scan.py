"""Galleries of every form, and errors about broken ones."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar_core.data import Annotations
from dcar_core.images import formats
from dcar_core.util.errors import DataError
from index_jobs.gallery.scan import scan
from index_jobs.gallery.storage import WHOLE_FILE, open_image
from tests.support.files import jsonl, tar_bytes, write_file, write_jsonl, write_rows, write_tar
from tests.support.galleries import rows_of
from tests.support.images import png
from tests.support.parts import needs


def test_folder_is_scanned_recursively_sorted_and_joined_with_metadata(tiny_gallery: Path) -> None:
    gallery = scan(tiny_gallery)
    names = gallery.table["name"].to_pylist()
    assert len(gallery) == 24
    assert names == sorted(names)
    row = rows_of(gallery)["circle/red.png"]
    assert (row["caption"], row["category"]) == ("a red circle", "circle")
    assert row["metadata"] == {"file_name": "circle/red.png", "color": "red"}
    assert row["offset"] == WHOLE_FILE


def test_ids_and_vector_signature_survive_a_move(tiny_gallery: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_gallery, tmp_path / "elsewhere", copy_function=shutil.copy2)
    a, b = scan(tiny_gallery), scan(moved)
    assert a.table["id"] == b.table["id"]
    assert len(set(a.table["id"].to_pylist())) == 24
    assert a.vectors_signature == b.vectors_signature


def test_signatures_distinguish_changed_images_from_changed_captions(tiny_gallery: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_gallery, tmp_path / "g"))
    before = scan(root)
    lines = (root / "metadata.jsonl").read_text().replace("a red circle", "a crimson circle")
    (root / "metadata.jsonl").write_text(lines)
    captioned = scan(root)
    assert captioned.vectors_signature == before.vectors_signature
    assert captioned.content_signature != before.content_signature
    listed = write_jsonl(tmp_path / "list.jsonl", {"file_name": str(root / "circle" / "red.png")})
    alone = scan(listed)
    os.utime(root / "circle" / "red.png", ns=(1, 1))
    assert scan(root).vectors_signature != before.vectors_signature
    assert scan(listed).vectors_signature != alone.vectors_signature


JPEGS = ["a.jfif", "b.JFIF", "c.jpe", "d.jpeg", "e.jpg", "f.pjpeg"]


@pytest.mark.parametrize("names", [JPEGS, pytest.param(["a.heic", "b.HEIF", "c.hif"], marks=needs("heic"))])
def test_images_are_known_by_their_suffix_and_hidden_files_left_out(names: list[str], tmp_path: Path) -> None:
    for name in (*names, ".b.png", ".hidden/c.png", "notes.txt", "d.pdf"):
        write_file(tmp_path / name, png())
    assert scan(tmp_path).table["name"].to_pylist() == names


def test_tar_members_are_read_in_place_with_their_siblings(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "shard.tar",
        {
            "x/2.png": png("blue"),
            "x/2.json": b'{"caption": "blue thing", "source": "here", "score": 0.5}',
            "x/1.png": png("green"),
            "x/1.txt": b"green thing\n",
            "x/1.cls": b"7",
            "x/._1.png": b"what macOS writes beside each file",
            "readme.md": b"no picture",
        },
    )
    gallery = scan(tmp_path)
    rows = rows_of(gallery)
    assert list(rows) == ["shard.tar/x/1.png", "shard.tar/x/2.png"]
    assert (rows["shard.tar/x/1.png"]["caption"], rows["shard.tar/x/1.png"]["category"]) == ("green thing", "7")
    assert rows["shard.tar/x/2.png"]["metadata"]["source"] == "here"
    for name, color in (("shard.tar/x/1.png", "green"), ("shard.tar/x/2.png", "blue")):
        row = rows[name]
        file, size = open_image(gallery.root, row["location"], row["offset"], row["size"])
        with file:
            assert file.read(size) == png(color)
    alone = scan(tmp_path / "shard.tar")
    assert alone.table["id"] == gallery.table["id"]


def test_tar_member_is_joined_by_its_bare_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "gallery.tar", {"deep/1f63f.png": png()})
    extra = {"meta_category": "faces", "attributes": ["crying", "cat"], "split": "test"}
    write_jsonl(
        tmp_path / "metadata.jsonl", {"file_name": "1f63f.png", "caption": "crying cat", "category": "cat", **extra}
    )
    (row,) = rows_of(scan(tmp_path)).values()
    assert row["caption"] == "crying cat"
    assert row["metadata"] == {"file_name": "1f63f.png", **extra}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["file_name", "image", "path"])
def test_lists_keep_their_order_ids_and_columns(tmp_path: Path, kind: str, column: str) -> None:
    outside = write_file(tmp_path / "outside" / "z.png", png())
    write_file(tmp_path / "lists" / "b.png", png())
    rows = [
        {column: str(outside), "id": "last", "caption": "z", "category": "k", "colour": "x"},
        {column: "./b.png", "id": "", "caption": "b", "category": "", "colour": "y"},
    ]
    path = tmp_path / "lists" / f"list.{kind}"
    write_rows(path, rows)
    gallery = scan(path)
    table = gallery.table.to_pylist()
    assert [row["location"] for row in table] == [str(outside), "b.png"]
    assert table[0]["id"] == "last"
    assert len(table[1]["id"]) == 20
    assert [row["caption"] for row in table] == ["z", "b"]
    assert [json.loads(row["metadata"])["colour"] for row in table] == ["x", "y"]


def test_unmatched_metadata_rows_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_file(tmp_path / "a.png", png())
    write_jsonl(tmp_path / "metadata.jsonl", {"file_name": "a.png"}, {"file_name": "gone.png"})
    scan(tmp_path)
    assert "/metadata.jsonl name no image here, such as gone.png" in caplog.text


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def described(**fields: str) -> dict[str, bytes]:
    return {"a.png": png(), "metadata.jsonl": jsonl({"file_name": "a.png", **fields})}


@pytest.mark.parametrize(
    ("files", "place", "says"),
    [
        ({"notes.txt": b"x"}, "", "is empty: no file or tar member with one of the suffixes"),
        ({"metadata.jsonl": jsonl({"file_name": "a.png"})}, "", "is empty"),
        ({}, "nowhere", "nowhere does not exist"),
        ({"a.png": png()}, "a.png", "is not a gallery; give a folder"),
        (
            {"l.jsonl": jsonl({"filename": "a.png", "caption": "a"})},
            "l.jsonl",
            "no column file_name or image or path or url with image paths; it has filename, caption",
        ),
        ({"l.csv": b"file_name,caption\n"}, "l.csv", "has no rows"),
        (
            {"l.parquet": parquet(image=[{"bytes": png(), "path": "a.png"}])},
            "l.parquet",
            "row 1: image holds the image itself; write the images to files",
        ),
        ({"l.csv": b"file_name,caption\n,x\n"}, "l.csv", "row 2: file_name is empty"),
        ({"l.jsonl": jsonl(["a.png"])}, "l.jsonl", "line 1: must be an object, not a list"),
        (
            {"l.jsonl": jsonl({"path": "nosuch://example.org/a.png"})},
            "l.jsonl",
            "nosuch://example.org/a.png cannot be read: the schemes of galleries are",
        ),
        ({"l.jsonl": jsonl({"path": "x/../../a.png"})}, "l.jsonl", "is outside of the list's folder"),
        (
            {"l.jsonl": jsonl({"path": "a.png", "id": 7}, {"path": "b.png"}, {"path": "c.png", "id": "7"})},
            "l.jsonl",
            r"a\.png and c\.png both have the id '7'",
        ),
        ({"l.jsonl": jsonl({"path": "a.png"}, {"path": "./a.png"})}, "l.jsonl", r"a\.png is listed twice; keep one"),
        (described(id="shop/7/image"), "", "the id 'shop/7/image' ends in /image, which is a route of the service"),
        (described(id="a\nb"), "", r"the id 'a\\nb' has a line break or another control character; give another"),
        (described(id=".."), "", r"the id '\.\.' has a meaning of its own in a URL; give another"),
        (described(id="x" * 1025), "", r"the id 'x{80}' is longer than 1024 characters; give another"),
        ({"g.tar.gz": tar_bytes({"a.png": png()}, "w:gz")}, "", "is a compressed tar.*decompress it first"),
        ({"g.tar": tar_bytes({"a.png": png()}, "w:gz")}, "g.tar", "is not an uncompressed tar"),
        (
            {"g.tar": tar_bytes({"a.png": png(), "b.png": bytes(4000)})[:2500]},
            "g.tar",
            r"is cut short .* after [ab]\.png",
        ),
        (
            {"sub/a.png": png(), "metadata.jsonl": jsonl({"file_name": "other/a.png"})},
            "",
            "no row of .*metadata.jsonl names an image of this gallery",
        ),
        (
            {"a.png": png(), "metadata.jsonl": jsonl({"file_name": "a.png"}, {"file_name": "./a.png"})},
            "",
            "rows 1 and 2 both describe a.png",
        ),
        (described() | {"metadata.csv": b"file_name\na.png\n"}, "", "both exist; keep one"),
        ({"a.png": png(), "metadata.jsonl": jsonl({"file": "a"})}, "", "row 1: no column file_name; it has file"),
    ],
)
def test_bad_gallery_is_an_error_that_says_what_to_do(
    files: dict[str, bytes], place: str, says: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        write_file(tmp_path / name, content)
    with pytest.raises(DataError, match=says):
        scan(tmp_path / place)


@pytest.mark.skipif(os.name != "posix", reason="file names are text here")
def test_file_name_that_is_no_text_is_an_error_with_its_place(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(png())
    with pytest.raises(DataError, match="is not UTF-8; rename the file"):
        scan(tmp_path)


def test_image_column_is_the_one_that_training_reads(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_file(tmp_path / name, png())
    row = {"path": "c.png", "image": "b.png", "file_name": "a.png", "caption": "red"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    assert scan(tmp_path / "train.jsonl").table["location"].to_pylist() == ["a.png"]
    assert [sample.image for sample in Annotations(tmp_path).load("train")[0].samples] == ["a.png"]


@pytest.mark.parametrize(("kind", "place"), [("folder", ""), ("tar", "shard.tar"), ("tar", "")])
def test_files_of_image_kinds_that_are_not_read_are_counted(
    kind: str, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"a.png": png(), **dict.fromkeys(("b.svg", "c.SVG", "d.mp4", "e.pef", "._f.svg", "notes.txt"), b"")}
    if kind == "tar":
        write_tar(tmp_path / "shard.tar", files)
    else:
        for name, content in files.items():
            write_file(tmp_path / name, content)
    assert len(scan(tmp_path / place)) == 1
    assert "2 SVG files are skipped: convert them to PNG" in caplog.text
    assert "1 video file is skipped: extract frames as images" in caplog.text
    assert "1 RAW file is skipped: convert them to JPEG" in caplog.text
    assert "notes" not in caplog.text


def test_heic_files_are_counted_without_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(formats, "IMAGE_SUFFIXES", formats.IMAGE_SUFFIXES - formats.HEIC_SUFFIXES)
    for name in ("a.png", "b.heic", "c.HIF"):
        write_file(tmp_path / name, png())
    assert len(scan(tmp_path)) == 1
    assert "2 HEIC files are skipped: pip install 'dcar[heic]'" in caplog.text
