"""The routes of searches, items and the service, and the list of all.

- Each endpoint reads a query (see `requests`), calls the retriever and returns a
  response (see `responses`).
- Ids are percent-encoded in URLs and looked up in the index; no part of a URL is ever
  used as a file path.
"""

import asyncio
import base64
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi import Query as QueryParam
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.api import concepts, feedback, page, requests, responses, writing
from app.api.feedback import noted
from app.api.guard import OPEN, PART_BYTES, Policy, byte_counter, out_of_scope
from app.api.plugins import report_search
from app.api.requests import decode_base64
from app.api.routing import (
    QUICK_BYTES,
    ItemId,
    JsonResponse,
    Routes,
    items_path,
    may_read,
    not_modified,
    read_json,
    send_items,
    state_of,
    validated,
    version_of,
)
from app.core.problems import Problem, field_problem
from app.core.turns import run_in_new_thread
from app.search.errors import BatchQueryError, UnavailableError
from app.search.query import Query, require_sortable, row_of
from app.search.results import SearchResponse
from app.search.served_version import ServedVersion, filter_rows, group_field, list_rows
from dcar_core.images import sniff_format
from dcar_core.images.decoding import ThumbnailFormat
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DcarError, ImageError

_READ = Policy("read")
_CHECKED = Policy("read", "checked")
_PICTURE = Policy("read", is_view=True, is_signable=True)
_UPLOAD = Policy("read", body=lambda settings: settings.max_upload_bytes + PART_BYTES)
_BATCH = Policy("read", body=requests.batch_bytes)
_EMBED = Policy("read", "checked", body=requests.batch_bytes)
# of a card on screens with one and two dots per pixel, and of the detail view
_Pixels = Literal["192", "384", "1280"]
_FORM = "multipart/form-data"
_IMAGE_MAX_AGE_S = 3600
_NUMBER_BYTES = 22  # of a number in JSON, at most


routes = Routes()


def add_routes(app: FastAPI, plugins: Iterable[Routes]) -> None:
    """Add all routes to an application. Those of text searches are first, so that they
    are found first; those of plug-ins are before the files of the page.
    """
    own = (routes, writing.routes, concepts.routes, feedback.routes)
    for part in (*own, *plugins, page.routes):
        part.add_to(app)


@routes.add("POST", "/search/text", _READ, SearchResponse, accepts=Query)
async def search_text(request: Request) -> Response:
    """Find the images that a text describes."""
    return await _search(
        request,
        await version_of(request),
        await read_json(request, Query),
    )


async def _search(
    request: Request,
    served: ServedVersion,
    query: Query,
    image: bytes | None = None,
) -> Response:
    body, size = await state_of(request).retriever.search(
        served,
        query,
        image,
        items_path(request),
    )
    if state_of(request).feedback is not None:
        noted(request, query, body, has_image=image is not None)
    if state_of(request).plugins:
        report_search(request, query, body, has_image=image is not None)
    return await send_items(request, body, size)


@routes.add(
    "POST",
    "/search/image",
    _UPLOAD,
    SearchResponse,
    accepts=requests.ImageForm,
    body_type=_FORM,
)
async def search_image(request: Request) -> Response:
    """Find the images that resemble an uploaded image."""
    served = await version_of(request)
    # a body that will not be used is not read
    state_of(request).retriever.require_room()
    query, image = await requests.read_image_query(request, state_of(request).settings)
    return await _search(request, served, query, image)


@routes.add(
    "POST",
    "/search/batch",
    _BATCH,
    responses.BatchResponse,
    accepts=requests.BatchQuery,
)
async def search_batch(request: Request) -> Response:
    """Run several searches by text or image in one request. Each one counts against the
    caller's rate limit.
    """
    served = await version_of(request)
    queries = {
        f"queries.{i}": query
        for i, query in enumerate(
            (await read_json(request, requests.BatchQuery)).queries
        )
    }
    await state_of(request).access.charge(len(queries) - 1)
    sources = {
        name: query.image for name, query in queries.items() if query.image is not None
    }
    images = await state_of(request).fetcher.read(request.scope, sources)
    searches = [(query, images.get(name)) for name, query in queries.items()]
    pages = await state_of(request).retriever.search_batch(
        served,
        searches,
        items_path(request),
    )
    for (query, image), (body, _) in zip(searches, pages, strict=True):
        noted(request, query, body, has_image=image is not None)
        if state_of(request).plugins:
            report_search(request, query, body, has_image=image is not None)
    answers = {"index_version": served.version, "answers": [body for body, _ in pages]}
    return await send_items(request, answers, sum(size for _, size in pages))


@routes.add("GET", "/items", _READ, responses.ItemsResponse)
async def items(
    request: Request, query: Annotated[requests.ItemsQuery, QueryParam()]
) -> Response:
    """List the gallery's items page by page, in index order or sorted; of a group the
    first one.
    """
    if query.k > (most := state_of(request).settings.max_k):
        raise field_problem("k", f"at most {most}, not {query.k}")
    served = await version_of(request)
    body, texts = await state_of(request).retriever.examine(
        _list,
        served,
        query,
        items_path(request),
    )
    return await send_items(request, body, texts)


def _list(
    served: ServedVersion,
    query: requests.ItemsQuery,
    path: str,
) -> tuple[responses.ItemsResponse, int]:
    """Return a page of items, and the bytes of their texts."""
    index = served.index
    body: responses.ItemsResponse = {
        "index_version": served.version,
        "count": 0,
        "items": [],
    }
    if not index.rows:
        return body, 0
    if query.sort:
        require_sortable(served, query.sort)
    if query.group_by is None:
        group_by = index.manifest.spec.group_field
    else:
        group_by = query.group_by
    rows = list_rows(served, query.filter, query.sort, group_by)
    end = query.offset + query.k
    page = rows[query.offset : end].tolist()
    items = [index.item(row) for row in page]
    body["count"] = len(rows)
    body["items"] = [responses.gallery_item(path, item) for item in items]
    if group_by and page:
        allowed = filter_rows(served, query.filter) if query.filter else None
        for shown, group in zip(
            body["items"],
            group_field(served, group_by).shown(page, allowed),
            strict=True,
        ):
            shown["group"] = group
    if len(rows) > end:
        body["next_offset"] = end
    return body, sum(item.text_bytes + item.metadata_bytes for item in items)


@routes.add("GET", "/items/{item_id:path}/similar", _READ, SearchResponse)
async def similar(
    request: Request,
    item_id: ItemId,
    page: Annotated[requests.PageQuery, QueryParam()],
) -> Response:
    """Find the items most similar to one of the gallery; the item itself is left
    out.
    """
    served = await version_of(request)
    row_of(served, item_id)  # an unknown one is 404 here
    fields = {"k": page.k, "offset": page.offset, "more_like": [item_id]}
    return await _search(
        request,
        served,
        validated(Query, fields, state_of(request).settings),
    )


@routes.add("GET", "/items/{item_id:path}/image", _PICTURE, "image/*")
async def picture(
    request: Request,
    item_id: ItemId,
    size: Annotated[
        _Pixels | None,
        QueryParam(description="return a thumbnail, whose longer side is so long"),
    ] = None,
) -> Response:
    """Return the image file of an item as stored in the gallery, or a thumbnail of it.

    A thumbnail is WebP for clients that name it in `Accept`, else JPEG.
    """
    served = await version_of(request)
    retriever = state_of(request).retriever
    kind: ThumbnailFormat = (
        "webp" if "image/webp" in request.headers.get("accept", "") else "jpeg"
    )
    name, data = await retriever.image(served, item_id, size and int(size), kind)
    # which caches may keep it
    keeper = "private" if state_of(request).settings.api_keys else "public"
    headers = {
        "Cache-Control": f"{keeper}, max-age={_IMAGE_MAX_AGE_S}",
        "ETag": f'"{name}"',
    }
    headers |= {} if size is None else {"Vary": "Accept"}
    byte_counter(request.scope)(len(data))
    return not_modified(request, headers) or Response(
        data,
        media_type=f"image/{sniff_format(data)}",
        headers=headers,
    )


@routes.add("GET", "/items/{item_id:path}", _READ, responses.ItemResponse)
async def item(request: Request, item_id: ItemId) -> Response:
    """Return an item with all its metadata."""
    served = await version_of(request)
    shown = await state_of(request).retriever.run(
        "search",
        served.index.item,
        row_of(served, item_id),
    )
    return JsonResponse(
        {
            "index_version": served.version,
            **responses.gallery_item(items_path(request), shown),
        }
    )


@routes.add(
    "POST",
    "/v1/embeddings",
    _EMBED,
    responses.EmbeddingsResponse,
    accepts=requests.EmbeddingsQuery,
)
async def embeddings(request: Request) -> Response:
    """Return the vectors of texts and images, in the shape of OpenAI's API."""
    retriever = state_of(request).retriever
    collections = state_of(request).collections
    retriever.require_room()
    query = await read_json(request, requests.EmbeddingsQuery)
    name = query.model or collections.default
    if not may_read(request, name):
        raise out_of_scope()
    served = collections.open(query.model, "model")
    encoder = served.encoder
    if query.dimensions not in (None, encoder.dim):
        raise field_problem(
            "dimensions",
            f"must be {encoder.dim} for this model, not {query.dimensions}",
        )
    await state_of(request).access.charge(len(query.input) - 1)
    inputs = await asyncio.to_thread(
        _inputs,
        query,
        state_of(request).settings.max_upload_bytes,
    )
    try:
        vectors = await retriever.embed(served, inputs)
    except BatchQueryError as error:
        if not isinstance(error.cause, ImageError):
            raise error.cause from None
        raise field_problem(f"input.{error.number}.image", str(error.cause)) from None
    is_text = query.encoding_format == "float"
    if (
        size := len(vectors) * encoder.dim * (_NUMBER_BYTES if is_text else 4)
    ) > QUICK_BYTES:
        byte_counter(request.scope)(size)
    data = await asyncio.to_thread(_vectors, vectors, is_text=is_text)
    body: responses.EmbeddingsResponse = {
        "object": "list",
        "data": data,
        "model": name,
        "fingerprint": encoder.fingerprint,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
    return await asyncio.to_thread(JsonResponse, body)


def _vectors(vectors: Sequence[Floats], *, is_text: bool) -> list[responses.Embedding]:
    sent = (
        (
            vector.tolist()
            if is_text
            else base64.b64encode(vector.astype("<f4").tobytes()).decode()
        )
        for vector in vectors
    )
    return [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(sent)
    ]


def _inputs(query: requests.EmbeddingsQuery, max_bytes: int) -> list[str | bytes]:
    return [
        (
            part
            if isinstance(part, str)
            else decode_base64(part.image, max_bytes, f"input.{number}.image")
        )
        for number, part in enumerate(query.input)
    ]


@routes.add("GET", "/v1/models", _CHECKED)
async def list_models(request: Request) -> Response:
    """List the collections that embed, those that the key opens, in the shape of
    OpenAI's API.
    """
    current = [
        (name, opened.current)
        for name, opened in state_of(request).collections
        if may_read(request, name)
    ]
    return JsonResponse(
        {
            "object": "list",
            "data": [_model(name, served) for name, served in current if served],
        }
    )


@routes.add("GET", "/v1/models/{collection}", _CHECKED)
async def model(request: Request, collection: str) -> Response:
    """Return one of the collections that embed, in the shape of OpenAI's API."""
    if not may_read(request, collection):
        raise out_of_scope()
    return JsonResponse(
        _model(collection, state_of(request).collections.open(collection, "model"))
    )


def _model(name: str, served: ServedVersion) -> dict[str, Any]:
    created = int(served.index.manifest.created_s or 0)
    return {"id": name, "object": "model", "created": created, "owned_by": "dcar"}


@routes.add("GET", "/collections", _CHECKED, responses.CollectionsResponse)
async def list_collections(request: Request) -> Response:
    """List the served collections that the key opens."""
    collections = state_of(request).collections
    entries = [
        responses.collection_response(collections, name)
        for name, _ in collections
        if may_read(request, name)
    ]
    return JsonResponse({"collections": entries})


@routes.add("GET", "/healthz", OPEN, responses.HealthResponse)
async def healthz() -> Response:
    """Report that the process is alive, whether or not an index is loaded."""
    return JsonResponse({"status": "ok"})


@routes.add("GET", "/readyz", OPEN, responses.ReadinessResponse)
async def readyz(request: Request) -> Response:
    """Report that searches work in all collections of the settings, or why not, to
    callers who may see them all.
    """
    collections = state_of(request).collections
    may_see_all = state_of(request).access.opens_everything(request.headers)
    if (missing := collections.missing) is not None:
        raise UnavailableError(
            missing if may_see_all else "Some collection cannot be searched."
        )
    served = collections[None].require()
    reason = collections.reason
    if reason is not None and not may_see_all:
        reason = "A key for all collections opens the reason."
    body: responses.ReadinessResponse = {
        "status": "ready" if reason is None else "degraded",
        "index_version": served.version,
        "count": served.index.manifest.count,
        "reason": reason,
        "model_note": next(
            (loaded.model_note for loaded in collections.loaded if loaded.model_note),
            None,
        ),
    }
    return JsonResponse(body)


@routes.add("GET", "/metrics", Policy("monitor", "service", cost=0), "text/plain")
async def metrics(request: Request) -> Response:
    """Return the service's metrics. If API keys are required, an API key or the admin
    key opens it.
    """
    return Response(
        await run_in_new_thread(state_of(request).metrics.render),
        media_type=CONTENT_TYPE_LATEST,
    )


@routes.add(
    "POST",
    "/admin/reload",
    Policy("admin", "service"),
    responses.ReloadResponse,
)
async def reload(request: Request) -> Response:
    """Serve the published version of every collection now, without waiting for the next
    poll.
    """
    collections = state_of(request).collections
    # unused, but an unread body would count as one that never arrives
    await request.body()
    try:
        changed = await collections.reload()
    except DcarError as error:
        raise Problem(
            503,
            f"The published version cannot be served: {error}",
            headers={"Retry-After": "30"},
        ) from None
    versions = {
        name: opened.current.version
        for name, opened in collections
        if opened.current is not None
    }
    default = collections[None].require().version
    return JsonResponse(
        {
            "index_version": default,
            "versions": versions,
            "changed": any(changed.values()),
        }
    )
