"""Images that cannot be read and images that occur twice: counted and listed; too many failures are an error.

A failed image is listed in `failed.jsonl` with its reason. The job stops as soon as more than `max_failed` of the
gallery has failed.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dcar_core.util.errors import DataError
from dcar_core.util.files import atomic_writer
from index_jobs.encoding.shards import FailedImage
from index_jobs.gallery.scan import Gallery
from index_jobs.store.manifest import FAILED


class FailureLimit:
    """Counts failures and ends the job when there are too many."""

    def __init__(self, gallery: Gallery, work: Path, max_failed: float, failed: list[FailedImage]) -> None:
        self.gallery, self.work, self.max_failed, self.failed = gallery, work, max_failed, failed

    def add(self, failed: Sequence[FailedImage]) -> None:
        """Count failures.

        Raises:
            DataError: there are too many.
        """
        if failed:
            self.failed.extend(failed)
            self.check()

    def check(self, *, final: bool = False) -> None:
        """Compare the failures with the limit; final: no image follows.

        Raises:
            DataError: there are too many.
        """
        count, total = len(self.failed), len(self.gallery)
        if count <= self.max_failed * total and not (final and count == total):
            return
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / FAILED
        write_failed(path, self.gallery, self.failed)
        names = self.gallery.table["name"]
        examples = "; ".join(f"{names[failure.row].as_py()}: {failure.reason}" for failure in sorted(self.failed)[:3])
        raise DataError(
            f"{'no image' if count == total else 'too few images'} of {self.gallery.source} can be read: {count:,} of "
            f"{total:,} failed, at most {self.max_failed:.1%} may. {examples}. {path} lists them; repair or remove "
            f"them, or raise --max-failed"
        )


def write_failed(path: Path, gallery: Gallery, failed: list[FailedImage]) -> None:
    """Write `failed.jsonl`: id, name, reason and fault of each image without a vector, in gallery order."""
    _write_lines(
        path, ({**_name(gallery, row), "reason": reason, "fault": fault} for row, reason, fault in sorted(failed))
    )


def write_duplicates(path: Path, gallery: Gallery, duplicates: list[tuple[int, int]]) -> None:
    """Write `duplicates.jsonl`: each image whose pixels an earlier one has, with that one's id and name."""
    _write_lines(path, ({**_name(gallery, row), "same_as": _name(gallery, first)} for row, first in duplicates))


def _name(gallery: Gallery, row: int) -> dict[str, str]:
    return {column: gallery.table[column][row].as_py() for column in ("id", "name")}


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    with atomic_writer(path) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
