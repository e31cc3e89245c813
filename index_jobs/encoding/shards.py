"""Vector shards: the finished part of an encoding job, safe against kills.

- A shard is a fixed range of gallery rows: `<n>.npy`, float32 (m, E), and `<n>.json` with the failed images, the sizes
  of the others, hashes of their locations and pixels, and the checksum. The JSON is written last, so a shard counts
  only when it is complete.
- The vectors of a shard depend on nothing outside its range, so those of a resumed job are those of an uninterrupted
  one.
- Shards hold the image tower's features; an adapter of features is applied when they are read. A training that changes
  only the adapter, or only the text side, finds them again, and its gallery takes a matrix product.
- The directory is named after a hash of everything that the vectors depend on, and one of the gallery. Another model or
  runtime cannot find them; another gallery reuses the vectors of common images (see `vector_reuse`).
- A failure of reading is tried again by the next job; a failure of the image itself only by force.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import ArtifactError, ImageFault
from dcar_core.util.files import atomic_writer, canonical_json, sha256_of, write_json

FORMAT = 4

Sizes = NDArray[np.int32]
"""Width and height of upright images in pixels, int32 (m, 2); 0 if unknown."""


class FailedImage(NamedTuple):
    """An image without a vector. row: of the gallery."""

    row: int
    reason: str
    fault: ImageFault

    @classmethod
    def parse(cls, values: Sequence[Any]) -> "FailedImage":
        """Return the failure of a shard's JSON. Older shards have no fault, so their images are tried again."""
        row, reason, *fault = values
        return cls(int(row), str(reason), ImageFault(fault[0]) if fault else ImageFault.UNREADABLE)


@dataclass(frozen=True)
class Shard:
    """A complete shard: the vectors' file, the gallery rows [start, stop) that it covers, and the failed images.

    pixel_hashes, location_hashes: of each vector's image, uint64 (m,). sizes: likewise; 0 in older shards.
    """

    path: Path
    start: int
    stop: int
    failed: tuple[FailedImage, ...]
    pixel_hashes: NDArray[np.uint64]
    location_hashes: NDArray[np.uint64]
    sizes: Sizes

    @classmethod
    def read(cls, note: Path) -> "Shard":
        path, values = note.with_suffix(".npy"), json.loads(note.read_bytes())
        start, stop = map(int, values["rows"])
        failed = tuple(FailedImage.parse(failure) for failure in values["failed"])
        count = stop - start - len(failed)
        sizes = np.frombuffer(bytes.fromhex(values.get("sizes", "00" * 8 * count)), ">i4").reshape(-1, 2)
        hashes = _from_hex(values["pixels"]), _from_hex(values["marks"])
        shard = cls(path, start, stop, failed, *hashes, sizes.astype(np.int32))
        vectors = shard.vectors()
        lengths = {len(vectors), len(sizes), *map(len, hashes)}
        is_valid = vectors.ndim == 2 and vectors.dtype == np.float32 and lengths == {count}
        if not is_valid or values["sha256"] != sha256_of(path):
            raise ValueError(f"{path} does not match {note.name}")
        return shard

    @property
    def rows(self) -> Rows:
        """Gallery rows of the vectors, in order, int64 (m,)."""
        failed = [failure.row for failure in self.failed]
        return np.setdiff1d(np.arange(self.start, self.stop), failed).astype(np.int64)

    @property
    def unread(self) -> list[int]:
        """Gallery rows of the images that another attempt may be able to read."""
        return [failure.row for failure in self.failed if failure.fault.is_temporary]

    def vectors(self) -> Floats:
        """float32 (m, E), memory-mapped."""
        mapped: Floats = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return mapped


class ShardStore:
    """The shards of one job in `work/<key>/`."""

    def __init__(
        self,
        work: Path,
        *,
        image_key: str,
        runtime: str,
        pixels: Mapping[str, Any],
        signature: str,
        count: int,
        dim: int,
        batch: int,
        rows: int,
    ) -> None:
        self._encoder_key = _hash_settings(FORMAT, image_key, runtime, pixels, dim)
        self.path = work / f"{self._encoder_key}-{_hash_settings(signature, count, batch, rows)}"
        self.count, self.dim, self.shard_rows = count, dim, rows

    def __len__(self) -> int:
        return -(-self.count // self.shard_rows)

    def stored_rows(self) -> int:
        """Return the number of gallery rows that have a shard, unverified."""
        return sum(len(self.span(int(note.stem))) for note in self.path.glob("[0-9]*.json"))

    def span(self, number: int) -> range:
        return range(number * self.shard_rows, min(self.count, (number + 1) * self.shard_rows))

    def load(self, number: int) -> Shard | None:
        """Return a complete shard after verifying its checksum; None if it is still to do."""
        note, path = self._paths(number)
        if not note.exists():
            return None
        span = self.span(number)
        try:
            shard = Shard.read(note)
            if (shard.start, shard.stop, shard.vectors().shape[1]) != (span.start, span.stop, self.dim):
                raise ValueError(f"{note.name} is of another job")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"the vector shard {path} is corrupted; delete it and {note.name} and run the same command again: only "
                f"this shard is encoded again"
            ) from error
        return shard

    def other_folders(self) -> list[Path]:
        """Return the folders of shards that the same encoder made of other galleries, complete or not."""
        return sorted({*self.path.parent.glob(f"{self._encoder_key}-*")} - {self.path})

    def other_galleries(self) -> Iterator[Shard]:
        """Yield the complete shards that the same encoder made of other galleries in the same way."""
        for folder in self.other_folders():
            for note in sorted(folder.glob("[0-9]*.json")):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # incomplete
                    yield Shard.read(note)

    def save(
        self,
        number: int,
        vectors: Floats,
        failed: Sequence[FailedImage],
        pixel_hashes: NDArray[np.uint64],
        location_hashes: NDArray[np.uint64],
        sizes: Sizes,
    ) -> Shard:
        """Write a shard: float32 (m, E) of the rows that did not fail, hashes and sizes as in `Shard`."""
        note, path = self._paths(number)
        span = self.span(number)
        if vectors.shape != (len(span) - len(failed), self.dim):
            raise ValueError(f"shard {number} has vectors {vectors.shape}, not {(len(span) - len(failed), self.dim)}")
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, shared=True) as file:
            np.save(file, np.ascontiguousarray(vectors, np.float32), allow_pickle=False)
        values = {
            "rows": [span.start, span.stop],
            "failed": [list(failure) for failure in failed],
            "pixels": _to_hex(pixel_hashes),
            "marks": _to_hex(location_hashes),
            "sizes": sizes.astype(">i4").tobytes().hex(),
            "sha256": sha256_of(path),
        }
        write_json(note, values, shared=True)
        return Shard(path, span.start, span.stop, tuple(failed), pixel_hashes, location_hashes, sizes)

    def reopen(self, number: int) -> None:
        """Mark a complete shard as to do, for every machine that sees the store."""
        self._paths(number)[0].unlink(missing_ok=True)

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self.path / f"{number:06}.json", self.path / f"{number:06}.npy"


def _hash_settings(*settings: Any) -> str:
    return hashlib.sha256(canonical_json(list(settings))).hexdigest()[:12]


def _to_hex(values: NDArray[np.uint64]) -> str:
    return values.astype(">u8").tobytes().hex()


def _from_hex(text: str) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64)
