"""Responses: JSON bodies as plain dicts, which `schemas` documents, and image files."""

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from app.api.routing import collection_of, state_of
from app.core.problems import field_problem
from app.http.long_response import LongResponse
from app.search.query import Match, SearchResults
from app.search.snapshots import Snapshot
from app.service.collections import Collections
from app.service.files import ImageFile
from dcar_core.util.arrays import Floats
from index_jobs.index.index_version import Item

_IMAGE_MAX_AGE_S = 3600
MAX_CHARS = 16 * 2**20  # of texts in a response; a page of the largest items takes 14 MiB
QUICK_CHARS = 64 * 2**10  # of texts that are made into JSON in the event loop, in about a millisecond
_ABSOLUTE = re.compile(r"/|\\|file:|[A-Za-z]:[/\\]")


class JsonResponse(Response):
    """Plain data as JSON, several times as fast as by the standard library; NaN and infinities become null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


def make_response(request: Request, make: Callable[[], Any], texts: int, field: str = "k") -> Response:
    """Return what `make` returns as JSON, which is a `LongResponse` if it is long.

    Args:
        texts: characters of the items' texts.
        field: of the request, which is at fault if they are too many.
    """
    if texts > MAX_CHARS:
        message = f"the texts and metadata take more than {MAX_CHARS // 2**20} MiB; "
        raise field_problem(field, message + "request fewer results at a time, or leave `fields` out")
    if texts <= QUICK_CHARS:
        return JsonResponse(make())
    return LongResponse(lambda: JsonResponse(make()), texts, request.app.state.unsent)


def item_chars(items: Iterable[Item]) -> int:
    """Return the length of the texts and metadata of items as JSON. Counting ends beyond the limit."""
    return _total(_text_chars(item) + item.metadata_bytes for item in items)


def result_chars(searches: Iterable[SearchResults]) -> int:
    """Return the same of results, with all of the metadata that fields are taken from."""
    return _total(size for results in searches for size in _result_sizes(results))


def _result_sizes(results: SearchResults) -> Iterator[int]:
    for facet in (results.facets or {}).values():
        yield from (_json_chars(str(value["value"])) for value in facet)
    for match in results.matches:
        others = [*match.folded, *map(str, (match.group or {}).values())]
        metadata = match.item.metadata_bytes if results.fields else 0
        yield _text_chars(match.item) + metadata + sum(map(_json_chars, others))


def _text_chars(item: Item) -> int:
    return 4 * len(item.id.encode()) + _json_chars(item.caption) + _json_chars(item.category)  # the URL has the id, too


def _json_chars(text: str) -> int:
    """Return the length of a text as JSON, in which a control character takes six."""
    return len(text) if text.isascii() and text.isprintable() else len(to_json(text))


def _total(sizes: Iterable[int]) -> int:
    total = 0
    for size in sizes:
        total += size
        if total > MAX_CHARS:
            break
    return total


class ImageResponse(Response):
    """An image file, read piece by piece as the client takes it."""

    def __init__(self, image: ImageFile, threads: Executor, headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "Content-Length": str(image.size)}, media_type=image.media_type)
        self._image = image
        self._threads = threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._image.pieces(self._threads):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._image.close()


def image_headers(request: Request, digest: str) -> dict[str, str]:
    """Return the headers by which caches keep an image; shared caches may, unless the service requires keys."""
    scope = "private" if state_of(request).settings.api_keys else "public"
    return {"Cache-Control": f"{scope}, max-age={_IMAGE_MAX_AGE_S}", "ETag": f'"{digest}"'}


def not_modified(request: Request, headers: dict[str, str]) -> Response | None:
    """Return the response to a client that has what the ETag names."""
    is_known = headers["ETag"] in request.headers.get("if-none-match", "")
    return Response(status_code=304, headers=headers) if is_known else None


def search_response(request: Request, results: SearchResults, query_id: str | None) -> dict[str, Any]:
    """Return the body of a `SearchResponse`; fields that were not requested are absent."""
    body, items = search_body(results), _items_path(request)
    if query_id is not None:
        body["query_id"] = query_id
    for result in body["results"]:
        result["image_url"] = _image_url(items, result["id"])
    return body


def search_body(results: SearchResults) -> dict[str, Any]:
    """Return the body of a `SearchResponse` without the URLs of images."""
    ranked = enumerate(results.matches, results.offset + 1)
    return {
        "index_version": results.version,
        "took_ms": round(results.took_ms, 2),
        "cached": results.is_cached,
        "nothing_fits": results.nothing_fits,
        "results": [_result(rank, match, results.fields) for rank, match in ranked],
        **_present(
            next_offset=results.next_offset,
            min_score=results.min_score,
            cutoff=results.cutoff,
            facets=results.facets,
            facets_approximate=True if results.facets is not None and not results.has_exact_facets else None,
            count=results.count,
            count_approximate=None if results.has_exact_count else True,
        ),
    }


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
    return {"index_version": version, **_item(_items_path(request), item)}


def items_response(request: Request, version: int, end: int, count: int, page: Sequence[Item]) -> dict[str, Any]:
    """Return the body of an `ItemsResponse` with a page of `count` items. end: the number of the next one."""
    items = [_item(_items_path(request), item) for item in page]
    body = {"index_version": version, "count": count, "items": items}
    return body | _present(next_offset=end if count > end else None)


def _item(items: str, item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "caption": item.caption,
        "category": item.category,
        "metadata": _metadata(item),
        "image_url": _image_url(items, item.id),
        "width": item.width,
        "height": item.height,
    }


def _result(rank: int, match: Match, fields: Sequence[str]) -> dict[str, Any]:
    item, metadata = match.item, _metadata(match.item) if fields else {}
    if "*" not in fields:
        metadata = {name: metadata[name] for name in fields if name in metadata}
    return {
        "rank": rank,
        "id": item.id,
        "score": round(match.score, 6),
        "level": match.level,
        "caption": item.caption,
        "category": item.category,
        "width": item.width,
        "height": item.height,
        **_present(
            metadata=metadata if fields else None,
            rerank_score=None if match.rerank_score is None else round(match.rerank_score, 6),
            text_score=None if match.text_score is None else round(match.text_score, 6),
            group=match.group,
            folded=match.folded or None,
            explanation=match.explanation,
        ),
    }


def _metadata(item: Item) -> dict[str, Any]:
    """Return the metadata of an item. An absolute `file_name`, as in a list of files, is cut to its last part."""
    metadata = item.metadata
    place = metadata.get("file_name")
    if not isinstance(place, str) or not _ABSOLUTE.match(place):
        return metadata
    name = re.split(r"[/\\]", place)[-1]
    return {field: name if value == place else value for field, value in metadata.items()}


def _items_path(request: Request) -> str:
    """Return the URL path of the items of the request's collection."""
    collection = collection_of(request)
    prefix = "" if collection is None else f"/collections/{quote(collection, safe='')}"
    return f"{prefix}/items"


def _image_url(items: str, item_id: str) -> str:
    return f"{items}/{quote(item_id, safe='')}/image"
