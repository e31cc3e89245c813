"""Checks of a file's contents, once for each process, and limits of an item's texts."""

from collections.abc import Callable
from pathlib import Path

from dcar_core.util.errors import ArtifactError

MAX_METADATA_BYTES = 64 * 2**10  # of one item, as canonical JSON
MAX_CAPTION_CHARS = 10_000
_checked = set[tuple[int, int, int, int]]()  # device, inode, size and time of change of files


def check_file_once(path: Path, check: Callable[[], None]) -> None:
    """Check the contents of a file that this process has not checked yet; versions share files by hard links.

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
