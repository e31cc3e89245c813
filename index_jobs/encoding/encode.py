"""Encode a gallery into vector shards: decode ahead, one forward pass per window, one shard per thousand rows.

- Windows are fixed parts of a shard, whichever images fail. Every run therefore makes the same forward passes, and the
  vectors of a resumed job are bit for bit those of an uninterrupted one.
- Complete shards are skipped after their checksums have been verified. Images whose vectors another gallery has are
  copied first, and in no window.
- Failed images are tried again: those that could not be read, as from a store that was down, in every run; those whose
  decoder was missing, once it is installed; all others only with --force, for example after a store has sent error
  pages, since a list does not show that an image has changed.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from dcar_core import Encoder
from dcar_core.images import IMAGE_SUFFIXES
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.console import progress_bar
from dcar_core.util.errors import DataError, ImageFault
from dcar_core.util.files import write_json_lines
from index_jobs.encoding.decode import decode_windows, worker_count
from index_jobs.encoding.devices import EncodedWindow, encode_windows
from index_jobs.encoding.shards import FailedImage, Images, ReusableVectors, Shard, ShardStore
from index_jobs.gallery.scan import Gallery
from index_jobs.gallery.storage import ImageLocation, is_url, join_location
from index_jobs.index.items import SIZE_COLUMNS, take_rows
from index_jobs.index.manifest import FAILED
from index_jobs.spec import BuildOptions

logger = logging.getLogger(__name__)

_LOCATION_COLUMNS = ["location", "offset", "size", "mtime_ns", "name"]  # the fields of `ImageLocation` after the row


class EncodedGallery:
    """A gallery in shards. It is complete once every shard in `todo` was given to `save`, and `finish` was called.

    images: then records of those with a vector, in gallery order. failed: the others.
    encoded, seconds: images and duration of this run. resumed: images of earlier runs. bar: the progress on stderr.
    """

    images: Images
    seconds: float

    def __init__(self, gallery: Gallery, encoder: Encoder, work: Path, options: BuildOptions) -> None:
        self.store = ShardStore(gallery, encoder, work, options)
        self.gallery, self._options, self._adapt = gallery, options, encoder.adapt_images
        self.shards = [self._reopen(self.store.load(number), number) for number in range(len(self.store))]
        reusable = ReusableVectors(self.store.other_folders())
        for number in self._unfinished() if len(reusable) else ():
            images, vectors = reusable.take(self._locations(number), self.store.dim)
            if len(images):
                self.shards[number] = self.store.extend(number, [(images, vectors)])
        self.todo = self._unfinished()
        self.encoded = sum(len(self.shards[number].missing) for number in self.todo)
        self.resumed = len(gallery) - self.encoded
        if self.resumed:
            logger.info("%d of %d images have vectors already", self.resumed, len(gallery))
        self.failed = [failure for shard in self.shards for failure in shard.failed]
        self._check_failed()
        self._start = time.perf_counter()
        self.bar = progress_bar(len(gallery), "encode", "img", is_shown=options.progress, initial=self.resumed)

    def _unfinished(self) -> list[int]:
        return [number for number, shard in enumerate(self.shards) if shard.missing]

    def _reopen(self, shard: Shard, number: int) -> Shard:
        """Return the shard with the failed images that are tried again as images that are still to do."""
        again = {fault: fault.is_temporary or self._options.force for fault in ImageFault}
        again[ImageFault.MISSING_DECODER] = ".heic" in IMAGE_SUFFIXES
        kept = [failure for failure in shard.failed if not again[failure.fault]]
        return shard if len(kept) == len(shard.failed) else self.store.save(number, shard.images, shard.vectors(), kept)

    def _locations(self, number: int) -> list[ImageLocation]:
        rows = self.shards[number].missing
        columns = take_rows(self.gallery.table.select(_LOCATION_COLUMNS), np.array(rows, np.int64)).to_pylist()
        for values in columns:
            if is_url(url := join_location(self.gallery.root, values["location"])):  # galleries may use the same names
                values["name"] = url
        return [ImageLocation(*(row, *values.values())) for row, values in zip(rows, columns, strict=True)]

    def windows(self, number: int) -> list[list[ImageLocation]]:
        """Return the images of a shard that must be encoded, in windows."""
        locations, batch = self._locations(number), self._options.batch_size
        return [locations[start : start + batch] for start in range(0, len(locations), batch)]

    def save(self, number: int, windows: Iterable[EncodedWindow]) -> None:
        """Add encoded windows to a shard. Raise DataError once too many images have failed."""
        parts, failed = list[tuple[Images, Floats]](), list[FailedImage]()
        for window in windows:
            parts.append((window.images, window.features))
            failed += window.failed
            self.failed += window.failed
            self._check_failed()
            count = len(window.images) + len(window.failed)
            if self._options.on_encoded is not None:
                self._options.on_encoded(count)
            self.bar.set_postfix_str(f"{len(self.failed)} failed", refresh=False)
            self.bar.update(count)
        self.shards[number] = self.store.extend(number, parts, failed)

    def _check_failed(self, *, final: bool = False) -> None:
        """Compare the failures with the limit; final: no image follows."""
        gallery, count, total = self.gallery, len(self.failed), len(self.gallery)
        if count <= self._options.spec.max_failed * total and not (final and count == total):
            return
        self.store.path.mkdir(parents=True, exist_ok=True)
        path = self.store.path / FAILED
        self.write_failed(path)
        names = gallery.table["name"]
        examples = "; ".join(f"{names[failure.row].as_py()}: {failure.reason}" for failure in sorted(self.failed)[:3])
        what, limit, remedy = "no image", "", ""
        if count < total:
            what, limit = "too few images", f", at most {self._options.spec.max_failed:.1%} may"
            remedy = ", or raise --max-failed"
        raise DataError(
            f"{what} of {gallery.location} can be read: {count:,} of {total:,} failed{limit}. {examples}. {path} lists "
            f"them; repair or remove them{remedy}"
        )

    def finish(self) -> "EncodedGallery":
        self.seconds = time.perf_counter() - self._start
        self._check_failed(final=True)
        self.images = np.concatenate([shard.images for shard in self.shards])
        self.failed.sort()
        return self

    def __len__(self) -> int:
        return len(self.images)

    @property
    def unread(self) -> int:
        """Number of failed images that a later run may be able to read."""
        return sum(failure.fault.is_temporary for failure in self.failed)

    def rows(self) -> Rows:
        """Gallery row of every vector, int64 (n,), ascending."""
        rows: Rows = self.images["row"]
        return rows

    def table(self) -> pa.Table:
        """Return the gallery's table with the columns of `SIZE_COLUMNS`, null where a size is unknown."""
        table = self.gallery.table
        sizes = np.zeros((table.num_rows, 2), np.int32)
        sizes[self.images["row"]] = self.images["size"]
        for name, column in zip(SIZE_COLUMNS, sizes.T, strict=True):
            table = table.append_column(name, pa.array(column, mask=column <= 0))
        return table

    def duplicates(self) -> list[tuple[int, int]]:
        """(gallery row, first row with the same pixels) of every repeated image."""
        rows = self.rows()
        _, first, group = np.unique(self.images["pixel_hash"], return_index=True, return_inverse=True)
        same = first[group]
        return [(int(rows[i]), int(rows[same[i]])) for i in np.flatnonzero(same != np.arange(len(rows)))]

    def blocks(self) -> Iterator[Floats]:
        """The vectors, float32 (m, E) at a time."""
        return (self._adapt(shard.vectors()) for shard in self.shards)

    def write_failed(self, path: Path) -> None:
        """Write id, name, reason and fault of each image without a vector, in gallery order, as JSON lines."""
        lines = ({**self._name(row), "reason": reason, "fault": fault} for row, reason, fault in sorted(self.failed))
        write_json_lines(path, lines)

    def write_duplicates(self, path: Path) -> None:
        """Write each image whose pixels an earlier one has, with that one's id and name, as JSON lines."""
        write_json_lines(path, ({**self._name(row), "same_as": self._name(first)} for row, first in self.duplicates()))

    def _name(self, row: int) -> dict[str, str]:
        return {column: self.gallery.table[column][row].as_py() for column in ("id", "name")}


def encode_gallery(gallery: Gallery, replicas: Sequence[Encoder], work: Path, options: BuildOptions) -> EncodedGallery:
    """Encode every image that has no vector yet.

    Args:
        replicas: the encoders of `load_replicas`.
        work: the directory of the shards; see `ShardStore`.

    Raises:
        DataError: too many images cannot be read, or none can.
        ArtifactError: a shard of an earlier run is corrupted.
        OSError: the disk is full or cannot be written.
    """
    encoded = EncodedGallery(gallery, replicas[0], work, options)
    windows = (window for number in encoded.todo for window in encoded.windows(number))
    workers = worker_count(options.workers, encoded.encoded)
    decoded = decode_windows(gallery.root, windows, replicas[0].preprocess, workers)
    with encoded.bar, closing(decoded), closing(encode_windows(decoded, replicas)) as vectors:
        for number in encoded.todo:
            encoded.save(number, islice(vectors, -(-len(encoded.shards[number].missing) // options.batch_size)))
    return encoded.finish()
