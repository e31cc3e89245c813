"""Encode a gallery into vector shards: decode ahead, one forward pass per window, one
shard per thousand rows.

- Windows are fixed parts of a shard, whichever images fail and however many devices
  compute. Every run therefore makes the same forward passes, and the vectors of a
  resumed job are bit for bit those of an uninterrupted one.
- Complete shards are skipped after their checksums have been verified. Images whose
  vectors another gallery has are copied first, and in no window. Every run tries the
  failed images again.
- Every GPU is used unless one is named, with two replicas of the model, so that one
  window is transferred while another is computed. A CPU computes in the job's own
  thread.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dcar_core import Encoder
from dcar_core.encoder.runtimes import AUTO
from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.console import progress_bar
from dcar_core.util.errors import DataError
from dcar_core.util.files import canonical_json, write_json_lines
from dcar_core.util.machine import is_installed
from index_jobs.encoding.decode import (
    DecodedWindow,
    FailedImage,
    decode_windows,
    map_ahead,
    worker_count,
)
from index_jobs.encoding.shards import Images, ReusableVectors, Shard, ShardStore
from index_jobs.gallery.locations import ImageLocation, is_url, join_location
from index_jobs.gallery.scan import Gallery
from index_jobs.index.items import SIZE_COLUMNS, TAKEN, take_rows
from index_jobs.index.manifest import FAILED
from index_jobs.spec import BuildOptions

logger = logging.getLogger(__name__)

# the fields of `ImageLocation` after the row
_LOCATION_COLUMNS = ["location", "offset", "size", "mtime_ns", "name"]


class EncodedWindow(NamedTuple):
    """The images of a window that can be read, their features, float32 (m, E), and the
    others.
    """

    images: Images
    features: Floats
    failed: tuple[FailedImage, ...]


def load_replicas(
    checkpoint: Path,
    device: str,
    *,
    exact: bool = False,
    runtime: str = "torch",
) -> list[Encoder]:
    """Load an encoder for each device, twice for a GPU, all on one runtime.

    Args:
        device: "auto" for every GPU or else the CPU; or device names with commas
            between them: cuda:0,cuda:1.
        exact: preprocess images as open_clip does, bit for bit.
        runtime: the encoder's runtime, as `Encoder.load` takes it.
    """
    names = [name.strip() for name in device.split(",")]
    if names == ["auto"] and is_installed("torch"):
        import torch

        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or names
    if runtime == AUTO and len({name.partition(":")[0] for name in names}) > 1:
        runtime = "torch"  # runs on all of them
    encoders = list[Encoder]()
    for name in names:
        encoder = Encoder.load(checkpoint, device=name, exact=exact, runtime=runtime)
        # PyTorch, if it is installed, resizes on every runtime, so the pixels are the
        # same
        if not exact:
            encoder.preprocess = encoder.preprocess.fast(torch=True)
        encoders.append(encoder)
        runtime = encoders[0].runtime.name  # "auto" has chosen
    return encoders + [
        encoder
        for encoder, name in zip(encoders, names, strict=True)
        if name.startswith("cuda")
    ]


def encode_windows(
    windows: Iterator[DecodedWindow], replicas: Sequence[Encoder]
) -> Generator[EncodedWindow, None, None]:
    """Yield each window with its features, in order; at most two windows per replica
    are under way.
    """

    def encode(encoder: Encoder, window: DecodedWindow) -> EncodedWindow:
        has_images = len(window.pixels) > 0
        if has_images:
            features = encoder.image_features(window.pixels)
        else:
            features = np.empty((0, encoder.dim), np.float32)
        return EncodedWindow(window.images, features, window.failed)

    if len(replicas) == 1:
        yield from (encode(replicas[0], window) for window in windows)
        return
    turns = iter(replicas)
    mine = threading.local()

    def take_replica() -> None:
        mine.encoder = next(turns)

    with ThreadPoolExecutor(len(replicas), "forward", take_replica) as threads:
        yield from map_ahead(
            threads,
            lambda window: encode(mine.encoder, window),
            windows,
            2 * len(replicas) - 1,
        )


@dataclass(frozen=True)
class EncodedGallery:
    """The vectors of a gallery, all in shards, and the images that have none.

    images: those with a vector, in gallery order. failed: the others. encoded, seconds:
    images and duration of the run that completed it. resumed: images of earlier runs.
    """

    gallery: Gallery
    images: Images
    failed: list[FailedImage]
    encoded: int
    resumed: int
    seconds: float
    _shards: list[Shard]
    _adapt: Callable[[Floats], Floats]

    def __len__(self) -> int:
        return len(self.images)

    def rows(self) -> Rows:
        """Gallery row of every vector, int64 (n,), ascending."""
        rows: Rows = self.images["row"]
        return rows

    def table(self) -> pa.Table:
        """Return the gallery's table with the field `TAKEN`, and the columns of
        `SIZE_COLUMNS`, null if unknown.
        """
        table = self.gallery.table
        if (dated := self.images[self.images["taken"] != b""]).size:
            metadata = table["metadata"].to_pylist()
            position = table.schema.get_field_index("metadata")
            for row, taken in zip(
                dated["row"].tolist(),
                dated["taken"].astype(str).tolist(),
                strict=True,
            ):
                metadata[row] = canonical_json(
                    {TAKEN: taken} | json.loads(metadata[row])
                ).decode()
            table = table.set_column(position, table.schema.field(position), [metadata])
        sizes = np.zeros((table.num_rows, 2), np.int32)
        sizes[self.images["row"]] = self.images["size"]
        for name, column in zip(SIZE_COLUMNS, sizes.T, strict=True):
            table = table.append_column(name, pa.array(column, mask=column <= 0))
        return table

    def blocks(self) -> Iterator[Floats]:
        """The vectors, float32 (m, E) at a time."""
        return (self._adapt(shard.vectors()) for shard in self._shards)

    def write_failed(self, path: Path) -> None:
        """Write the images without a vector; see `write_failed_images`."""
        write_failed_images(path, self.gallery, self.failed)


class EncodingRun:
    """A run that encodes the images of a gallery which have no vector yet.

    `complete` saves the shards of `todo` as they are encoded, each from its `windows`,
    and returns the complete gallery. encoded: images to encode. resumed: images of
    earlier runs.
    """

    def __init__(
        self,
        gallery: Gallery,
        encoder: Encoder,
        work: Path,
        options: BuildOptions,
    ) -> None:
        self._store = ShardStore(gallery, encoder, work, options)
        self._gallery = gallery
        self._options = options
        self._adapt = encoder.state.adapt_images
        self._shards = [self._store.load(number) for number in range(len(self._store))]
        self._failed = list[FailedImage]()
        self._copy_known_vectors()
        self.todo = self._unfinished()
        self.encoded = sum(len(self._shards[number].missing) for number in self.todo)
        self.resumed = len(gallery) - self.encoded
        if self.resumed:
            logger.info(
                "%d of %d images have vectors already",
                self.resumed,
                len(gallery),
            )

    def _copy_known_vectors(self) -> None:
        """Copy the vectors that the same encoder has computed for other galleries."""
        reusable = ReusableVectors(self._store.other_folders())
        if not len(reusable):
            return
        for number in self._unfinished():
            images, vectors = reusable.take(self._locations(number), self._store.dim)
            if len(images):
                self._shards[number] = self._store.extend(number, [(images, vectors)])

    def _unfinished(self) -> list[int]:
        return [number for number, shard in enumerate(self._shards) if shard.missing]

    def _locations(self, number: int) -> list[ImageLocation]:
        rows = self._shards[number].missing
        columns = take_rows(
            self._gallery.table.select(_LOCATION_COLUMNS), np.array(rows, np.int64)
        ).to_pylist()
        for values in columns:
            # galleries may use the same names
            if is_url(url := join_location(self._gallery.root, values["location"])):
                values["name"] = url
        return [
            ImageLocation(*(row, *values.values()))
            for row, values in zip(rows, columns, strict=True)
        ]

    def windows(self, number: int) -> list[list[ImageLocation]]:
        """Return the images of a shard that must be encoded, in windows."""
        locations = self._locations(number)
        batch = self._options.batch_size
        return [
            locations[start : start + batch]
            for start in range(0, len(locations), batch)
        ]

    def window_count(self, number: int) -> int:
        """Return the number of windows of a shard."""
        return -(-len(self._shards[number].missing) // self._options.batch_size)

    def complete(
        self, shards: Iterable[tuple[int, Iterable[EncodedWindow]]]
    ) -> EncodedGallery:
        """Save the shards of `todo`, and return the complete gallery.

        shards: the number and the encoded windows of each shard, in any order. Raise
        DataError once too many images have failed.
        """
        start = time.perf_counter()
        bar = progress_bar(
            len(self._gallery),
            "encode",
            "img",
            is_shown=self._options.progress,
            initial=self.resumed,
        )
        with bar:
            for number, windows in shards:
                parts = list[tuple[Images, Floats]]()
                for window in windows:
                    parts.append((window.images, window.features))
                    self._failed += window.failed
                    self._check_failed()
                    count = len(window.images) + len(window.failed)
                    if self._options.on_encoded is not None:
                        self._options.on_encoded(count)
                    bar.set_postfix_str(f"{len(self._failed)} failed", refresh=False)
                    bar.update(count)
                self._shards[number] = self._store.extend(number, parts)
        seconds = time.perf_counter() - start
        self._check_failed(final=True)
        return EncodedGallery(
            gallery=self._gallery,
            images=np.concatenate([shard.images for shard in self._shards]),
            failed=sorted(self._failed),
            encoded=self.encoded,
            resumed=self.resumed,
            seconds=seconds,
            _shards=self._shards,
            _adapt=self._adapt,
        )

    def _check_failed(self, *, final: bool = False) -> None:
        """Compare the failures with the limit; final: no image follows."""
        gallery = self._gallery
        count = len(self._failed)
        total = len(gallery)
        limit = self._options.spec.max_failed
        if count <= limit * total and not (final and count == total):
            return
        self._store.path.mkdir(parents=True, exist_ok=True)
        path = self._store.path / FAILED
        names = gallery.table["name"]
        write_failed_images(path, gallery, self._failed)
        examples = "; ".join(
            f"{names[failure.row].as_py()}: {failure.reason}"
            for failure in sorted(self._failed)[:3]
        )
        if limit < 1:
            fault = f"{count:,} of {total:,} failed, at most {limit:.1%} may"
            fault = f"too few images of {gallery.location} can be read: {fault}"
            remedy = ", or raise --max-failed"
        else:
            fault = f"none of the {total:,} images to encode can be read"
            remedy = ""
        raise DataError(
            f"{fault}. {examples}. {path} lists them; repair or remove them{remedy}"
        )


def write_failed_images(
    path: Path, gallery: Gallery, failed: Iterable[FailedImage]
) -> None:
    """Write id, name, reason and fault of each image without a vector, in gallery
    order, as JSON lines.
    """
    ids = gallery.table["id"]
    names = gallery.table["name"]
    records = (
        {
            "id": ids[image.row].as_py(),
            "name": names[image.row].as_py(),
            "reason": image.reason,
            "fault": image.fault,
        }
        for image in sorted(failed)
    )
    write_json_lines(path, records)


def encode_gallery(
    gallery: Gallery,
    replicas: Sequence[Encoder],
    work: Path,
    options: BuildOptions,
) -> EncodedGallery:
    """Encode every image that has no vector yet.

    Args:
        replicas: the encoders of `load_replicas`.
        work: the directory of the shards; see `ShardStore`.

    Raises:
        DataError: too many images cannot be read, or none can.
        ArtifactError: a shard of an earlier run is corrupted.
        OSError: the disk is full or cannot be written.
    """
    run = EncodingRun(gallery, replicas[0], work, options)
    workers = worker_count(options.workers, run.encoded)
    with closing(_encode_shards(run, gallery.root, replicas, workers)) as shards:
        return run.complete(shards)


def _encode_shards(
    run: EncodingRun, root: str, replicas: Sequence[Encoder], workers: int
) -> Generator[tuple[int, Iterable[EncodedWindow]], None, None]:
    """Yield the shards in order. Their windows are one stream, so the images of the
    next shard are decoded ahead.
    """
    windows = chain.from_iterable(map(run.windows, run.todo))
    decoded = decode_windows(root, windows, replicas[0].preprocess, workers)
    with closing(decoded), closing(encode_windows(decoded, replicas)) as encoded:
        for number in run.todo:
            yield number, islice(encoded, run.window_count(number))
