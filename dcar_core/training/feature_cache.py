"""Decoded images and frozen features on disk, computed once for all runs on a data set.

- An entry's key covers everything it depends on: the backbone's content hash, the image bytes and the texts.
  Entries never go stale, because changed images or weights have another key.
- Each entry is one file of NumPy's, written atomically. Concurrent processes write the same bytes. A damaged entry is
  computed again.
- Temporary files of a killed run are removed after a day. Deleting the directory is always safe.
- Without a directory, every value is computed when requested and not stored.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.util.arrays import Pixels
from dcar_core.util.files import atomic_writer

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

        def write(file: BinaryIO) -> None:
            values = compute().cpu().numpy()
            _allocate(file, values.shape, values.dtype)[:] = values

        values = _read_or_make(self._directory / f"{kind}-{key}.npy", write)
        return torch.from_numpy(values).to(self._backbone.device)

    def array(self, kind: str, key: str, shape: tuple[int, ...], fill: Callable[[Pixels], None]) -> Pixels:
        """Load a uint8 array of `shape`, memory-mapped; allocate it and call `fill` first if it is missing."""
        if self._directory is None:
            out = np.empty(shape, np.uint8)
            fill(out)
            return out
        path = self._directory / f"{kind}-{key}.npy"
        pixels: Pixels = _read_or_make(path, lambda file: fill(_allocate(file, shape, np.uint8)), mmap_mode="r")
        return pixels


def _allocate(file: BinaryIO, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Map an array of NumPy's format, all on disk: on a full one, a write into mapped memory would kill the process."""
    out = np.lib.format.open_memmap(file.name, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, Path(file.name).stat().st_size)
    return out


def _read_or_make(path: Path, write: Callable[[BinaryIO], None], mmap_mode: Literal["r"] | None = None) -> Any:
    """Read an entry; make it first if it is missing, and again if it is damaged."""
    if path.is_file():
        with suppress(ValueError, EOFError):
            return np.load(path, mmap_mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_AFTER_S:
                leftover.unlink()
    with atomic_writer(path, shared=True) as file:
        write(file)
    return np.load(path, mmap_mode)
