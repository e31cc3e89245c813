"""Pictures that cannot be read, and those that are there twice: counted, listed, and too many of them an error.

- A broken picture is listed in `failed.jsonl` with its reason; the job stops as soon as more than `max_failed` of the
  gallery has failed, since no later picture could mend that.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcar_core.util.errors import DataError
from dcar_core.util.files import atomic_writer
from index_jobs.encoding.shards import FailedImage, kind_of
from index_jobs.gallery.scan import Gallery
from index_jobs.store.manifest import FAILED


class FailureLimit:
    """Counts failures, and ends the job when there are too many."""

    def __init__(self, gallery: Gallery, work: Path, max_failed: float, failed: list[FailedImage]) -> None:
        self.gallery, self.work, self.max_failed, self.failed = gallery, work, max_failed, failed

    def add(self, failed: tuple[FailedImage, ...]) -> None:
        if failed:
            self.failed.extend(failed)
            self.check()

    def check(self, *, final: bool = False) -> None:
        count, total = len(self.failed), len(self.gallery)
        none_left = count == total
        if count <= self.max_failed * total and not (final and none_left):
            return
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / FAILED
        write_failed(path, self.gallery, self.failed)
        names = self.gallery.table["name"]
        first = "; ".join(f"{names[row].as_py()}: {reason}" for row, reason in sorted(self.failed)[:3])
        raise DataError(
            f"{'no picture' if none_left else 'too few pictures'} of {self.gallery.source} can be read: {count:,} of "
            f"{total:,} failed, at most {self.max_failed:.1%} may. {first}. {path} lists those found so far; mend or "
            f"remove them, or raise --max-failed"
        )


def write_failed(path: Path, gallery: Gallery, failed: list[FailedImage]) -> None:
    """`failed.jsonl`: a line for each picture without a vector: id, name, reason and kind, in gallery order."""
    lines = ({**_named(gallery, row), "reason": why, "kind": kind_of(why)} for row, why in sorted(failed))
    _write_lines(path, lines)


def write_duplicates(path: Path, gallery: Gallery, duplicates: list[tuple[int, int]]) -> None:
    """`duplicates.jsonl`: a line for each picture whose pixels an earlier one has, with that one's id and name."""
    _write_lines(path, ({**_named(gallery, row), "same_as": _named(gallery, first)} for row, first in duplicates))


def _named(gallery: Gallery, row: int) -> dict[str, str]:
    return {column: gallery.table[column][row].as_py() for column in ("id", "name")}


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    with atomic_writer(path) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
