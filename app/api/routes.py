"""The routes. Each takes a checked query (see `params`), calls the retriever and returns a response (see `responses`).

- Item routes exist twice: for the default collection, and below /collections/{collection}.
- Ids are percent-encoded in URLs and looked up in the index; no part of a URL is ever used as a file path.
- The settings only write the actual limits into the documentation.
"""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from app.api.bodies import read_text_query
from app.api.openapi import batch_body, image_body, operation, problem_responses, text_body
from app.api.params import (
    BatchDep,
    CollectionsDep,
    ImageQueryDep,
    ItemId,
    ItemsQueryDep,
    RetrieverDep,
    SimilarQueryDep,
    SnapshotDep,
    require_admin,
    retriever_of,
    settings_of,
    snapshot_of,
)
from app.api.responses import JsonResponse, item_response, items_response, search_response
from app.api.schemas import (
    BatchResponse,
    CollectionsResponse,
    HealthResponse,
    ItemResponse,
    ItemsResponse,
    ReadinessResponse,
    ReloadResponse,
    SearchResponse,
)
from app.core.media import media_type
from app.core.metrics import CONTENT_TYPE
from app.core.problems import Problem
from app.core.settings import Settings
from app.search.errors import NotReadyError
from dcar_core.util.errors import DcarError

_COLLECTION = "/collections/{collection}"
_IMAGE_MAX_AGE_S = 3600
_RELOAD_RETRY = {"Retry-After": "30"}  # a version that fails to load now will not load a second later


class DirectRoute(APIRoute):
    """A route whose endpoint takes only the request: dependency injection costs 20 % of a cached search."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        return self.endpoint


def add_routes(app: FastAPI, settings: Settings) -> None:
    """Add every route of the API to the application."""
    for prefix in ("", _COLLECTION):
        # On the app itself: FastAPI matches the routes of an included router more slowly.
        app.router.add_api_route(
            f"{prefix}/search/text",
            search_text,
            methods=["POST"],
            route_class_override=DirectRoute,
            tags=["search"],
            dependencies=_prefix_parameters(prefix),
            **operation(SearchResponse, 400, 404, 409, 413, 415, 422, 503, body=text_body(settings)),
        )
        app.include_router(_item_routes(settings), prefix=prefix, dependencies=_prefix_parameters(prefix))
    app.include_router(_service_routes())


async def search_text(request: Request) -> Response:
    """Find the images that a text describes."""
    snapshot = await snapshot_of(request)
    query = await read_text_query(request, settings_of(request))
    results = await (await retriever_of(request)).search(snapshot, query)
    return JsonResponse(search_response(request, results))


def _prefix_parameters(prefix: str) -> list[Any]:
    return [Depends(_collection_parameter)] if prefix else []


async def _collection_parameter(collection: Annotated[str, Path(description="a name from GET /collections")]) -> None:
    """Document the path parameter; `collection_of` reads it."""


def _item_routes(settings: Settings) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/search/image",
        tags=["search"],
        **operation(SearchResponse, 400, 404, 409, 413, 415, 422, 503, body=image_body(settings)),
    )
    async def search_image(
        snapshot: SnapshotDep, query: ImageQueryDep, retriever: RetrieverDep, request: Request
    ) -> Response:
        """Find the images that resemble an uploaded image."""
        return JsonResponse(search_response(request, await retriever.search(snapshot, query)))

    @router.post(
        "/search/batch",
        tags=["search"],
        **operation(BatchResponse, 400, 404, 409, 413, 415, 422, 503, body=batch_body(settings)),
    )
    async def search_batch(
        snapshot: SnapshotDep, queries: BatchDep, retriever: RetrieverDep, request: Request
    ) -> Response:
        """Run several text searches in one request."""
        results = await retriever.search_batch(snapshot, queries)
        responses = [search_response(request, each) for each in results]
        return JsonResponse({"index_version": results[0].version, "answers": responses})

    @router.get("/items", tags=["items"], **operation(ItemsResponse, 404, 422, 503))
    async def items(snapshot: SnapshotDep, query: ItemsQueryDep, retriever: RetrieverDep, request: Request) -> Response:
        """List the gallery's items page by page, in index order."""
        return JsonResponse(
            items_response(request, await retriever.items(snapshot, query.filter, query.offset, query.k))
        )

    @router.get("/items/{item_id:path}/similar", tags=["items"], **operation(SearchResponse, 404, 409, 422, 503))
    async def similar(
        snapshot: SnapshotDep, query: SimilarQueryDep, retriever: RetrieverDep, request: Request
    ) -> Response:
        """Find the items most similar to one of the gallery; the item itself is left out."""
        return JsonResponse(search_response(request, await retriever.search(snapshot, query)))

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
    async def picture(snapshot: SnapshotDep, item_id: ItemId, retriever: RetrieverDep, request: Request) -> Response:
        """Return the image file of an item, as stored in the gallery."""
        data, digest = await retriever.image(snapshot, item_id)
        etag = f'"{digest}"'
        scope = "private" if settings_of(request).api_keys else "public"
        headers = {"Cache-Control": f"{scope}, max-age={_IMAGE_MAX_AGE_S}", "ETag": etag}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=media_type(data), headers=headers)

    @router.get("/items/{item_id:path}", tags=["items"], **operation(ItemResponse, 404, 422, 503))
    async def item(snapshot: SnapshotDep, item_id: ItemId, retriever: RetrieverDep, request: Request) -> Response:
        """Return an item with all its metadata."""
        return JsonResponse(item_response(request, *await retriever.item(snapshot, item_id)))

    return router


def _service_routes() -> APIRouter:
    router = APIRouter()

    @router.get("/collections", tags=["service"], **operation(CollectionsResponse))
    async def list_collections(collections: CollectionsDep) -> Response:
        """List the served collections."""
        entries = [
            {
                "name": name,
                "default": name == collections.default,
                "count": snapshots.live.artifact.manifest.count if snapshots.live else 0,
                "index_version": snapshots.live.version if snapshots.live else None,
                "min_score": snapshots.live.min_score if snapshots.live else None,
            }
            for name, snapshots in collections
        ]
        return JsonResponse({"collections": entries})

    @router.get("/healthz", tags=["service"], **operation(HealthResponse))
    async def healthz() -> Response:
        """Report that the process is alive, whether or not an index is loaded."""
        return JsonResponse({"status": "ok"})

    @router.get("/readyz", tags=["service"], **operation(ReadinessResponse, 503))
    async def readyz(collections: CollectionsDep) -> Response:
        """Report that searches work in every collection, or the reason why they do not."""
        collections.require_all()
        if collections.is_draining:
            raise NotReadyError("The service is shutting down.")
        live, reason = collections[None].require(), collections.reason
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
        return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE)

    @router.post(
        "/admin/reload",
        tags=["service"],
        dependencies=[Depends(require_admin)],
        **operation(ReloadResponse, 401, 403, 503),
    )
    async def reload(collections: CollectionsDep, request: Request) -> Response:
        """Serve the published version of every collection now, without waiting for the next poll."""
        await request.body()  # unused, but an unread body would count as one that never arrives
        try:
            changed = await collections.reload()
        except DcarError as error:
            detail = f"The published version cannot be served: {error}"
            raise Problem(503, detail, headers=_RELOAD_RETRY) from None
        versions = {name: snapshots.require().version for name, snapshots in collections}
        default = collections[None].require().version
        return JsonResponse({"index_version": default, "versions": versions, "changed": any(changed.values())})

    return router
