"""Checks of a file's contents, once for each process, and limits of an item's texts and metadata."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcar_core.util.errors import ArtifactError

MAX_METADATA_BYTES = 64 * 2**10  # of one item, as canonical JSON
MAX_METADATA_LEVELS = 100  # of objects and lists, that of the fields included; parsers of responses read about 200
MAX_CAPTION_CHARS = 10_000
_checked = set[tuple[int, int, int, int]]()  # device, inode, size and time of change of files


def is_too_deep(value: Any, levels: int = MAX_METADATA_LEVELS) -> bool:
    """Return whether a JSON value nests objects and lists in more levels."""
    if not isinstance(value, dict | list | tuple):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return not levels or any(is_too_deep(part, levels - 1) for part in parts)


def require_rows(rows: Any, count: int) -> None:
    """Raise ValueError unless all row numbers of an array are in 0..count - 1."""
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        raise ValueError(f"a row number is not in 0..{count - 1}")


def check_file_once(path: Path, check: Callable[[], None]) -> None:
    """Check the contents of a file that this process has not checked yet; versions share files.

    `check` raises ValueError for damaged contents. Raise ArtifactError instead, with a remedy.
    """
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key in _checked:
        return
    try:
        check()
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}; roll back, or rebuild the index") from error
    _checked.add(key)
