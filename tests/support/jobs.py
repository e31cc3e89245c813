"""Accepted changes of items of an index."""

from pathlib import Path
from typing import Any

from index_jobs.index.job_queue import JobQueue
from tests.support.images import draw, encoded, exif_of


def picture(color: str) -> bytes:
    return encoded(draw(color, "square"), exif=exif_of("2024:07:01 10:20:30"))


def put(
    index: Path,
    *ids: str,
    data: list[bytes] | None = None,
    color: str = "pink",
    **metadata: Any,
) -> str:
    """Accept a job that puts items with these ids. data: their image files, by default
    of a square.
    """
    items: list[dict[str, Any]] = [
        {
            "id": each,
            "caption": f"a {color} {each}",
            "category": "new",
            "metadata": metadata,
        }
        for each in ids
    ]
    return JobQueue(index).accept("put", items, data or [picture(color)] * len(ids))


def delete(index: Path, *ids: str, filter: dict[str, Any] | None = None) -> str:
    return JobQueue(index).accept(
        "delete",
        [{"id": each} for each in ids],
        filter=filter,
    )


def patch(
    index: Path,
    *item_ids: str,
    filter: dict[str, Any] | None = None,
    **fields: Any,
) -> str:
    """Accept a job that merges fields into items."""
    return JobQueue(index).accept(
        "patch",
        [{"id": item_id} for item_id in item_ids],
        filter=filter,
        fields=fields,
    )


def status(index: Path, job: str) -> dict[str, Any]:
    found = JobQueue(index).status(job)
    assert found is not None
    return found
