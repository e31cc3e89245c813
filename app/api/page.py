"""The search page and the API documentation: their files, and the private routes that the search page calls.

- Files come from the package, and nothing is loaded from other sites. They are read once; a requested name is looked up
  in that table and never joined to a path.
- No page has an inline script or style, so the content security policy forbids them.
- The other routes are the gallery without a query, and its filters. They are not part of the documented API.
"""

import asyncio
import hashlib
from enum import IntEnum
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Annotated, Any

import pyarrow.compute as pc
from fastapi import FastAPI, Request
from fastapi import Query as QueryParam
from fastapi.responses import Response

from app.api.requests import FilterQuery, ItemsQuery, check_k
from app.api.responses import JsonResponse, image_headers, items_response, make_response, not_modified, text_bytes
from app.api.routing import Routes, snapshot_of, state_of
from app.core.problems import Problem
from app.http.access import Policy
from app.search.facets import count_facets, count_values
from app.search.rows import ResultGroup, filter_rows, group_field, mask_key
from app.search.snapshots import Snapshot
from dcar_core.images import sniff_format
from dcar_core.images.decoding import ThumbnailFormat
from index_jobs.index.index_version import IndexVersion, Item
from index_jobs.row_filter import EMPTY_IS_MISSING

routes = Routes()
_PRIVATE = Policy("read", is_private=True)

_LISTED_FIELDS = 12
_FACETS = 6
_FACET_VALUES = 100  # a field with more values is not offered as a filter
_NUMBERS = frozenset({"int64", "double"})

_PUBLIC = Policy("open", "service", cost=0, is_private=True)
_UI = files("app") / "ui"
_MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_DOCS_CONTENT_POLICY = _CONTENT_POLICY.replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)  # Swagger UI sets inline styles


class ThumbnailSize(IntEnum):
    """Pixels of the longer side: of a card on screens with one and two dots per pixel, and of the detail view."""

    CARD = 192
    SHARP_CARD = 384
    LARGE = 1280


def _facet_fields(artifact: IndexVersion) -> list[str]:
    """Return the fields to filter by: the category first, then those with the most values.

    A field is left out if it has too many values, or fewer than two items for each of them on average.
    """
    group_by = artifact.manifest.spec.group_field
    sizes: dict[str, int] = {}
    for name in artifact.fields.keys() - {"id", "caption", "title", group_by}:
        facet = count_values(artifact, name, artifact.live, limit=_FACET_VALUES + 1)
        if 2 <= len(facet) <= min(_FACET_VALUES, sum(entry["count"] for entry in facet) // 2):
            sizes[name] = len(facet)
    return sorted(sizes, key=lambda name: (name != "category", -sizes[name], name))[:_FACETS]


def _sort_fields(artifact: IndexVersion) -> list[dict[str, Any]]:
    """Return the fields to sort by. The caption and the category are left out where no item has one."""

    def has_texts(name: str) -> bool:
        return any(pc.any(pc.not_equal(chunk, "")).as_py() for chunk in artifact.column(name).chunks)

    types = {name: kind for name, kind in artifact.fields.items() if kind in {*_NUMBERS, "string"}}
    names = types.keys() - {"id"} - {name for name in EMPTY_IS_MISSING & types.keys() if not has_texts(name)}
    ordered = sorted(names, key=lambda name: (name != "caption", name != "category", name))
    return [{"name": name, "is_number": types[name] in _NUMBERS} for name in ordered[:_LISTED_FIELDS]]


def _groups_of(snapshot: Snapshot, page: list[Item], filter: dict[str, Any] | None) -> list[ResultGroup]:
    """Return the group of each item of a page: its value, and its number of items that fulfil the filter."""
    groups = group_field(snapshot, snapshot.artifact.manifest.spec.group_field)
    rows = [row for item in page if (row := snapshot.artifact.row_of(item.id)) is not None]
    return groups.shown(rows, filter_rows(snapshot, filter) if filter else None)


@routes.add("GET", "/ui/browse", _PRIVATE)
async def browse(request: Request, query: Annotated[ItemsQuery, QueryParam()]) -> Response:
    snapshot, retriever = await snapshot_of(request), state_of(request).retriever
    check_k(query.k, state_of(request).settings)
    count, page = await retriever.items(snapshot, query.filter, query.offset, query.k, query.sort, query.group_by)
    groups = list[ResultGroup]()
    if snapshot.artifact.manifest.spec.group_field:
        groups = await retriever.examine(_groups_of, snapshot, page, query.filter)

    def make() -> dict[str, Any]:
        body = items_response(request, snapshot.version, query.offset + query.k, count, page)
        for item, group in zip(body["items"], groups, strict=False):
            item["group"] = group
        return body

    return make_response(request, make, text_bytes(page))


@routes.add("GET", "/ui/catalogue", _PRIVATE)
async def catalogue(request: Request) -> Response:
    """Return the fields of the index, and whether the page can and should search by words as well."""
    snapshot = await snapshot_of(request)
    artifact = snapshot.artifact
    settings = state_of(request).settings
    has_words = len(artifact.sample_vectors) > 0
    fields = await asyncio.to_thread(snapshot.page_facts.find, "fields", lambda: _sort_fields(artifact))
    return JsonResponse(
        {
            "fields": fields,
            "group_field": artifact.manifest.spec.group_field,
            "has_words": has_words,
            "has_cutoff": snapshot.min_score is not None,
            "hybrid_by_default": has_words and settings.page_hybrid,
            "model_note": snapshot.model_note,
            "languages": snapshot.languages,
            "max_k": min(settings.max_k, settings.max_window),
        }
    )


@routes.add("GET", "/ui/facets", _PRIVATE)
async def facets(request: Request, query: Annotated[FilterQuery, QueryParam()]) -> Response:
    """Count the values of the fields to filter by.

    Each field is counted without its own part of the filter, so that another of its values can be chosen.
    """
    snapshot = await snapshot_of(request)
    given = query.filter or {}

    def count() -> list[dict[str, Any]]:
        artifact = snapshot.artifact
        names = snapshot.page_facts.find("facets", lambda: _facet_fields(artifact))
        others = {name: {k: v for k, v in given.items() if k != name} for name in names}
        group_by = artifact.manifest.spec.group_field
        values = list[dict[str, Any]]()
        for name, filter in others.items():
            allowed, key = (filter_rows(snapshot, filter), mask_key(filter)) if filter else (None, "")
            values.append({"name": name, "values": count_facets(snapshot, [name], allowed, key, group_by)[name]})
        return values

    return JsonResponse({"facets": await state_of(request).retriever.examine(count)})


async def thumbnail_response(request: Request, item_id: str, size: ThumbnailSize) -> Response:
    """Return a thumbnail of an item, as WebP for clients that name it in `Accept`, else as JPEG."""
    kind: ThumbnailFormat = "webp" if "image/webp" in request.headers.get("accept", "") else "jpeg"
    name, data = await state_of(request).retriever.thumbnail(await snapshot_of(request), item_id, size, kind)
    headers = image_headers(request, name) | {"Vary": "Accept"}
    response = Response(data, media_type=f"image/{sniff_format(data)}", headers=headers)
    return not_modified(request, headers) or response


def _add_page(path: str, name: str, content_policy: str | None = None) -> None:
    @routes.add("GET", path, _PUBLIC)
    async def page(request: Request) -> Response:
        return _file(request, name, content_policy)


_add_page("/", "index.html", _CONTENT_POLICY)
_add_page("/ui/insights", "insights.html", _CONTENT_POLICY)
_add_page("/docs", "docs.html", _DOCS_CONTENT_POLICY)
_add_page("/favicon.ico", "icon.svg")


@routes.add("GET", "/openapi.json", _PUBLIC)
async def openapi(request: Request) -> Response:
    return Response(_document(request.app), media_type=JsonResponse.media_type)


@cache
def _document(app: FastAPI) -> bytes:
    """Return the OpenAPI document as JSON; the page and tools ask for it again and again."""
    return bytes(JsonResponse(app.openapi()).body)


@routes.add("GET", "/ui/{name}", _PUBLIC)
async def file(request: Request, name: str) -> Response:
    return _file(request, name)


def _file(request: Request, name: str, content_policy: str | None = None) -> Response:
    if name not in _files():
        raise Problem(404, "There is no such file.")
    data, media_type, etag = _files()[name]
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if content_policy is not None:
        headers["Content-Security-Policy"] = content_policy
    return not_modified(request, headers) or Response(data, media_type=media_type, headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Return the data, the media type and the ETag of each file by its name."""
    found, swagger = {}, _UI / "vendor" / "swagger-ui"
    for each in (*_UI.iterdir(), swagger / "swagger-ui-bundle.js", swagger / "swagger-ui.css"):
        media_type = _MEDIA_TYPES.get(PurePath(each.name).suffix)
        if media_type is not None:
            data = each.read_bytes()
            etag = f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"'
            found[each.name] = data, f"{media_type}; charset=utf-8", etag
    return found
