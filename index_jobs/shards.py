"""Vector shards: what an encoding job has done so far, safe against being killed.

- A shard is a fixed range of gallery rows: `<n>.npy`, float32 (m, E), and `<n>.json` with the rows that failed,
  hashes of the others' pixels and the checksum. The JSON is written last, so a shard counts only when it is whole.
- A shard's vectors depend on nothing outside its range, so a resumed job's vectors are those of an undisturbed one.
- The directory's name is a hash of all that the vectors depend on; another model, gallery or runtime cannot find them.
- A failure is of the picture, which no other attempt mends, or of reading it, which is tried again by the next job.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.errors import ArtifactError
from dcar_core.files import canonical, replacing, sha256_of, write_json

FORMAT = 3
Failed = tuple[int, str]  # gallery row, reason
PICTURE, READING = "picture", "reading"  # the kinds of failures
_OF_THE_PICTURE = re.compile(r"the file is empty|\d+ x \d+ pixels|not an image|broken or truncated")


def kind_of(reason: str) -> str:
    """PICTURE where the bytes were read and are no picture; READING where another attempt may get them.

    Told by the words of `dcar_core.images.open_image`, since shards keep nothing else. A reason that is not among them
    is READING: to try once more in vain is cheap, never to try again loses a picture.
    """
    return PICTURE if _OF_THE_PICTURE.match(reason) else READING


@dataclass(frozen=True)
class Shard:
    """A whole shard: the vectors' file, the gallery rows [start, stop) it covers, and the ones that failed.

    digests: a hash of each vector's pixels, uint64 (m,).
    """

    path: Path
    start: int
    stop: int
    failed: tuple[Failed, ...]
    digests: NDArray[np.uint64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Gallery rows of the vectors, in order, int64 (m,)."""
        return np.setdiff1d(np.arange(self.start, self.stop), [row for row, _ in self.failed]).astype(np.int64)

    @property
    def unread(self) -> list[int]:
        """Gallery rows of the pictures that could not be read, which says nothing of the pictures themselves."""
        return [row for row, reason in self.failed if kind_of(reason) == READING]

    def vectors(self) -> NDArray[np.float32]:
        """float32 (m, E), memory-mapped."""
        mapped: NDArray[np.float32] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return mapped


class ShardStore:
    """The shards of one job in `work/<key>/`."""

    def __init__(
        self,
        work: Path,
        *,
        fingerprint: str,
        runtime: str,
        pixels: Mapping[str, Any],
        signature: str,
        count: int,
        dim: int,
        batch: int,
        rows: int,
    ) -> None:
        settings = [FORMAT, fingerprint, runtime, pixels, signature, count, dim, batch, rows]
        self.path = work / hashlib.sha256(canonical(settings)).hexdigest()[:16]
        self.count, self.dim, self.shard_rows = count, dim, rows

    def __len__(self) -> int:
        return -(-self.count // self.shard_rows)

    def rows_there(self) -> int:
        """How many gallery rows have their shard, none of them looked at yet."""
        return sum(len(self.span(int(note.stem))) for note in self.path.glob("[0-9]*.json"))

    def span(self, number: int) -> range:
        """The gallery rows of a shard."""
        return range(number * self.shard_rows, min(self.count, (number + 1) * self.shard_rows))

    def load(self, number: int) -> Shard | None:
        """A finished shard, checked against its checksum; None when it is still to do.

        Raises:
            ArtifactError: the shard is corrupted.
        """
        note, path = self._paths(number)
        if not note.exists():
            return None
        span = self.span(number)
        try:
            values = json.loads(note.read_bytes())
            failed = tuple((int(row), str(reason)) for row, reason in values["failed"])
            digests = np.frombuffer(bytes.fromhex(values["pixels"]), ">u8").astype(np.uint64)
            shard = Shard(path, span.start, span.stop, failed, digests)
            whole = (
                values["rows"] == [span.start, span.stop]
                and values["sha256"] == sha256_of(path)
                and shard.vectors().shape == (len(span) - len(failed), self.dim)
                and shard.vectors().dtype == np.float32
                and len(digests) == len(span) - len(failed)
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._corrupted(path, note) from error
        if not whole:
            raise self._corrupted(path, note)
        return shard

    def save(
        self, number: int, vectors: NDArray[np.float32], failed: list[Failed], digests: NDArray[np.uint64]
    ) -> Shard:
        """Write a shard: vectors float32 (m, E) of its rows that did not fail, and the hashes of their pixels.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        note, path = self._paths(number)
        span = self.span(number)
        if vectors.shape != (len(span) - len(failed), self.dim):
            raise ValueError(f"shard {number} has vectors {vectors.shape}, not {(len(span) - len(failed), self.dim)}")
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as file:
            np.save(file, np.ascontiguousarray(vectors, np.float32), allow_pickle=False)
        pixels = digests.astype(">u8").tobytes().hex()
        whole = {"rows": [span.start, span.stop], "failed": failed, "pixels": pixels, "sha256": sha256_of(path)}
        write_json(note, whole, shared=True)
        return Shard(path, span.start, span.stop, tuple(failed), digests)

    def reopen(self, number: int) -> None:
        """Make a finished shard one that is still to do, for every machine that sees the store.

        Raises:
            OSError: the store cannot be written.
        """
        self._paths(number)[0].unlink(missing_ok=True)

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self.path / f"{number:06}.json", self.path / f"{number:06}.npy"

    @staticmethod
    def _corrupted(path: Path, note: Path) -> ArtifactError:
        return ArtifactError(
            f"the vector shard {path} is corrupted; delete it and {note.name}, and run the same command again: only "
            f"this shard is encoded anew"
        )
