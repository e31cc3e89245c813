"""The routes that change items: they accept jobs, and tell how a job is.

- A request is checked as a whole, its images as those of searches, before anything of it is accepted.
- The answer to an accepted request is 202, once the job is on the disk; the index changes later.
"""

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.bodies import decode_base64, read_json
from app.api.openapi import operation
from app.api.params import (
    collection_of,
    collections_of,
    require_writer,
    retriever_of,
    settings_of,
    snapshot_of,
    writer_of,
)
from app.api.requests import DeleteItems, PutItem, PutItems
from app.api.responses import JsonResponse
from app.api.schemas import JobResponse
from app.core.problems import Problem, field_problem
from app.middleware.access import charge
from app.search.snapshots import Snapshot
from dcar_core.images import sniff_format
from dcar_core.util.errors import ImageError
from index_jobs.store.writes.write_queue import JobKind

logger = logging.getLogger(__name__)

_ERRORS = (400, 404, 413, 415, 422, 503)


def item_writing_routes() -> APIRouter:
    """Return the routes that change the items of a collection."""
    router = APIRouter(tags=["items"])

    @router.put("/items", status_code=202, **operation(JobResponse, *_ERRORS, status=202, body=PutItems))
    async def put_items(request: Request) -> Response:
        """Add items, or replace those with the same ids, by a job."""
        require_writer(request, _name(request))
        snapshot = snapshot_of(request)
        items = (await read_json(request, PutItems)).items
        _require_unique([item.id for item in items])
        await charge(request, len(items) - 1)
        images = await _checked_images(request, snapshot, items)
        return await _accept(request, "put", [item.model_dump(exclude={"image"}) for item in items], images)

    @router.delete("/items", status_code=202, **operation(JobResponse, *_ERRORS, status=202, body=DeleteItems))
    async def delete_items(request: Request) -> Response:
        """Remove items by a job."""
        require_writer(request, _name(request))
        snapshot_of(request)
        ids = (await read_json(request, DeleteItems)).ids
        return await _accept(request, "delete", [{"id": each} for each in dict.fromkeys(ids)])

    return router


def job_routes() -> APIRouter:
    """Return the route that tells how a job is."""
    router = APIRouter(tags=["items"])

    @router.get("/jobs/{job_id}", **operation(JobResponse, 404))
    async def job(request: Request, job_id: str) -> Response:
        """Return the status of a change of items: how far it is, and how it ended."""
        status = await writer_of(request).status(job_id) if settings_of(request).writes else None
        require_writer(request, collections_of(request).default if status is None else status["collection"])
        if status is None:
            raise Problem(404, "There is no such job.", errors=[("job_id", "unknown")])
        return JsonResponse(status)

    return router


def _name(request: Request) -> str:
    return collection_of(request) or collections_of(request).default


def _require_unique(ids: list[str]) -> None:
    for number, item_id in enumerate(ids):
        if ids.index(item_id) != number:
            raise field_problem(f"items.{number}.id", "is the id of an earlier item")


async def _checked_images(request: Request, snapshot: Snapshot, items: list[PutItem]) -> list[tuple[bytes, str]]:
    """Return the image files of items and their suffixes; an error names the item."""
    settings, images, images_of = settings_of(request), list[tuple[bytes, str]](), retriever_of(request).images
    for number, item in enumerate(items):
        field = f"items.{number}.image"
        data = await asyncio.to_thread(decode_base64, item.image, settings, field)
        try:
            await images_of.check(snapshot, data)
        except ImageError as error:
            raise field_problem(field, str(error)) from None
        images.append((data, str(sniff_format(data))))
    return images


async def _accept(
    request: Request, kind: JobKind, items: list[dict[str, Any]], images: list[tuple[bytes, str]] | None = None
) -> Response:
    try:
        job = await writer_of(request).accept(_name(request), kind, items, images or [])
    except OSError:
        raise Problem(
            503, "There is no disk space for the job. Try again later.", headers={"Retry-After": "10"}
        ) from None
    return JsonResponse(job, 202, headers={"Location": f"{request.scope.get('root_path', '')}/jobs/{job['id']}"})
