"""Items added, replaced and removed without a rebuild."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from app.cli import app
from dcar_core import Encoder
from dcar_core.util.errors import DataError, FingerprintError
from index_jobs.index.filters import filter_rows, match_rows
from index_jobs.index.publish import rollback, verify_index
from index_jobs.index.versions import current_version, open_current
from index_jobs.jobs import update as updates
from index_jobs.jobs.update import add, live_gallery, remove
from tests.support.files import write_file
from tests.support.images import draw, png
from tests.support.updates import nearest_ids, write_images
from tests.support.versions import Build


def test_added_items_are_found_beside_the_others(index: Path, encoder: Encoder, tmp_path: Path) -> None:
    gallery = write_images(tmp_path / "more", "pink", "cyan", year=1999)
    before = open_current(index)
    done = add(index, gallery, progress=False)
    assert (done.version, done.count, done.added, done.removed, done.failed, done.rebuild) == (2, 26, 2, 0, 0, "")
    artifact = open_current(index)
    pictures = [gallery / "pink.png", gallery / "cyan.png", Path(before.manifest.root) / "circle" / "red.png"]
    vectors = encoder.encode_images(pictures)
    assert nearest_ids(artifact, vectors) == ["pink", "cyan", nearest_ids(before, vectors[2:])[0]]
    scores, rows = artifact.search(vectors, 30)
    assert (np.diff(scores[:, :26]) <= 0).all()
    assert [sorted(line) for line in rows.tolist()] == [[-1] * 4 + list(range(26))] * 3
    row = artifact.row_of("pink")
    assert row is not None
    np.testing.assert_allclose(artifact.vectors(np.array([row])), vectors[:1], atol=1e-5)
    assert artifact.image_bytes(row) == (gallery / "pink.png").read_bytes()
    assert (artifact.item(row).width, artifact.item(row).height) == (48, 48)
    assert artifact.item(row).metadata == {"file_name": "pink.png", "color": "pink", "year": 1999}
    assert artifact.fields["year"] == "int64"
    assert artifact.column("year").to_pylist() == [None] * 24 + [1999, 1999]
    assert np.flatnonzero(match_rows(artifact, {"color": ["pink", "red"]})).tolist()[-1] == row


def test_the_live_items_are_a_gallery_wherever_they_came_from(build: Build, index: Path, tmp_path: Path) -> None:
    build(write_images(tmp_path / "one, two", "pink", "cyan"), force=True)
    add(index, write_images(tmp_path / "more", "brown", year=1999), progress=False)
    remove(index, ["cyan"])
    served = open_current(index)
    build(live_gallery(served), out=tmp_path / "again")
    again = open_current(tmp_path / "again")
    assert [again.item(row).id for row in range(again.rows)] == ["pink", "brown"]
    for row, before in enumerate((1, 2)):
        np.testing.assert_allclose(again.vectors(np.array([row])), served.vectors(np.array([before])), atol=1e-6)
        assert again.item(row).metadata == served.item(before).metadata


def test_files_that_the_index_has_below_another_folder_are_named(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.png", "b/2.png"):
        write_file(tmp_path / "photos" / name, png())
    build(tmp_path / "photos")
    add(tmp_path / "index", tmp_path / "photos" / "a", progress=False)
    assert f"1 images, such as {tmp_path}/photos/a/1.png, are in the index already" in caplog.text


def test_replaced_item_has_the_new_vector(index: Path, encoder: Encoder, tmp_path: Path) -> None:
    gallery = write_images(tmp_path / "more", "pink", "cyan")
    add(index, gallery, progress=False)
    with pytest.raises(
        DataError, match=r"2 of the 2 images of .* such as 'cyan', and are the same files; --replace indexes them again"
    ):
        add(index, gallery, progress=False)
    changed = write_images(tmp_path / "changed", "pink", shape="circle")
    assert add(index, changed, replace_existing=True, progress=False).count == 26
    artifact = open_current(index)
    vectors = encoder.encode_images([changed / "pink.png", gallery / "pink.png"])
    row = artifact.row_of("pink")
    assert row is not None
    assert artifact.item(row).caption == "a pink circle"
    np.testing.assert_allclose(artifact.vectors(np.array([row])), vectors[:1], atol=1e-5)
    rows = artifact.search(vectors[1:], 26)[1][0]
    assert sum(artifact.item(int(r)).id == "pink" for r in rows if r >= 0) == 1


def test_broken_image_replaces_nothing(index: Path, tmp_path: Path) -> None:
    add(index, write_images(tmp_path / "more", "pink", "cyan"), progress=False)
    changed = write_images(tmp_path / "changed", "pink", "cyan", shape="circle")
    (changed / "pink.png").write_bytes(b"no picture")
    done = add(index, changed, replace_existing=True, max_failed=0.5, progress=False)
    assert (done.count, done.added, done.removed, done.failed) == (26, 1, 1, 1)
    artifact = open_current(index)
    rows = [artifact.row_of(color) for color in ("pink", "cyan")]
    assert [artifact.item(row).caption for row in rows if row is not None] == ["a pink square", "a cyan circle"]


@pytest.mark.slow
def test_many_small_additions_are_merged_into_few_segments(index: Path, encoder: Encoder, tmp_path: Path) -> None:
    colors, parts = ["pink", "cyan", "lime", "navy", "teal", "gold"], []
    for color in colors:
        add(index, write_images(tmp_path / color, color), progress=False)
        parts.append([addition.count for addition in open_current(index).manifest.additions])
    assert parts == [[1], [2], [3], [3, 1], [5], [5, 1]]
    remove(index, ["lime"])
    add(index, write_images(tmp_path / "last", "coral", "gray", "olive"), progress=False)
    artifact = open_current(index)
    assert len(artifact.manifest.additions) <= 3
    assert artifact.manifest.count == 24 + len(colors) - 1 + 3
    left = [color for color in colors if color != "lime"]
    vectors = encoder.encode_images([tmp_path / color / f"{color}.png" for color in left])
    assert nearest_ids(artifact, vectors) == left
    assert artifact.row_of("lime") is None
    assert len(verify_index(index)) == 3
    sources = [source for addition in artifact.manifest.additions for source in addition.sources]
    assert sources == [str(tmp_path / name) for name in [*colors, "last"]]


def test_a_field_of_the_index_does_not_become_text(index: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"price": 5, "new": True, "tags": ["x"], "note": "7"}
    add(index, write_images(tmp_path / "typed", "pink", **given), progress=False)
    before = open_current(index).fields
    for name, value, said in (
        ("price", "5 EUR", "the field 'price' is int64 in the index and string in"),
        ("new", "true", "the field 'new' is bool in the index and string in"),
        ("tags", "x", "the field 'tags' is list"),
        ("note", ["x"], "the field 'note' is string in the index and list"),
        ("price", [1, 2], "give values of type int64, rename the field, or rebuild"),
    ):
        gallery = write_images(tmp_path / f"{name}{len(value)}", "cyan", **(given | {name: value}))
        (gallery / "cyan.png").write_bytes(b"")  # which would be the error if it were encoded first
        with pytest.raises(DataError, match=said):
            add(index, gallery, progress=False)
    assert current_version(index) == 2
    gallery = write_images(tmp_path / "csv", "lime", "navy")
    (gallery / "metadata.jsonl").unlink()
    (gallery / "metadata.csv").write_text("file_name,id,price,note\nlime.png,lime,6.5,8\nnavy.png,navy,,9\n")
    with pytest.raises(DataError, match="the field 'note' is string in the index and int64 in"):
        add(index, gallery, progress=False)
    (gallery / "metadata.csv").write_text("file_name,id,price,note\nlime.png,lime,6.5,8\nnavy.png,navy,,x\n")
    add(index, gallery, progress=False)
    artifact = open_current(index)
    assert artifact.fields == before | {"price": "double"}
    assert artifact.column("price").to_pylist()[-3:] == [5.0, 6.5, None]
    last = np.arange(artifact.rows - 2, artifact.rows)
    assert artifact.column("price", last).to_pylist() == [6.5, None]
    assert match_rows(artifact, {"price": {"gt": 5}}).sum() == 1


def test_images_of_another_encoder_are_not_added(
    index: Path, other_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of the model's files that the sizes in the manifest do not show."""
    other = Encoder.load(other_checkpoint, device="cpu")
    monkeypatch.setattr(updates, "load_replicas", lambda *_, **__: [other])
    with pytest.raises(FingerprintError, match="was built by encoder"):
        add(index, write_images(tmp_path / "more", "pink"), progress=False)
    assert current_version(index) == 1


def test_removed_item_is_never_found(index: Path) -> None:
    before = open_current(index)
    gone = [before.item(row).id for row in (3, 17)]
    vectors = before.vectors(np.arange(24))
    done = remove(index, [*gone, gone[0]])
    assert (done.count, done.removed) == (22, 2)
    artifact = open_current(index)
    assert (artifact.rows, artifact.manifest.count, artifact.manifest.removed) == (24, 22, 2)
    live = sorted(set(range(24)) - {3, 17})
    for allowed in (None, filter_rows(artifact, {})):
        rows = artifact.search(vectors, 24, allowed)[1]
        assert [sorted(line) for line in rows.tolist()] == [[-1, -1, *live]] * 24
    assert [artifact.row_of(item_id) for item_id in gone] == [None, None]
    for read in (artifact.item, artifact.image_bytes):
        with pytest.raises(IndexError, match="row 3 was removed"):
            read(3)
    assert not match_rows(artifact, {})[[3, 17]].any()
    with pytest.raises(DataError, match=f"1 of 1 ids are not in the index: '{gone[0]}'; nothing was removed"):
        remove(index, [gone[0]])
    assert rollback(index) == 1
    assert open_current(index).row_of(gone[0]) == 3


def test_files_of_ids_may_come_from_another_system(index: Path, tmp_path: Path) -> None:
    """Windows begins UTF-8 with a mark, and an id may contain what only `str.splitlines` takes for a line's end."""
    gallery, ids = write_images(tmp_path / "more", "pink"), tmp_path / "ids"
    for name in ("cyan", "lime"):
        draw(name, "square").save(gallery / f"{name}.png")
    rows = [{"file_name": "cyan.png", "id": "a\u2028b"}, {"file_name": "lime.png", "id": "l"}]
    with (gallery / "metadata.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    add(index, gallery, progress=False)
    for text, left in (("pink\r\na\u2028b\r\n", 25), ("l\r\n", 24)):
        ids.write_bytes(text.encode("utf-8-sig"))
        done = CliRunner().invoke(app, ["index", "remove", str(index), "--ids-file", str(ids)])
        assert f"{left} images" in done.output
    ids.write_bytes("pink\r\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"ids is not UTF-8 .*; convert it first"):
        CliRunner().invoke(
            app, ["index", "remove", str(index), "--ids-file", str(ids), "--missing-ok"], catch_exceptions=False
        )
