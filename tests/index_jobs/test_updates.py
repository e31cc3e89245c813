"""Additions and removals together: shared files, kinds of index, refusals, faults and commands."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from app.cli import app
from dcar_core import Encoder
from dcar_core.util.errors import ArtifactError, DataError, LockedError
from index_jobs.engines.faiss import index as faiss_index
from index_jobs.index import publish
from index_jobs.index.filters import filter_rows
from index_jobs.index.publish import verify_index
from index_jobs.index.versions import current_version, open_current, open_version, version_numbers
from index_jobs.jobs.update import add, remove
from tests.support.commands import dcar
from tests.support.updates import nearest_ids, write_images
from tests.support.versions import Build, file_of


def test_unchanged_files_are_shared(index: Path, tmp_path: Path) -> None:
    add(index, write_images(tmp_path / "more", "pink"), progress=False)
    remove(index, ["pink"])
    for name in ("index.faiss", "items.arrow", "checkpoint/config.json", "failed.jsonl"):
        assert len({file_of(index, name, number) for number in (1, 2, 3)}) == 1, name
    verify_index(index)
    remove(index, [open_current(index).item(0).id], keep=1)
    assert [manifest.version for manifest in verify_index(index)] == [4]


def test_another_user_may_read_every_file(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcar_core.util.files._UMASK", 0o022)
    before = os.umask(0o022)
    try:
        build()
        add(tmp_path / "index", write_images(tmp_path / "more", "pink"), progress=False)
    finally:
        os.umask(before)
    files = [path for folder in ("blobs", "versions") for path in (tmp_path / "index" / folder).iterdir()]
    assert {path for path in files if path.stat().st_mode & 0o777 != 0o644} == set()


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivf-pq", "ivf-pq-fp16"])
@pytest.mark.slow
def test_every_kind_of_built_index_takes_updates(
    kind: str, index: Path, build: Build, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "EXACT_UP_TO", 0)
    build(kind=kind, force=True)
    built = open_current(index)
    assert built.manifest.kind != "Flat"
    ids = [built.item(row).id for row in range(24)]
    changed = write_images(tmp_path / "changed", "cyan")
    (changed / "metadata.jsonl").write_text(json.dumps({"file_name": "cyan.png", "id": ids[3], "caption": "new"}))
    add(index, write_images(tmp_path / "more", "pink"), progress=False)
    assert add(index, changed, replace_existing=True, progress=False).removed == 1
    remove(index, [ids[17], "pink"])
    artifact = open_current(index)
    vectors = encoder.encode_images([changed / "cyan.png", tmp_path / "more" / "pink.png"])
    assert nearest_ids(artifact, vectors[:1]) == [ids[3]]
    expected = sorted({*ids} - {ids[17]})
    for allowed in (None, filter_rows(artifact, {})):
        rows = artifact.search(np.concatenate([vectors, built.vectors(np.arange(24))]), artifact.rows, allowed)[1]
        assert all(sorted(artifact.item(row).id for row in line if row >= 0) == expected for line in rows.tolist())


def test_manifest_recommends_a_rebuild(
    index: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [open_current(index).item(row).id for row in range(6)]
    assert remove(index, ids[:4]).rebuild == ""
    assert remove(index, ids[4:5]).rebuild.startswith("5 of 24 rows are removed")
    monkeypatch.setattr(publish, "ADDED_ROWS", 3)
    more = write_images(tmp_path / "more", "pink", "cyan", "lime", "navy", "teal", "gold")
    assert "6 of 30 items are outside the built index" in add(index, more, progress=False).rebuild
    monkeypatch.undo()
    assert not build(max_vanished=0.3).reused  # although neither gallery nor checkpoint has changed
    artifact = open_current(index)
    assert (artifact.manifest.count, artifact.manifest.rebuild, artifact.row_of("pink")) == (24, "", None)


def test_refused_updates_change_nothing(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no item would be left"):
        remove(index, [open_current(index).item(row).id for row in range(24)])
    with pytest.raises(DataError, match="does not exist"):
        add(index, tmp_path / "nowhere", progress=False)
    broken = write_images(tmp_path / "broken", "pink")
    (broken / "pink.png").write_bytes(b"")
    with pytest.raises(DataError, match="can be read"):
        add(index, broken, progress=False)
    with FileLock(index / ".lock"), pytest.raises(LockedError):
        remove(index, ["x"])
    with pytest.raises(ArtifactError, match="holds no published index"):
        remove(tmp_path / "other", ["x"])
    assert current_version(index) == 1
    assert version_numbers(index) == [1]


def test_damage_to_an_update_is_found(index: Path, tmp_path: Path) -> None:
    add(index, write_images(tmp_path / "more", "pink"), progress=False)
    remove(index, [open_current(index).item(0).id])
    for name in ("removed.npy", "added-2/index.faiss", "added-2/items.arrow"):
        path = file_of(index, name)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\x7f")
        with pytest.raises(ArtifactError, match=name):
            verify_index(index)
        path.unlink()
        with pytest.raises(ArtifactError, match=f"is missing, which is {name} in version 3"):
            open_version(index, 3)
        path.write_bytes(content)


@pytest.mark.slow
def test_full_disk_changes_nothing(index: Path, tmp_path: Path) -> None:
    """Limit file sizes below those of the manifest and of the added files."""
    gallery = write_images(tmp_path / "more", "pink", caption="pink " * 1000)
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
        for folder in ("blobs", "versions"):
            assert {path.relative_to(index) for path in (index / folder).iterdir()} <= {*before}
        assert [manifest.version for manifest in verify_index(index)] == [1]
    assert add(index, gallery, progress=False).version == 2
    done = dcar("index", "rollback", index, file_size=1)
    assert (done.returncode, "Traceback" in done.stderr, current_version(index)) == (1, False, 2)
    assert "cannot be written: File too large" in done.stderr
    (index / "CURRENT").write_bytes(b"")
    listed = CliRunner().invoke(app, ["index", "list", str(index)])
    assert (listed.exit_code, "*" in listed.stdout) == (0, False)
    with pytest.raises(ArtifactError, match="holds no published index; make one with"):
        add(index, write_images(tmp_path / "last", "teal"), progress=False)


def test_add_and_remove_commands_publish_versions(index: Path, tmp_path: Path) -> None:
    def run(*given: object) -> str:
        result = CliRunner().invoke(app, ["index", *map(str, given)], catch_exceptions=False)
        return f"{result.exit_code} {result.output}"

    gallery = write_images(tmp_path / "more", "pink", "cyan", "lime")
    assert "0 " in (shown := run("add", index, "--gallery", gallery))
    assert "version 2, 27 images (3 added, 0 broken)" in shown
    (tmp_path / "ids").write_text("lime\n\n cyan \n")
    assert "version 3, 24 images (3 removed)" in run("remove", index, "pink", "--ids-file", tmp_path / "ids")
    assert "3 items removed" in run("list", index).splitlines()[0]
    assert run("remove", index).startswith("2 ")
    both = run("remove", index, open_current(index).item(0).id, "--filter", '{"category": "circle"}')
    assert both.startswith("2 "), "it may mean all of both, or what is in both"
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
