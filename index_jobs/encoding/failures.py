"""Lists of the images that cannot be read, with reasons, and of those that occur twice."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcar_core.util.files import atomic_writer
from index_jobs.encoding.shards import FailedImage
from index_jobs.gallery.scan import Gallery


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
