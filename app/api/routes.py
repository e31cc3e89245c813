"""The routes of searches, items and the service, and the list of all.

- Each endpoint reads a query (see `requests`), calls the retriever and returns a response (see `responses`).
- Ids are percent-encoded in URLs and looked up in the index; no part of a URL is ever used as a file path.
"""

import asyncio
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi import Query as QueryParam
from fastapi.responses import Response

from app.api import feedback, page, schemas
from app.api.feedback import noted
from app.api.image_urls import decode_base64
from app.api.page import ThumbnailSize, thumbnail_response
from app.api.requests import (
    BatchQuery,
    EmbeddingsQuery,
    ImageForm,
    ItemsQuery,
    PageQuery,
    batch_bytes,
    check_form_type,
    check_k,
    form_bytes,
    read_image_query,
    read_json,
    validated,
)
from app.api.responses import (
    JsonResponse,
    collection_response,
    embeddings_response,
    image_headers,
    image_response,
    item_response,
    items_path,
    items_response,
    make_response,
    model_response,
    not_modified,
    text_bytes,
)
from app.api.routing import ItemId, Routes, may_read, snapshot_of, state_of
from app.api.writing import collection_writes, item_writes
from app.core.metrics import CONTENT_TYPE
from app.core.problems import Problem, field_problem
from app.core.threads import run_in_new_thread
from app.http.access import OPEN, Policy, out_of_scope
from app.search.errors import BatchQueryError, UnavailableError
from app.search.plan import row_of
from app.search.query import Query
from app.search.results import SearchResponse
from app.search.snapshots import Snapshot
from app.service.batching import SharedTasks
from dcar_core.util.errors import DcarError, ImageError

_UPLOAD = Policy("read", body=form_bytes, field="file")
_BATCH = Policy("read", body=batch_bytes)
_FORM = "multipart/form-data"
_rendering = SharedTasks[bytes]()  # of metrics, one thread for all who wait
_RELOAD_RETRY = {"Retry-After": "30"}  # a version that fails to load now will not load a second later

search = Routes("search")
gallery = Routes("items")
embedding = Routes("embeddings")
service = Routes("service")


def add_routes(app: FastAPI) -> None:
    """Add all routes to an application. Those of text searches are first, so that they are found first."""
    for routes in (search, gallery, item_writes, embedding, service, collection_writes, feedback.routes, page.routes):
        routes.add_to(app)


@search.add("POST", "/search/text", Policy("read"), SearchResponse, accepts=Query, errors=(409,))
async def search_text(request: Request) -> Response:
    """Find the images that a text describes."""
    return await _search(request, await snapshot_of(request), await read_json(request, Query))


async def _search(request: Request, snapshot: Snapshot, query: Query, image: bytes | None = None) -> Response:
    body, size = await state_of(request).retriever.search(snapshot, query, image, items_path(request))
    noted(request, query, body, has_image=image is not None)
    return make_response(request, lambda: body, size)


@search.add("POST", "/search/image", _UPLOAD, SearchResponse, accepts=ImageForm, media_type=_FORM, errors=(409,))
async def search_image(request: Request) -> Response:
    """Find the images that resemble an uploaded image."""
    snapshot = await snapshot_of(request)
    check_form_type(request)
    state_of(request).retriever.require_room()  # a body that will not be used is not read
    query, image = await read_image_query(request, state_of(request).settings)
    return await _search(request, snapshot, query, image)


@search.add("POST", "/search/batch", _BATCH, schemas.BatchResponse, accepts=BatchQuery, errors=(409,))
async def search_batch(request: Request) -> Response:
    """Run several searches by text or image in one request. Each one counts against the caller's rate limit."""
    snapshot = await snapshot_of(request)
    queries = {f"queries.{i}": query for i, query in enumerate((await read_json(request, BatchQuery)).queries)}
    await state_of(request).access.charge(len(queries) - 1)
    given = {place: query.image for place, query in queries.items() if query.image is not None}
    images = await state_of(request).fetcher.read(request.scope, given)
    searches = [(query, images.get(place)) for place, query in queries.items()]
    pages = await state_of(request).retriever.search_batch(snapshot, searches, items_path(request))
    for (query, image), (body, _) in zip(searches, pages, strict=True):
        noted(request, query, body, has_image=image is not None)
    answers = {"index_version": snapshot.version, "answers": [body for body, _ in pages]}
    return make_response(request, lambda: answers, sum(size for _, size in pages), "queries")


@gallery.add("GET", "/items", Policy("read"), schemas.ItemsResponse)
async def items(request: Request, query: Annotated[ItemsQuery, QueryParam()]) -> Response:
    """List the gallery's items page by page, in index order or sorted; of a group the first one."""
    check_k(query.k, state_of(request).settings)
    snapshot = await snapshot_of(request)
    count, page = await state_of(request).retriever.items(
        snapshot, query.filter, query.offset, query.k, query.sort, query.group_by
    )
    end = query.offset + query.k
    return make_response(request, lambda: items_response(request, snapshot.version, end, count, page), text_bytes(page))


@gallery.add("GET", "/items/{item_id:path}/similar", Policy("read"), SearchResponse, errors=(409,))
async def similar(request: Request, item_id: ItemId, page: Annotated[PageQuery, QueryParam()]) -> Response:
    """Find the items most similar to one of the gallery; the item itself is left out."""
    snapshot = await snapshot_of(request)
    row_of(snapshot, item_id)  # an unknown one is 404 here
    fields = {"k": page.k, "offset": page.offset, "more_like": [item_id]}
    return await _search(request, snapshot, validated(Query, fields, state_of(request).settings))


@gallery.add(
    "GET",
    "/items/{item_id:path}/image",
    Policy("read"),
    {"content": {"image/*": {}}, "description": "the image file"},
    others={304: {"description": "not modified: the ETag in If-None-Match is current"}},
)
async def picture(
    request: Request,
    item_id: ItemId,
    size: Annotated[
        ThumbnailSize | None, QueryParam(description="return a thumbnail, with a longer side of this many pixels")
    ] = None,
) -> Response:
    """Return the image file of an item as stored in the gallery, or a thumbnail of it."""
    if size is not None:
        return await thumbnail_response(request, item_id, size)
    digest, data = await state_of(request).retriever.image(await snapshot_of(request), item_id)
    headers = image_headers(request, digest)
    return not_modified(request, headers) or image_response(data, headers)


@gallery.add("GET", "/items/{item_id:path}", Policy("read"), schemas.ItemResponse)
async def item(request: Request, item_id: ItemId) -> Response:
    """Return an item with all its metadata."""
    snapshot = await snapshot_of(request)
    found = await state_of(request).retriever.compute.run("search", snapshot.artifact.item, row_of(snapshot, item_id))
    return JsonResponse(item_response(request, snapshot.version, found))


@embedding.add(
    "POST",
    "/v1/embeddings",
    Policy("read", "checked", body=batch_bytes),
    schemas.EmbeddingsResponse,
    accepts=EmbeddingsQuery,
    errors=(404, 503),
)
async def embeddings(request: Request) -> Response:
    """Return the vectors of texts and images, in the shape of OpenAI's API."""
    retriever, collections = state_of(request).retriever, state_of(request).collections
    retriever.require_room()
    query = await read_json(request, EmbeddingsQuery)
    if not may_read(request, query.model or collections.default):
        raise out_of_scope()
    snapshot = await collections.open(query.model, "model")
    encoder = snapshot.encoder
    if query.dimensions not in (None, encoder.dim):
        raise field_problem("dimensions", f"must be {encoder.dim} for this model, not {query.dimensions}")
    await state_of(request).access.charge(len(query.input) - 1)
    inputs = await asyncio.to_thread(_inputs, query, state_of(request).settings.max_upload_bytes)
    try:
        vectors = await retriever.embed(snapshot, inputs)
    except BatchQueryError as error:
        if not isinstance(error.cause, ImageError):
            raise error.cause from None
        raise field_problem(f"input.{error.number}.image", str(error.cause)) from None
    name = query.model or collections.default
    return JsonResponse(embeddings_response(name, encoder.fingerprint, vectors, query.encoding_format))


def _inputs(query: EmbeddingsQuery, max_bytes: int) -> list[str | bytes]:
    return [
        each if isinstance(each, str) else decode_base64(each.image, max_bytes, f"input.{number}.image")
        for number, each in enumerate(query.input)
    ]


@embedding.add("GET", "/v1/models", Policy("read", "checked"), schemas.ModelsResponse)
async def list_models(request: Request) -> Response:
    """List the collections that embed, those that the key opens, in the shape of OpenAI's API."""
    entries = [model_response(name, served.live) for name, served in state_of(request).collections if served.live]
    return JsonResponse({"object": "list", "data": [each for each in entries if may_read(request, each["id"])]})


@embedding.add("GET", "/v1/models/{collection}", Policy("read", "checked"), schemas.ServedModel, errors=(404, 422, 503))
async def model(request: Request, collection: str) -> Response:
    """Return one of the collections that embed, in the shape of OpenAI's API."""
    if not may_read(request, collection):
        raise out_of_scope()
    return JsonResponse(model_response(collection, await state_of(request).collections.open(collection, "model")))


@service.add("GET", "/collections", Policy("read", "checked"), schemas.CollectionsResponse)
async def list_collections(request: Request) -> Response:
    """List the served collections that the key opens."""
    collections = state_of(request).collections
    entries = [collection_response(collections, name) for name, _ in collections if may_read(request, name)]
    return JsonResponse({"collections": entries})


@service.add("GET", "/healthz", OPEN, schemas.HealthResponse)
async def healthz() -> Response:
    """Report that the process is alive, whether or not an index is loaded."""
    return JsonResponse({"status": "ok"})


@service.add("GET", "/readyz", OPEN, schemas.ReadinessResponse, errors=(503,))
async def readyz(request: Request) -> Response:
    """Report that searches work in all collections of the settings, or why not, to callers who may see them all."""
    collections = state_of(request).collections
    may_see_all = state_of(request).access.opens_everything(request.headers)
    if (missing := collections.missing) is not None:
        raise UnavailableError(missing if may_see_all else "Some collection cannot be searched.")
    if (fault := state_of(request).retriever.fault) is not None:
        raise UnavailableError(fault)
    live, reason = collections[None].require(), collections.reason
    reason = reason or await collections.gallery_fault()
    if reason is not None and not may_see_all:
        reason = "A key for all collections opens the reason."
    status = {"status": "ready" if reason is None else "degraded", "index_version": live.version}
    note = next((each.model_note for each in collections.loaded if each.model_note), None)
    opening = collections.opening if may_see_all else None
    facts = {"count": live.artifact.manifest.count, "reason": reason, "model_note": note, "opening": opening}
    return JsonResponse({**status, **facts})


@service.add(
    "GET",
    "/metrics",
    Policy("monitor", "service", cost=0),
    {"content": {"text/plain": {}}, "description": "metrics for Prometheus"},
)
async def metrics(request: Request) -> Response:
    """Return the service's metrics. If API keys are required, an API key or the admin key opens it."""
    render = state_of(request).metrics.render
    return Response(await _rendering.run(render, lambda: run_in_new_thread(render)), media_type=CONTENT_TYPE)


@service.add("POST", "/admin/reload", Policy("admin", "service"), schemas.ReloadResponse, errors=(503,))
async def reload(request: Request) -> Response:
    """Serve the published version of every collection now, without waiting for the next poll."""
    collections = state_of(request).collections
    await request.body()  # unused, but an unread body would count as one that never arrives
    try:
        changed = await collections.reload()
    except DcarError as error:
        raise Problem(503, f"The published version cannot be served: {error}", headers=_RELOAD_RETRY) from None
    versions = {name: index.live.version for name, index in collections if index.live is not None}
    default = collections[None].require().version
    return JsonResponse({"index_version": default, "versions": versions, "changed": any(changed.values())})
