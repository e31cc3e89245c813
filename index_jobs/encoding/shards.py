"""Vector shards: the finished part of an encoding job, safe against kills.

- A shard is a fixed range of gallery rows in one file, `<n>.npz`, that is replaced as a
  whole and has checksums: the vectors and a record of each one's image. Rows without a
  vector are still to do, so each run tries failed images again.
- Shards hold the image tower's features; `encode` applies an adapter of features.
- The directory is named after a hash of everything that the vectors depend on, and one
  of the gallery. Another model or runtime cannot find them; another gallery takes the
  vectors of common images: `ReusableVectors`.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import atomic_writer, hash_json
from index_jobs.gallery.locations import ImageLocation
from index_jobs.gallery.scan import Gallery
from index_jobs.spec import BuildOptions

FORMAT = 7

# An image with a vector: its gallery row, a hash of its location, width and height when
# upright (0 if unknown), and the time that it was taken (empty if unknown).
IMAGE = np.dtype(
    [("row", "<i8"), ("location_hash", "<u8"), ("size", "<i4", (2,)), ("taken", "S19")]
)
Images = NDArray[np.void]
"""Records (m,) of the type IMAGE."""


@dataclass(frozen=True)
class Shard:
    """A shard: the gallery rows that it covers, and the images with vectors in their
    order.
    """

    path: Path
    span: range
    images: Images

    @cached_property
    def missing(self) -> list[int]:
        """Gallery rows that are still to do."""
        done = {*self.images["row"].tolist()}
        return [row for row in self.span if row not in done]

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """Read a shard and verify its checksums. Raise ArtifactError if it is
        damaged.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as parts:
                images = parts["images"]
                vectors = parts["vectors"]
                span = range(*parts["span"].tolist())
            if (images.dtype, vectors.dtype, vectors.ndim) != (
                IMAGE,
                np.float32,
                2,
            ) or len(images) != len(vectors):
                raise ValueError("its parts do not fit together")
            return cls(path, span, images)
        except Exception as error:
            # NumPy and zipfile raise many types for a file that they did not write
            raise ArtifactError(
                f"the vector shard {path} is corrupted: {error}; delete it and run the"
                " same command again: only this shard is encoded again"
            ) from error

    def vectors(self) -> Floats:
        """Return the features of `images`, float32 (m, E), from the file."""
        with np.load(self.path, allow_pickle=False) as file:
            vectors: Floats = file["vectors"]
        return vectors


class ShardStore:
    """The shards of one job in `work/<key>/`."""

    def __init__(
        self,
        gallery: Gallery,
        encoder: Encoder,
        work: Path,
        options: BuildOptions,
    ) -> None:
        batch = options.batch_size
        self.count = len(gallery)
        self.dim = encoder.dim
        self.shard_rows = -(-options.shard_rows // batch) * batch
        pixels = asdict(encoder.preprocess)
        self._encoder_key = hash_json(
            [FORMAT, encoder.image_key, encoder.runtime.name, pixels, encoder.dim]
        )[:12]
        gallery_key = hash_json(
            [gallery.vectors_signature, self.count, batch, self.shard_rows]
        )[:12]
        self.path = work / f"{self._encoder_key}-{gallery_key}"

    def __len__(self) -> int:
        return -(-self.count // self.shard_rows)

    def stored_rows(self) -> int:
        """Return the number of gallery rows that have a shard, unverified."""
        return sum(
            len(self.span(int(path.stem))) for path in self.path.glob("[0-9]*.npz")
        )

    def span(self, number: int) -> range:
        return range(
            number * self.shard_rows, min(self.count, (number + 1) * self.shard_rows)
        )

    def load(self, number: int) -> Shard:
        """Return a shard after verifying its checksums; one without images if nothing
        is done.
        """
        path = self.path_of(number)
        if path.exists():
            return Shard.read(path)
        return Shard(path, self.span(number), np.empty(0, IMAGE))

    def other_folders(self) -> list[Path]:
        """Return the folders of shards that the same encoder made of other galleries,
        complete or not.
        """
        return sorted({*self.path.parent.glob(f"{self._encoder_key}-*")} - {self.path})

    def extend(self, number: int, parts: Iterable[tuple[Images, Floats]]) -> Shard:
        """Add images with their vectors, float32 (m, E), to a shard, and write it in
        place of the earlier file.
        """
        shard = self.load(number)
        path = self.path_of(number)
        if len(shard.images):
            before = shard.vectors()
        else:
            before = np.empty((0, self.dim), np.float32)
        images, vectors = map(
            np.concatenate, zip((shard.images, before), *parts, strict=True)
        )
        order = np.argsort(images["row"])
        images = images[order]
        span = np.array([shard.span.start, shard.span.stop])
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, shared=True) as file:
            np.savez(
                file,
                allow_pickle=False,
                span=span,
                images=images,
                vectors=vectors[order].astype(np.float32),
            )
        return Shard(path, shard.span, images)

    def path_of(self, number: int) -> Path:
        return self.path / f"{number:06}.npz"


class ReusableVectors:
    """Vectors that the same encoder has computed for other galleries.

    A changed gallery is a new one with shards of its own. Images that it shares with an
    earlier gallery, recognised by name (at a URL, by the URL), size and time of change,
    are copied from there instead of being encoded again.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._shards = shards = list[Shard]()
        for path in (
            path for folder in folders for path in sorted(folder.glob("[0-9]*.npz"))
        ):
            with contextlib.suppress(ArtifactError):  # damaged
                shards.append(Shard.read(path))
        self._starts = np.cumsum([0, *(len(shard.images) for shard in shards)])
        self._images = np.concatenate(
            [np.empty(0, IMAGE), *(shard.images for shard in shards)]
        )
        self._hashes, self._positions = np.unique(
            self._images["location_hash"], return_index=True
        )

    def __len__(self) -> int:
        return len(self._hashes)

    def take(
        self,
        locations: Sequence[ImageLocation],
        dim: int,
    ) -> tuple[Images, Floats]:
        """Return those of some images that have a vector here, and their vectors,
        float32 (m, E).
        """
        wanted = np.fromiter(
            (location.location_hash for location in locations),
            np.uint64,
            len(locations),
        )
        near = np.searchsorted(self._hashes, wanted).clip(max=len(self) - 1)
        known = np.flatnonzero(self._hashes[near] == wanted)
        positions = self._positions[near[known]]
        images = self._images[positions]
        vectors = np.empty((len(known), dim), np.float32)
        images["row"] = [locations[i].row for i in known.tolist()]
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            vectors[here] = self._shards[number].vectors()[
                positions[here] - self._starts[number]
            ]
        return images, vectors
