"""Items added and removed without a rebuild."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from app.cli import app
from dcar_core import Encoder
from dcar_core.util.errors import ArtifactError, DataError, FingerprintError, LockedError
from index_jobs.jobs import updates
from index_jobs.jobs.updates import add, remove
from index_jobs.rebuild import rebuild
from index_jobs.store import faiss_search
from index_jobs.store.artifact import Artifact
from index_jobs.store.filters import match_rows
from index_jobs.store.publish import rollback
from index_jobs.store.versions import current_version, open_current, open_version, verify_index
from tests.support.commands import dcar
from tests.support.files import write_file
from tests.support.images import draw, png


def more(path: Path, *colors: str, shape: str = "square", **fields: object) -> Path:
    """Write a gallery with one image per colour."""
    path.mkdir()
    lines = []
    for color in colors:
        draw(color, shape).save(path / f"{color}.png")
        given = {"file_name": f"{color}.png", "id": color, "caption": f"a {color} {shape}", "color": color}
        lines.append(json.dumps(given | fields) + "\n")
    (path / "metadata.jsonl").write_text("".join(lines))
    return path


def found(artifact: Artifact, vectors: np.ndarray) -> list[str]:
    return [artifact.item(int(row)).id for row in artifact.search(vectors, 1)[1][:, 0]]


def test_added_items_are_found_beside_the_others(index: Path, encoder: Encoder, tmp_path: Path) -> None:
    gallery = more(tmp_path / "more", "pink", "cyan", year=1999)
    before = open_current(index)
    done = add(index, gallery, progress=False)
    assert (done.version, done.count, done.added, done.removed, done.failed, done.rebuild) == (2, 26, 2, 0, 0, "")
    artifact = open_current(index)
    pictures = [gallery / "pink.png", gallery / "cyan.png", Path(before.manifest.root) / "circle" / "red.png"]
    vectors = encoder.encode_images(pictures)
    assert found(artifact, vectors) == ["pink", "cyan", found(before, vectors[2:])[0]]
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


def test_unchanged_files_are_shared(index: Path, tmp_path: Path) -> None:
    add(index, more(tmp_path / "more", "pink"), progress=False)
    remove(index, ["pink"])
    for name in ("index.faiss", "items.arrow", "checkpoint/config.json", "failed.jsonl"):
        assert len({(index / "versions" / str(n) / name).stat().st_ino for n in (1, 2, 3)}) == 1, name
    verify_index(index)
    remove(index, [open_current(index).item(0).id], keep=1)
    assert [manifest.version for manifest in verify_index(index)] == [4]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes of files")
def test_another_user_may_read_every_file(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcar_core.util.files._UMASK", 0o022)
    before = os.umask(0o022)
    try:
        rebuild(tiny_gallery, tiny_checkpoint, tmp_path / "index", progress=False)
        add(tmp_path / "index", more(tmp_path / "more", "pink"), progress=False)
    finally:
        os.umask(before)
    for number in "12":
        files = [path for path in (tmp_path / "index" / "versions" / number).rglob("*") if path.is_file()]
        assert {path.name for path in files if path.stat().st_mode & 0o777 != 0o644} == set()


def test_files_that_the_index_has_below_another_folder_are_named(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.png", "b/2.png"):
        write_file(tmp_path / "photos" / name, png())
    rebuild(tmp_path / "photos", tiny_checkpoint, tmp_path / "index", progress=False)
    add(tmp_path / "index", tmp_path / "photos" / "a", progress=False)
    assert f"1 images, such as {tmp_path}/photos/a/1.png, are in the index already" in caplog.text


def test_removed_item_is_never_found(index: Path) -> None:
    before = open_current(index)
    gone = [before.item(row).id for row in (3, 17)]
    vectors = before.vectors(np.arange(24))
    done = remove(index, [*gone, gone[0]])
    assert (done.count, done.removed) == (22, 2)
    artifact = open_current(index)
    assert (artifact.rows, artifact.manifest.count, artifact.manifest.removed) == (24, 22, 2)
    live = sorted(set(range(24)) - {3, 17})
    for allowed in (None, np.ones(24, np.bool_)):
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
    gallery, ids = more(tmp_path / "more", "pink"), tmp_path / "ids"
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


@pytest.mark.parametrize("row", [-1, 24])
def test_removed_rows_that_do_not_exist_are_refused(index: Path, row: int) -> None:
    remove(index, [open_current(index).item(0).id])
    np.save(open_current(index).path / "removed.npy", np.array([row]))
    with pytest.raises(ArtifactError, match=r"removed\.npy does not fit the manifest; roll back"):
        open_current(index)


def test_replaced_item_has_the_new_vector(index: Path, encoder: Encoder, tmp_path: Path) -> None:
    gallery = more(tmp_path / "more", "pink", "cyan")
    add(index, gallery, progress=False)
    with pytest.raises(
        DataError, match=r"2 of the 2 images of .* such as 'cyan', and are the same files; --replace indexes them anew"
    ):
        add(index, gallery, progress=False)
    changed = more(tmp_path / "changed", "pink", shape="circle")
    assert add(index, changed, replace_existing=True, progress=False).count == 26
    artifact = open_current(index)
    vectors = encoder.encode_images([changed / "pink.png", gallery / "pink.png"])
    row = artifact.row_of("pink")
    assert row is not None
    assert artifact.item(row).caption == "a pink circle"
    np.testing.assert_allclose(artifact.vectors(np.array([row])), vectors[:1], atol=1e-5)
    rows = artifact.search(vectors[1:], 26)[1][0]
    assert sum(artifact.item(int(r)).id == "pink" for r in rows if r >= 0) == 1


@pytest.mark.parametrize(
    "kind",
    [
        "hnsw",
        "hnsw-sq8",
        "ivf",
        "ivf-sq8",
        "ivf-pq",
        "ivf-pq-fp16",
        "ivf-rabitq",
        pytest.param("IVF1,PQ32x4", id="pq"),  # its codes of eight bits need 256 images to train
    ],
)
@pytest.mark.slow
def test_every_kind_of_built_index_takes_updates(
    kind: str,
    index: Path,
    tiny_gallery: Path,
    tiny_checkpoint: Path,
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faiss_search, "EXACT_UP_TO", 0)
    rebuild(tiny_gallery, tiny_checkpoint, index, kind=kind, progress=False)
    built = open_current(index)
    assert built.manifest.kind != "Flat"
    ids = [built.item(row).id for row in range(24)]
    changed = more(tmp_path / "changed", "cyan")
    (changed / "metadata.jsonl").write_text(json.dumps({"file_name": "cyan.png", "id": ids[3], "caption": "new"}))
    add(index, more(tmp_path / "more", "pink"), progress=False)
    assert add(index, changed, replace_existing=True, progress=False).removed == 1
    remove(index, [ids[17], "pink"])
    artifact = open_current(index)
    vectors = encoder.encode_images([changed / "cyan.png", tmp_path / "more" / "pink.png"])
    assert found(artifact, vectors[:1]) == [ids[3]]
    expected = sorted({*ids} - {ids[17]})
    for allowed in (None, np.arange(artifact.rows) % 26 != 24):  # 24 is the row of the removed addition
        rows = artifact.search(np.concatenate([vectors, built.vectors(np.arange(24))]), artifact.rows, allowed)[1]
        assert all(sorted(artifact.item(row).id for row in line if row >= 0) == expected for line in rows.tolist())


def test_broken_image_replaces_nothing(index: Path, tmp_path: Path) -> None:
    add(index, more(tmp_path / "more", "pink", "cyan"), progress=False)
    changed = more(tmp_path / "changed", "pink", "cyan", shape="circle")
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
        add(index, more(tmp_path / color, color), progress=False)
        parts.append([addition.count for addition in open_current(index).manifest.additions])
    assert parts == [[1], [2], [3], [3, 1], [5], [5, 1]]
    remove(index, ["lime"])
    add(index, more(tmp_path / "last", "coral", "gray", "olive"), progress=False)
    artifact = open_current(index)
    assert len(artifact.manifest.additions) <= 3
    assert artifact.manifest.count == 24 + len(colors) - 1 + 3
    left = [color for color in colors if color != "lime"]
    vectors = encoder.encode_images([tmp_path / color / f"{color}.png" for color in left])
    assert found(artifact, vectors) == left
    assert artifact.row_of("lime") is None
    assert len(verify_index(index)) == 3
    sources = [source for addition in artifact.manifest.additions for source in addition.sources]
    assert sources == [str(tmp_path / name) for name in [*colors, "last"]]


def test_manifest_recommends_a_rebuild(
    index: Path, tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [open_current(index).item(row).id for row in range(6)]
    assert remove(index, ids[:4]).rebuild == ""
    assert remove(index, ids[4:5]).rebuild.startswith("5 of 24 rows are removed")
    monkeypatch.setattr(updates, "ADDED_ROWS", 3)
    colors = ["pink", "cyan", "lime", "navy", "teal", "gold"]
    assert (
        "6 of 30 items are outside the built index" in add(index, more(tmp_path / "6", *colors), progress=False).rebuild
    )
    monkeypatch.undo()
    summary = rebuild(tiny_gallery, tiny_checkpoint, index, progress=False, max_vanished=0.3)
    assert not summary.reused  # although neither gallery nor checkpoint has changed
    artifact = open_current(index)
    assert (artifact.manifest.count, artifact.manifest.rebuild, artifact.row_of("pink")) == (24, "", None)


def test_a_field_of_the_index_does_not_become_text(index: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"price": 5, "new": True, "tags": ["x"], "note": "7"}
    add(index, more(tmp_path / "typed", "pink", **given), progress=False)
    before = open_current(index).fields
    for name, value, said in (
        ("price", "5 EUR", "the field 'price' is int64 in the index and string in"),
        ("new", "true", "the field 'new' is bool in the index and string in"),
        ("tags", "x", "the field 'tags' is list"),
        ("note", ["x"], "the field 'note' is string in the index and list"),
        ("price", [1, 2], "give values of type int64, rename the field, or rebuild"),
    ):
        gallery = more(tmp_path / f"{name}{len(value)}", "cyan", **(given | {name: value}))
        (gallery / "cyan.png").write_bytes(b"")  # which would be the error if it were encoded first
        with pytest.raises(DataError, match=said):
            add(index, gallery, progress=False)
    assert current_version(index) == 2
    gallery = more(tmp_path / "csv", "lime", "navy")
    (gallery / "metadata.jsonl").unlink()
    (gallery / "metadata.csv").write_text("file_name,id,price,note\nlime.png,lime,6.5,8\nnavy.png,navy,,9\n")
    with pytest.raises(DataError, match="the field 'note' is string in the index and int64 in"):
        add(index, gallery, progress=False)
    (gallery / "metadata.csv").write_text("file_name,id,price,note\nlime.png,lime,6.5,8\nnavy.png,navy,,x\n")
    add(index, gallery, progress=False)
    artifact = open_current(index)
    assert artifact.fields == before | {"price": "double"}
    assert artifact.column("price").to_pylist()[-3:] == [5.0, 6.5, None]
    assert match_rows(artifact, {"price": {"gt": 5}}).sum() == 1


def test_refused_updates_change_nothing(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no item would be left"):
        remove(index, [open_current(index).item(row).id for row in range(24)])
    with pytest.raises(DataError, match="does not exist"):
        add(index, tmp_path / "nowhere", progress=False)
    broken = more(tmp_path / "broken", "pink")
    (broken / "pink.png").write_bytes(b"")
    with pytest.raises(DataError, match="can be read"):
        add(index, broken, progress=False)
    with FileLock(index / ".lock"), pytest.raises(LockedError):
        remove(index, ["x"])
    with pytest.raises(ArtifactError, match="holds no published index"):
        remove(tmp_path / "other", ["x"])
    assert current_version(index) == 1
    assert [path.name for path in (index / "versions").iterdir()] == ["1"]


@pytest.mark.parametrize("name", ["removed.npy", "added-2/index.faiss", "added-2/items.arrow"])
def test_damage_to_an_update_is_found(name: str, index: Path, tmp_path: Path) -> None:
    add(index, more(tmp_path / "more", "pink"), progress=False)
    remove(index, [open_current(index).item(0).id])
    path = open_current(index).path / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtifactError, match=name):
        open_version(index, 3).verify()
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        open_version(index, 3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_full_disk_changes_nothing(index: Path, tmp_path: Path) -> None:
    """Limit file sizes below those of the manifest and of the added files."""
    gallery = more(tmp_path / "more", "pink", caption="pink " * 1000)
    before = sorted(path.relative_to(index) for path in index.rglob("*"))
    for limit, command in (
        (100, ["remove", index, open_current(index).item(0).id]),
        (3000, ["add", index, "--gallery", gallery]),
    ):
        done = dcar("index", *command, file_size=limit)
        assert done.returncode == 1
        assert "cannot be written: File too large" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert [path for path in before if not (index / path).exists()] == []
        assert sorted(path.relative_to(index) for path in (index / "versions").rglob("*")) == [
            path for path in before if path.parts[0] == "versions" and len(path.parts) > 1
        ]
        assert [manifest.version for manifest in verify_index(index)] == [1]
    assert add(index, gallery, progress=False).version == 2
    done = dcar("index", "rollback", index, file_size=1)
    assert (done.returncode, "Traceback" in done.stderr, current_version(index)) == (1, False, 2)
    assert "cannot be written: File too large" in done.stderr
    (index / "CURRENT").unlink()
    assert rollback(index) == 2, "the newest, where it is not known what was current"
    assert rollback(index) == 1
    (index / "CURRENT").write_bytes(b"\0\0")
    listed = CliRunner().invoke(app, ["index", "list", str(index)])
    assert (listed.exit_code, "*" in listed.stdout) == (0, False)
    assert rollback(index) == 2
    (index / "CURRENT").write_bytes(b"")
    with pytest.raises(ArtifactError, match="names no version: ''; roll back"):
        add(index, more(tmp_path / "last", "teal"), progress=False)


def test_add_and_remove_commands_publish_versions(index: Path, tmp_path: Path) -> None:
    def run(*given: object) -> str:
        result = CliRunner().invoke(app, ["index", *map(str, given)], catch_exceptions=False)
        return f"{result.exit_code} {result.output}"

    gallery = more(tmp_path / "more", "pink", "cyan", "lime")
    assert "0 " in (shown := run("add", index, "--gallery", gallery))
    assert "version 2, 27 images (3 added, 0 broken)" in shown
    (tmp_path / "ids").write_text("lime\n\n cyan \n")
    assert "version 3, 24 images (3 removed)" in run("remove", index, "pink", "--ids-file", tmp_path / "ids")
    assert "-3 removed" in run("list", index).splitlines()[0]
    assert run("remove", index).startswith("2 ")
    with pytest.raises(DataError, match="pink"):
        run("remove", index, "pink")
    assert "version 3, 24 images (0 removed)" in run("remove", index, "pink", "--missing-ok")
    listed = [json.loads(line) for line in run("items", index)[2:].splitlines()]
    assert len(listed) == 24
    assert listed[0].keys() >= {"id", "caption", "category", "file_name"}
    some = run("items", index, "--filter", '{"category": "circle"}')[2:].splitlines()
    assert [json.loads(line)["id"] for line in some] == [each["id"] for each in listed if each["category"] == "circle"]
    assert run("items", index, "--filter", "[]").startswith("2 ")
    assert "version 4, 18 images (6 removed)" in run("remove", index, "--filter", '{"category": "circle"}')
    assert "version 4, 18 images (0 removed)" in run("remove", index, "--filter", '{"category": "circle"}')
    assert run("remove", index, "--filter", "{}").startswith("2 "), "an empty filter does not remove everything"


def test_rebuild_restores_items_removed_by_hand(index: Path, tiny_gallery: Path, tiny_checkpoint: Path) -> None:
    gone = open_current(index).item(3).id
    remove(index, [gone, gone])
    assert open_current(index).manifest.removed == 1
    again = rebuild(tiny_gallery, tiny_checkpoint, index, progress=False)
    assert (again.reused, again.version) == (False, 3)
    assert open_current(index).row_of(gone) is not None


def test_without_hard_links_files_are_copied(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError("no links on this file system")

    monkeypatch.setattr(os, "link", none)
    remove(index, [open_current(index).item(0).id])
    assert [manifest.version for manifest in verify_index(index)] == [1, 2]
    assert len({(index / "versions" / str(n) / "index.faiss").stat().st_ino for n in (1, 2)}) == 2


def test_images_of_another_encoder_are_not_added(
    index: Path, other_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of the model's files that the sizes in the manifest do not show."""
    other = Encoder.load(other_checkpoint, device="cpu")
    monkeypatch.setattr(updates, "choose_replicas", lambda *_: [other])
    with pytest.raises(FingerprintError, match="was built by encoder"):
        add(index, more(tmp_path / "more", "pink"), progress=False)
    assert current_version(index) == 1
