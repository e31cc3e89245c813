"""Decoded images and frozen features on disk, computed once for all runs on a data set.

- An entry's key covers everything it depends on: the backbone's content hash, the image bytes and the texts.
  Entries never go stale, because changed images or weights have another key.
- Each entry is one file, written to a temporary name and renamed. Concurrent processes write the same bytes. A damaged
  entry is computed again.
- Temporary files of a killed run are removed after a day. Deleting the directory is always safe.
- Without a directory, every value is computed when requested and not stored.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.util.arrays import Pixels
from dcar_core.util.errors import DataError
from dcar_core.util.files import DISK_ERRORS, apply_umask

T = TypeVar("T")

_STALE_AFTER_S = 24 * 3600  # no entry takes longer to compute


def digest(*parts: Any) -> str:
    """Return the sha256 of JSON-serialisable values, as 32 hex digits."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]


class FeatureCache:
    """Outputs of one frozen backbone below `directory`, in a sub-directory for each backbone."""

    def __init__(self, directory: Path | None, backbone: Backbone) -> None:
        self._backbone = backbone
        self._directory = directory / self.backbone_hash[:16] if directory is not None else None
        self._image_hashes: dict[str, dict[str, str]] = {}

    @cached_property
    def backbone_hash(self) -> str:
        """The backbone's content hash, computed once because it reads every weight."""
        return self._backbone.content_hash()

    def image_key(self, data: Dataset) -> str:
        """Return a hash of the names and bytes of a split's images, read once. Raise DataError if one is missing."""
        lines = (f"{name} {content}\n" for name, content in self.image_hashes(data).items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]

    def image_hashes(self, data: Dataset) -> dict[str, str]:
        """Return the hash of the bytes of each of a split's images, read once. Raise DataError if one is missing."""
        names = digest(str(data.root.path), data.images)
        if names not in self._image_hashes:
            self._image_hashes[names] = {name: hashlib.sha256(data.read(name)).hexdigest() for name in data.images}
        return self._image_hashes[names]

    def tensor(self, kind: str, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """Load an entry to the backbone's device; compute and store it first if it is missing."""
        if self._directory is None:
            return compute()
        path = self._directory / f"{kind}-{key}.safetensors"

        def read() -> Tensor:
            loaded: dict[str, Tensor] = load_file(str(path), device=str(self._backbone.device))
            return loaded[kind]

        return _read_or_make(path, read, lambda part: save_file({kind: compute().cpu().contiguous()}, str(part)))

    def array(self, kind: str, key: str, shape: tuple[int, ...], fill: Callable[[Pixels], None]) -> Pixels:
        """Load a uint8 array of `shape`, memory-mapped; allocate it and call `fill` first if it is missing."""
        if self._directory is None:
            out = np.empty(shape, np.uint8)
            fill(out)
            return out
        path = self._directory / f"{kind}-{key}.npy"

        def write(part: Path) -> None:
            out = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
            _allocate(part)
            fill(out)
            out.flush()

        return _read_or_make(path, lambda: np.load(path, mmap_mode="r"), write)


def _read_or_make(path: Path, read: Callable[[], T], write: Callable[[Path], None]) -> T:
    """Read an entry; make it first if it is missing, and again if it is damaged."""
    if path.is_file():
        with suppress(SafetensorError, ValueError, EOFError):
            return read()
    with _written_atomically(path) as part:
        write(part)
    return read()


@contextmanager
def _written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path and rename it to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob("*.part"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_AFTER_S:
                leftover.unlink()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(apply_umask(0o666))
        part.replace(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"cannot write features to {path.parent}: {reason}; free some space, or choose another directory with "
            f"--features"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _allocate(path: Path) -> None:
    """Reserve the whole file on disk: on a full disk, a write into mapped memory would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
