"""Decoded pictures and frozen features on disk, so that they are computed once for all runs on a data set.

- An entry's key is all that it follows from: the backbone's content hash, the pictures' bytes, the texts. So nothing
  goes stale; a replaced picture or other weights have another key.
- An entry is one file, written aside and renamed: no half of one is ever read, and processes that write the same entry
  write the same bytes. What a killed run left aside is removed a day later. Deleting the directory is always safe.
- Without a directory everything is computed when asked for and kept nowhere.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.util.errors import DataError
from dcar_core.util.files import DISK_ERRORS, apply_umask

_LEFT_S = 24 * 3600  # no entry takes so long, so whoever wrote it is gone


def digest(*parts: Any) -> str:
    """sha256 over values that JSON can hold, as 32 hex digits."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]


class FeatureCache:
    """What the frozen `backbone` says, kept below `directory` (a sub-directory for each backbone)."""

    def __init__(self, directory: Path | None, backbone: Backbone) -> None:
        self._backbone = backbone
        self._directory = directory / self.backbone_hash[:16] if directory is not None else None
        self._seen: dict[str, str] = {}

    @cached_property
    def backbone_hash(self) -> str:
        """The backbone's content hash, computed once: it reads every weight."""
        return self._backbone.content_hash()

    def pictures(self, data: Dataset) -> str:
        """The key of a split's pictures: their names and bytes. They are read once in the life of this object.

        Raises:
            DataError: a picture is missing; the message names it.
        """
        asked = digest(str(data.root.path), data.images)
        if asked not in self._seen:
            total = hashlib.sha256()
            for name in data.images:
                total.update(f"{name} {hashlib.sha256(data.read(name)).hexdigest()}\n".encode())
            self._seen[asked] = total.hexdigest()[:32]
        return self._seen[asked]

    def tensor(self, kind: str, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """The entry, on the backbone's device."""
        if self._directory is None:
            return compute()
        path = self._directory / f"{kind}-{key}.safetensors"
        if not path.is_file():
            with _written_aside(path) as part:
                save_file({kind: compute().cpu().contiguous()}, str(part))
        loaded: dict[str, Tensor] = load_file(str(path), device=str(self._backbone.device))
        return loaded[kind]

    def array(self, kind: str, key: str, shape: tuple[int, ...], fill: Callable[[NDArray[Any]], None]) -> NDArray[Any]:
        """uint8 of `shape`; from disk it is memory-mapped, so that a large data set need not fit in memory."""
        if self._directory is None:
            out = np.empty(shape, np.uint8)
            fill(out)
            return out
        path = self._directory / f"{kind}-{key}.npy"
        if not path.is_file():
            with _written_aside(path) as part:
                out = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
                _allocate(part)
                fill(out)
                out.flush()
                del out
        return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to the real one only if nothing was raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob("*.part"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_S:
                left.unlink()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.chmod(apply_umask(0o666))
        part.replace(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"features cannot be kept in {path.parent}: {reason}; make room, or name another place with --features"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _allocate(path: Path) -> None:
    """Claim all of a file's room: where there is none, a write into mapped memory would end the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
