"""A directory of thumbnails with a limit in bytes, which several processes may share.

- Beyond the limit, the least recently used files are removed until nine tenths of the limit remain. A file's time of
  modification is the time of its last use.
- On a disk that is full or read-only nothing is cached, and every thumbnail is made again.
"""

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from dcar_core.images import sniff_format
from dcar_core.util.files import write_bytes

logger = logging.getLogger(__name__)

_KEPT = 0.9  # share of the limit that remains after files are removed
_RECOUNT = 0.05  # share of the limit that this process adds before it counts the files of other processes again


class ThumbnailCache:
    """Cached thumbnails by file name. Its methods block. A limit of 0 caches none."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._lock = threading.Lock()
        self._left = 0.0  # bytes that may be added before the files are counted again
        self._has_warned = False

    def get(self, name: str) -> bytes | None:
        if not self._limit:
            return None
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if sniff_format(data) is not None else None  # a damaged file is replaced

    def put(self, name: str, data: bytes) -> None:
        if len(data) > self._limit * _KEPT:
            return
        try:
            path = self._path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data, shared=True)
            self._count(len(data))
        except OSError as error:
            if not self._has_warned:
                logger.warning("thumbnails cannot be cached in %s: %s", self._directory, error.strerror or error)
            self._has_warned = True

    def _path(self, name: str) -> Path:
        return self._directory / name[:2] / name

    def _count(self, added: int) -> None:
        with self._lock:
            self._left -= added
            if self._left < 0:
                self._left = min(self._limit * _RECOUNT, self._limit - self._remove_old())

    def _remove_old(self) -> int:
        """Return the bytes in the directory, after files are removed if they exceed the limit."""
        files = []
        for path in self._directory.glob("??/*"):
            with suppress(OSError):  # another process has removed it
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        remaining = total if total <= self._limit else self._limit * _KEPT
        for _, size, path in sorted(files):
            if total <= remaining:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total
