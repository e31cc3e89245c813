"""Encode a gallery into vector shards: decode ahead, a forward pass a window, a shard on disk every thousand rows.

- Windows are fixed ranges of gallery rows inside a shard, whatever fails in them, so that every run makes the same
  forward passes and a resumed job's vectors are bit for bit those of an undisturbed one.
- A broken picture is listed in `failed.jsonl` with its reason; the job stops as soon as more than `max_failed` of the
  gallery has failed, since no later picture could mend that.
- Whole shards are skipped, after their checksum was checked.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dcar_core.errors import DataError
from index_jobs.decode import Pixels, Preprocess, Window, decode, worker_count
from index_jobs.files import replacing
from index_jobs.gallery import Gallery
from index_jobs.shards import Failed, Shard, ShardStore
from index_jobs.sources import Place

logger = logging.getLogger(__name__)

FAILED_FILE = "failed.jsonl"


class ImageEncoder(Protocol):
    """What encoding needs of `dcar_core.Encoder`."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def preprocess(self) -> Preprocess: ...
    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Encoded:
    """A gallery in shards. `encoded` pictures were encoded by this run in `seconds`, `resumed` by an earlier one."""

    shards: list[Shard]
    failed: list[Failed]
    encoded: int
    resumed: int
    seconds: float

    def __len__(self) -> int:
        return sum(shard.stop - shard.start - len(shard.failed) for shard in self.shards)

    def rows(self) -> NDArray[np.int64]:
        """Gallery row of every vector, int64 (n,)."""
        return np.concatenate([shard.rows for shard in self.shards])

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """The vectors, float32 (m, E) at a time."""
        return (shard.vectors() for shard in self.shards)


def encode(
    gallery: Gallery,
    encoder: ImageEncoder,
    work: Path,
    *,
    workers: int | None = None,
    batch_size: int = 64,
    shard_rows: int = 1024,
    max_failed: float = 0.05,
    progress: bool = True,
) -> Encoded:
    """Encode every picture that has no vector yet.

    Args:
        work: the directory for shards; see `ShardStore`.
        workers: decoding processes, 0 for threads of this process, None to choose.
        batch_size: pictures in one forward pass.
        shard_rows: pictures in one shard; rounded up to whole batches.
        max_failed: the share of the gallery that may be unreadable, 0 to 1.
        progress: a bar on stderr with rate, time left and failures.

    Raises:
        DataError: too many pictures cannot be read, or none can.
        ArtifactError: a shard of an earlier run is corrupted.
        OSError: the disk is full or cannot be written.
    """
    if batch_size < 1 or shard_rows < 1:
        raise ValueError(f"batch_size and shard_rows must be at least 1, not {batch_size} and {shard_rows}")
    if not 0 <= max_failed <= 1:
        raise ValueError(f"max_failed is a share from 0 to 1, not {max_failed}")
    store = ShardStore(
        work,
        fingerprint=encoder.fingerprint,
        signature=gallery.vectors_signature,
        count=len(gallery),
        dim=encoder.dim,
        batch=batch_size,
        rows=-(-shard_rows // batch_size) * batch_size,
    )
    shards = {number: shard for number in range(len(store)) if (shard := store.load(number))}
    todo = [number for number in range(len(store)) if number not in shards]
    failed = [failure for shard in shards.values() for failure in shard.failed]
    resumed = sum(shard.stop - shard.start for shard in shards.values())
    if resumed:
        logger.info("%d of %d pictures were encoded by an earlier run", resumed, len(gallery))
    guard = _Guard(gallery, store.path, max_failed, failed)
    start = time.perf_counter()
    left = len(gallery) - resumed
    windows = (window for number in todo for window in _windows(gallery, store.span(number), batch_size))
    decoded = decode(windows, encoder.preprocess, worker_count(workers, left))
    with closing(decoded) as pixels, _bar(len(gallery), resumed, progress) as bar:
        for number in todo:
            guard.check()
            shards[number] = _shard(store, number, encoder, pixels, guard, bar)
    seconds = time.perf_counter() - start
    guard.check(final=True)
    return Encoded([shards[n] for n in sorted(shards)], sorted(guard.failed), left, resumed, seconds)


def _shard(
    store: ShardStore,
    number: int,
    encoder: ImageEncoder,
    windows: Iterator[Pixels],
    guard: "_Guard",
    bar: "tqdm[NoReturn]",
) -> Shard:
    vectors = [np.empty((0, encoder.dim), np.float32)]
    failed: list[Failed] = []
    missing = len(store.span(number))
    while missing:
        window = next(windows)
        if len(window.pixels):
            vectors.append(encoder.encode_pixels(window.pixels))
        failed += window.failed
        guard.add(window.failed)
        missing -= window.size
        bar.set_postfix_str(f"{len(guard.failed)} failed", refresh=False)
        bar.update(window.size)
    return store.save(number, np.concatenate(vectors), failed)


def _windows(gallery: Gallery, span: range, batch: int) -> Iterator[Window]:
    for start in range(span.start, span.stop, batch):
        rows = gallery.table.slice(start, min(batch, span.stop - start)).select(["location", "offset", "size"])
        places = tuple(Place(start + i, **row) for i, row in enumerate(rows.to_pylist()))
        yield Window(gallery.root, places)


class _Guard:
    """Counts failures, and ends the job when there are too many."""

    def __init__(self, gallery: Gallery, work: Path, max_failed: float, failed: list[Failed]) -> None:
        self.gallery, self.work, self.max_failed, self.failed = gallery, work, max_failed, failed

    def add(self, failed: tuple[Failed, ...]) -> None:
        if failed:
            self.failed.extend(failed)
            self.check()

    def check(self, *, final: bool = False) -> None:
        count, total = len(self.failed), len(self.gallery)
        none_left = count == total
        if count <= self.max_failed * total and not (final and none_left):
            return
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / FAILED_FILE
        write_failed(path, self.gallery, self.failed)
        names = self.gallery.table["name"]
        first = "; ".join(f"{names[row].as_py()}: {reason}" for row, reason in sorted(self.failed)[:3])
        raise DataError(
            f"{'no picture' if none_left else 'too few pictures'} of {self.gallery.source} can be read: {count:,} of "
            f"{total:,} failed, at most {self.max_failed:.1%} may. {first}. {path} lists those found so far; mend or "
            f"remove them, or raise --max-failed"
        )


def write_failed(path: Path, gallery: Gallery, failed: list[Failed]) -> None:
    """`failed.jsonl`: a line for each unreadable picture with its id, name and reason, in gallery order."""
    table = gallery.table
    with replacing(path) as file:
        for row, reason in sorted(failed):
            line = {"id": table["id"][row].as_py(), "name": table["name"][row].as_py(), "reason": reason}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _bar(total: int, done: int, progress: bool) -> "tqdm[NoReturn]":
    """On a terminal twice a second, in a log file every ten seconds."""
    return tqdm(
        total=total,
        initial=done,
        desc="encode",
        unit="img",
        file=sys.stderr,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
    )
