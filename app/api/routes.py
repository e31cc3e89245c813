"""The routes. Each takes a checked query (see `queries`), asks the retriever, and shapes the answer (see `answers`).

Everything about items is there twice: for the default collection, and below /collections/{collection}. Ids travel in
URLs percent-encoded and are looked up in the index; no part of a URL is ever used as a path of the file system.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response

from app.api.openapi_bodies import batch_body, documented, image_body, problem_responses, text_body
from app.api.params import (
    BatchDep,
    CollectionsDep,
    ItemId,
    ItemsQueryDep,
    PictureDep,
    RetrieverDep,
    SimilarDep,
    SnapshotDep,
    WordsDep,
    require_admin,
    settings_of,
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
from app.core.problems import NotReady, Problem
from app.core.settings import Settings
from dcar_core.util.errors import DcarError

_PICTURE_AGE_S = 3600
_LATER = {"Retry-After": "30"}  # what does not load now will not load a second later


def make_router(settings: Settings) -> APIRouter:
    """All routes of the API. The settings only serve to write the true limits into its documentation."""
    router = APIRouter()
    router.include_router(_item_routes(settings))
    router.include_router(
        _item_routes(settings), prefix="/collections/{collection}", dependencies=[Depends(_named_collection)]
    )
    router.include_router(_service_routes())
    return router


async def _named_collection(collection: Annotated[str, Path(description="a name from GET /collections")]) -> None:
    """Puts the parameter into the documentation; `collection_of` reads it."""


def _item_routes(settings: Settings) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/search/text",
        tags=["search"],
        **documented(SearchResponse, 400, 404, 409, 413, 415, 422, 503, body=text_body(settings)),
    )
    async def search_text(
        snapshot: SnapshotDep, query: WordsDep, retriever: RetrieverDep, request: Request
    ) -> Response:
        """Find the pictures that a text describes."""
        return JsonResponse(search_response(request, await retriever.search(snapshot, query)))

    @router.post(
        "/search/image",
        tags=["search"],
        **documented(SearchResponse, 400, 404, 409, 413, 415, 422, 503, body=image_body(settings)),
    )
    async def search_image(
        snapshot: SnapshotDep, query: PictureDep, retriever: RetrieverDep, request: Request
    ) -> Response:
        """Find the pictures that look like, or mean, the same as the one sent."""
        return JsonResponse(search_response(request, await retriever.search(snapshot, query)))

    @router.post(
        "/search/batch",
        tags=["search"],
        **documented(BatchResponse, 400, 404, 409, 413, 415, 422, 503, body=batch_body(settings)),
    )
    async def search_batch(
        snapshot: SnapshotDep, queries: BatchDep, retriever: RetrieverDep, request: Request
    ) -> Response:
        """Several searches by words in one request."""
        answers = await retriever.search_all(snapshot, queries)
        found = [search_response(request, answer) for answer in answers]
        return JsonResponse({"index_version": answers[0].version, "answers": found})

    @router.get("/items", tags=["items"], **documented(ItemsResponse, 404, 422, 503))
    async def items(snapshot: SnapshotDep, page: ItemsQueryDep, retriever: RetrieverDep, request: Request) -> Response:
        """What is in the gallery, page by page, in the order of the index."""
        return JsonResponse(items_response(request, await retriever.items(snapshot, page.filter, page.offset, page.k)))

    @router.get("/items/{item_id:path}/similar", tags=["items"], **documented(SearchResponse, 404, 409, 422, 503))
    async def similar(snapshot: SnapshotDep, query: SimilarDep, retriever: RetrieverDep, request: Request) -> Response:
        """Find the items nearest to one of the gallery's own; itself is left out."""
        return JsonResponse(search_response(request, await retriever.search(snapshot, query)))

    @router.get(
        "/items/{item_id:path}/image",
        tags=["items"],
        response_class=Response,
        responses={
            200: {"content": {"image/*": {}}, "description": "the picture"},
            304: {"description": "it is what the caller has, by its ETag"},
            **problem_responses(404, 422, 503),
        },
    )
    async def picture(snapshot: SnapshotDep, item_id: ItemId, retriever: RetrieverDep, request: Request) -> Response:
        """The picture of an item, as it lies in the gallery."""
        data, mark = await retriever.picture(snapshot, item_id)
        tag = f'"{mark}"'
        shared = "private" if settings_of(request).api_keys else "public"
        headers = {"Cache-Control": f"{shared}, max-age={_PICTURE_AGE_S}", "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        kind = media_type(data)
        if kind is None:  # never let a browser guess: it might be a page
            headers["Content-Disposition"] = "attachment"
        return Response(data, media_type=kind or "application/octet-stream", headers=headers)

    @router.get("/items/{item_id:path}", tags=["items"], **documented(ItemResponse, 404, 422, 503))
    async def item(snapshot: SnapshotDep, item_id: ItemId, retriever: RetrieverDep, request: Request) -> Response:
        """Everything that is known about an item."""
        return JsonResponse(item_response(request, *await retriever.item(snapshot, item_id)))

    return router


def _service_routes() -> APIRouter:
    router = APIRouter()

    @router.get("/collections", tags=["service"], **documented(CollectionsResponse))
    async def list_collections(collections: CollectionsDep) -> Response:
        """The domains that are served."""
        found = [
            {
                "name": name,
                "default": name == collections.default,
                "count": snapshots.live.artifact.manifest.count if snapshots.live else 0,
                "index_version": snapshots.live.version if snapshots.live else None,
                "min_score": snapshots.live.min_score if snapshots.live else None,
            }
            for name, snapshots in collections
        ]
        return JsonResponse({"collections": found})

    @router.get("/healthz", tags=["service"], **documented(HealthResponse))
    async def healthz() -> Response:
        """The process lives; says nothing of the index."""
        return JsonResponse({"status": "ok"})

    @router.get("/readyz", tags=["service"], **documented(ReadinessResponse, 503))
    async def readyz(collections: CollectionsDep) -> Response:
        """Searches are answered in every collection, or why they are not."""
        collections.require_all()
        if collections.draining:
            raise NotReady("The service is shutting down.")
        live, reason = collections[None].require(), collections.reason
        status = {"status": "ready" if reason is None else "degraded", "index_version": live.version}
        return JsonResponse({**status, "count": live.artifact.manifest.count, "reason": reason})

    @router.get(
        "/metrics",
        tags=["service"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "for Prometheus"}, **problem_responses(401)},
    )
    async def metrics(request: Request) -> Response:
        """What the service measures of itself. With API keys it needs one, or the admin key."""
        return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE)

    @router.post(
        "/admin/reload",
        tags=["service"],
        dependencies=[Depends(require_admin)],
        **documented(ReloadResponse, 401, 403, 503),
    )
    async def reload(collections: CollectionsDep, request: Request) -> Response:
        """Serve what is published now, in every collection, without waiting for the next look at it."""
        await request.body()  # not needed; but a body that nobody takes counts as one that never arrives
        try:
            changed = await collections.reload()
        except DcarError as error:
            raise Problem(503, f"What is published cannot be served: {error}", headers=_LATER) from None
        versions = {name: snapshots.require().version for name, snapshots in collections}
        served = collections[None].require().version
        return JsonResponse({"index_version": served, "versions": versions, "changed": any(changed.values())})

    return router
