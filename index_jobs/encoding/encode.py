"""Encode a gallery into vector shards: decode ahead, one forward pass per window, one shard per thousand rows.

- Windows are fixed parts of a shard, whichever images fail. Every run therefore makes the same forward passes, and the
  vectors of a resumed job are bit for bit those of an uninterrupted one.
- Images whose vectors another gallery has are in no window: see `vector_reuse`.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from dcar_core import Encoder
from dcar_core.util.arrays import Floats
from index_jobs.encoding.decode import DecodedWindow, decode_windows, worker_count
from index_jobs.encoding.devices import encode_windows
from index_jobs.encoding.encoding_state import EncodedGallery, EncodingState
from index_jobs.encoding.pixel_cache import PixelCache
from index_jobs.encoding.shards import FailedImage, Shard, ShardStore
from index_jobs.encoding.vector_reuse import ReusedVectors
from index_jobs.gallery.scan import Gallery
from index_jobs.gallery.storage import ImageLocation
from index_jobs.spec import BuildOptions


def encode_gallery(
    gallery: Gallery,
    replicas: Sequence[Encoder],
    work: Path,
    options: BuildOptions,
    cache: PixelCache | None = None,
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
    state = EncodingState(gallery, replicas[0], work, options, replicas[0].runtime.name)
    windows = (window for number in state.todo for window in split_windows(state.missing(number), options.batch_size))
    workers = worker_count(options.workers, state.remaining)
    decoded = decode_windows(gallery.root, windows, replicas[0].preprocess, workers, cache)
    with closing(decoded), state.progress_bar() as bar:

        def checked() -> Iterator[DecodedWindow]:
            for window in decoded:
                state.add_failed(window.failed)  # before the forward pass, so that a hopeless job ends early
                yield window

        def counted() -> Iterator[tuple[DecodedWindow, Floats]]:
            for window, encoded in vectors:
                state.advance(bar, window.size)
                yield window, encoded

        with closing(encode_windows(checked(), replicas)) as vectors:
            encoded_windows = counted()
            for number in state.todo:
                state.shards[number] = save_shard(
                    state.store, number, state.locations(number), encoded_windows, state.reused(number)
                )
    return state.result()


def split_windows(locations: Sequence[ImageLocation], batch: int) -> Iterator[Sequence[ImageLocation]]:
    return (locations[start : start + batch] for start in range(0, len(locations), batch))


def save_shard(
    store: ShardStore,
    number: int,
    locations: Sequence[ImageLocation],
    windows: Iterator[tuple[DecodedWindow, Floats]],
    reused: ReusedVectors,
) -> Shard:
    """Consume the windows of a shard and write it.

    Args:
        locations: of all images of the shard.
        reused: the vectors that exist already; their images are in no window.
    """
    vectors, hashes, sizes = [reused.vectors], [reused.pixel_hashes], [reused.sizes]
    failed = list[FailedImage]()
    missing = len(locations) - len(reused.indices)
    while missing:  # keeps no window: the pixels of a shard take 150 MB
        window, encoded = next(windows)
        vectors.append(encoded)
        hashes.append(window.pixel_hashes)
        sizes.append(window.sizes)
        failed += window.failed
        missing -= window.size
    failed_rows = {failure.row for failure in failed}
    readable = np.array([i for i, location in enumerate(locations) if location.row not in failed_rows], np.int64)
    order = np.argsort(np.concatenate([reused.indices, np.setdiff1d(readable, reused.indices)]))
    location_hashes = np.array([locations[i].location_hash for i in readable], np.uint64)
    joined = np.concatenate(vectors)[order]
    pixel_hashes, all_sizes = np.concatenate(hashes)[order], np.concatenate(sizes)[order]
    return store.save(number, joined, failed, pixel_hashes, location_hashes, all_sizes)
