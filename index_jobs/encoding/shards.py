"""Vector shards: the finished part of an encoding job, safe against kills.

- A shard is a fixed range of gallery rows in one file, `<n>.npz`, that is replaced as a whole: the vectors, a record of
  each one's image, and the failed images; all other rows are still to do. The archive has a checksum of each part.
- The vectors of a shard depend on nothing outside its range, so those of a resumed job are those of an uninterrupted
  one.
- Shards hold the image tower's features; an adapter of features is applied when they are read. A training that changes
  only the adapter, or only the text side, finds them again, and its gallery takes a matrix product.
- The directory is named after a hash of everything that the vectors depend on, and one of the gallery. Another model or
  runtime cannot find them; another gallery takes the vectors of common images: `ReusableVectors`.
- A failure of reading is tried again by the next job; a failure of the image itself only by force.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ArtifactError, ImageFault
from dcar_core.util.files import atomic_writer, hash_json
from index_jobs.gallery.scan import Gallery
from index_jobs.gallery.storage import ImageLocation
from index_jobs.spec import BuildOptions

FORMAT = 5

# An image with a vector: its gallery row, hashes of location and pixels, width and height when upright (0 if unknown).
IMAGE = np.dtype([("row", "<i8"), ("location_hash", "<u8"), ("pixel_hash", "<u8"), ("size", "<i4", (2,))])
Images = NDArray[np.void]
"""Records (m,) of the type IMAGE."""


class FailedImage(NamedTuple):
    """An image without a vector. row: of the gallery."""

    row: int
    reason: str
    fault: ImageFault


@dataclass(frozen=True)
class Shard:
    """A shard: the gallery rows that it covers, the images with vectors in their order, and the failed ones."""

    path: Path
    span: range
    images: Images
    failed: tuple[FailedImage, ...]

    @cached_property
    def missing(self) -> list[int]:
        """Gallery rows that are still to do."""
        done = {*self.images["row"].tolist(), *(failure.row for failure in self.failed)}
        return [row for row in self.span if row not in done]

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """Read a shard and verify its checksums. Raise ArtifactError if it is damaged."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as parts:
                images, vectors, span = parts["images"], parts["vectors"], range(*parts["span"].tolist())
                failed = zip(*(parts[name].tolist() for name in ("failed", "reasons", "faults")), strict=True)
            failures = tuple(FailedImage(row, reason, ImageFault(fault)) for row, reason, fault in failed)
            if (images.dtype, vectors.dtype, vectors.ndim) != (IMAGE, np.float32, 2) or len(images) != len(vectors):
                raise ValueError("its parts do not fit together")
            return cls(path, span, images, failures)
        except Exception as error:  # NumPy and zipfile raise many types for a file that they did not write
            raise ArtifactError(
                f"the vector shard {path} is corrupted: {error}; delete it and run the same command again: only this "
                f"shard is encoded again"
            ) from error

    def vectors(self) -> Floats:
        """Return the vectors of `images`, float32 (m, E), from the file."""
        with np.load(self.path, allow_pickle=False) as file:
            vectors: Floats = file["vectors"]
        return vectors


class ShardStore:
    """The shards of one job in `work/<key>/`."""

    def __init__(self, gallery: Gallery, encoder: Encoder, work: Path, options: BuildOptions) -> None:
        """Name the folder of the shards that an encoder makes of a gallery."""
        batch = options.batch_size
        self.count, self.dim, self.shard_rows = len(gallery), encoder.dim, -(-options.shard_rows // batch) * batch
        pixels = asdict(encoder.preprocess)
        self._encoder_key = hash_json([FORMAT, encoder.image_key, encoder.runtime.name, pixels, encoder.dim])[:12]
        gallery_key = hash_json([gallery.vectors_signature, self.count, batch, self.shard_rows])[:12]
        self.path = work / f"{self._encoder_key}-{gallery_key}"

    def __len__(self) -> int:
        return -(-self.count // self.shard_rows)

    def stored_rows(self) -> int:
        """Return the number of gallery rows that have a shard, unverified."""
        return sum(len(self.span(int(path.stem))) for path in self.path.glob("[0-9]*.npz"))

    def span(self, number: int) -> range:
        return range(number * self.shard_rows, min(self.count, (number + 1) * self.shard_rows))

    def load(self, number: int) -> Shard:
        """Return a shard after verifying its checksums; one without images if nothing is done."""
        path = self.path_of(number)
        return Shard.read(path) if path.exists() else Shard(path, self.span(number), np.empty(0, IMAGE), ())

    def other_folders(self) -> list[Path]:
        """Return the folders of shards that the same encoder made of other galleries, complete or not."""
        return sorted({*self.path.parent.glob(f"{self._encoder_key}-*")} - {self.path})

    def extend(self, number: int, parts: Iterable[tuple[Images, Floats]], failed: Iterable[FailedImage] = ()) -> Shard:
        """Add images with their vectors, float32 (m, E), and failures to a shard."""
        shard, nothing = self.load(number), (np.empty(0, IMAGE), np.empty((0, self.dim), np.float32))
        known = (shard.images, shard.vectors()) if len(shard.images) else nothing
        images, vectors = map(np.concatenate, zip(known, *parts, strict=True))
        order = np.argsort(images["row"])
        return self.save(number, images[order], vectors[order], [*shard.failed, *failed])

    def save(self, number: int, images: Images, vectors: Floats, failed: Sequence[FailedImage]) -> Shard:
        """Write a shard in place of an earlier one."""
        path, span = self.path_of(number), self.span(number)
        self.path.mkdir(parents=True, exist_ok=True)
        failed = sorted(failed)
        rows, reasons, faults = zip(*failed, strict=True) if failed else ((), (), ())
        parts = {
            "span": np.array([span.start, span.stop]), "images": images, "vectors": vectors.astype(np.float32),
            "failed": np.array(rows, np.int64), "reasons": np.array(reasons, str), "faults": np.array(faults, str),
        }  # fmt: skip
        with atomic_writer(path, shared=True) as file:
            np.savez(file, allow_pickle=False, **parts)
        return Shard(path, span, images, tuple(failed))

    def path_of(self, number: int) -> Path:
        return self.path / f"{number:06}.npz"


class ReusableVectors:
    """Vectors that the same encoder has computed for other galleries.

    A changed gallery is a new one with shards of its own. Images that it shares with an earlier gallery, recognised by
    name (at a URL, by the URL), size and time of change, are copied from there instead of being encoded again.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._shards = shards = list[Shard]()
        for path in (path for folder in folders for path in sorted(folder.glob("[0-9]*.npz"))):
            with contextlib.suppress(ArtifactError):  # damaged
                shards.append(Shard.read(path))
        self._starts = np.cumsum([0, *(len(shard.images) for shard in shards)])
        self._images = np.concatenate([np.empty(0, IMAGE), *(shard.images for shard in shards)])
        self._hashes, self._positions = np.unique(self._images["location_hash"], return_index=True)

    def __len__(self) -> int:
        return len(self._hashes)

    def take(self, locations: Sequence[ImageLocation], dim: int) -> tuple[Images, Floats]:
        """Return those of some images that have a vector here, and their vectors, float32 (m, E); if there are any."""
        wanted = np.fromiter((location.location_hash for location in locations), np.uint64, len(locations))
        near = np.searchsorted(self._hashes, wanted).clip(max=len(self) - 1)
        found = np.flatnonzero(self._hashes[near] == wanted)
        positions = self._positions[near[found]]
        images, vectors = self._images[positions], np.empty((len(found), dim), np.float32)
        images["row"] = [locations[i].row for i in found.tolist()]
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            vectors[here] = self._shards[number].vectors()[positions[here] - self._starts[number]]
        return images, vectors
