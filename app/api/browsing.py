"""What the search page needs beside the API: thumbnails, the gallery without a query, and the share of known words.

The routes of this module are not part of the documented API, except for the thumbnails of GET /items/{id}/image.
"""

import asyncio
import threading
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi import Query as QueryParam
from fastapi.responses import Response
from pydantic import Field

from app.api.params import retriever_of, settings_of, snapshot_of
from app.api.requests import PageQuery
from app.api.responses import JsonResponse, items_response
from app.core.problems import field_problem
from app.search.ranking.facets import count_values
from app.search.snapshots import Snapshot
from dcar_core.images.decoding import ThumbnailFormat
from dcar_core.util.arrays import Rows

_MAX_AGE_S = 3600
_LISTED_CATEGORIES = 500
_LISTED_FIELDS = 12
_NUMBERS = frozenset({"int64", "double"})


class ThumbnailSize(IntEnum):
    """Pixels of the longer side: of a card on screens with one and two dots per pixel, and of the detail view."""

    CARD = 192
    SHARP_CARD = 384
    LARGE = 1280


class BrowseQuery(PageQuery):
    """A page of the gallery, of one category or of all, in the order of a field: "price", or "-price" descending."""

    category: str = ""
    sort: Annotated[str, Field(max_length=1024)] = ""


class Catalogue:
    """Facts about the items of one version, each computed once. Its methods block."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot, self._artifact = snapshot, snapshot.artifact
        self._lock = threading.Lock()
        self._orders: dict[str, Rows] = {}

    @cached_property
    def categories(self) -> list[dict[str, Any]]:
        """The most frequent categories with their numbers of items."""
        return count_values(self._snapshot, "category", self._artifact.live, limit=_LISTED_CATEGORIES)

    @cached_property
    def fields(self) -> list[dict[str, Any]]:
        """Fields to sort by."""
        types = {name: kind for name, kind in self._artifact.fields.items() if kind in {*_NUMBERS, "string"}}
        names = [name for name in ("caption", "category", *sorted(types)) if name in types and name != "id"]
        unique = list(dict.fromkeys(names))[:_LISTED_FIELDS]
        return [{"name": name, "is_number": types[name] in _NUMBERS} for name in unique]

    def order(self, sort: str) -> Rows:
        """Return all rows in the order of a field; rows without it are last, equal ones in the order of the index."""
        import pyarrow as pa
        import pyarrow.compute as pc

        with self._lock:
            if sort not in self._orders:
                column = self._artifact.column(sort.removeprefix("-"))
                if pa.types.is_string(column.type):
                    column = pc.if_else(pc.equal(column, ""), None, pc.utf8_lower(column))
                table = pa.table({"value": column, "row": np.arange(self._artifact.rows)})
                keys = [("value", "descending" if sort.startswith("-") else "ascending"), ("row", "ascending")]
                self._orders[sort] = pc.sort_indices(table, keys).to_numpy().astype(np.int64)
            return self._orders[sort]


def _catalogue_of(snapshot: Snapshot) -> Catalogue:
    catalogue: Catalogue = snapshot.page_facts.setdefault("catalogue", Catalogue(snapshot))
    return catalogue


def browsing_routes() -> APIRouter:
    """Return the routes that only the page uses."""
    router = APIRouter(include_in_schema=False)

    @router.get("/browse")
    async def browse(request: Request, query: Annotated[BrowseQuery, QueryParam()]) -> Response:
        snapshot, most = snapshot_of(request), settings_of(request).max_k
        if query.k > most:
            raise field_problem("k", f"at most {most}, not {query.k}")
        catalogue = _catalogue_of(snapshot)
        fields = catalogue.fields
        if query.sort and query.sort.removeprefix("-") not in {field["name"] for field in fields}:
            raise field_problem("sort", "must be a field with numbers or texts, or '-' and such a field")
        filter = {"category": query.category} if query.category else None
        order = await asyncio.to_thread(catalogue.order, query.sort) if query.sort else None
        page = await retriever_of(request).items(snapshot, filter, query.offset, query.k, order)
        categories = await asyncio.to_thread(lambda: catalogue.categories)
        return JsonResponse({**items_response(request, page), "categories": categories, "fields": fields})

    @router.get("/words")
    async def words(request: Request, q: str) -> Response:
        """Tell how familiar a query's words are, and the score that makes up for unfamiliar ones."""
        snapshot = snapshot_of(request)
        text = q[: settings_of(request).max_query_chars]
        lexical = snapshot.artifact.lexical
        known = 1.0 if lexical is None else await asyncio.to_thread(lexical.known_share, text)
        cutoff = snapshot.artifact.manifest.cutoff
        return JsonResponse({"known": known, "strong_score": cutoff.get("strong_score")})

    return router


async def thumbnail_response(request: Request, item_id: str, size: ThumbnailSize) -> Response:
    """Return a thumbnail of an item, as WebP for clients that name it in `Accept`, else as JPEG."""
    kind: ThumbnailFormat = "webp" if "image/webp" in request.headers.get("accept", "") else "jpeg"
    thumbnail = await retriever_of(request).images.thumbnail(snapshot_of(request), item_id, size, kind)
    scope = "private" if settings_of(request).api_keys else "public"
    etag = f'"{thumbnail.name}"'
    headers = {"Cache-Control": f"{scope}, max-age={_MAX_AGE_S}", "ETag": etag, "Vary": "Accept"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(thumbnail.data, media_type=thumbnail.media_type, headers=headers)
