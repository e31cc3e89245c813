"""Published versions: reading, verifying, rolling back, and everything that may be wrong with them."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dcar_core import Encoder
from dcar_core.util.errors import ArtifactError, DataError, FingerprintError
from index_jobs.gallery.scan import SCHEMA, scan
from index_jobs.index import items
from index_jobs.index.index_version import ImageAccess, IndexVersion
from index_jobs.index.manifest import Current, Manifest
from index_jobs.index.publish import new_version, rollback, verify_index
from index_jobs.index.versions import current_version, list_versions, open_current, version_numbers
from index_jobs.jobs.update import remove
from tests.support.encoding import cut, flip
from tests.support.versions import file_of, publish_copy, write_manifest


def with_sizes(table: pa.Table) -> pa.Table:
    for name in items.SIZE_COLUMNS:
        table = table.append_column(name, pa.array([40] * len(table), pa.int32()))
    return table


def test_search_and_items(
    published: Path, encoder: Encoder, tiny_gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_current(published)
    vectors = encoder.encode_images([tiny_gallery / "cross" / "red.png", tiny_gallery / "circle" / "blue.png"])
    scores, rows = artifact.search(vectors, 30)
    assert (scores.shape, rows.shape) == ((2, 30), (2, 30))
    assert (rows[:, 24:] == -1).all()
    item = artifact.item(int(rows[0, 0]))
    assert (item.caption, item.category) == ("a red cross", "cross")
    assert item.metadata == {"file_name": "cross/red.png", "color": "red"}
    assert (item.width, item.height) == (48, 48)
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)
    np.testing.assert_allclose(artifact.vectors(rows[1:2, 0]), vectors[1:], atol=1e-5)
    assert artifact.image_bytes(int(rows[0, 0])) == (tiny_gallery / "cross" / "red.png").read_bytes()
    ids = artifact.column("id").to_pylist()
    monkeypatch.setattr("index_jobs.index.index_version._CACHED_ITEMS", 5)
    assert [artifact.row_of(each) for each in ids] == list(range(24))
    assert [artifact.row_of(artifact.item(row).id) for row in range(24)] == list(range(24)), "of items that were shown"
    assert len(artifact.known) <= 5
    monkeypatch.setattr("index_jobs.index.index_version._CACHED_BYTES", 100)
    other = open_current(published)
    assert other.item(0) == other.item(0)
    assert not other.known, "long texts are read again"
    for unknown in ("", "0", "zzz", "../../etc/passwd", "\ud800"):
        assert artifact.row_of(unknown) is None


def test_items_are_read_from_many_batches(tmp_path: Path, tiny_gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "_BATCH", 5)
    table = with_sizes(scan(tiny_gallery).table)
    rows = np.array([r for r in range(24) if r != 7])
    items.write_items(tmp_path / "items.arrow", table, rows)
    found = items.Items(tmp_path / "items.arrow")
    ids = table["id"].to_pylist()
    assert [found.cell(i, "id") for i in range(len(found))] == [ids[row] for row in rows]
    assert [found.row_of(ids[row]) for row in rows] == list(range(23))
    assert found.row_of(ids[7]) is None


def test_rows_queries_and_fields_that_it_lacks_are_refused(published: Path) -> None:
    artifact = open_current(published)
    for row in (-1, 24):
        for read in (artifact.item, artifact.image_bytes):
            with pytest.raises(IndexError, match=f"row {row} is not in 0..23"):
                read(row)
    with pytest.raises(IndexError, match=r"row 24 is not in 0\.\.23"):
        artifact.vectors(np.array([1, 24]))
    with pytest.raises(ArtifactError, match=r"the index has vectors of 32, but the queries are \(1, 16\)"):
        artifact.search(np.zeros((1, 16), np.float32), 1)
    with pytest.raises(DataError, match="no item has the field 'colour'; there are: caption, category, color"):
        artifact.column("colour")


@pytest.mark.parametrize("removed", [[], [0], [4, 5, 9], range(1, 10), range(9)])
def test_removed_rows_are_skipped_without_a_mask(removed: Any) -> None:
    artifact: Any = SimpleNamespace(removed=np.array(removed, np.int64))
    live = np.setdiff1d(np.arange(10), artifact.removed)
    assert IndexVersion._nth_live(artifact, np.arange(len(live))).tolist() == live.tolist()
    assert [row for row in range(10) if not IndexVersion._is_removed(artifact, row)] == live.tolist()


def test_another_encoder_is_refused_with_the_command_to_run(
    published: Path, encoder: Encoder, tiny_gallery: Path
) -> None:
    artifact = open_current(published)
    artifact.require(encoder.fingerprint)
    with pytest.raises(FingerprintError) as caught:
        artifact.require("f" * 64)
    checkpoint = "--checkpoint CHECKPOINT_OF_THIS_ENCODER"
    command = f"python -m index_jobs.rebuild --gallery {tiny_gallery} {checkpoint} --out {published}"
    assert command in str(caught.value)


def test_threads_share_an_artifact(published: Path) -> None:
    artifact = open_current(published)
    vectors = artifact.vectors(np.arange(24))
    barrier = threading.Barrier(8)

    def work(seed: int) -> bool:
        barrier.wait()
        for row in np.random.default_rng(seed).permutation(24).tolist():
            found = int(artifact.search(vectors[row : row + 1], 1)[1][0, 0])
            item = artifact.item(found)
            if artifact.row_of(item.id) != row or not artifact.image_bytes(row).startswith(b"\x89PNG"):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_removed_version_stays_usable_while_open(index: Path) -> None:
    artifact = open_current(index)
    vector, lexical = artifact.vectors(np.array([3])), artifact.lexical
    shutil.rmtree(index)
    assert artifact.search(vector, 1)[1].tolist() == [[3]]
    assert lexical is not None
    assert lexical.search("red cross", 1)[1].tolist() == lexical.search("cross red", 1)[1].tolist() != []
    assert artifact.row_of(artifact.item(3).id) == 3


FILES = ["index.faiss", "items.arrow", "versions/1.json", "checkpoint/trainables.safetensors", "checkpoint/config.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [flip, cut, lambda path: path.write_bytes(path.read_bytes() + b"\0"), Path.unlink])
def test_damage_to_any_file_is_found_and_named(index: Path, name: str, harm: Callable[[Path], None]) -> None:
    verify_index(index)
    harm(index / name if name.endswith("1.json") else file_of(index, name))
    with pytest.raises(ArtifactError, match=f"{name}|no version 1"):
        verify_index(index)
    if harm is not flip:  # opening finds missing files and wrong lengths
        with pytest.raises(ArtifactError, match=f"{name}|no version 1"):
            open_current(index)


def test_files_that_do_not_fit_together_are_refused(index: Path) -> None:
    artifact = open_current(index)
    for wrong in ({"dim": 64}, {"count": 23}):
        manifest = replace(artifact.manifest, **wrong)  # type: ignore[arg-type]
        write_manifest(index, manifest)
        with pytest.raises(ArtifactError, match="does not fit together: 24 vectors of 32 and 24 items"):
            open_current(index)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 99}, "is of format 99, not 4; rebuild the index"),
        ({"runtime": "another"}, r"versions/1\.json is corrupted: its checksum differs"),
    ],
)
def test_a_changed_manifest_is_refused(index: Path, change: dict[str, Any], says: str) -> None:
    path = index / "versions/1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=says):
        open_current(index)
    assert list_versions(index) == []


def test_a_manifest_that_is_nested_too_deeply_is_refused(index: Path) -> None:
    (index / "versions/1.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ArtifactError, match=r"versions/1\.json cannot be read: maximum recursion depth"):
        open_current(index)


def test_nothing_published_says_what_to_run(tmp_path: Path) -> None:
    assert current_version(tmp_path / "nowhere") is None
    assert list_versions(tmp_path / "nowhere") == []
    for read in (open_current, verify_index):
        with pytest.raises(ArtifactError, match="holds no published index; make one with `dcar index build"):
            read(tmp_path)
    (tmp_path / "empty" / "versions").mkdir(parents=True)
    for name in ("nowhere", "empty"):
        with pytest.raises(ArtifactError, match="holds no published index"):
            rollback(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no CURRENT; `dcar index rollback"),
        ("two\n", "CURRENT of .* names no version: 'two'"),
        ("\0", r"CURRENT of .* names no version: '\\x00'"),
        (f"7 {'0' * 64}\n", "has no version 7; it has 1, 2"),
        ("7\n", "has the format of an earlier release, which is not read; build it again"),
    ],
)
def test_a_damaged_current_is_named_and_rolls_back_to_the_newest(index: Path, content: str | None, says: str) -> None:
    publish_copy(index)
    (index / "CURRENT").unlink()
    if content is not None:
        (index / "CURRENT").write_text(content)
    with pytest.raises(ArtifactError, match=says):
        open_current(index)
    assert rollback(index) == 2


def test_versions_are_kept_listed_and_rolled_back(index: Path) -> None:
    assert [publish_copy(index, keep=3) for _ in range(3)] == [2, 3, 4]
    assert version_numbers(index) == [2, 3, 4]
    assert [manifest.version for manifest in list_versions(index)] == [2, 3, 4]
    assert rollback(index) == 3
    assert current_version(index) == 3
    assert rollback(index, 2) == 2
    with pytest.raises(ArtifactError, match="has no version earlier than 2"):
        rollback(index)
    with pytest.raises(ArtifactError, match="has no version 9; it has 2, 3, 4"):
        rollback(index, 9)
    assert rollback(index, 4) == 4
    assert publish_copy(index, keep=1) == 5
    assert version_numbers(index) == [5]
    assert [manifest.version for manifest in verify_index(index)] == [5]
    with pytest.raises(ValueError, match="keep must be at least 1, not 0"):
        publish_copy(index, keep=0)
    assert version_numbers(index) == [5]


def test_replaced_version_is_kept_for_rollback(index: Path) -> None:
    """Not a newer version, which was given up for it."""
    assert [publish_copy(index, keep=3) for _ in range(2)] == [2, 3]
    assert rollback(index, 1) == 1
    assert publish_copy(index, keep=3) == 4
    assert version_numbers(index) == [1, 3, 4]
    assert rollback(index) == 1
    assert rollback(index, 3) == 3
    assert publish_copy(index, keep=2) == 5
    assert version_numbers(index) == [3, 5]
    (index / "versions/5.json").write_text("{}")
    assert rollback(index) == 3, "the newest before, where it is not known"


def test_a_number_is_never_used_twice(index: Path) -> None:
    publish_copy(index)
    rollback(index)
    assert publish_copy(index) == 3
    (index / "CURRENT").write_bytes(Current(7, "0" * 64).to_bytes())  # whose manifest is lost
    with new_version(index) as new:
        assert new.number == 8


def test_rollback_to_a_broken_version_changes_nothing(index: Path) -> None:
    publish_copy(index)
    flip(file_of(index, "index.faiss", 1))
    with pytest.raises(ArtifactError, match=r"index\.faiss of version 1: .* is corrupted"):
        rollback(index)
    assert current_version(index) == 2


def test_version_that_does_not_open_is_not_published(index: Path) -> None:
    before, current = sorted((index / "blobs").iterdir()), open_current(index)
    with new_version(index) as new:
        new.link(current)
        (new.folder / "items.arrow").unlink()
        (new.folder / "items.arrow").write_bytes(b"ARROW1")
        with pytest.raises(ArtifactError, match="cannot be read"):
            new.publish(current.manifest)
    assert (current_version(index), version_numbers(index)) == (1, [1])
    assert sorted((index / "blobs").iterdir()) == before


def test_version_that_is_not_on_disk_is_not_published(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(path: Path) -> None:
        if path.name == "index.faiss":
            flip(path)

    monkeypatch.setattr("index_jobs.index.publish.fsync_path", damage)
    with pytest.raises(ArtifactError, match=r"index\.faiss of version 2: .* is corrupted"):
        publish_copy(index)
    assert current_version(index) == 1
    assert version_numbers(index) == [1]


def test_remains_of_a_killed_writer_are_deleted(index: Path) -> None:
    left, blob, pulled = (index / "blobs" / name for name in (".new/index.faiss", "0" * 64, f".{'1' * 64}.tmp"))
    left.parent.mkdir()
    for path in (left, blob, pulled):
        path.write_bytes(b"half")
    assert version_numbers(index) == [1]
    publish_copy(index)
    assert not any(path.exists() for path in (left.parent, blob, pulled))
    verify_index(index)


def test_reader_follows_when_its_version_is_removed_under_it(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CURRENT is read, then a writer publishes and removes that version, then the reader opens it."""
    opened, ids = IndexVersion.open, open_current(index).column("id").to_pylist()
    remove(index, ids[:1])

    def late(index: Path, manifest: Manifest, *access: ImageAccess) -> IndexVersion:
        if manifest.version == 2:
            monkeypatch.setattr(IndexVersion, "open", opened)
            remove(index, ids[1:2], keep=1)
        return opened(index, manifest, *access)

    monkeypatch.setattr(IndexVersion, "open", late)
    assert open_current(index).manifest.version == 3


BATCHES, ROWS, TEXT = 32, 4, 2**18  # 32 MiB of texts


def large_table() -> pa.Table:
    metadata = json.dumps({"about": "y" * TEXT})
    batches = [
        pa.RecordBatch.from_pylist([
            dict.fromkeys(SCHEMA.names, 0)
            | dict.fromkeys(("caption", "category", "location", "name"), "")
            | {"id": f"{number:08}", "metadata": metadata}
            for number in range(start, start + ROWS)
        ], SCHEMA)
        for start in range(0, BATCHES * ROWS, ROWS)
    ]  # fmt: skip
    table = pa.Table.from_batches(batches, SCHEMA)
    for name in items.SIZE_COLUMNS:
        table = table.append_column(name, pa.nulls(len(table), pa.int32()))
    return table


@pytest.mark.parametrize("rows", [[], [0], [19], [3, 4], [0, 1, 7, 8, 19], [*range(20)], [5, 6, 7, 8, 9]])
def test_take_rows_returns_the_rows_that_arrow_takes(rows: list[int]) -> None:
    columns = {"text": pa.chunked_array([[str(i) for i in part] for part in np.split(np.arange(20), [3, 3, 8, 19])])}
    columns["number"] = pa.chunked_array([[*range(11)], [*range(11, 20)]])
    table = pa.table(columns)
    taken = items.take_rows(table, np.array(rows, np.int64))
    assert taken.to_pylist() == table.take(pa.array(rows, pa.int64())).to_pylist()


def test_rows_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must ascend"):
        items.take_rows(pa.table({"number": [1, 2, 3]}), np.array([0, 2, 1]))


def test_no_column_is_joined_for_a_part_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined, texts of 2 GiB are more than Arrow holds, and every batch costs as much as all."""
    monkeypatch.setattr(items, "_BATCH", ROWS)
    table, rows = large_table(), np.delete(np.arange(BATCHES * ROWS), 7)
    before, pool = pa.default_memory_pool(), pa.system_memory_pool()
    assert pool.max_memory() < 8 * ROWS * TEXT  # unused so far
    try:
        pa.set_memory_pool(pool)
        items.write_items(tmp_path / "items.arrow", table, rows)
        part = items.Items(tmp_path / "items.arrow").table(np.array([5, 6, 100]))
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 8 * ROWS * TEXT
    assert part["id"].to_pylist() == ["00000005", "00000006", "00000101"]
