"""The routes. Each takes a checked query (see `queries`), asks the retriever, and shapes the answer.

Answers are plain dicts in a JSONResponse, so nothing is validated twice. Ids travel in URLs percent-encoded and are
looked up in the index; no part of a URL is ever used as a path of the file system.
"""

import hashlib
import math
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from app.media import media_type
from app.metrics import CONTENT_TYPE
from app.problems import MEDIA_TYPE, NotReady, Problem
from app.queries import ItemId, KDep, PictureDep, RetrieverDep, SnapshotsDep, WordsDep, require_admin
from app.retriever import Answer
from app.schemas import (
    DEFAULT_K,
    Health,
    ItemAnswer,
    ProblemAnswer,
    Readiness,
    Reloaded,
    SearchAnswer,
    TextQuery,
)
from app.settings import Settings
from dcar_core.errors import DcarError

_PICTURE_AGE_S = 3600


def make_router(settings: Settings) -> APIRouter:
    """All routes of the API. The settings only serve to write the true limits into its documentation."""
    router = APIRouter()

    @router.post(
        "/search/text", tags=["search"], **_documented(SearchAnswer, 400, 413, 415, 422, 503, body=_words(settings))
    )
    async def search_text(query: WordsDep, retriever: RetrieverDep, request: Request) -> Response:
        """Find the pictures that a text describes."""
        return _answer(request, await retriever.search_text(query.text, query.k))

    @router.post(
        "/search/image", tags=["search"], **_documented(SearchAnswer, 400, 413, 415, 422, 503, body=_form(settings))
    )
    async def search_image(query: PictureDep, retriever: RetrieverDep, request: Request) -> Response:
        """Find the pictures that look like, or mean, the same as the one sent."""
        return _answer(request, await retriever.search_image(query.data, query.k))

    @router.get("/items/{item_id:path}/similar", tags=["items"], **_documented(SearchAnswer, 404, 422, 503))
    async def similar(item_id: ItemId, k: KDep, retriever: RetrieverDep, request: Request) -> Response:
        """Find the items nearest to one of the gallery's own; itself is left out."""
        return _answer(request, await retriever.search_item(item_id, k))

    @router.get(
        "/items/{item_id:path}/image",
        tags=["items"],
        response_class=Response,
        responses={200: {"content": {"image/*": {}}, "description": "the picture"}, **_problems(404, 422, 503)},
    )
    async def picture(item_id: ItemId, retriever: RetrieverDep, request: Request) -> Response:
        """The picture of an item, as it lies in the gallery."""
        data = await retriever.picture(item_id)
        tag = f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"'
        headers = {"Cache-Control": f"public, max-age={_PICTURE_AGE_S}", "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        kind = media_type(data)
        if kind is None:  # never let a browser guess: it might be a page
            headers["Content-Disposition"] = "attachment"
        return Response(data, media_type=kind or "application/octet-stream", headers=headers)

    @router.get("/items/{item_id:path}", tags=["items"], **_documented(ItemAnswer, 404, 422, 503))
    async def item(item_id: ItemId, retriever: RetrieverDep, request: Request) -> Response:
        """Everything that is known about an item."""
        version, found = await retriever.item(item_id)
        return JSONResponse(
            {
                "index_version": version,
                "id": found.id,
                "caption": found.caption,
                "category": found.category,
                "metadata": _finite(found.metadata),
                "image_url": _image_url(request, found.id),
            }
        )

    @router.get("/healthz", tags=["service"], **_documented(Health))
    async def healthz() -> Response:
        """The process lives; says nothing of the index."""
        return JSONResponse({"status": "ok"})

    @router.get("/readyz", tags=["service"], **_documented(Readiness, 503))
    async def readyz(snapshots: SnapshotsDep) -> Response:
        """Searches are answered, or why they are not."""
        live = snapshots.require()
        if snapshots.draining:
            raise NotReady("The service is shutting down.")
        state = "ready" if snapshots.reason is None else "degraded"
        status = {"status": state, "index_version": live.version, "count": live.artifact.manifest.count}
        return JSONResponse({**status, "reason": snapshots.reason})

    @router.get(
        "/metrics",
        tags=["service"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "for Prometheus"}, **_problems(401)},
    )
    async def metrics(request: Request) -> Response:
        """What the service measures of itself. With API keys it needs one, or the admin key."""
        return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE)

    @router.post(
        "/admin/reload",
        tags=["service"],
        dependencies=[Depends(require_admin)],
        **_documented(Reloaded, 401, 403, 503),
    )
    async def reload(snapshots: SnapshotsDep) -> Response:
        """Serve what CURRENT names now, without waiting for the next look at it."""
        try:
            changed = await snapshots.reload()
        except DcarError as error:
            raise Problem(503, f"What is published cannot be served: {error}") from None
        return JSONResponse({"index_version": snapshots.require().version, "changed": changed})

    return router


def _answer(request: Request, answer: Answer) -> JSONResponse:
    return JSONResponse(
        {
            "index_version": answer.version,
            "took_ms": round(answer.took_ms, 2),
            "cached": answer.cached,
            "results": [
                {
                    "rank": rank,
                    "id": match.item.id,
                    "score": round(match.score, 6),
                    "caption": match.item.caption,
                    "category": match.item.category,
                    "image_url": _image_url(request, match.item.id),
                }
                for rank, match in enumerate(answer.matches, 1)
            ],
        }
    )


def _image_url(request: Request, item_id: str) -> str:
    return f"{request.scope.get('root_path', '')}/items/{quote(item_id, safe='')}/image"


def _finite(value: Any) -> Any:
    """Metadata without NaN and infinities, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    schema = {"$ref": f"#/components/schemas/{ProblemAnswer.__name__}"}
    return {status: {"description": "problem", "content": {MEDIA_TYPE: {"schema": schema}}} for status in statuses}


def _documented(model: type[Any], *statuses: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of a route: what it answers, its errors and, where it reads the body itself, the body."""
    documented: dict[str, Any] = {"responses": {200: {"model": model}, **_problems(*statuses)}}
    if body is not None:
        documented["openapi_extra"] = {"requestBody": {"required": True, "content": body}}
    return documented


def _words(settings: Settings) -> dict[str, Any]:
    schema = TextQuery.model_json_schema()
    schema["properties"]["query"]["maxLength"] = settings.max_query_chars
    schema["properties"]["k"]["maximum"] = settings.max_k
    return {"application/json": {"schema": schema}}


def _form(settings: Settings) -> dict[str, Any]:
    k = {"type": "integer", "minimum": 1, "maximum": settings.max_k, "default": DEFAULT_K}
    file = {"type": "string", "format": "binary", "description": f"at most {settings.max_upload_bytes} bytes"}
    schema = {"type": "object", "required": ["file"], "properties": {"file": file, "k": k}}
    return {"multipart/form-data": {"schema": schema}}
