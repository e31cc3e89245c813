"""The routes that change items and collections. They accept jobs and return the status of jobs.

- A request is checked as a whole before any part of it is accepted. Its images have the limits of query images.
- An accepted request is answered 202 once its job is stored on disk. The index changes later.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import Path as PathParam
from fastapi import Query as QueryParam
from fastapi import Request
from fastapi.responses import Response

from app.api import requests
from app.api.requests import ChosenItems, PatchItem, PutItem
from app.api.responses import Collection, JobResponse, JobsResponse, JsonResponse, collection_response
from app.api.routing import Routes, collection_of, may_read, snapshot_of, state_of
from app.core.problems import Problem, field_problem
from app.core.settings import COLLECTION_NAME
from app.core.turns import run_in_new_thread
from app.http.access import Policy, out_of_scope
from app.search.errors import CollectionNotFoundError, ItemNotFoundError
from app.search.snapshots import Snapshot, filter_rows
from app.service.collections import Collections
from dcar_core.util.errors import ImageError, LockedError
from dcar_core.util.files import canonical_json
from index_jobs.index.index_version import IndexVersion, Item
from index_jobs.index.jobs import JobKind, create_collection, drop_collection

logger = logging.getLogger(__name__)

items = Routes("items")
collections = Routes("collections")
_ITEMS = Policy("write", body=requests.items_bytes)
_MAX_FIELDS = 1000  # of a collection that changes add to
MAX_CHANGE_BYTES = 64 * 2**20  # of the fields that a job merges into all of its items
_MAX_NAMED = 20  # fields in a response, or in a list of a job
IsStrict = Annotated[bool, QueryParam(alias="strict", description="refuse metadata fields that no item has")]
ItemPath = Annotated[requests.NewItemId, PathParam(description="the id of an item")]


@items.add("PUT", "/items", _ITEMS, JobResponse, status=202, accepts=requests.PutItems)
async def put_items(request: Request, strict: IsStrict = False) -> Response:
    """Add items, or replace those with the same ids, by a job."""
    snapshot = await _snapshot(request)
    items = (await requests.read_json(request, requests.PutItems)).items
    ids = [item.id for item in items]
    for number, item_id in enumerate(ids):
        if ids.index(item_id) != number:
            raise field_problem(f"items.{number}.id", "is the id of an earlier item")
    await state_of(request).access.charge(len(items) - 1)
    return await _put(request, snapshot, items, strict)


@items.add("PUT", "/items/{item_id:path}", _ITEMS, JobResponse, status=202, accepts=requests.PutFields)
async def put_item(request: Request, item_id: ItemPath, strict: IsStrict = False) -> Response:
    """Add an item, or replace the one with this id, by a job."""
    snapshot = await _snapshot(request)
    fields = await requests.read_json(request, requests.PutFields)
    try:
        return await _put(request, snapshot, [PutItem.model_construct(id=item_id, **dict(fields))], strict)
    except Problem as problem:
        raise problem.without("items.0.") from None


@items.add("PATCH", "/items", _ITEMS, JobResponse, status=202, accepts=requests.PatchItems)
async def patch_items(request: Request, strict: IsStrict = False) -> Response:
    """Merge fields into items, without their images, by a job."""
    snapshot = await _snapshot(request)
    patch = await requests.read_json(request, requests.PatchItems)
    return await _change(request, snapshot, patch, patch, strict)


@items.add("PATCH", "/items/{item_id:path}", _ITEMS, JobResponse, status=202, accepts=PatchItem)
async def patch_item(request: Request, item_id: ItemPath, strict: IsStrict = False) -> Response:
    """Merge fields into an item, without its image, by a job."""
    snapshot = await _snapshot(request)
    patch = await requests.read_json(request, PatchItem)
    return await _change(request, snapshot, await _chosen(request, snapshot, item_id), patch, strict)


@items.add("DELETE", "/items", _ITEMS, JobResponse, status=202, accepts=ChosenItems)
async def delete_items(request: Request) -> Response:
    """Remove items by a job; ids that the index lacks are ignored."""
    snapshot = await _snapshot(request)
    return await _change(request, snapshot, await requests.read_json(request, ChosenItems))


@items.add("DELETE", "/items/{item_id:path}", Policy("write"), JobResponse, status=202)
async def delete_item(request: Request, item_id: ItemPath) -> Response:
    """Remove an item by a job."""
    snapshot = await _snapshot(request)
    return await _change(request, snapshot, await _chosen(request, snapshot, item_id))


@items.add("GET", "/jobs", Policy("write", "checked"), JobsResponse, errors=(422, 503))
async def jobs(
    request: Request,
    limit: Annotated[int, QueryParam(ge=1, le=requests.MAX_LISTED_JOBS, description="number of jobs")] = 20,
) -> Response:
    """List the newest changes of items, in the collections that the key opens."""
    newest = await state_of(request).writer.newest(await _readable(request), limit)
    return await asyncio.to_thread(JsonResponse, {"jobs": newest})


@items.add("GET", "/jobs/{job_id}", Policy("write", "checked"), JobResponse, errors=(404, 422))
async def job(request: Request, job_id: str) -> Response:
    """Return the status of a change of items: how far it is, and how it ended."""
    names = await _readable(request)
    if (status := await state_of(request).writer.status(names, job_id)) is not None:
        return JsonResponse(status)
    if not may_read(request, state_of(request).collections.default):
        raise out_of_scope()
    raise Problem(404, "There is no such job.", errors=[("job_id", "unknown")])


async def _readable(request: Request) -> list[str]:
    """Return the collections that the key opens, those that another process has created included."""
    await state_of(request).collections.sync()
    return [name for name, _ in state_of(request).collections if may_read(request, name)]


@collections.add("PUT", "/collections/{collection}", Policy("write"), Collection, errors=(409,))
async def put_collection(
    request: Request,
    model: Annotated[str | None, QueryParam(description="the collection whose model encodes the items")] = None,
) -> Response:
    """Create a collection without items, unless there is one of this name."""
    name, collections = _name(request), state_of(request).collections
    folder = state_of(request).settings.collections_dir
    await collections.sync()  # another process may have created or dropped some
    if name not in dict(collections):
        if not COLLECTION_NAME.fullmatch(name):
            raise field_problem("collection", "must be 1 to 64 letters, digits, '.', '_' and '-'")
        if folder is None:
            raise Problem(403, "Collections cannot be created; set DCAR_COLLECTIONS_DIR to enable it.")
        if not may_read(request, model or collections.default):
            raise out_of_scope()
        source = collections.open(model, "model").artifact
        async with _storing("collection", collections, model):
            await run_in_new_thread(create_collection, folder, name, source.checkpoint)
        await collections.sync()
    return JsonResponse(collection_response(collections, name))


@collections.add("DELETE", "/collections/{collection}", Policy("write"), status=204, errors=(409,))
async def delete_collection(request: Request) -> Response:
    """Drop a collection that was created over HTTP, with all of its items."""
    name, collections = _name(request), state_of(request).collections
    await collections.sync()
    served = collections[name]
    if not served.is_created:
        raise Problem(409, "This collection belongs to the settings of the service.", errors=[("collection", name)])
    try:
        async with _storing("change", collections, name):
            await run_in_new_thread(drop_collection, served.index)
    except LockedError:
        raise Problem(503, "Its jobs are being applied. Try again in 5 s.", headers={"Retry-After": "5"}) from None
    await collections.sync()
    return Response(status_code=204)


def _name(request: Request) -> str:
    return collection_of(request) or state_of(request).collections.default


async def _snapshot(request: Request) -> Snapshot:
    """Return the version of the collection in the path, which another process may have created just now."""
    if _name(request) not in dict(state_of(request).collections):
        await state_of(request).collections.sync()
    return await snapshot_of(request)


async def _put(request: Request, snapshot: Snapshot, items: list[PutItem], strict: bool) -> Response:
    places, state = {f"items.{number}": item for number, item in enumerate(items)}, state_of(request)
    given = {f"{place}.metadata": item.metadata for place, item in places.items()}
    new = _new_fields(snapshot.artifact, given, strict)
    dropped = await state.retriever.run("search", _dropped_fields, snapshot.artifact, items)
    files = await state.fetcher.read(request.scope, {place: item.image for place, item in places.items()})
    for place in places:
        try:
            await state.retriever.check_image(snapshot, files[place])
        except ImageError as error:
            raise field_problem(f"{place}.image", str(error)) from None
    stored, images = [item.model_dump(exclude={"image"}) for item in items], [files[place] for place in places]
    return await _accept(request, "put", stored, images, notes={"new_fields": new, "dropped_fields": dropped})


async def _change(
    request: Request, snapshot: Snapshot, chosen: ChosenItems, patch: PatchItem | None = None, strict: bool = False
) -> Response:
    """Accept a patch of chosen items, or their removal."""
    fields, notes = (patch.fields if patch else {}), dict[str, Any]()
    if patch:
        notes["new_fields"] = _new_fields(snapshot.artifact, {"metadata": patch.metadata}, strict)
    if (chosen.ids is None) == (chosen.filter is None):
        raise field_problem("ids", "give either ids or a filter")
    if (filter := chosen.filter) is not None:
        mask = await state_of(request).retriever.run("search", lambda: filter_rows(snapshot, filter).mask)
        notes["items"] = int(np.count_nonzero(mask))
    items = [{"id": each} for each in dict.fromkeys(chosen.ids or ())]
    count, each = notes.get("items", len(items)), len(canonical_json(fields))
    if patch and count * each > MAX_CHANGE_BYTES:
        message = f"{count:,} items with {each:,} bytes of fields take more than {MAX_CHANGE_BYTES // 2**20} MiB; "
        message += "choose fewer items at a time, or send shorter fields"
        raise field_problem("ids" if filter is None else "filter", message)
    kind: JobKind = "patch" if patch else "delete"
    return await _accept(request, kind, items, filter=filter, fields=fields, notes=notes)


async def _chosen(request: Request, snapshot: Snapshot, item_id: str) -> ChosenItems:
    """Return the choice of one item. Raise ItemNotFoundError unless there is one, or a waiting job puts it."""
    is_known = snapshot.artifact.row_of(item_id) is not None
    if not is_known and not await state_of(request).writer.has_put(_name(request), item_id):
        raise ItemNotFoundError(item_id, "id")
    return ChosenItems(ids=[item_id])


def _new_fields(artifact: IndexVersion, given: Mapping[str, Mapping[str, Any]], strict: bool) -> list[str]:
    """Return the fields with a value that no item has, [] for a collection without items.

    Raise Problem if there are any and `strict`, or if the collection would have too many fields.

    Args:
        given: metadata by their places in the request.
    """
    fields = [(name, place) for place, each in given.items() for name, value in each.items() if value is not None]
    new = {name: place for name, place in fields if name not in artifact.fields}
    if new and (count := len(artifact.fields) + len(new)) > _MAX_FIELDS:
        message = f"with it items have {count:,} fields, at most {_MAX_FIELDS:,}"
        raise field_problem(next(reversed(new.values())), message)
    if strict and new and artifact.rows:
        faults = [(f"{place}.{name}", "no item has this field") for name, place in new.items()][:_MAX_NAMED]
        raise Problem(422, "; ".join(": ".join(fault) for fault in faults), errors=faults)
    return sorted(new)[:_MAX_NAMED] if artifact.rows else []


def _dropped_fields(artifact: IndexVersion, items: Sequence[PutItem]) -> list[str]:
    """Return the fields that items of the index have and their replacements lack."""

    def fields_of(item: Item | PutItem) -> set[str]:
        fields = {**item.metadata, "caption": item.caption, "category": item.category}
        return {name for name, value in fields.items() if value not in (None, "")}

    replaced = [(item, row) for item in items if (row := artifact.row_of(item.id)) is not None]
    dropped = set[str]().union(*(fields_of(artifact.item(row)) - fields_of(item) for item, row in replaced))
    return sorted(dropped - {"file_name"})[:_MAX_NAMED]  # which comes with an image


async def _accept(
    request: Request,
    kind: JobKind,
    items: Sequence[Mapping[str, Any]],
    images: Sequence[bytes] = (),
    **more: Mapping[str, Any] | None,
) -> Response:
    async with _storing("job", state_of(request).collections, _name(request)):
        job = await state_of(request).writer.accept(_name(request), kind, items, images, **more)
    return JsonResponse(job, 202, headers={"Location": f"/jobs/{job['id']}"})


@asynccontextmanager
async def _storing(what: str, collections: Collections, name: str | None = None) -> AsyncIterator[None]:
    """Turn a full disk into a 503, and a named collection that was dropped meanwhile into a 404."""
    try:
        yield
    except OSError as error:
        is_gone = isinstance(error, FileNotFoundError | FileExistsError)  # the latter where it goes between two calls
        if is_gone and collections[name].is_created:
            await collections.sync()
            raise CollectionNotFoundError(str(name), "collection") from None  # even if there is a new one of this name
        logger.warning("a %s cannot be stored: %s", what, error)
        detail = f"The {what} cannot be stored; perhaps the disk is full. Try again later."
        raise Problem(503, detail, headers={"Retry-After": "10"}) from None
