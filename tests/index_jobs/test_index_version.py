"""Published versions: reading, verifying, rolling back, and everything that may be
wrong with them.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dcar_core import Encoder
from dcar_core.util.errors import (
    ArtifactError,
    DataError,
    DcarError,
    LockedError,
    MissingExtraError,
)
from dcar_core.util.files import fsync_tree
from index_jobs.index import items, versions
from index_jobs.index.index_version import ImageAccess, IndexVersion
from index_jobs.index.manifest import Current, Manifest
from index_jobs.index.stores import index_path
from index_jobs.index.versions import (
    current_version,
    list_versions,
    new_version,
    open_current,
    open_version,
    report_os_errors,
    rollback,
    verify_index,
    version_numbers,
)
from index_jobs.jobs.update import remove
from tests.support.encoding import cut, flip
from tests.support.files import write_file
from tests.support.versions import file_of, publish_copy, write_manifest


def test_search_and_items(
    published: Path,
    encoder: Encoder,
    tiny_gallery: Path,
) -> None:
    opened = open_current(published)
    vectors = encoder.encode_images(
        [tiny_gallery / "cross" / "red.png", tiny_gallery / "circle" / "blue.png"]
    )
    scores, rows = opened.search(vectors, 30)
    assert scores.shape == (2, 30)
    assert rows.shape == (2, 30)
    assert (rows[:, 24:] == -1).all()
    item = opened.item(int(rows[0, 0]))
    assert item.caption == "a red cross"
    assert item.category == "cross"
    assert item.metadata == {"file_name": "cross/red.png", "color": "red"}
    assert item.width == 48
    assert item.height == 48
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)
    np.testing.assert_allclose(opened.vectors(rows[1:2, 0]), vectors[1:], atol=1e-5)
    assert (
        opened.image_bytes(int(rows[0, 0]))
        == (tiny_gallery / "cross" / "red.png").read_bytes()
    )
    ids = opened.column("id").to_pylist()
    assert [opened.row_of(item_id) for item_id in ids] == list(range(24))
    for unknown in ("", "0", "zzz", "../../etc/passwd", "\ud800"):
        assert opened.row_of(unknown) is None


def test_rows_queries_fields_and_encoders_must_fit(
    published: Path,
    encoder: Encoder,
    tiny_gallery: Path,
) -> None:
    opened = open_current(published)
    for row in (-1, 24):
        for read in (opened.item, opened.image_bytes):
            with pytest.raises(IndexError, match=f"row {row} is not in 0..23"):
                read(row)
    with pytest.raises(IndexError, match=r"row 24 is not in 0\.\.23"):
        opened.vectors(np.array([1, 24]))
    with pytest.raises(
        ArtifactError,
        match=r"the index has vectors of 32, but the queries are \(1, 16\)",
    ):
        opened.search(np.zeros((1, 16), np.float32), 1)
    with pytest.raises(
        DataError,
        match="no item has the field 'colour'; there are: caption, category, color",
    ):
        opened.column("colour")
    opened.require(encoder.fingerprint)
    options = (
        f"--gallery {tiny_gallery} --checkpoint CHECKPOINT_OF_THIS_ENCODER --out"
        f" {published}"
    )
    with pytest.raises(ArtifactError, match=f"python -m index_jobs.rebuild {options}"):
        opened.require("f" * 64)


def test_removed_version_stays_usable_while_open(index: Path) -> None:
    opened = open_current(index)
    vector = opened.vectors(np.array([3]))
    lexical = opened.lexical
    shutil.rmtree(index)
    assert opened.search(vector, 1)[1].tolist() == [[3]]
    assert lexical is not None
    assert (
        lexical.search("red cross", 1)[1].tolist()
        == lexical.search("cross red", 1)[1].tolist()
        != []
    )
    assert opened.row_of(opened.item(3).id) == 3


Event = tuple[str, str]  # "sync" and a path, or "rename" and the new path
FILES = [
    "index.faiss",
    "items.arrow",
    "versions/1.json",
    "checkpoint/trainables.safetensors",
    "checkpoint/config.json",
]


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "harm",
    [
        flip,
        cut,
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        Path.unlink,
        make_folder,
    ],
)
def test_damage_to_any_file_is_found_and_named(
    index: Path,
    name: str,
    harm: Callable[[Path], None],
) -> None:
    verify_index(index)
    harm(index / name if name.endswith("1.json") else file_of(index, name))
    with pytest.raises(ArtifactError, match=f"{name}|no version 1"):
        verify_index(index)
    if harm is not flip:  # opening finds missing files and wrong lengths
        with pytest.raises(ArtifactError, match=f"{name}|no version 1"):
            open_current(index)


def test_files_that_do_not_fit_together_are_refused(index: Path) -> None:
    opened = open_current(index)
    for wrong in ({"dim": 64}, {"count": 23}):
        manifest = replace(opened.manifest, **wrong)  # type: ignore[arg-type]
        write_manifest(index, manifest)
        with pytest.raises(
            ArtifactError,
            match=r"files of version 1 of .* do not fit together; roll back",
        ):
            open_current(index)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 99}, "is of format 99, not 5; rebuild the index"),
        (
            {"runtime": "another"},
            r"versions/1\.json is corrupted: its checksum differs",
        ),
        (
            "[" * 200_000 + "]" * 200_000,
            r"versions/1\.json cannot be read: maximum recursion depth",
        ),
    ],
)
def test_a_changed_manifest_is_refused(index: Path, change: Any, says: str) -> None:
    path = index / "versions/1.json"
    path.write_text(
        change
        if isinstance(change, str)
        else json.dumps(json.loads(path.read_text()) | change)
    )
    with pytest.raises(ArtifactError, match=says):
        open_current(index)
    assert list_versions(index) == []


def test_nothing_published_says_what_to_run(tmp_path: Path) -> None:
    assert current_version(tmp_path / "nowhere") is None
    assert list_versions(tmp_path / "nowhere") == []
    for read in (open_current, verify_index):
        with pytest.raises(
            ArtifactError,
            match="holds no published index; make one with `dcar index build",
        ):
            read(tmp_path)
    (tmp_path / "empty" / "versions").mkdir(parents=True)
    for name in ("nowhere", "empty"):
        with pytest.raises(ArtifactError, match="holds no published index"):
            rollback(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds no published index; make one with .* or `dcar index rollback`"),
        ("two\n", "CURRENT of .* names no version: 'two'"),
        ("\0", r"CURRENT of .* names no version: '\\x00'"),
        (f"7 {'0' * 64}\n", "has no version 7; it has 1, 2"),
    ],
)
def test_a_damaged_current_is_named_and_rolls_back_to_the_newest(
    index: Path,
    content: str | None,
    says: str,
) -> None:
    publish_copy(index)
    (index / "CURRENT").unlink()
    if content is not None:
        (index / "CURRENT").write_text(content)
    with pytest.raises(ArtifactError, match=says):
        open_current(index)
    assert rollback(index) == 2


def test_versions_are_kept_listed_and_rolled_back(index: Path) -> None:
    assert [publish_copy(index, keep=3) for _ in range(3)] == [2, 3, 4]
    assert (
        [manifest.version for manifest in list_versions(index)]
        == version_numbers(index)
        == [2, 3, 4]
    )
    assert rollback(index) == 3
    assert rollback(index, 2) == 2
    assert current_version(index) == 2
    for to, says in (
        (None, "has no version earlier than 2"),
        (9, "has no version 9; it has 2, 3, 4"),
    ):
        with pytest.raises(ArtifactError, match=says):
            rollback(index, to)
    assert publish_copy(index, keep=3) == 5, "a number is never used twice"
    assert version_numbers(index) == [
        2,
        4,
        5,
    ], "the one that was replaced, not a newer one that was given up for it"
    assert rollback(index) == 2
    assert rollback(index, 4) == 4
    assert publish_copy(index, keep=2) == 6
    (index / "versions/6.json").write_text("{}")
    assert rollback(index) == 4, "the newest before, where it is not known"
    assert publish_copy(index, keep=1) == 7
    assert [manifest.version for manifest in verify_index(index)] == [7]


def test_broken_version_is_neither_published_nor_rolled_back_to(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((index / "blobs").iterdir())
    current = open_current(index)
    with new_version(index) as new:
        new.link(current)
        (new.folder / "items.arrow").unlink()
        (new.folder / "items.arrow").write_bytes(b"ARROW1")
        with pytest.raises(ArtifactError, match="cannot be read"):
            new.publish(current.manifest)
    assert sorted((index / "blobs").iterdir()) == before
    publish_copy(index)
    flip(file_of(index, "index.faiss", 1))
    with pytest.raises(
        ArtifactError, match=r"index\.faiss of version 1: .* is corrupted"
    ):
        rollback(index)
    flip(file_of(index, "index.faiss", 1))
    damage = {"index.faiss": flip}
    monkeypatch.setattr(
        versions, "fsync_path", lambda path: damage.get(path.name, Path.exists)(path)
    )
    with pytest.raises(
        ArtifactError, match=r"index\.faiss of version 3: .* is corrupted"
    ):
        publish_copy(index)
    assert current_version(index) == 2
    assert version_numbers(index) == [1, 2]


def test_remains_of_a_killed_writer_are_deleted(index: Path) -> None:
    left, blob, pulled = (
        index / "blobs" / name
        for name in (".new/index.faiss", "0" * 64, f".{'1' * 64}.tmp")
    )
    for path in (left, blob, pulled):
        write_file(path, b"half")
    # whose manifest is lost
    (index / "CURRENT").write_bytes(Current(7, "0" * 64).to_bytes())
    assert version_numbers(index) == [1]
    first = open_version(index, 1)
    with new_version(index) as new:
        assert not any(path.exists() for path in (left, blob, pulled))
        new.link(first)
        # which tantivy still holds
        (new.folder / "lexical" / ".tantivy-meta.lock").touch()
        second = new.publish(first.manifest)
    assert second.version == 8
    assert second.files.keys() == first.manifest.files.keys()
    verify_index(index)


def test_reader_follows_when_its_version_is_removed_under_it(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CURRENT is read, then a writer publishes and removes that version, then the
    reader opens it.
    """
    opened = IndexVersion.open
    ids = open_current(index).column("id").to_pylist()
    remove(index, ids[:1])

    def late(index: Path, manifest: Manifest, *access: ImageAccess) -> IndexVersion:
        if manifest.version == 2:
            monkeypatch.setattr(IndexVersion, "open", opened)
            remove(index, ids[1:2], keep=1)
        return opened(index, manifest, *access)

    monkeypatch.setattr(IndexVersion, "open", late)
    assert open_current(index).manifest.version == 3


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [0],
        [19],
        [3, 4],
        [0, 1, 7, 8, 19],
        [*range(20)],
        [5, 6, 7, 8, 9],
    ],
)
def test_take_rows_returns_the_rows_that_arrow_takes(rows: list[int]) -> None:
    columns = {
        "text": pa.chunked_array(
            [[str(i) for i in part] for part in np.split(np.arange(20), [3, 3, 8, 19])]
        )
    }
    columns["number"] = pa.chunked_array([[*range(11)], [*range(11, 20)]])
    table = pa.table(columns)
    taken = items.take_rows(table, np.array(rows, np.int64))
    assert taken.to_pylist() == table.take(pa.array(rows, pa.int64())).to_pylist()
    with pytest.raises(ValueError, match="rows must ascend"):
        items.take_rows(table, np.array([0, 2, 1]))


def test_no_column_is_joined_for_a_part_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined, texts of 2 GiB are more than Arrow holds, and every batch costs as much
    as all.
    """
    # 32 MiB of texts
    batch = 4
    batches = 32
    text = 2**18
    monkeypatch.setattr(items, "BATCH", batch)
    count = batch * batches
    numbers = pa.array([0] * count)
    texts = pa.array([""] * count)
    columns = dict.fromkeys(("caption", "category", "location"), texts) | dict.fromkeys(
        ("offset", "size"), numbers
    )
    columns |= dict.fromkeys(items.SIZE_COLUMNS, numbers.cast(pa.int32())) | {
        "id": [f"{n:08}" for n in range(count)]
    }
    metadata = pa.chunked_array(
        [[json.dumps({"about": "y" * text})] * batch for _ in range(batches)]
    )
    table = pa.table({**columns, "metadata": metadata})
    rows = np.delete(np.arange(count), 7)
    before = pa.default_memory_pool()
    pool = pa.system_memory_pool()
    assert pool.max_memory() < 8 * batch * text  # unused so far
    try:
        pa.set_memory_pool(pool)
        items.write_items(tmp_path / "items.arrow", table, rows)
        found = items.Items(tmp_path / "items.arrow")
        part = found.table(np.array([5, 6, 100]))
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 8 * batch * text
    assert part["id"].to_pylist() == ["00000005", "00000006", "00000101"]
    ids = [f"{number:08}" for number in rows]
    assert found.columns["id"].to_pylist() == ids
    assert [found.row_of(each) for each in ids] == [*range(len(ids))]
    assert found.row_of("00000007") is None


def test_a_second_writer_is_refused(index: Path) -> None:
    with new_version(index):
        for write in (rollback, publish_copy):
            with pytest.raises(
                LockedError,
                match=r"another job is writing to .*; wait until it has ended",
            ):
                write(index)
    assert publish_copy(index) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.EACCES, "Permission denied", "one"),
            r"cannot be written: Permission denied \(one\); published",
        ),
        (
            OSError(errno.EXDEV, "Other device", "one", None, "two"),
            r"cannot be written: Other device \(two\); ",
        ),
        (
            OSError(errno.EIO, "Broken"),
            (
                r"cannot be written: Broken; published versions are unchanged, run the"
                r" same"
            ),
        ),
    ],
)
def test_errors_of_the_system_are_one_line(
    error: OSError,
    told: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(DcarError, match=told), report_os_errors(tmp_path):
        raise error


def test_the_key_of_an_image_changes_with_its_file(index: Path, gallery: Path) -> None:
    write_manifest(index, replace(open_current(index).manifest, root=str(gallery)))
    opened = open_current(index)
    keys = [opened.image_key(row) for row in range(24)]
    assert len({*keys}) == 24
    assert {len(key) for key in keys} == {32}
    assert opened.image_key(3) == keys[3]
    path = Path(opened.image_location(3)[0])
    os.utime(path, ns=(1, 1))
    assert opened.image_key(3) != keys[3]
    assert opened.image_key(4) == keys[4]
    path.unlink()
    with pytest.raises(
        ArtifactError, match="the image of row 3 cannot be read: No such file"
    ):
        opened.image_key(3)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Record every fsync by the path of its file, and every rename by the new path."""
    recorded: list[Event] = []
    sync = os.fsync

    def recording_sync(descriptor: int) -> None:
        recorded.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        sync(descriptor)

    def recording(
        rename: Callable[[object, object], None],
    ) -> Callable[[object, object], None]:
        def record(old: object, new: object, **options: object) -> None:
            recorded.append(("rename", str(new)))
            rename(old, new)

        return record

    monkeypatch.setattr(os, "fsync", recording_sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, recording(getattr(os, name)))
    return recorded


def test_a_version_is_on_the_disk_before_current_names_it(
    index: Path, events: list[Event]
) -> None:
    blobs = {*(index / "blobs").iterdir()}
    remove(index, [open_current(index).item(0).id])
    named = events.index(("rename", str(index / "versions/2.json")))
    current = events.index(("rename", str(index / "CURRENT")))
    (blob,) = {*(index / "blobs").iterdir()} - blobs
    put = events.index(("rename", str(blob)))
    assert put < named < current
    assert ("sync", str(index / "blobs/.new/removed.npy")) in events[:put]
    assert ("sync", str(blob.parent)) in events[put:named]
    for path in (index / "versions/2.json", index / "CURRENT"):
        renamed = events.index(("rename", str(path)))
        assert ("sync", str(path.with_name(f".{path.name}..tmp"))) in events[:renamed]
        assert ("sync", str(path.parent)) in events[renamed:]


def test_a_tree_is_synced_with_its_own_folder(
    tmp_path: Path, events: list[Event]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    fsync_tree(tmp_path)
    expected = {tmp_path, tmp_path / "folder", tmp_path / "folder" / "file"}
    assert {Path(path) for _, path in events} == expected


@pytest.mark.parametrize(
    ("url", "says"),
    [
        *(
            (url, "is not the URL of an index, such as s3://bucket/index")
            for url in (
                "s3://bucket/../etc",
                "s3://bucket//index",
                "gs://./index",
                "s3://",
                "file:///index",
                Path("https://bucket.host/index"),
            )
        ),
        *(
            (url, "neither credentials, which come from the environment, nor")
            for url in (
                "s3://key:SECRET@bucket/index",
                "az://c/index?sig=SECRET",
                "s3://bucket/index#SECRET",
            )
        ),
    ],
)
def test_url_that_names_more_or_less_than_an_index_is_refused(
    url: str | Path, says: str
) -> None:
    with pytest.raises(DataError, match=says) as refused:
        index_path(url)
    assert "SECRET" not in str(refused.value)


def test_url_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for url in (
        "s3://bucket/index",
        "gs://bucket/index",
        "az://container/index",
        Path("s3://bucket/index"),
    ):
        with pytest.raises(MissingExtraError, match="objectstore"):
            index_path(url)
    assert index_path("s3") == Path("s3")
    assert index_path("bucket/index") == Path("bucket/index")
