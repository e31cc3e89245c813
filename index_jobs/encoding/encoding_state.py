"""Shared state of every way to encode a gallery: complete shards, shards to do, and the limit of failures.

- Complete shards are skipped after their checksum has been verified.
- A shard is encoded again if one of its failed images can be read now. To find out, each is read at most once.
- Images that could not be read, as from a store that was down, are read again in every run. Images whose decoder was
  missing are read again once it is installed.
- All other failures are read again only with --force, for example after a store has sent error pages: a list does not
  show that an image has changed.
- Windows are fixed, so the result is that of an uninterrupted job.
"""

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from dcar_core import Encoder
from dcar_core.images import IMAGE_SUFFIXES
from dcar_core.images.workers import DecodeWorker
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import DataError, ImageFault
from index_jobs.encoding.decode import is_readable
from index_jobs.encoding.failures import write_failed
from index_jobs.encoding.shards import FailedImage, Shard, ShardStore
from index_jobs.encoding.vector_reuse import ReusableVectors, ReusedVectors
from index_jobs.gallery.scan import Gallery
from index_jobs.gallery.storage import ImageLocation, is_url, read_images
from index_jobs.spec import BuildOptions
from index_jobs.store.items import SIZE_COLUMNS
from index_jobs.store.manifest import FAILED

logger = logging.getLogger(__name__)

LOCATION_COLUMNS = ["location", "offset", "size", "mtime_ns"]  # the fields of `ImageLocation` after the row
_FAULTS_OF_READING = (ImageFault.MISSING, ImageFault.UNREADABLE)
_READ_AT_ONCE = 32  # images whose bytes are in memory together
_MAX_RETRY_S = 60.0  # for all images of a kind: a host that never responds must not hold a job for hours


@dataclass(frozen=True)
class EncodedGallery:
    """A gallery in shards. This run encoded `encoded` images in `seconds`; earlier runs had encoded `resumed`.

    adapt: turns the features of the shards into vectors.
    """

    shards: list[Shard]
    adapt: Callable[[Floats], Floats]
    failed: list[FailedImage]
    encoded: int
    resumed: int
    seconds: float

    def __len__(self) -> int:
        return sum(shard.stop - shard.start - len(shard.failed) for shard in self.shards)

    @property
    def unread(self) -> int:
        """Number of failed images that a later run may be able to read."""
        return sum(len(shard.unread) for shard in self.shards)

    def rows(self) -> Rows:
        """Gallery row of every vector, int64 (n,), ascending."""
        return np.concatenate([shard.rows for shard in self.shards])

    def with_sizes(self, table: pa.Table) -> pa.Table:
        """Return the gallery's table with the columns of `SIZE_COLUMNS`, null where a size is unknown."""
        sizes = np.zeros((table.num_rows, 2), np.int32)
        for shard in self.shards:
            sizes[shard.rows] = shard.sizes
        for name, column in zip(SIZE_COLUMNS, sizes.T, strict=True):
            table = table.append_column(name, pa.array(column, mask=column <= 0))
        return table

    def duplicates(self) -> list[tuple[int, int]]:
        """(gallery row, first row with the same pixels) of every repeated image."""
        rows, hashes = self.rows(), np.concatenate([shard.pixel_hashes for shard in self.shards])
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        same = first[group]
        return [(int(rows[i]), int(rows[same[i]])) for i in np.flatnonzero(same != np.arange(len(rows)))]

    def blocks(self) -> Iterator[Floats]:
        """The vectors, float32 (m, E) at a time."""
        return (self.adapt(shard.vectors()) for shard in self.shards)


def shard_store(gallery: Gallery, encoder: Encoder, runtime: str, work: Path, options: BuildOptions) -> ShardStore:
    """Return the store of the shards that a runtime makes of a gallery."""
    return ShardStore(
        work,
        image_key=encoder.image_key,
        runtime=runtime,
        pixels=encoder.preprocess.to_dict(),
        signature=gallery.vectors_signature,
        count=len(gallery),
        dim=encoder.dim,
        batch=options.batch_size,
        rows=-(-options.shard_rows // options.batch_size) * options.batch_size,
    )


def any_readable(gallery: Gallery, failed: Sequence[FailedImage], deadline: float) -> bool:
    """Return True if any of these images can be read now. Images that failed to decode must decode as well.

    deadline: by `time.monotonic`; no image is read after it.
    """
    columns = [gallery.table[name] for name in LOCATION_COLUMNS]
    with closing(DecodeWorker()) as worker:
        for start in range(0, len(failed), _READ_AT_ONCE):
            if time.monotonic() >= deadline:
                return False
            batch = failed[start : start + _READ_AT_ONCE]
            locations = [ImageLocation(each.row, *(column[each.row].as_py() for column in columns)) for each in batch]
            for failure, data in zip(batch, read_images(gallery.root, locations, pauses=()), strict=True):
                if isinstance(data, bytes) and (failure.fault in _FAULTS_OF_READING or is_readable(data, worker)):
                    return True
    return False


def image_locations(root: str, table: Any, span: range) -> list[ImageLocation]:
    """Return the locations of some rows of a gallery. table: needs only the LOCATION_COLUMNS."""
    root = root if is_url(root) else ""
    rows = table.slice(span.start, len(span)).select(LOCATION_COLUMNS).to_pylist()
    return [ImageLocation(*(row, *columns.values(), root)) for row, columns in zip(span, rows, strict=True)]


class EncodingState:
    """The encoding of one gallery: fill `shards` for every number in `todo`, then call `result`."""

    def __init__(
        self,
        gallery: Gallery,
        encoder: Encoder,
        work: Path,
        options: BuildOptions,
        runtime: str,
        *,
        whole_shards: bool = False,
    ) -> None:
        """Load the complete shards.

        Args:
            runtime: the runtime that will make the vectors.
            whole_shards: encode all images of a shard unless all of their vectors can be reused.
        """
        self.store = shard_store(gallery, encoder, runtime, work, options)
        self._gallery, self._options, self._adapt = gallery, options, encoder.adapt_images
        numbers = range(len(self.store))
        self.shards = {number: shard for number in numbers if (shard := self.store.load(number))}
        self._reopen_readable(_FAULTS_OF_READING)
        if ".heic" in IMAGE_SUFFIXES:
            self._reopen_readable({ImageFault.MISSING_DECODER})
        if options.force:
            self._reopen_readable([fault for fault in ImageFault if not fault.is_temporary])
        self._reusable = ReusableVectors(self.store.other_galleries())
        self._positions: dict[int, NDArray[np.int64]] = {}
        for number in [number for number in numbers if number not in self.shards] if len(self._reusable) else ():
            self._reuse(number, whole_shards=whole_shards)
        self.todo = [number for number in numbers if number not in self.shards]
        self.resumed = sum(shard.stop - shard.start for shard in self.shards.values())
        self.resumed += sum(int((positions >= 0).sum()) for positions in self._positions.values())
        self.remaining = len(gallery) - self.resumed
        if self.resumed:
            logger.info("%d of %d images have vectors already", self.resumed, len(gallery))
        self._failed = [failure for shard in self.shards.values() for failure in shard.failed]
        self._check_failed()
        self._start = time.perf_counter()

    def _reopen_readable(self, faults: Collection[ImageFault]) -> None:
        """Mark shards as unfinished if an image that failed for one of these reasons can be read now."""
        deadline = time.monotonic() + _MAX_RETRY_S
        failed = {n: [failure for failure in s.failed if failure.fault in faults] for n, s in self.shards.items()}
        if count := sum(map(len, failed.values())):
            logger.info("retrying %d images that could not be read", count)
        readable = [number for number, images in failed.items() if any_readable(self._gallery, images, deadline)]
        for number in readable:
            del self.shards[number]
            self.store.reopen(number)
        if readable:
            logger.info("%d shards are encoded again, since images that they lack can be read now", len(readable))

    def _reuse(self, number: int, *, whole_shards: bool) -> None:
        """Save a shard from the vectors of other galleries, or remember which of its images they have."""
        locations = self.locations(number)
        positions = self._reusable.positions(locations)
        if (positions >= 0).all():
            reused = self._reusable.take(positions, self.store.dim)
            hashes = np.array([location.location_hash for location in locations], np.uint64)
            self.shards[number] = self.store.save(number, reused.vectors, [], reused.pixel_hashes, hashes, reused.sizes)
        elif (positions >= 0).any() and not whole_shards:
            self._positions[number] = positions

    def locations(self, number: int) -> list[ImageLocation]:
        return image_locations(self._gallery.root, self._gallery.table, self.store.span(number))

    def missing(self, number: int) -> list[ImageLocation]:
        """Return the locations of the images of a shard that must be encoded."""
        locations = self.locations(number)
        if number not in self._positions:
            return locations
        return [location for location, at in zip(locations, self._positions[number], strict=True) if at < 0]

    def reused(self, number: int) -> ReusedVectors:
        """Return the vectors of a shard that other galleries have."""
        return self._reusable.take(self._positions.get(number, np.empty(0, np.int64)), self.store.dim)

    def progress_bar(self) -> "tqdm[NoReturn]":
        """Return a bar on stderr: updated twice a second on a terminal, every ten seconds in a log file."""
        return tqdm(
            total=self.remaining + self.resumed,
            initial=self.resumed,
            desc="encode",
            unit="img",
            file=sys.stderr,
            disable=not self._options.progress or sys.stderr is None,
            mininterval=0.5 if sys.stderr and sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        )

    def advance(self, bar: "tqdm[NoReturn]", images: int) -> None:
        if self._options.on_encoded is not None:
            self._options.on_encoded(images)
        bar.set_postfix_str(f"{len(self._failed)} failed", refresh=False)
        bar.update(images)

    def add_failed(self, failed: Sequence[FailedImage]) -> None:
        if failed:
            self._failed += failed
            self._check_failed()

    def _check_failed(self, *, final: bool = False) -> None:
        """Compare the failures with the limit; final: no image follows."""
        gallery, count, total = self._gallery, len(self._failed), len(self._gallery)
        if count <= self._options.spec.max_failed * total and not (final and count == total):
            return
        self.store.path.mkdir(parents=True, exist_ok=True)
        path = self.store.path / FAILED
        write_failed(path, gallery, self._failed)
        names = gallery.table["name"]
        examples = "; ".join(f"{names[failure.row].as_py()}: {failure.reason}" for failure in sorted(self._failed)[:3])
        raise DataError(
            f"{'no image' if count == total else 'too few images'} of {gallery.location} can be read: {count:,} of "
            f"{total:,} failed, at most {self._options.spec.max_failed:.1%} may. {examples}. {path} lists them; repair "
            f"or remove them, or raise --max-failed"
        )

    def result(self) -> EncodedGallery:
        """Return the encoded gallery, once no shard is left to do."""
        seconds = time.perf_counter() - self._start
        self._check_failed(final=True)
        shards = [self.shards[number] for number in sorted(self.shards)]
        return EncodedGallery(shards, self._adapt, sorted(self._failed), self.remaining, self.resumed, seconds)
