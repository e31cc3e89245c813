"""What the search page needs beside the API: thumbnails, the gallery without a query, and known words.

The routes of this module are not part of the documented API, except for the thumbnails of GET /items/{id}/image.
"""

import asyncio
import re
import threading
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import numpy as np
from fastapi import APIRouter, Request
from fastapi import Query as QueryParam
from fastapi.responses import Response
from pydantic import Field

from app.api.params import retriever_of, settings_of, snapshot_of
from app.api.requests import PageQuery
from app.api.responses import JsonResponse, items_response
from app.core.problems import field_problem
from dcar_core.images.decoding import ThumbnailFormat
from dcar_core.util.arrays import Rows
from index_jobs.store.artifact import Artifact

_MAX_AGE_S = 3600
_LISTED_CATEGORIES = 500
_LISTED_FIELDS = 12
_NUMBERS = frozenset({"int64", "double"})
_COMMON = frozenset({"the", "and", "with", "for", "from", "are", "without", "one", "some"})
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff]")  # scripts without spaces between words


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
    """Facts about the items of one artifact, each computed once. Its methods block."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._lock = threading.Lock()
        self._orders: dict[str, Rows] = {}

    @cached_property
    def categories(self) -> list[dict[str, Any]]:
        """The most frequent categories with their numbers of items."""
        import pyarrow as pa
        import pyarrow.compute as pc

        live = pa.chunked_array([self._artifact.live])
        counts = pc.value_counts(self._artifact.column("category").filter(live)).to_pylist()
        named = [(-each["counts"], each["values"]) for each in counts if each["values"]]
        return [{"value": value, "count": -count} for count, value in sorted(named)[:_LISTED_CATEGORIES]]

    @cached_property
    def fields(self) -> list[dict[str, Any]]:
        """Fields to sort by."""
        types = {name: kind for name, kind in self._artifact.fields.items() if kind in {*_NUMBERS, "string"}}
        names = [name for name in ("caption", "category", *sorted(types)) if name in types and name != "id"]
        unique = list(dict.fromkeys(names))[:_LISTED_FIELDS]
        return [{"name": name, "is_number": types[name] in _NUMBERS} for name in unique]

    @cached_property
    def words(self) -> frozenset[str]:
        """The words of all captions and categories, in lower case."""
        import pyarrow.compute as pc

        words: set[str] = set()
        for name in ("caption", "category"):
            for chunk in self._artifact.column(name).chunks:
                parts = pc.split_pattern_regex(pc.utf8_lower(chunk), r"[^\p{L}\p{N}]+")
                words.update(pc.unique(pc.list_flatten(parts)).drop_null().to_pylist())
        return frozenset(words)

    def known_share(self, text: str) -> float:
        """Return the share of a text's words that captions and categories have; 1 without words or captions."""
        words = [word for word in re.findall(r"[^\W_]+", text.lower()) if _counts(word)]
        if not words or len(self.words) <= 1:
            return 1.0
        return sum(map(self._is_known, words)) / len(words)

    def _is_known(self, word: str) -> bool:
        if _UNSPACED.search(word):
            return any(_UNSPACED.search(each) and (word in each or each in word) for each in self.words if each)
        return not self.words.isdisjoint({word, f"{word}s", word.removesuffix("s")})

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


_catalogues: WeakKeyDictionary[Artifact, Catalogue] = WeakKeyDictionary()


def _catalogue_of(artifact: Artifact) -> Catalogue:
    return _catalogues.setdefault(artifact, Catalogue(artifact))


def browsing_routes() -> APIRouter:
    """Return the routes that only the page uses."""
    router = APIRouter(include_in_schema=False)

    @router.get("/browse")
    async def browse(request: Request, query: Annotated[BrowseQuery, QueryParam()]) -> Response:
        snapshot, most = snapshot_of(request), settings_of(request).max_k
        if query.k > most:
            raise field_problem("k", f"at most {most}, not {query.k}")
        catalogue = _catalogue_of(snapshot.artifact)
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
        known = await asyncio.to_thread(_catalogue_of(snapshot.artifact).known_share, text)
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


def _counts(word: str) -> bool:
    """Return whether a word says something about what an image shows."""
    return (len(word) > 2 and word not in _COMMON) or bool(_UNSPACED.search(word))
