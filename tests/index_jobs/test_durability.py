"""The order of the system calls that make a version durable before CURRENT names it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dcar_core.util.files import fsync_tree
from index_jobs.jobs.update import remove
from index_jobs.store.versions import open_current

Event = tuple[str, str]  # "sync" and a path, or "rename" and the new path


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
    remove(index, [open_current(index).item(0).id])
    version = index / "versions" / "2"
    published = events.index(("rename", str(version)))
    current = events.index(("rename", str(index / "CURRENT")))
    assert published < current
    synced = {Path(path) for kind, path in events[:published] if kind == "sync"}
    (staging,) = {path for path in synced if path.name.startswith(".tmp-") and path.parent == version.parent}
    contents = {staging, *(staging / path.relative_to(version) for path in version.rglob("*"))}
    assert contents <= synced, "every file and folder of the version"
    assert ("sync", str(version.parent)) in events[published:current], "its name"
    temporary = str(index / ".CURRENT..tmp")
    assert ("sync", temporary) in events[published:current], "the content of CURRENT"
    assert ("sync", str(index)) in events[current:], "the name of CURRENT"


def test_a_tree_is_synced_with_its_own_folder(tmp_path: Path, events: list[Event]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    fsync_tree(tmp_path)
    expected = {tmp_path, tmp_path / "folder", tmp_path / "folder" / "file"}
    assert {Path(path) for _, path in events} == expected
