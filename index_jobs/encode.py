"""Encode a gallery into vector shards: decode ahead, a forward pass a window, a shard every thousand rows.

- Windows are fixed ranges of gallery rows inside a shard, whatever fails in them, so that every run makes the same
  forward passes and a resumed job's vectors are bit for bit those of an undisturbed one.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from index_jobs.decode import Pixels, Window, decode, worker_count
from index_jobs.devices import Floats, ImageEncoder, forward
from index_jobs.gallery import Gallery
from index_jobs.pixels import PixelCache
from index_jobs.progress import Encoded, Encoding
from index_jobs.shards import Failed, Shard, ShardStore
from index_jobs.sources import Place

PLACE = ["location", "offset", "size", "mtime_ns"]  # the columns that `Place` is made of


def encode(
    gallery: Gallery,
    encoder: ImageEncoder | Sequence[ImageEncoder],
    work: Path,
    *,
    workers: int | None = None,
    batch_size: int = 64,
    shard_rows: int = 1024,
    max_failed: float = 0.05,
    progress: bool = True,
    cache: PixelCache | None = None,
) -> Encoded:
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
    job = Encoding(
        gallery, lanes[0], work, runtime=lanes[0].runtime.name, batch_size=batch_size, shard_rows=shard_rows,
        max_failed=max_failed, progress=progress,
    )  # fmt: skip
    spans = (job.store.span(number) for number in job.todo)
    windows = (window for span in spans for window in windows_of(gallery.root, gallery.table, span, batch_size))
    decoded = decode(windows, lanes[0].preprocess, worker_count(workers, job.left), cache)
    with closing(decoded), job.bar() as bar:

        def watched() -> Iterator[Pixels]:
            """Failures are counted before the forward pass, so that a hopeless job ends without it."""
            for window in decoded:
                job.guard.add(window.failed)
                yield window

        def shown() -> Iterator[tuple[Pixels, Floats]]:
            for window, encoded in vectors:
                job.advance(bar, window.size)
                yield window, encoded

        with closing(forward(watched(), lanes)) as vectors:
            done = shown()
            for number in job.todo:
                job.shards[number] = save_shard(job.store, number, done)
    return job.encoded()


def windows_of(root: str, table: Any, span: range, batch: int) -> Iterator[Window]:
    """The forward passes of a shard; `table` has the columns PLACE."""
    for start in range(span.start, span.stop, batch):
        rows = table.slice(start, min(batch, span.stop - start)).select(PLACE)
        places = tuple(Place(start + i, *row.values()) for i, row in enumerate(rows.to_pylist()))
        yield Window(root, places)


def save_shard(store: ShardStore, number: int, windows: Iterator[tuple[Pixels, Floats]]) -> Shard:
    """Take a shard's windows, and write it."""
    vectors, digests, failed = [], [], list[Failed]()  # and no pixels, of which a shard has 150 MB
    missing = len(store.span(number))
    while missing:
        window, encoded = next(windows)
        vectors.append(encoded)
        digests.append(window.digests)
        failed += window.failed
        missing -= window.size
    return store.save(number, np.concatenate(vectors), failed, np.concatenate(digests))
