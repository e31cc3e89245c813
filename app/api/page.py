"""The search page and the API documentation: their files, and the private routes that
the search page calls.

- Files are read once; a requested name is looked up in that table and never joined to a
  path.
- No page has an inline script or style, so the content security policy forbids them.
"""

import hashlib
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Annotated, Any

from fastapi import Query as QueryParam
from fastapi import Request
from fastapi.responses import Response

from app.api.guard import API_KEY, Policy
from app.api.requests import ItemsQuery
from app.api.routing import (
    JsonResponse,
    Routes,
    collection_of,
    not_modified,
    openapi_document,
    state_of,
    version_of,
)
from app.core.callers import ApiKey
from app.core.problems import Problem
from app.search.results import count_values
from app.search.served_version import filter_rows, group_field
from index_jobs.index.index_version import IndexVersion

routes = Routes()
_PRIVATE = Policy("read", is_view=True, is_private=True)
_PUBLIC = Policy("open", "service", cost=0, is_private=True)

_LISTED_FIELDS = 12
_FACETS = 6
_FACET_VALUES = 100  # a field with more values is not offered as a filter
_NUMBERS = frozenset({"int64", "double"})

_UI = files("app") / "ui"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:"
    " data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors"
    " 'none'"
)
# Swagger UI sets styles
_DOCS_POLICY = _CONTENT_POLICY.replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)


def _facet_fields(index: IndexVersion) -> list[str]:
    """Return the fields to filter by: the category first, then those with the most
    values.

    A field is left out if it has too many values, or fewer than two items for each of
    them on average.
    """
    sizes: dict[str, int] = {}
    for name in index.fields.keys() - {
        "id",
        "caption",
        "title",
        index.manifest.spec.group_field,
    }:
        facet = count_values(index, name, index.live, limit=_FACET_VALUES + 1)
        if (
            2
            <= len(facet)
            <= min(_FACET_VALUES, sum(entry["count"] for entry in facet) // 2)
        ):
            sizes[name] = len(facet)
    return sorted(sizes, key=lambda name: (name != "category", -sizes[name], name))[
        :_FACETS
    ]


def _sort_fields(index: IndexVersion) -> list[dict[str, Any]]:
    types = {
        name: kind
        for name, kind in index.fields.items()
        if kind in {*_NUMBERS, "string"} and name != "id"
    }
    ordered = sorted(
        types, key=lambda name: (name != "caption", name != "category", name)
    )
    return [
        {"name": name, "is_number": types[name] in _NUMBERS}
        for name in ordered[:_LISTED_FIELDS]
    ]


@routes.add("GET", "/ui/catalogue", _PRIVATE)
async def catalogue(request: Request) -> Response:
    """Return the fields of the index, and what the page can do: search by words as
    well, and write with its key.
    """
    key: ApiKey | None = request.scope.get(API_KEY)
    served = await version_of(request)
    settings = state_of(request).settings
    index = served.index
    waits_for = state_of(request).collections[collection_of(request)].waits_for
    has_words = len(index.sample_vectors) > 0
    body = {
        "fields": _sort_fields(index),
        "group_field": index.manifest.spec.group_field,
        "has_words": has_words,
        "has_cutoff": served.min_score is not None,
        "hybrid_by_default": has_words and settings.page_hybrid,
        "model_note": " ".join(filter(None, (served.model_note, waits_for))),
        "languages": served.languages,
        "max_k": min(settings.max_k, settings.max_window),
        "may_write": settings.writes and (key is None or key.may_write),
    }
    return JsonResponse(body)


@routes.add("GET", "/ui/facets", _PRIVATE)
async def facets(
    request: Request, query: Annotated[ItemsQuery, QueryParam()]
) -> Response:
    """Count the values of the fields to filter by.

    Each field is counted without its own part of the filter, so that another of its
    values can be chosen.
    """
    served = await version_of(request)
    index = served.index
    group_by = served.index.manifest.spec.group_field

    def count() -> list[dict[str, Any]]:
        counted = list[dict[str, Any]]()
        groups = group_field(served, group_by) if group_by else None
        for name in served.page_facts.find(
            f"facets {served.concepts.revision}", lambda: _facet_fields(index)
        ):
            others = {
                field: part
                for field, part in (query.filter or {}).items()
                if field != name
            }
            mask = filter_rows(served, others).mask if others else index.live
            counted.append(
                {"name": name, "values": count_values(index, name, mask, groups)}
            )
        return counted

    return JsonResponse({"facets": await state_of(request).retriever.examine(count)})


@routes.add("GET", "/openapi.json", _PUBLIC)
async def document(request: Request) -> Response:
    return Response(openapi_document(request.app), media_type=JsonResponse.media_type)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Return the data and the ETag of each file by its name."""
    paths = [
        path
        for folder in (_UI, _UI / "vendor" / "swagger-ui")
        for path in folder.iterdir()
    ]
    data = {
        path.name: path.read_bytes()
        for path in paths
        if PurePath(path.name).suffix in _MEDIA_TYPES
    }
    return {
        name: (file, f'"{hashlib.blake2b(file, digest_size=16).hexdigest()}"')
        for name, file in data.items()
    }


def _add_file(path: str, file: str = "", content_policy: str = "") -> None:
    @routes.add("GET", path, _PUBLIC)
    async def send(request: Request) -> Response:
        name = file or request.path_params["name"]
        if name not in _files():
            raise Problem(404, "There is no such file.")
        data, etag = _files()[name]
        headers = {"ETag": etag, "Cache-Control": "no-cache"}
        headers |= {"Content-Security-Policy": content_policy} if content_policy else {}
        media_type = f"{_MEDIA_TYPES[PurePath(name).suffix]}; charset=utf-8"
        return not_modified(request, headers) or Response(
            data,
            media_type=media_type,
            headers=headers,
        )


_add_file("/", "index.html", _CONTENT_POLICY)
_add_file("/ui/insights", "insights.html", _CONTENT_POLICY)
_add_file("/docs", "docs.html", _DOCS_POLICY)
_add_file("/favicon.ico", "icon.svg")
_add_file("/ui/{name}")
