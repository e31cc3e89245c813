"""Responses: JSON bodies as plain dicts, which `schemas` documents, and image files."""

import base64
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json

from app.api.routing import collection_of, state_of
from app.core.problems import field_problem
from app.http.body_limit import LongResponse
from app.search.plan import MAX_TEXT_BYTES
from app.search.results import image_url, public_metadata
from app.search.snapshots import Snapshot
from app.service.collections import Collections
from dcar_core.images import sniff_format
from dcar_core.util.arrays import Floats
from index_jobs.index.index_version import Item

_IMAGE_MAX_AGE_S = 3600
QUICK_BYTES = 64 * 2**10  # of texts that are made into JSON in the event loop, in about a millisecond


class JsonResponse(Response):
    """Plain data as JSON, several times as fast as by the standard library; NaN and infinities become null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


def make_response(request: Request, make: Callable[[], Any], texts: int, field: str = "k") -> Response:
    """Return what `make` returns as JSON, which is a `LongResponse` if it is long.

    Args:
        texts: bytes of the items' texts.
        field: of the request, which is at fault if they are too many.
    """
    if texts > MAX_TEXT_BYTES:
        message = f"the texts and metadata take more than {MAX_TEXT_BYTES // 2**20} MiB; "
        raise field_problem(field, message + "request fewer results at a time, or leave `fields` out")
    if texts <= QUICK_BYTES:
        return JsonResponse(make())
    return LongResponse(lambda: JsonResponse(make()), texts)


def text_bytes(items: Iterable[Item]) -> int:
    """Return the size of the texts and metadata of items."""
    return sum(item.text_bytes + item.metadata_bytes for item in items)


def image_response(data: bytes, headers: dict[str, str]) -> Response:
    """Return an image file, which is a `LongResponse` if it is long."""
    response = Response(data, media_type=f"image/{sniff_format(data)}", headers=headers)
    return response if len(data) <= QUICK_BYTES else LongResponse(lambda: response, len(data))


def image_headers(request: Request, digest: str) -> dict[str, str]:
    """Return the headers by which caches keep an image; shared caches may, unless the service requires keys."""
    scope = "private" if state_of(request).settings.api_keys else "public"
    return {"Cache-Control": f"{scope}, max-age={_IMAGE_MAX_AGE_S}", "ETag": f'"{digest}"'}


def not_modified(request: Request, headers: dict[str, str]) -> Response | None:
    """Return the response to a client that has what the ETag names."""
    is_known = headers["ETag"] in request.headers.get("if-none-match", "")
    return Response(status_code=304, headers=headers) if is_known else None


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def embeddings_response(name: str, fingerprint: str, vectors: Sequence[Floats], encoding: str) -> dict[str, Any]:
    """Return the body of an `EmbeddingsResponse`."""

    def encoded(vector: Floats) -> Any:
        return vector.tolist() if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()

    data = [{"object": "embedding", "index": i, "embedding": encoded(each)} for i, each in enumerate(vectors)]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return {"object": "list", "data": data, "model": name, "fingerprint": fingerprint, "usage": usage}


def collection_response(collections: Collections, name: str) -> dict[str, Any]:
    """Return the body of a `Collection`."""
    live = collections[name].live
    return {
        "name": name,
        "default": name == collections.default,
        "count": live.artifact.manifest.count if live else 0,
        "index_version": live.version if live else None,
        "min_score": live.min_score if live else None,
    }


def model_response(name: str, live: Snapshot) -> dict[str, Any]:
    """Return the body of a `ServedModel`."""
    created = int(live.artifact.manifest.created_s or 0)
    return {"id": name, "object": "model", "created": created, "owned_by": "dcar"}


def item_response(request: Request, version: int, item: Item) -> dict[str, Any]:
    """Return the body of an `ItemResponse`."""
    return {"index_version": version, **_item(items_path(request), item)}


def items_response(request: Request, version: int, end: int, count: int, page: Sequence[Item]) -> dict[str, Any]:
    """Return the body of an `ItemsResponse` with a page of `count` items. end: the number of the next one."""
    items = [_item(items_path(request), item) for item in page]
    body = {"index_version": version, "count": count, "items": items}
    return body | _present(next_offset=end if count > end else None)


def _item(items: str, item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "caption": item.caption,
        "category": item.category,
        "metadata": public_metadata(item),
        "image_url": image_url(items, item.id),
        "width": item.width,
        "height": item.height,
    }


def items_path(request: Request) -> str:
    """Return the URL path of the items of the request's collection."""
    collection = collection_of(request)
    prefix = "" if collection is None else f"/collections/{quote(collection, safe='')}"
    return f"{prefix}/items"
