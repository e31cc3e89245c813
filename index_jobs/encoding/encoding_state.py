"""What every way of encoding a gallery shares: which shards are there, which are to do, and when to give up.

- Whole shards are skipped, after their checksum was checked.
- But a shard that lacks a picture for want of its bytes, where these can be read by now, is encoded again, so that a
  store that was down for a while costs no picture for good. Those that are still missing cost nothing but the question:
  a list with dead links is not encoded anew for another kind of index. Windows are fixed, so that what comes of it is
  what an undisturbed job would have made.
"""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from index_jobs.encoding.devices import ImageEncoder
from index_jobs.encoding.failures import FailureLimit
from index_jobs.encoding.shards import FailedImage, Shard, ShardStore
from index_jobs.encoding.vector_reuse import ReusableVectors, ReusedVectors
from index_jobs.gallery.scan import Gallery
from index_jobs.gallery.storage import ImageLocation, read_images

logger = logging.getLogger(__name__)

LOCATION_COLUMNS = ["location", "offset", "size", "mtime_ns"]  # the columns that `Place` is made of
_ASKED = 32  # pictures at a time, whose bytes are in memory together
_PATIENCE_S = 60.0  # for asking again in all: a host that swallows every question must not keep a job for hours


@dataclass(frozen=True)
class EncodedGallery:
    """A gallery in shards. `encoded` pictures were encoded by this run in `seconds`, `resumed` by an earlier one."""

    shards: list[Shard]
    failed: list[FailedImage]
    encoded: int
    resumed: int
    seconds: float

    def __len__(self) -> int:
        return sum(shard.stop - shard.start - len(shard.failed) for shard in self.shards)

    @property
    def unread(self) -> int:
        """How many of the failed could not be read, and may be another time."""
        return sum(len(shard.unread) for shard in self.shards)

    def rows(self) -> NDArray[np.int64]:
        """Gallery row of every vector, int64 (n,), ascending."""
        return np.concatenate([shard.rows for shard in self.shards])

    def duplicates(self) -> list[tuple[int, int]]:
        """(gallery row, the first row with the same pixels) of every picture that was there before."""
        rows, digests = self.rows(), np.concatenate([shard.digests for shard in self.shards])
        _, first, group = np.unique(digests, return_index=True, return_inverse=True)
        same = first[group]
        return [(int(rows[i]), int(rows[same[i]])) for i in np.flatnonzero(same != np.arange(len(rows)))]

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """The vectors, float32 (m, E) at a time."""
        return (shard.vectors() for shard in self.shards)


def shard_store(
    gallery: Gallery, encoder: ImageEncoder, runtime: str, work: Path, batch_size: int, shard_rows: int
) -> ShardStore:
    """Where the shards of a gallery lie that a runtime makes of it.

    Raises:
        ValueError: no pictures in a batch or a shard.
    """
    if batch_size < 1 or shard_rows < 1:
        raise ValueError(f"batch_size and shard_rows must be at least 1, not {batch_size} and {shard_rows}")
    return ShardStore(
        work,
        fingerprint=encoder.fingerprint,
        runtime=runtime,
        pixels=encoder.preprocess.to_dict(),
        signature=gallery.vectors_signature,
        count=len(gallery),
        dim=encoder.dim,
        batch=batch_size,
        rows=-(-shard_rows // batch_size) * batch_size,
    )


def any_readable(gallery: Gallery, rows: Sequence[int], until: float) -> bool:
    """Whether the bytes of any of these pictures can be had. Each is asked for once, and none is decoded.

    until: by `time.monotonic`, when to ask for no more.
    """
    columns = [gallery.table[name] for name in LOCATION_COLUMNS]
    for start in range(0, len(rows), _ASKED):
        if time.monotonic() >= until:
            return False
        places = [
            ImageLocation(row, *(column[row].as_py() for column in columns)) for row in rows[start : start + _ASKED]
        ]
        if any(isinstance(data, bytes) for data in read_images(gallery.root, places, pauses=())):
            return True
    return False


def image_locations(table: Any, span: range) -> list[ImageLocation]:
    """Where some rows' pictures lie; `table` has the columns PLACE."""
    rows = table.slice(span.start, len(span)).select(LOCATION_COLUMNS).to_pylist()
    return [ImageLocation(row, *columns.values()) for row, columns in zip(span, rows, strict=True)]


class EncodingState:
    """One gallery on its way into shards: fill `shards` for every number in `todo`, then take `encoded`."""

    def __init__(
        self,
        gallery: Gallery,
        encoder: ImageEncoder,
        work: Path,
        *,
        runtime: str,
        batch_size: int,
        shard_rows: int,
        max_failed: float,
        progress: bool,
        whole: bool = False,
    ) -> None:
        """See `encode`, whose arguments these are.

        Args:
            runtime: the name of what the vectors will be made with.
            whole: whether a shard is encoded whole if any of its pictures is not known.

        Raises:
            DataError: too many pictures of an earlier run could not be read.
            ArtifactError: a shard of an earlier run is corrupted.
        """
        if not 0 <= max_failed <= 1:
            raise ValueError(f"max_failed is a share from 0 to 1, not {max_failed}")
        self.store = shard_store(gallery, encoder, runtime, work, batch_size, shard_rows)
        numbers = range(len(self.store))
        self.shards = {number: shard for number in numbers if (shard := self.store.load(number))}
        unread, until = {n: s.unread for n, s in self.shards.items() if s.unread}, time.monotonic() + _PATIENCE_S
        if unread:
            logger.info("asking again for %d pictures that could not be read", sum(map(len, unread.values())))
        mended = [number for number, rows in unread.items() if any_readable(gallery, rows, until)]
        for number in mended:
            del self.shards[number]
            self.store.reopen(number)
        if mended:
            logger.info("%d shards lack pictures that can be read by now, and are encoded again", len(mended))
        self._gallery, self._known = gallery, ReusableVectors(self.store.others())
        self._positions: dict[int, NDArray[np.int64]] = {}
        for number in [number for number in numbers if number not in self.shards] if len(self._known) else ():
            self._use_known(number, whole=whole)
        self.todo = [number for number in numbers if number not in self.shards]
        self.resumed = sum(shard.stop - shard.start for shard in self.shards.values())
        self.resumed += sum(int((positions >= 0).sum()) for positions in self._positions.values())
        self.left = len(gallery) - self.resumed
        if self.resumed:
            logger.info("%d of %d pictures were encoded before", self.resumed, len(gallery))
        failed = [failure for shard in self.shards.values() for failure in shard.failed]
        self.guard = FailureLimit(gallery, self.store.path, max_failed, failed)
        self.guard.check()
        self._start = time.perf_counter()
        self._progress = progress

    def places(self, number: int) -> list[ImageLocation]:
        """Where the pictures of a shard lie."""
        return image_locations(self._gallery.table, self.store.span(number))

    def unknown(self, number: int) -> list[ImageLocation]:
        """Those of them that are to be encoded."""
        places = self.places(number)
        if number not in self._positions:
            return places
        return [place for place, at in zip(places, self._positions[number], strict=True) if at < 0]

    def taken(self, number: int) -> ReusedVectors | None:
        """What is known of the others, None where there are none."""
        if number not in self._positions:
            return None
        return self._known.take(self._positions[number], self.store.dim)

    def _use_known(self, number: int, *, whole: bool) -> None:
        places = self.places(number)
        positions = self._known.positions(places)
        if (positions >= 0).all():
            taken = self._known.take(positions, self.store.dim)
            marks = np.array([place.mark for place in places], np.uint64)
            self.shards[number] = self.store.save(number, taken.vectors, [], taken.digests, marks)
        elif (positions >= 0).any() and not whole:
            self._positions[number] = positions

    def bar(self) -> "tqdm[NoReturn]":
        """Rate, time left and failures on stderr: on a terminal twice a second, in a log file every ten seconds."""
        return tqdm(
            total=self.left + self.resumed,
            initial=self.resumed,
            desc="encode",
            unit="img",
            file=sys.stderr,
            disable=not self._progress or sys.stderr is None,
            mininterval=0.5 if sys.stderr and sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        )

    def advance(self, bar: "tqdm[NoReturn]", pictures: int) -> None:
        """Move the bar."""
        bar.set_postfix_str(f"{len(self.guard.failed)} failed", refresh=False)
        bar.update(pictures)

    def encoded(self) -> EncodedGallery:
        """The gallery in shards, once none is to do.

        Raises:
            DataError: no picture can be read.
        """
        seconds = time.perf_counter() - self._start
        self.guard.check(final=True)
        shards = [self.shards[number] for number in sorted(self.shards)]
        return EncodedGallery(shards, sorted(self.guard.failed), self.left, self.resumed, seconds)
