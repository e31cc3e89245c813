"""Vector shards: what an encoding job has done so far, safe against being killed.

- A shard is a fixed range of gallery rows: `<n>.npy`, float32 (m, E), and `<n>.json` with the rows that failed, marks
  of the others (see `Place`), hashes of their pixels and the checksum. The JSON is written last, so a shard counts only
  when it is whole.
- A shard's vectors depend on nothing outside its range, so a resumed job's vectors are those of an undisturbed one.
- The directory's name is a hash of all that the vectors depend on, and one of the gallery: another model or runtime
  cannot find them, and another gallery takes from them what it has in common (see `known`).
- A failure is of the picture, which no other attempt mends, or of reading it, which is tried again by the next job.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import atomic_writer, canonical_json, sha256_of, write_json

FORMAT = 4
FailedImage = tuple[int, str]  # gallery row, reason
PICTURE, READING = "picture", "reading"  # the kinds of failures
_OF_THE_PICTURE = re.compile(r"the file is empty|\d+ x \d+ pixels|not an image|broken or truncated")


def kind_of(reason: str) -> str:
    """PICTURE where the bytes were read and are no picture; READING where another attempt may get them.

    Told by the words of `dcar_core.images.open_image`, since shards keep nothing else. A reason that is not among
    them     is READING: to try once more in vain is cheap, never to try again loses a picture.
    """
    return PICTURE if _OF_THE_PICTURE.match(reason) else READING


@dataclass(frozen=True)
class Shard:
    """A whole shard: the vectors' file, the gallery rows [start, stop) it covers, and the ones that failed.

    digests, marks: of each vector's picture, uint64 (m,): a hash of its pixels, and of where it lies.
    """

    path: Path
    start: int
    stop: int
    failed: tuple[FailedImage, ...]
    digests: NDArray[np.uint64]
    marks: NDArray[np.uint64]

    @classmethod
    def read(cls, note: Path) -> "Shard":
        """A shard by its JSON.

        Raises:
            OSError, ValueError, KeyError, TypeError: it is not whole.
        """
        path, values = note.with_suffix(".npy"), json.loads(note.read_bytes())
        start, stop = map(int, values["rows"])
        failed = tuple((int(row), str(reason)) for row, reason in values["failed"])
        shard = cls(path, start, stop, failed, _unhexed(values["pixels"]), _unhexed(values["marks"]))
        vectors, count = shard.vectors(), stop - start - len(failed)
        lengths = {len(vectors), len(shard.digests), len(shard.marks)}
        if (
            vectors.ndim != 2
            or vectors.dtype != np.float32
            or lengths != {count}
            or values["sha256"] != sha256_of(path)
        ):
            raise ValueError(f"{path} is not what {note.name} says")
        return shard

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
        self._maker = _hashed(FORMAT, fingerprint, runtime, pixels, dim)
        self.path = work / f"{self._maker}-{_hashed(signature, count, batch, rows)}"
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
            shard = Shard.read(note)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._corrupted(path, note) from error
        if (shard.start, shard.stop) != (span.start, span.stop) or shard.vectors().shape[1] != self.dim:
            raise self._corrupted(path, note)
        return shard

    def others(self) -> Iterator[Shard]:
        """The whole shards of other galleries that the same encoder made in the same way."""
        for folder in sorted(self.path.parent.glob(f"{self._maker}-*")):
            if folder == self.path:
                continue
            for note in sorted(folder.glob("[0-9]*.json")):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what is not whole is made anew
                    yield Shard.read(note)

    def save(
        self,
        number: int,
        vectors: NDArray[np.float32],
        failed: Sequence[FailedImage],
        digests: NDArray[np.uint64],
        marks: NDArray[np.uint64],
    ) -> Shard:
        """Write a shard: vectors float32 (m, E) of its rows that did not fail, and what `Shard` says of their pictures.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        note, path = self._paths(number)
        span = self.span(number)
        if vectors.shape != (len(span) - len(failed), self.dim):
            raise ValueError(f"shard {number} has vectors {vectors.shape}, not {(len(span) - len(failed), self.dim)}")
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, shared=True) as file:
            np.save(file, np.ascontiguousarray(vectors, np.float32), allow_pickle=False)
        whole = {
            "rows": [span.start, span.stop], "failed": list(failed), "pixels": _hexed(digests), "marks": _hexed(marks),
            "sha256": sha256_of(path),
        }  # fmt: skip
        write_json(note, whole, shared=True)
        return Shard(path, span.start, span.stop, tuple(failed), digests, marks)

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


def _hashed(*settings: Any) -> str:
    return hashlib.sha256(canonical_json(list(settings))).hexdigest()[:12]


def _hexed(values: NDArray[np.uint64]) -> str:
    return values.astype(">u8").tobytes().hex()


def _unhexed(text: str) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64)
