"""Encode a gallery into vector shards: decode ahead, a forward pass a window, a shard every thousand rows.

- Windows are fixed parts of a shard, whatever fails in them, so that every run makes the same forward passes and a
  resumed job's vectors are bit for bit those of an undisturbed one.
- Pictures whose vectors are known from another gallery are in no window: see `known`.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from dcar_core.util.arrays import Floats
from index_jobs.encoding.decode import DecodedWindow, Window, decode_windows, worker_count
from index_jobs.encoding.devices import ImageEncoder, encode_windows
from index_jobs.encoding.encoding_state import EncodedGallery, EncodingState
from index_jobs.encoding.pixel_cache import PixelCache
from index_jobs.encoding.shards import FailedImage, Shard, ShardStore
from index_jobs.encoding.vector_reuse import ReusedVectors
from index_jobs.gallery.scan import Gallery
from index_jobs.gallery.storage import ImageLocation
from index_jobs.options import RebuildOptions


def encode_gallery(
    gallery: Gallery,
    encoder: ImageEncoder | Sequence[ImageEncoder],
    work: Path,
    *,
    workers: int | None = None,
    batch_size: int = RebuildOptions.batch_size,
    shard_rows: int = RebuildOptions.shard_rows,
    max_failed: float = RebuildOptions.max_failed,
    progress: bool = True,
    cache: PixelCache | None = None,
) -> EncodedGallery:
    """Encode every picture that has no vector yet.

    Args:
        encoder: one, or the lanes that `load_encoders` gives for several devices.
        work: the directory for shards; see `ShardStore`.
        workers: decoding processes, 0 for threads of this process, None to choose.
        batch_size: pictures in one forward pass.
        shard_rows: pictures in one shard; rounded up to whole batches.
        max_failed: the share of the gallery that may be unreadable, 0 to 1.
        progress: a bar on stderr with rate, time left and failures.
        cache: where decoded pictures are kept and looked for.

    Raises:
        DataError: too many pictures cannot be read, or none can.
        ArtifactError: a shard of an earlier run is corrupted.
        OSError: the disk is full or cannot be written.
    """
    lanes = list(encoder) if isinstance(encoder, Sequence) else [encoder]
    job = EncodingState(
        gallery, lanes[0], work, runtime=lanes[0].runtime.name, batch_size=batch_size, shard_rows=shard_rows,
        max_failed=max_failed, progress=progress,
    )  # fmt: skip
    windows = (window for number in job.todo for window in split_windows(gallery.root, job.unknown(number), batch_size))
    decoded = decode_windows(windows, lanes[0].preprocess, worker_count(workers, job.left), cache)
    with closing(decoded), job.bar() as bar:

        def watched() -> Iterator[DecodedWindow]:
            """Failures are counted before the forward pass, so that a hopeless job ends without it."""
            for window in decoded:
                job.guard.add(window.failed)
                yield window

        def shown() -> Iterator[tuple[DecodedWindow, Floats]]:
            for window, encoded in vectors:
                job.advance(bar, window.size)
                yield window, encoded

        with closing(encode_windows(watched(), lanes)) as vectors:
            done = shown()
            for number in job.todo:
                job.shards[number] = save_shard(job.store, number, job.places(number), done, job.taken(number))
    return job.encoded()


def split_windows(root: str, places: Sequence[ImageLocation], batch: int) -> Iterator[Window]:
    """The forward passes of a shard."""
    for start in range(0, len(places), batch):
        yield Window(root, tuple(places[start : start + batch]))


def save_shard(
    store: ShardStore,
    number: int,
    places: Sequence[ImageLocation],
    windows: Iterator[tuple[DecodedWindow, Floats]],
    taken: ReusedVectors | None = None,
) -> Shard:
    """Take a shard's windows, and write it.

    Args:
        places: of all its pictures.
        taken: what is known of them already, and in no window.
    """
    known = taken.which if taken is not None else np.empty(0, np.int64)
    vectors, digests = ([taken.vectors], [taken.digests]) if taken is not None else ([], [])
    failed = list[FailedImage]()  # and no pixels, of which a shard has 150 MB
    missing = len(places) - len(known)
    while missing:
        window, encoded = next(windows)
        vectors.append(encoded)
        digests.append(window.digests)
        failed += window.failed
        missing -= window.size
    lost = {row for row, _ in failed}
    read = np.array([at for at, place in enumerate(places) if place.row not in lost], np.int64)
    order = np.argsort(np.concatenate([known, np.setdiff1d(read, known)]))
    marks = np.array([places[at].mark for at in read], np.uint64)
    return store.save(number, np.concatenate(vectors)[order], failed, np.concatenate(digests)[order], marks)
