"""Checksums, durable writes, and JSON of other programs.

- A file that others may read appears complete or not at all: it is written under a
  temporary name, flushed to the disk and renamed.
- JSON can contain half of a surrogate pair, as truncated captions of a model often do.
  UTF-8 cannot: it becomes U+FFFD.
- Imports only the standard library, so a decoding worker starts quickly.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dcar_core.util.errors import DcarError

# The disk is full, read-only or broken, or the user's quota is used up.
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
)

_UMASK = os.umask(0o077)  # reading the umask requires setting it
os.umask(_UMASK)

_SURROGATE = re.compile("[\ud800-\udfff]")
# Half of a pair, and what may look like one: an escaped backslash, and a whole pair.
_HALF = re.compile(
    r"\\\\|\\u(?i:d[89ab][0-9a-f]{2})\\u(?i:d[c-f][0-9a-f]{2})|(?P<half>\\u(?i:d[89a-f][0-9a-f]{2}))"
)


def default_cache_directory() -> Path:
    """Return DCAR_RUNTIME_CACHE, which jobs, commands and the service share; else the
    user's cache directory.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  where the user is unknown
    return Path(os.environ.get("DCAR_RUNTIME_CACHE") or f"{base}/dcar")


def apply_umask(mode: int) -> int:
    """Return the mode that `mkdir` or `open` would use; some libraries write only for
    this user.
    """
    return mode & ~_UMASK


def require_writable(directory: Path) -> None:
    """Raise DcarError if a directory cannot be written to or created. Nothing is
    created.
    """
    existing = next(
        path
        for path in (directory, *directory.absolute().parents)
        if os.path.lexists(path)
    )
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not writable" if existing.is_dir() else "is not a directory"
        raise DcarError(
            f"{directory} cannot be written: {existing} {reason}; give another"
        )


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits. Raise OSError if the file cannot be
    read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return JSON in which equal values have equal bytes."""
    return json.dumps(
        value,
        sort_keys=True,
        ensure_ascii=False,
        separators=(",", ":"),
    ).encode()


def hash_json(value: Any) -> str:
    """Return the sha256 of `canonical_json` as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def csv_text(*rows: Iterable[Any]) -> str:
    """Return rows as CSV, the header first."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some file systems cannot flush a directory
            raise
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file that never changes into another place, as a hard link where the file
    system has them.
    """
    try:
        os.link(source.resolve(), target)
    except OSError:  # no hard links here, or too many of this file
        shutil.copyfile(source, target)
        fsync_path(target)


def fsync_tree(directory: Path) -> None:
    """Flush a directory and everything below it to the disk."""
    for path in [*directory.rglob("*"), directory]:
        fsync_path(path)


@contextlib.contextmanager
def atomic_writer(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end, atomically and durably;
    after an error nothing changes.

    Args:
        shared: several processes may write the file at once, so each uses another
            temporary name. A single writer, such as a job with a lock, uses a fixed
            one: killed, it leaves one file at most.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex if shared else ''}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (
            isinstance(error, OSError)
            and error.errno in DISK_ERRORS
            and error.filename is None
        ):
            error.filename = str(path)  # a write that fails does not say where
        raise


def write_bytes(path: Path, data: bytes | memoryview, *, shared: bool = False) -> None:
    """Replace `path`, atomically; `shared` as in `atomic_writer`."""
    with atomic_writer(path, shared=shared) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with indented JSON, atomically."""
    write_bytes(
        path,
        json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()
        + b"\n",
    )


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Replace `path` with a line of JSON for each value, atomically."""
    with atomic_writer(path) as file:
        file.writelines(
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            for value in values
        )


def parse_json(
    text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return the value of a JSON text.

    Args:
        make_object: builds an object from its names and values, in order; names may
            repeat. The default is a dict.

    Raises:
        ValueError: invalid JSON, an encoding other than Unicode, or nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    try:
        whole = _HALF.sub(lambda match: r"\ufffd" if match["half"] else match[0], text)
        return json.loads(whole, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def replace_surrogates(text: str) -> str:
    """Return the text with U+FFFD in place of characters that UTF-8 cannot hold."""
    return _SURROGATE.sub("\ufffd", text)
