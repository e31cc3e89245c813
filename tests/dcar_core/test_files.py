"""Durable writes: complete or not at all, with exact bytes."""

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcar_core.util.files import atomic_writer, canonical_json, fsync_path, write_json


def test_whole_content_is_on_disk_before_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bytes]] = []

    def record(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, path.read_bytes() if path.is_file() else b""))

    monkeypatch.setattr(os, "fsync", record)
    with atomic_writer(tmp_path / "file") as file:
        file.write(b"short")
    assert synced == [(".file..tmp", b"short"), (tmp_path.name, b"")]
    write_json(tmp_path / "file", 1)
    assert synced[2:] == [(".file..tmp", b"1\n"), (tmp_path.name, b"")]


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_writer(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    def fail(number: int) -> Callable[..., Any]:
        def call(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return call

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    with pytest.raises(FileNotFoundError), atomic_writer(tmp_path / "nowhere" / "file"):
        pass
    before = len([*Path("/proc/self/fd").iterdir()])
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left on device") as full:
        write_json(path, 1)
    assert full.value.filename == str(path), "a full disk is named"
    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    fsync_path(tmp_path)  # a folder that cannot be flushed is no error
    with pytest.raises(OSError, match="Invalid argument"):
        fsync_path(path)
    assert len([*Path("/proc/self/fd").iterdir()]) == before, "descriptors are closed"
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    # of the folder, after the file has its name
    monkeypatch.setattr(os, "open", fail(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"), atomic_writer(path):
        pass


def test_writers_that_share_a_file_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        atomic_writer(path, shared=True) as one,
        atomic_writer(path, shared=True) as other,
    ):
        assert len({one.name, other.name}) == 2
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one", "the last to end"
    with atomic_writer(path) as file:
        assert file.name == str(tmp_path / ".file..tmp")


def test_json_is_written_readably_and_hashed_canonically(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"b": "é", "a": [1]})
    assert (tmp_path / "file").read_text(
        encoding="utf-8"
    ) == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", math.nan)
    assert canonical_json({"b": "é", "a": [1, 2]}) == '{"a":[1,2],"b":"é"}'.encode()
