"""Routes for the search page: thumbnails, the gallery without a query, and its filters.

The routes of this module are not part of the documented API, except for the thumbnails of GET /items/{id}/image.
"""

import asyncio
import threading
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fastapi import Query as QueryParam
from fastapi import Request
from fastapi.responses import Response
from pydantic import Field

from app.api.bodies import check_k
from app.api.requests import FilterQuery, PageQuery
from app.api.responses import JsonResponse, image_headers, item_chars, items_response, make_response
from app.api.routing import Routes, snapshot_of, state_of
from app.core.problems import field_problem
from app.middleware.policy import Policy
from app.search.query import ItemPage
from app.search.ranking.facets import count_values, facet_values
from app.search.ranking.groups import group_field
from app.search.ranking.rows import filter_mask
from app.search.snapshots import Snapshot
from dcar_core.images import sniff_format
from dcar_core.images.decoding import ThumbnailFormat
from dcar_core.util.arrays import Rows
from index_jobs.store.filters import EMPTY_IS_MISSING

routes = Routes()
_PRIVATE = Policy("read", is_private=True)

_LISTED_FIELDS = 12
_FACETS = 6
_FACET_VALUES = 100  # a field with more values is not offered as a filter
_NUMBERS = frozenset({"int64", "double"})


class ThumbnailSize(IntEnum):
    """Pixels of the longer side: of a card on screens with one and two dots per pixel, and of the detail view."""

    CARD = 192
    SHARP_CARD = 384
    LARGE = 1280


class BrowseQuery(PageQuery, FilterQuery):
    """A page of the gallery in the order of a field: "price", or "-price" descending."""

    sort: Annotated[str, Field(max_length=1024)] = ""


class Catalogue:
    """Facts about the items of one version, each computed once. Its methods block."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._artifact = snapshot.artifact
        self._lock = threading.Lock()
        self._orders: dict[str, Rows] = {}

    @cached_property
    def facets(self) -> list[str]:
        """Fields to filter by: the category first, then those with the most values.

        A field is left out if it has too many values, or fewer than two items for each of them on average.
        """
        group_by = self._artifact.manifest.group_field
        sizes: dict[str, int] = {}
        for name in self._artifact.fields.keys() - {"id", "caption", "title", group_by}:
            facet = count_values(self._artifact, name, self._artifact.live, limit=_FACET_VALUES + 1)
            if 2 <= len(facet) <= min(_FACET_VALUES, sum(entry["count"] for entry in facet) // 2):
                sizes[name] = len(facet)
        return sorted(sizes, key=lambda name: (name != "category", -sizes[name], name))[:_FACETS]

    @cached_property
    def fields(self) -> list[dict[str, Any]]:
        """Fields to sort by. The caption and the category are left out where no item has one."""
        types = {name: kind for name, kind in self._artifact.fields.items() if kind in {*_NUMBERS, "string"}}
        missing = {name for name in EMPTY_IS_MISSING & types.keys() if not self._has_texts(name)}
        offered = types.keys() - missing - {"id"}
        names = [name for name in ("caption", "category", *sorted(types)) if name in offered]
        unique = list(dict.fromkeys(names))[:_LISTED_FIELDS]
        return [{"name": name, "is_number": types[name] in _NUMBERS} for name in unique]

    def _has_texts(self, name: str) -> bool:
        return any(pc.any(pc.not_equal(chunk, "")).as_py() for chunk in self._artifact.column(name).chunks)

    def order(self, sort: str) -> Rows:
        """Return all rows in the order of a field; rows without it are last, equal ones in the order of the index."""
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


def _groups_of(snapshot: Snapshot, page: ItemPage, filter: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the group of each item of a page: its value, and its number of items that fulfil the filter."""
    groups = group_field(snapshot, snapshot.artifact.manifest.group_field)
    rows = [row for item in page.items if (row := snapshot.artifact.row_of(item.id)) is not None]
    sizes = groups.sizes(rows, filter_mask(snapshot, filter) if filter else None)
    return [{"value": groups.value(row), "count": size} for row, size in zip(rows, sizes, strict=True)]


@routes.add("GET", "/ui/browse", _PRIVATE)
async def browse(request: Request, query: Annotated[BrowseQuery, QueryParam()]) -> Response:
    snapshot, retriever = snapshot_of(request), state_of(request).retriever
    check_k(query.k, state_of(request).settings)
    catalogue = _catalogue_of(snapshot)
    sort = query.sort if snapshot.artifact.rows else ""
    fields = await asyncio.to_thread(lambda: catalogue.fields) if sort else []
    if sort and sort.removeprefix("-") not in {field["name"] for field in fields}:
        raise field_problem("sort", "must be a field with numbers or texts, or '-' and such a field")
    order = await asyncio.to_thread(catalogue.order, sort) if sort else None
    page = await retriever.items(snapshot, query.filter, query.offset, query.k, order)
    groups = list[dict[str, Any]]()
    if snapshot.artifact.manifest.group_field:
        groups = await retriever.examine(_groups_of, snapshot, page, query.filter)

    def make() -> dict[str, Any]:
        body = items_response(request, page)
        for item, group in zip(body["items"], groups, strict=False):
            item["group"] = group
        return body

    return await make_response(make, item_chars(page.items))


@routes.add("GET", "/ui/catalogue", _PRIVATE)
async def catalogue(request: Request) -> Response:
    """Return the fields of the index, and whether the page can and should search by words as well."""
    snapshot = snapshot_of(request)
    artifact = snapshot.artifact
    settings = state_of(request).settings
    has_words = artifact.lexical is not None and len(artifact.sample_vectors) > 0
    return JsonResponse(
        {
            "fields": await asyncio.to_thread(lambda: _catalogue_of(snapshot).fields),
            "group_field": artifact.manifest.group_field,
            "has_words": has_words,
            "hybrid_by_default": has_words and settings.page_hybrid,
            "max_k": min(settings.max_k, settings.max_window),
        }
    )


@routes.add("GET", "/ui/facets", _PRIVATE)
async def facets(request: Request, query: Annotated[FilterQuery, QueryParam()]) -> Response:
    """Count the values of the fields to filter by.

    Each field is counted without its own part of the filter, so that another of its values can be chosen.
    """
    snapshot = snapshot_of(request)
    given = query.filter or {}

    def count() -> list[dict[str, Any]]:
        others = {name: {k: v for k, v in given.items() if k != name} for name in _catalogue_of(snapshot).facets}
        group_by = snapshot.artifact.manifest.group_field
        return [
            {"name": name, "values": facet_values(snapshot, name, filter, group_by)} for name, filter in others.items()
        ]

    return JsonResponse({"facets": await state_of(request).retriever.examine(count)})


async def thumbnail_response(request: Request, item_id: str, size: ThumbnailSize) -> Response:
    """Return a thumbnail of an item, as WebP for clients that name it in `Accept`, else as JPEG."""
    kind: ThumbnailFormat = "webp" if "image/webp" in request.headers.get("accept", "") else "jpeg"
    name, data = await state_of(request).retriever.images.thumbnail(snapshot_of(request), item_id, size, kind)
    headers = image_headers(request, name) | {"Vary": "Accept"}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=f"image/{sniff_format(data)}", headers=headers)
