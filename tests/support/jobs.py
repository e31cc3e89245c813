"""Jobs in the queue of an index: puts, patches and deletions of items."""

from pathlib import Path
from typing import Any

from index_jobs.store.writes import WriteQueue
from tests.support.images import draw, encoded


def picture(color: str) -> bytes:
    return encoded(draw(color, "square"))


def put(index: Path, *ids: str, data: list[bytes] | None = None, color: str = "pink", **metadata: Any) -> str:
    """Accept a job that puts items with these ids. data: their image files, by default of a square."""
    items: list[dict[str, Any]] = [
        {"id": each, "caption": f"a {color} {each}", "category": "new", "metadata": metadata} for each in ids
    ]
    return WriteQueue(index).accept("put", items, [(each, "png") for each in data or [picture(color)] * len(ids)])


def delete(index: Path, *ids: str) -> str:
    return WriteQueue(index).accept("delete", [{"id": each} for each in ids])


def status(index: Path, job: str) -> dict[str, Any]:
    found = WriteQueue(index).status(job)
    assert found is not None
    return found


def patch(index: Path, *item_ids: str, filter: dict[str, Any] | None = None, **fields: Any) -> str:
    """Accept a job that merges fields into items."""
    items = [{"id": each} for each in item_ids]
    return WriteQueue(index).accept("patch", items, more={"filter": filter, "fields": fields})
