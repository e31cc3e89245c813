"""The routes that change items and collections, and their bodies. They accept jobs and
return the status of jobs.

- A request is checked as a whole before any part of it is accepted. Its images have the
  limits of query images.
- An accepted request is answered 202 once its job is stored on disk. The index changes
  later.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Self

import numpy as np
from fastapi import Path as PathParam
from fastapi import Query as QueryParam
from fastapi import Request
from fastapi.responses import Response
from pydantic import AfterValidator, FailFast, Field, model_validator
from pydantic_core import from_json, to_json

from app.api.guard import PART_BYTES, Policy, out_of_scope, query_bytes
from app.api.requests import Strict
from app.api.responses import Collection, JobResponse, JobsResponse, collection_response
from app.api.routing import (
    JsonResponse,
    Routes,
    collection_of,
    may_read,
    read_json,
    state_of,
    version_of,
)
from app.core.problems import Problem, field_problem
from app.core.settings import COLLECTION_NAME, Settings
from app.core.turns import run_in_new_thread
from app.search.errors import CollectionNotFoundError
from app.search.query import check_filter, checked_parts
from app.search.served_version import ServedVersion, filter_rows
from app.service.collections import Collections
from dcar_core.util.errors import DataError, ImageError, LockedError
from dcar_core.util.files import canonical_json
from index_jobs.checks import (
    MAX_CAPTION_CHARS,
    MAX_METADATA_BYTES,
    MAX_METADATA_LEVELS,
    is_too_deep,
)
from index_jobs.index.changes import rows_with
from index_jobs.index.created_collections import create_collection, drop_collection
from index_jobs.index.filters import condition_fields
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.items import fit_one_field, type_of
from index_jobs.index.job_queue import JobKind

logger = logging.getLogger(__name__)

routes = Routes()
MAX_CHANGE_BYTES = 64 * 2**20  # of the fields that a job merges into all of its items
_MAX_PUT = 256  # items of a request
_MAX_CHOSEN = 10_000
_MAX_JOBS = 100  # in a list
_MAX_FIELDS = 1000  # of a collection that changes add to
_MAX_NAME = 256  # characters of a metadata field's name
_MAX_NAMED = 20  # fields in a response, or in a list of a job
# of an item, beside its metadata
_OWN_FIELDS = ("id", "caption", "category", "file_name")
_ITEM_ID = re.compile(
    r"(?!\s|\.{1,2}$)[^\x00-\x1f\x7f]+(?<!\s)(?<!/image)(?<!/similar)"
)


def _check_item_id(item_id: str) -> str:
    if not _ITEM_ID.fullmatch(item_id):
        message = (
            "must have no control characters, must not begin or end with a space, "
        )
        raise ValueError(
            message + "must not end in /image or /similar, and must not be . or .."
        )
    return item_id


def _check_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    for name in metadata:
        if name in _OWN_FIELDS or not name.strip() or len(name) > _MAX_NAME:
            raise ValueError(
                f"must not have the field {name!r}; names have at most {_MAX_NAME}"
                " characters"
            )
    for _ in checked_parts(metadata):  # refuses long numbers
        pass
    if is_too_deep(metadata):
        raise ValueError(
            f"has more than {MAX_METADATA_LEVELS} nested levels; flatten it"
        )
    values: dict[str, Any] = from_json(to_json(metadata, inf_nan_mode="null"))
    if len(canonical_json(values)) > MAX_METADATA_BYTES:
        raise ValueError(f"takes at most {MAX_METADATA_BYTES // 2**10} KiB as JSON")
    return values


NewItemId = Annotated[
    str,
    Field(min_length=1, max_length=1024),
    AfterValidator(_check_item_id),
]


Caption = Annotated[str, Field(max_length=MAX_CAPTION_CHARS)]
Category = Annotated[str, Field(max_length=1000)]
Metadata = Annotated[dict[str, Any], AfterValidator(_check_metadata)]


class PutFields(Strict):
    """An item without its id."""

    image: Annotated[
        str,
        Field(
            min_length=1,
            description="the file in base64, a data URI, or a URL of an allowed host",
        ),
    ]
    caption: Caption = ""
    category: Category = ""
    metadata: Metadata = Field(
        {}, description="any other fields; a field keeps its type"
    )


class PutItem(PutFields):
    """An item with its image."""

    id: NewItemId


class PutItems(Strict):
    """Items to add; they replace items with the same ids."""

    items: Annotated[
        list[PutItem],
        Field(min_length=1, max_length=_MAX_PUT),
        FailFast(),
    ]


class PatchItem(
    Strict,
    json_schema_extra={"examples": [{"metadata": {"price": 49.9, "sale": None}}]},
):
    """Fields to merge into an item; null removes one, and the others stay."""

    caption: Caption | None = None
    category: Category | None = None
    metadata: Metadata = Field(
        {}, description="any other fields; a field keeps its type"
    )

    @model_validator(mode="after")
    def _require_fields(self) -> Self:
        if not self.fields:
            raise ValueError("must have metadata, a caption or a category")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """What to merge, caption and category included; None removes a field."""
        own = self.model_fields_set & {"caption", "category"}
        return self.metadata | {
            name: getattr(self, name) or None for name in sorted(own)
        }


class ChosenItems(Strict, json_schema_extra={"examples": [{"ids": ["1f63f"]}]}):
    """Items, by `ids`, of which the index may lack some, or by a `filter` as in
    searches.
    """

    ids: Annotated[
        list[NewItemId] | None,
        Field(min_length=1, max_length=_MAX_CHOSEN),
        FailFast(),
    ] = None
    filter: Annotated[
        dict[str, Any] | None,
        Field(min_length=1, description="instead of ids, as in searches"),
        AfterValidator(check_filter),
    ] = None


class PatchItems(
    PatchItem,
    ChosenItems,
    json_schema_extra={"examples": [{"ids": ["1f63f"], "metadata": {"size": 3}}]},
):
    """Fields to merge into chosen items; null removes one, and the others stay."""

    changes: Annotated[
        dict[str, Metadata] | None,
        Field(
            min_length=1,
            max_length=_MAX_CHOSEN,
            description="instead, fields for each id, or value of `by`",
        ),
    ] = None
    by: Annotated[
        str,
        Field(
            max_length=_MAX_NAME,
            description="a field whose values name items in `changes`",
        ),
    ] = "id"

    @model_validator(mode="after")
    def _require_fields(self) -> Self:
        if (self.changes is None) == (not self.fields):
            raise ValueError(
                "must have metadata, a caption or a category, or else changes"
            )
        return self


def _items_bytes(settings: Settings) -> int:
    """Return the largest size of a change of items in JSON."""
    if settings.writes:
        return settings.max_upload_bytes * 4 // 3 + _MAX_PUT * PART_BYTES
    return query_bytes(settings)


_ITEMS = Policy("write", body=_items_bytes)
ItemPath = Annotated[NewItemId, PathParam(description="the id of an item")]


@routes.add("PUT", "/items", _ITEMS, JobResponse, status=202, accepts=PutItems)
async def put_items(request: Request) -> Response:
    """Add items, or replace those with the same ids, by a job."""
    items = (await read_json(request, PutItems)).items
    ids = [item.id for item in items]
    for number, item_id in enumerate(ids):
        if ids.index(item_id) != number:
            raise field_problem(f"items.{number}.id", "is the id of an earlier item")
    await state_of(request).access.charge(len(items) - 1)
    return await _put(request, items)


@routes.add(
    "PUT",
    "/items/{item_id:path}",
    _ITEMS,
    JobResponse,
    status=202,
    accepts=PutFields,
)
async def put_item(request: Request, item_id: ItemPath) -> Response:
    """Add an item, or replace the one with this id, by a job."""
    fields = await read_json(request, PutFields)
    try:
        return await _put(
            request, [PutItem.model_construct(id=item_id, **dict(fields))]
        )
    except Problem as problem:
        raise problem.without("items.0.") from None


@routes.add("PATCH", "/items", _ITEMS, JobResponse, status=202, accepts=PatchItems)
async def patch_items(request: Request) -> Response:
    """Merge fields into items, without their images, by a job; ids that the index lacks
    are ignored.
    """
    patch = await read_json(request, PatchItems)
    if patch.changes is None:
        return await _change(request, patch, patch)
    served = await newest_version(request)
    changes = patch.changes
    by = patch.by
    new_fields = _check_fields(
        served.index, {f"changes.{key}": fields for key, fields in changes.items()}
    )
    try:
        rows = await state_of(request).retriever.run(
            "filter",
            rows_with,
            served.index,
            by,
            [*changes],
        )
    except DataError as error:
        raise field_problem("by", str(error)) from None
    _check_size(
        sum(
            len(rows[key]) * len(canonical_json(fields))
            for key, fields in changes.items()
        ),
        "changes",
    )
    notes = {"items": sum(map(len, rows.values())), "new_fields": new_fields}
    items = [{"id": key, "fields": fields} for key, fields in changes.items()]
    return await _accept(request, "patch", items, by=by, notes=notes)


@routes.add(
    "PATCH",
    "/items/{item_id:path}",
    _ITEMS,
    JobResponse,
    status=202,
    accepts=PatchItem,
)
async def patch_item(request: Request, item_id: ItemPath) -> Response:
    """Merge fields into an item, without its image, by a job."""
    return await _change(
        request,
        ChosenItems(ids=[item_id]),
        await read_json(request, PatchItem),
    )


@routes.add("DELETE", "/items", _ITEMS, JobResponse, status=202, accepts=ChosenItems)
async def delete_items(request: Request) -> Response:
    """Remove items by a job; ids that the index lacks are ignored."""
    return await _change(request, await read_json(request, ChosenItems))


@routes.add("DELETE", "/items/{item_id:path}", Policy("write"), JobResponse, status=202)
async def delete_item(request: Request, item_id: ItemPath) -> Response:
    """Remove an item by a job."""
    return await _change(request, ChosenItems(ids=[item_id]))


@routes.add("GET", "/jobs", Policy("write", "checked"), JobsResponse)
async def jobs(
    request: Request,
    limit: Annotated[
        int, QueryParam(ge=1, le=_MAX_JOBS, description="number of jobs")
    ] = 20,
) -> Response:
    """List the newest changes of items, in the collections that the key opens."""
    newest = await state_of(request).writer.newest(await _readable(request), limit)
    return await asyncio.to_thread(JsonResponse, {"jobs": newest})


@routes.add("GET", "/jobs/{job_id}", Policy("write", "checked"), JobResponse)
async def job(request: Request, job_id: str) -> Response:
    """Return the status of a change of items: how far it is, and how it ended."""
    names = await _readable(request)
    if (status := await state_of(request).writer.status(names, job_id)) is not None:
        return JsonResponse(status)
    raise Problem(404, "There is no such job.", errors=[("job_id", "unknown")])


async def _readable(request: Request) -> list[str]:
    """Return the collections that the key opens, those that another process has created
    included.
    """
    await state_of(request).collections.sync()
    return [
        name for name, _ in state_of(request).collections if may_read(request, name)
    ]


@routes.add("PUT", "/collections/{collection}", Policy("write"), Collection)
async def put_collection(
    request: Request,
    model: Annotated[
        str | None,
        QueryParam(description="the collection whose model encodes the items"),
    ] = None,
) -> Response:
    """Create a collection without items, unless there is one of this name."""
    name = _name(request)
    collections = state_of(request).collections
    settings = state_of(request).settings
    await collections.sync()  # another process may have created or dropped some
    if name not in dict(collections):
        if not COLLECTION_NAME.fullmatch(name):
            raise field_problem(
                "collection", "must be 1 to 64 letters, digits, '.', '_' and '-'"
            )
        if settings.collections_dir is None:
            raise Problem(
                403,
                "Collections cannot be created; set DCAR_COLLECTIONS_DIR to enable it.",
            )
        if not may_read(request, model or collections.default):
            raise out_of_scope()
        source = collections.open(model, "model").index
        async with storing("collection", collections, model):
            await run_in_new_thread(
                create_collection,
                settings.collections_dir,
                name,
                source.checkpoint,
            )
        await collections.sync()
    return JsonResponse(collection_response(collections, name))


@routes.add("DELETE", "/collections/{collection}", Policy("write"), status=204)
async def delete_collection(request: Request) -> Response:
    """Drop a collection that was created over HTTP, with all of its items."""
    name = _name(request)
    collections = state_of(request).collections
    await collections.sync()
    collection = collections[name]
    if not collection.is_created:
        raise Problem(
            409,
            "This collection belongs to the settings of the service.",
            errors=[("collection", name)],
        )
    try:
        async with storing("change", collections, name):
            await run_in_new_thread(drop_collection, collection.path)
    except LockedError:
        raise Problem(
            503,
            "Its jobs are being applied. Try again in 5 s.",
            headers={"Retry-After": "5"},
        ) from None
    await collections.sync()
    return Response(status_code=204)


def _name(request: Request) -> str:
    return collection_of(request) or state_of(request).collections.default


async def newest_version(request: Request) -> ServedVersion:
    """Return the version of the collection in the path, which another process may have
    created just now.
    """
    if _name(request) not in dict(state_of(request).collections):
        await state_of(request).collections.sync()
    return await version_of(request)


async def _put(request: Request, items: list[PutItem]) -> Response:
    served = await newest_version(request)
    state = state_of(request)
    metadata = {
        f"items.{number}.metadata": item.metadata for number, item in enumerate(items)
    }
    new_fields = _check_fields(served.index, metadata)
    sources = {f"items.{number}": item.image for number, item in enumerate(items)}
    images = await state.fetcher.read(request.scope, sources)
    for name, image in images.items():
        try:
            await state.retriever.check_image(served, image)
        except ImageError as error:
            raise field_problem(f"{name}.image", str(error)) from None
    stored = [item.model_dump(exclude={"image"}) for item in items]
    return await _accept(
        request,
        "put",
        stored,
        [*images.values()],
        notes={"new_fields": new_fields},
    )


async def _change(
    request: Request,
    chosen: ChosenItems,
    patch: PatchItem | None = None,
) -> Response:
    """Accept a patch of chosen items, or their removal."""
    served = await newest_version(request)
    fields = patch.fields if patch else {}
    notes = dict[str, Any]()
    if patch:
        notes["new_fields"] = _check_fields(served.index, {"metadata": patch.metadata})
    if (chosen.ids is None) == (chosen.filter is None):
        raise field_problem("ids", "give either ids or a filter")
    items = [{"id": item_id} for item_id in dict.fromkeys(chosen.ids or ())]
    stored = chosen.filter
    if (filter := chosen.filter) is not None:
        mask = await state_of(request).retriever.run(
            "search", lambda: filter_rows(served, filter).mask
        )
        notes["items"] = int(np.count_nonzero(mask))
        # which a job does not know
        if not served.index.computed.keys().isdisjoint(condition_fields(filter)):
            stored = {"id": served.index.column("id", np.flatnonzero(mask)).to_pylist()}
    count = notes.get("items", len(items))
    size = len(canonical_json(fields))
    if patch:
        _check_size(count * size, "ids" if filter is None else "filter")
    return await _accept(
        request,
        "patch" if patch else "delete",
        items,
        filter=stored,
        fields=fields,
        notes=notes,
    )


def _check_size(size: int, field: str) -> None:
    if size > MAX_CHANGE_BYTES:
        raise field_problem(
            field,
            f"{size:,} bytes of fields are too many; choose fewer items at a time",
        )


def _check_fields(
    index: IndexVersion, metadata: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return the fields with a value that no item has. Raise Problem for too many, or a
    value of another type.

    metadata: of items, by its name in the request.
    """
    fields = [
        (name, part)
        for part, values in metadata.items()
        for name in values
        if values[name] is not None
    ]
    for name, part in fields:
        current = index.fields.get(name)
        kind = str(type_of(metadata[part][name]))
        if current is not None and not fit_one_field(current, kind):
            raise field_problem(
                f"{part}.{name}", f"must be {current}, as in the index, not {kind}"
            )
    new = {name: part for name, part in fields if name not in index.fields}
    if new and (count := len(index.fields) + len(new)) > _MAX_FIELDS:
        raise field_problem(
            [*new.values()][-1],
            f"with it items have {count:,} fields, at most {_MAX_FIELDS:,}",
        )
    return sorted(new)[:_MAX_NAMED] if index.rows else []


async def _accept(
    request: Request,
    kind: JobKind,
    items: Sequence[Mapping[str, Any]],
    images: Sequence[bytes] = (),
    **more: Any,
) -> Response:
    async with storing("job", state_of(request).collections, _name(request)):
        job = await state_of(request).writer.accept(
            _name(request),
            kind,
            items,
            images,
            **more,
        )
    return JsonResponse(job, 202, headers={"Location": f"/jobs/{job['id']}"})


@asynccontextmanager
async def storing(
    what: str,
    collections: Collections,
    name: str | None = None,
) -> AsyncIterator[None]:
    """Turn a full disk into a 503, and a named collection that was dropped meanwhile
    into a 404.
    """
    try:
        yield
    except OSError as error:
        # the latter where it goes between two calls
        is_gone = isinstance(error, FileNotFoundError | FileExistsError)
        if is_gone and collections[name].is_created:
            await collections.sync()
            # even if there is a new one of this name
            raise CollectionNotFoundError(str(name), "collection") from None
        logger.warning("a %s cannot be stored: %s", what, error)
        detail = (
            f"The {what} cannot be stored; perhaps the disk is full. Try again later."
        )
        raise Problem(503, detail, headers={"Retry-After": "10"}) from None
