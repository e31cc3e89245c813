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


def test_signatures_tell_changed_images_from_changed_captions_and_places(tiny_gallery: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_gallery, tmp_path / "g", copy_function=shutil.copy2))
    before, moved = scan(tiny_gallery), scan(root)
    assert (moved.table["id"], moved.vectors_signature) == (before.table["id"], before.vectors_signature)
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


def test_tar_members_are_read_in_place_with_their_siblings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {
        "x/2.png": png("blue"), "x/2.json": b'{"caption": "blue thing", "source": "here", "score": 0.5}',
        "x/1.png": png("green"), "x/1.txt": b"green thing\n", "x/1.cls": b"7",
        "x/._1.png": b"what macOS writes beside each file", "readme.md": b"no picture",
    }  # fmt: skip
    write_tar(tmp_path / "shard.tar", members)
    gallery = scan(tmp_path)
    rows = rows_of(gallery)
    assert list(rows) == ["shard.tar/x/1.png", "shard.tar/x/2.png"]
    assert (rows["shard.tar/x/1.png"]["caption"], rows["shard.tar/x/1.png"]["category"]) == ("green thing", "7")
    assert rows["shard.tar/x/2.png"]["metadata"]["source"] == "here"
    for row, color in zip(rows.values(), ("green", "blue"), strict=True):
        file, size = open_image(gallery.root, row["location"], row["offset"], row["size"])
        with file:
            assert file.read(size) == png(color)
    assert scan(tmp_path / "shard.tar").table["id"] == gallery.table["id"]
    described = {"file_name": "2.png", "caption": "a sea", "attributes": ["wide"], "split": "test"}
    write_jsonl(tmp_path / "metadata.jsonl", described, {"file_name": "gone.png"})
    joined = rows_of(scan(tmp_path))["shard.tar/x/2.png"]
    assert (joined["caption"], joined["metadata"]["attributes"]) == ("a sea", ["wide"]), "by its bare name"
    assert "/metadata.jsonl name no image here, such as gone.png" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["file_name", "image", "path"])
def test_lists_keep_their_order_ids_and_columns(tmp_path: Path, kind: str, column: str) -> None:
    outside = write_file(tmp_path / "outside" / "z.png", png())
    write_file(tmp_path / "lists" / "b.png", png())
    path = tmp_path / "lists" / f"list.{kind}"
    write_rows(path, [
        {column: str(outside), "id": "last", "caption": "z", "category": "k", "path": str(outside)},
        {column: "./b.png", "id": "", "caption": "b", "category": "", "path": "./b.png"},
    ])  # fmt: skip
    first, second = scan(path).table.to_pylist()
    assert (first["location"], first["id"], first["caption"]) == (str(outside), "last", "z")
    assert (second["location"], len(second["id"]), second["caption"]) == ("b.png", 20, "b")
    assert json.loads(second["metadata"])["path"] == "./b.png"


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def described(**fields: str) -> dict[str, bytes]:
    return {"a.png": png(), "metadata.jsonl": jsonl({"file_name": "a.png", **fields})}


A = {"a.png": png()}
BAD: list[tuple[dict[str, bytes], str, str]] = [
    ({"notes.txt": b"x"}, "", "is empty: no file or tar member with one of the suffixes"),
    ({"metadata.jsonl": jsonl({"file_name": "a.png"})}, "", "is empty"),
    ({}, "nowhere", "nowhere does not exist"),
    (A, "a.png", "is not a gallery; give a folder"),
    ({"l.jsonl": jsonl({"filename": "a.png", "caption": "a"})}, "l.jsonl",
     "no column file_name or image or path or url with image paths; it has filename, caption"),
    ({"l.csv": b"file_name,caption\n"}, "l.csv", "has no rows"),
    ({"l.parquet": parquet(image=[{"bytes": png(), "path": "a.png"}])}, "l.parquet", "row 1: image is empty or not"),
    ({"l.csv": b"file_name,caption\n,x\n"}, "l.csv", "row 2: file_name is empty"),
    ({"l.jsonl": jsonl(["a.png"])}, "l.jsonl", "line 1: must be an object, not a list"),
    ({"l.jsonl": jsonl({"path": "x/../../a.png"})}, "l.jsonl", "is outside of the list's folder"),
    ({"l.jsonl": jsonl({"path": "a.png", "id": 7}, {"path": "b.png"}, {"path": "c.png", "id": "7"})}, "l.jsonl",
     "such as '7' by a.png and c.png"),
    ({"l.jsonl": jsonl({"path": "a.png"}, {"path": "./a.png"})}, "l.jsonl", "by a.png and a.png; list an image once"),
    *((described(id=each), "", r"cannot be part of a URL.*; give another")
      for each in ("shop/7/image", "7/similar", "a\nb", "..", "x" * 1025)),
    ({"g.tar.gz": tar_bytes(A, "w:gz")}, "", "is empty"),
    ({"g.tar": tar_bytes(A, "w:gz")}, "g.tar", "is not a whole uncompressed tar"),
    ({"g.tar": tar_bytes({**A, "b.png": bytes(4000)})[:2500]}, "g.tar", r"at [ab]\.png: "),
    ({"sub/a.png": png(), "metadata.jsonl": jsonl({"file_name": "other/a.png"})}, "",
     "no row of .*metadata.jsonl names an image of this gallery"),
    (A | {"metadata.jsonl": jsonl({"file_name": "a.png"}, {"file_name": "./a.png"})}, "",
     "rows 1 and 2 both describe ./a.png"),
    (described() | {"metadata.csv": b"file_name\na.png\n"}, "", "both exist; keep one"),
    (A | {"metadata.jsonl": jsonl({"file": "a"})}, "", "row 1: no file_name; the columns are file"),
    ({"\udcff.png": png()}, "", "is not UTF-8; rename the file"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "place", "says"), BAD)
def test_bad_gallery_is_an_error_that_says_what_to_do(
    files: dict[str, bytes], place: str, says: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        write_file(tmp_path / name, content)
    with pytest.raises(DataError, match=says):
        scan(tmp_path / place)


@pytest.mark.parametrize(("kind", "place"), [("folder", ""), ("tar", "shard.tar"), ("tar", "")])
def test_files_that_are_not_read_are_counted(
    kind: str, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "IMAGE_SUFFIXES", formats.IMAGE_SUFFIXES - formats.HEIC_SUFFIXES)
    others = ("b.svg", "c.SVG", "d.mp4", "e.pef", "._f.svg", "notes.txt", "b.heic", "c.HIF")
    files = {"a.png": png(), **dict.fromkeys(others, b"")}
    if kind == "tar":
        write_tar(tmp_path / "shard.tar", files)
    else:
        for name, content in files.items():
            write_file(tmp_path / name, content)
    assert len(scan(tmp_path / place)) == 1
    assert "not read: 1 .heic, 1 .hif, 1 .mp4, 1 .pef, 2 .svg; " in caplog.text
    assert "notes" not in caplog.text
