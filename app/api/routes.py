"""The routes. Each reads a query (see `bodies`), calls the retriever and returns a response (see `responses`).

- Item routes exist twice: for the default collection, and below /collections/{collection}.
- Ids are percent-encoded in URLs and looked up in the index; no part of a URL is ever used as a file path.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi import Query as QueryParam
from fastapi.responses import Response
from fastapi.routing import APIRoute

from app.api.bodies import (
    check_batch,
    check_form_type,
    check_k,
    check_window,
    embeddings_input,
    read_batch,
    read_embeddings,
    read_image_query,
    read_text_query,
)
from app.api.browsing import ThumbnailSize, browsing_routes, thumbnail_response
from app.api.dependencies import ItemId, may_read, require_admin, snapshot_of, state_of
from app.api.openapi import operation, problem_responses
from app.api.requests import BatchQuery, EmbeddingsQuery, ImageForm, ItemsQuery, PageQuery, TextQuery
from app.api.responses import (
    ImageResponse,
    JsonResponse,
    collection_response,
    embeddings_response,
    image_headers,
    item_response,
    items_response,
    search_response,
)
from app.api.schemas import (
    BatchResponse,
    CollectionsResponse,
    EmbeddingsResponse,
    HealthResponse,
    ItemResponse,
    ItemsResponse,
    ReadinessResponse,
    ReloadResponse,
    SearchResponse,
)
from app.api.writing import collection_writing_routes, item_writing_routes, job_routes
from app.core.keys import opens_everything
from app.core.metrics import CONTENT_TYPE
from app.core.problems import Problem, field_problem
from app.core.settings import Settings
from app.core.threads import run_in_new_thread
from app.middleware.access import charge, out_of_scope
from app.search.errors import BatchQueryError, NotReadyError
from app.search.query import Query, SearchOptions
from app.search.snapshots import Snapshot
from dcar_core.util.errors import DcarError, ImageError

_COLLECTION = "/collections/{collection}"
_RELOAD_RETRY = {"Retry-After": "30"}  # a version that fails to load now will not load a second later


class DirectRoute(APIRoute):
    """A route whose endpoint takes only the request: injected dependencies would take 14 % of a cached search."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        return self.endpoint


def add_routes(app: FastAPI, settings: Settings) -> None:
    for prefix in ("", _COLLECTION):
        # On the app itself: FastAPI matches the routes of an included router more slowly.
        app.router.add_api_route(
            f"{prefix}/search/text",
            search_text,
            methods=["POST"],
            route_class_override=DirectRoute,
            tags=["search"],
            **operation(SearchResponse, 400, 404, 409, 413, 415, 422, 503, body=TextQuery),
        )
        app.include_router(_item_routes(settings), prefix=prefix)
        app.include_router(browsing_routes(), prefix=prefix)
        app.include_router(item_writing_routes(), prefix=prefix)
    app.include_router(_service_routes(settings))
    app.include_router(job_routes())
    app.include_router(collection_writing_routes())


async def search_text(request: Request) -> Response:
    """Find the images that a text describes."""
    snapshot = snapshot_of(request)
    return await _search(request, snapshot, await read_text_query(request, state_of(request).settings))


async def _search(request: Request, snapshot: Snapshot, query: Query) -> Response:
    return JsonResponse(search_response(request, await state_of(request).retriever.search(snapshot, query)))


def _item_routes(settings: Settings) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/search/image",
        tags=["search"],
        **operation(
            SearchResponse, 400, 404, 409, 413, 415, 422, 503, body=ImageForm, media_type="multipart/form-data"
        ),
    )
    async def search_image(request: Request) -> Response:
        """Find the images that resemble an uploaded image."""
        snapshot = snapshot_of(request)
        check_form_type(request)
        state_of(request).retriever.require_room()  # a body that will not be used is not read
        return await _search(request, snapshot, await read_image_query(request, state_of(request).settings))

    @router.post(
        "/search/batch",
        tags=["search"],
        **operation(BatchResponse, 400, 404, 409, 413, 415, 422, 503, body=BatchQuery),
    )
    async def search_batch(request: Request) -> Response:
        """Run several searches by text or image in one request. Each one counts against the caller's rate limit."""
        snapshot = snapshot_of(request)
        queries = await read_batch(request, settings)
        await charge(request, len(queries) - 1)
        checked = await asyncio.to_thread(check_batch, queries, settings)
        checked = await state_of(request).fetcher.complete(request.scope, queries, checked)
        results = await state_of(request).retriever.search_batch(snapshot, checked)
        responses = [search_response(request, each) for each in results]
        return JsonResponse({"index_version": results[0].version, "answers": responses})

    @router.get("/items", tags=["items"], **operation(ItemsResponse, 404, 422, 503))
    async def items(request: Request, query: Annotated[ItemsQuery, QueryParam()]) -> Response:
        """List the gallery's items page by page, in index order; of a group the first one."""
        check_k(query.k, settings)
        page = await state_of(request).retriever.items(
            snapshot_of(request), query.filter, query.offset, query.k, group_by=query.group_by
        )
        return JsonResponse(items_response(request, page))

    @router.get("/items/{item_id:path}/similar", tags=["items"], **operation(SearchResponse, 404, 409, 422, 503))
    async def similar(request: Request, item_id: ItemId, page: Annotated[PageQuery, QueryParam()]) -> Response:
        """Find the items most similar to one of the gallery; the item itself is left out."""
        options = SearchOptions(k=page.k, offset=page.offset)
        check_window(options, settings)
        return await _search(request, snapshot_of(request), Query(options, item_id=item_id))

    @router.get(
        "/items/{item_id:path}/image",
        tags=["items"],
        response_class=Response,
        responses={
            200: {"content": {"image/*": {}}, "description": "the image file"},
            304: {"description": "not modified: the ETag in If-None-Match is current"},
            **problem_responses(404, 422, 503),
        },
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
        images = state_of(request).retriever.images
        image = await images.open(snapshot_of(request), item_id)
        headers = image_headers(request, image.digest)
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            image.close()
            return Response(status_code=304, headers=headers)
        return ImageResponse(image, images.threads, headers)

    @router.get("/items/{item_id:path}", tags=["items"], **operation(ItemResponse, 404, 422, 503))
    async def item(request: Request, item_id: ItemId) -> Response:
        """Return an item with all its metadata."""
        snapshot = snapshot_of(request)
        found = await state_of(request).retriever.item(snapshot, item_id)
        return JsonResponse(item_response(request, snapshot.version, found))

    return router


def _service_routes(settings: Settings) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/embeddings",
        tags=["embeddings"],
        **operation(EmbeddingsResponse, 400, 404, 413, 415, 422, 503, body=EmbeddingsQuery),
    )
    async def embeddings(request: Request) -> Response:
        """Return the vectors of texts and images, in the shape of OpenAI's API."""
        retriever, collections = state_of(request).retriever, state_of(request).collections
        retriever.require_room()
        query = await read_embeddings(request, settings)
        if not may_read(request, query.model or collections.default):
            raise out_of_scope()
        snapshot = collections.find(query.model, "model").require()
        encoder = snapshot.encoder
        if query.dimensions not in (None, encoder.dim):
            raise field_problem("dimensions", f"must be {encoder.dim} for this model, not {query.dimensions}")
        await charge(request, len(query.input) - 1)
        inputs = await asyncio.to_thread(embeddings_input, query, settings)
        try:
            vectors = await retriever.embed(snapshot, inputs)
        except BatchQueryError as error:
            if not isinstance(error.cause, ImageError):
                raise error.cause from None
            raise field_problem(f"input.{error.number}.image", str(error.cause)) from None
        name = query.model or collections.default
        return JsonResponse(embeddings_response(name, encoder.fingerprint, vectors, query.encoding_format))

    @router.get("/collections", tags=["service"], **operation(CollectionsResponse))
    async def list_collections(request: Request) -> Response:
        """List the served collections that the key opens."""
        collections = state_of(request).collections
        entries = [collection_response(collections, name) for name, _ in collections if may_read(request, name)]
        return JsonResponse({"collections": entries})

    @router.get("/healthz", tags=["service"], **operation(HealthResponse))
    async def healthz() -> Response:
        """Report that the process is alive, whether or not an index is loaded."""
        return JsonResponse({"status": "ok"})

    @router.get("/readyz", tags=["service"], **operation(ReadinessResponse, 503))
    async def readyz(request: Request) -> Response:
        """Report that searches work in every collection, or the reason why they do not, to callers who may see all."""
        collections, settings = state_of(request).collections, state_of(request).settings
        secret = settings.admin_key.get_secret_value() if settings.admin_key else None
        may_see_all = opens_everything(settings.api_keys, secret, request.headers)
        try:
            collections.require_all()
        except NotReadyError as error:
            raise error if may_see_all else NotReadyError("Some collection cannot be searched.") from None
        if collections.is_draining:
            raise NotReadyError("The service is shutting down.")
        if (fault := state_of(request).retriever.fault) is not None:
            raise NotReadyError(fault)
        live, reason = collections[None].require(), collections.reason
        reason = reason or await collections.gallery_fault.result()
        if reason is not None and not may_see_all:
            reason = "A key for all collections opens the reason."
        status = {"status": "ready" if reason is None else "degraded", "index_version": live.version}
        return JsonResponse({**status, "count": live.artifact.manifest.count, "reason": reason})

    @router.get(
        "/metrics",
        tags=["service"],
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {}}, "description": "metrics for Prometheus"},
            **problem_responses(401),
        },
    )
    async def metrics(request: Request) -> Response:
        """Return the service's metrics. If API keys are required, an API key or the admin key opens it."""
        text = await run_in_new_thread(state_of(request).metrics.render)
        return Response(text, media_type=CONTENT_TYPE)

    @router.post("/admin/reload", tags=["service"], **operation(ReloadResponse, 401, 403, 503))
    async def reload(request: Request) -> Response:
        """Serve the published version of every collection now, without waiting for the next poll."""
        require_admin(request)
        collections = state_of(request).collections
        await request.body()  # unused, but an unread body would count as one that never arrives
        try:
            changed = await collections.reload()
        except DcarError as error:
            detail = f"The published version cannot be served: {error}"
            raise Problem(503, detail, headers=_RELOAD_RETRY) from None
        versions = {name: index.live.version for name, index in collections if index.live is not None}
        default = collections[None].require().version
        return JsonResponse({"index_version": default, "versions": versions, "changed": any(changed.values())})

    return router
