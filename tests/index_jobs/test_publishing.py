"""Publishing in detail: the order of writes to the disk, locks, shared files and what an opened version checks."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError, DcarError, LockedError
from dcar_core.util.files import fsync_tree, sha256_of
from index_jobs.checks import check_file_once
from index_jobs.index import index_version
from index_jobs.index.lexical.fusion import DEFAULT_WEIGHT
from index_jobs.index.manifest import Addition, FileInfo
from index_jobs.index.publish import new_version, report_os_errors, rollback, verify_index
from index_jobs.index.storage import Directory
from index_jobs.index.versions import open_current, open_version, read_manifest
from index_jobs.jobs.update import remove
from tests.support.versions import file_of, publish_copy, write_manifest

Event = tuple[str, str]  # "sync" and a path, or "rename" and the new path


def test_a_refused_writer_does_not_wait(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, sleep = threading.get_ident(), time.sleep

    def wait(seconds: float) -> None:
        assert threading.get_ident() != here, "waits"
        sleep(seconds)  # a thread of an earlier test

    with new_version(index):
        monkeypatch.setattr("time.sleep", wait)
        for write in (rollback, publish_copy):
            with pytest.raises(LockedError, match=r"another job is writing to .*; wait until it has ended"):
                write(index)
    assert publish_copy(index) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EACCES, "Permission denied", "one"), r"cannot be written: Permission denied \(one\); published"),
        (OSError(errno.EXDEV, "Other device", "one", None, "two"), r"cannot be written: Other device \(two\); "),
        (OSError(errno.EIO, "Broken"), r"cannot be written: Broken; published versions are unchanged, run the same"),
        (OSError("no library"), r"cannot be made: no library; published versions are unchanged$"),
        (OSError("4352 requested and 992 written"), "No space left on device.* unchanged, run the same command again"),
    ],
)
def test_errors_of_the_system_are_one_line(error: OSError, told: str, tmp_path: Path) -> None:
    with pytest.raises(DcarError, match=told), report_os_errors(tmp_path):
        raise error


def test_shared_files_are_not_read_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, read, parts = list[str](), list[FileInfo](), Directory.parts

    def hash_file(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    def read_blob(directory: Directory, info: FileInfo) -> Iterator[bytes]:
        read.append(info)
        return parts(directory, info)

    monkeypatch.setattr("index_jobs.index.publish.sha256_of", hash_file)
    monkeypatch.setattr(Directory, "parts", read_blob)
    remove(index, [open_current(index).item(0).id])
    assert hashed == ["removed.npy", "2.json"]
    assert read == [open_current(index).manifest.files["removed.npy"]], "it is read back"


def test_the_number_of_removed_rows_must_be_that_of_the_manifest(index: Path) -> None:
    remove(index, [open_current(index).item(row).id for row in (3, 7)])
    path = file_of(index, "removed.npy")
    for rows in ([], [3], [3, 7, 9], [-1, 3], [3, 24]):
        np.save(path, np.array(rows, np.int64))
        path.with_suffix(".npy").rename(path)
        manifest = read_manifest(index, 2)
        info = replace(manifest.files["removed.npy"], size=path.stat().st_size)
        write_manifest(index, replace(manifest, files=manifest.files | {"removed.npy": info}))
        with pytest.raises(ArtifactError, match=r"does not fit the manifest"):
            open_current(index)


def test_a_file_that_cannot_be_read_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(index, "checkpoint/config.json")
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match=r"checkpoint/config.json of version 1: .* cannot be read: Is a directory"):
        verify_index(index)


def test_half_of_the_images_may_be_missing(index: Path, gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_version, "_SAMPLE", 24)
    write_manifest(index, replace(open_current(index).manifest, root=str(gallery)))
    artifact = open_current(index)
    assert artifact.find_gallery_fault() is None
    paths = [Path(artifact.image_location(row)[0]) for row in range(24)]
    for path in paths[:12]:
        path.unlink()
    assert artifact.find_gallery_fault() is None
    paths[20].unlink()
    assert artifact.find_gallery_fault() == f"13 of 24 sampled images are not in the gallery, such as {paths[0]}"


def test_the_key_of_an_image_changes_with_its_file(index: Path, gallery: Path) -> None:
    write_manifest(index, replace(open_current(index).manifest, root=str(gallery)))
    artifact = open_current(index)
    keys = [artifact.image_key(row) for row in range(24)]
    assert (len({*keys}), {len(key) for key in keys}) == (24, {32})
    assert artifact.image_key(3) == keys[3]
    path = Path(artifact.image_location(3)[0])
    os.utime(path, ns=(1, 1))
    assert artifact.image_key(3) != keys[3]
    assert artifact.image_key(4) == keys[4]
    path.unlink()
    with pytest.raises(ArtifactError, match="the image of row 3 cannot be read: No such file"):
        artifact.image_key(3)


def test_derived_facts_of_a_manifest(published: Path) -> None:
    manifest = open_version(published, 1).manifest
    assert manifest.words_weight == DEFAULT_WEIGHT
    assert replace(manifest, hybrid_weight=0.0).words_weight == 0
    addition = Addition(folder="added-2", count=1, kind="Flat", sources=["d"], roots=["/d", "/a"])
    assert replace(manifest, root="/a", roots=["/b", ""], additions=[addition]).folders == ["/a", "/b", "/d"]


def test_a_file_is_checked_until_it_is_sound(tmp_path: Path) -> None:
    path, checks = tmp_path / "file", list[Path]()
    path.touch()

    def check() -> None:
        checks.append(path)
        if len(checks) == 1:
            raise ValueError("odd")

    with pytest.raises(ArtifactError, match=r"file is damaged: odd; roll back, or rebuild the index"):
        check_file_once(path, check)
    for _ in range(3):
        check_file_once(path, check)
    assert len(checks) == 2
    path.write_bytes(b"changed")
    check_file_once(path, check)
    assert len(checks) == 3


def test_a_lock_that_tantivy_still_holds_is_no_file_of_the_version(index: Path) -> None:
    with new_version(index) as new:
        current = open_current(index)
        new.link(current)
        (new.folder / "lexical" / ".tantivy-meta.lock").touch()
        manifest = new.publish(current.manifest)
    assert manifest.files.keys() == current.manifest.files.keys()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Record every fsync by the path of its file, and every rename by the new path."""
    recorded: list[Event] = []
    sync = os.fsync

    def recording_sync(descriptor: int) -> None:
        recorded.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        sync(descriptor)

    def recording(rename: Callable[[object, object], None]) -> Callable[[object, object], None]:
        def record(old: object, new: object, **options: object) -> None:
            recorded.append(("rename", str(new)))
            rename(old, new)

        return record

    monkeypatch.setattr(os, "fsync", recording_sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, recording(getattr(os, name)))
    return recorded


def test_a_version_is_on_the_disk_before_current_names_it(index: Path, events: list[Event]) -> None:
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


def test_a_tree_is_synced_with_its_own_folder(tmp_path: Path, events: list[Event]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    fsync_tree(tmp_path)
    expected = {tmp_path, tmp_path / "folder", tmp_path / "folder" / "file"}
    assert {Path(path) for _, path in events} == expected
