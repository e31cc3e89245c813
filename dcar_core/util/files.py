"""Bytes on disk: checksums and durable writes.

- A file that others may read appears whole or not at all: written beside its name, flushed to the disk, renamed.
- Only the standard library is imported, so that a decoding worker starts in a fraction of a second.
"""

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# The disk is full, read-only or broken, or this user may write no more.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})

_UMASK = os.umask(0o077)  # which the system tells only to those who set it
os.umask(_UMASK)


def apply_umask(mode: int) -> int:
    """What `mkdir` or `open` would make of a mode; some libraries write for this user alone."""
    return mode & ~_UMASK


def sha256_of(path: Path) -> str:
    """sha256 of a file as 64 hex digits.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON of which equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def fsync_path(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some file systems cannot sync a directory; none refuses a file without a cause
            raise
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flush every file and directory below, and the directory itself."""
    for path in directory.rglob("*"):
        fsync_path(path)
    fsync_path(directory)


@contextlib.contextmanager
def atomic_writer(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write into that takes the place of `path` at the end, at once and durably; on an error, all stays.

    One who writes alone (a job with its lock, a training run) has a fixed temporary name: a killed one leaves one file
    at most. `shared` is for a file that two processes may write at once: each has a name of its own.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex if shared else ''}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """Replace `path` by indented JSON, atomically; `shared` as in `atomic_writer`."""
    with atomic_writer(path, shared=shared) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")
