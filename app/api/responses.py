"""What was found, as the plain dicts of the answers; `schemas` documents them."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response
from pydantic_core import to_json

from app.api.params import collection_of
from app.search.pairs import Words
from app.search.retriever import Answer, Listed, Match
from index_jobs.store.artifact import Item


class JsonResponse(Response):
    """Plain data as JSON, several times as fast as by the standard library; NaN and infinities are null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content, inf_nan_mode="null")


def search_response(request: Request, answer: Answer) -> dict[str, Any]:
    """As `SearchResponse`; what was not asked for is absent."""
    items, ranked = _items(request), enumerate(answer.matches, answer.offset + 1)
    body: dict[str, Any] = {
        "index_version": answer.version,
        "took_ms": round(answer.took_ms, 2),
        "cached": answer.cached,
        "results": [_result(items, rank, match, answer.fields) for rank, match in ranked],
    }
    if answer.next_offset is not None:
        body["next_offset"] = answer.next_offset
    if answer.min_score is not None:
        body["min_score"] = answer.min_score
    if answer.words is not None:
        body["words"] = _words(answer.words)
    return body


def item_response(request: Request, version: int, item: Item) -> dict[str, Any]:
    """As `ItemResponse`."""
    return {"index_version": version, **_known(_items(request), item)}


def items_response(request: Request, found: Listed) -> dict[str, Any]:
    """As `ItemsResponse`."""
    items = _items(request)
    body: dict[str, Any] = {
        "index_version": found.version,
        "count": found.count,
        "items": [_known(items, item) for item in found.items],
    }
    if found.next_offset is not None:
        body["next_offset"] = found.next_offset
    return body


def _known(items: str, item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "caption": item.caption,
        "category": item.category,
        "metadata": item.metadata,
        "image_url": _image_url(items, item.id),
    }


def _result(items: str, rank: int, match: Match, fields: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "rank": rank,
        "id": match.item.id,
        "score": round(match.score, 6),
        "caption": match.item.caption,
        "category": match.item.category,
        "image_url": _image_url(items, match.item.id),
    }
    if fields:
        known = match.item.metadata
        result["metadata"] = known if "*" in fields else {name: known[name] for name in fields if name in known}
    if match.reranked is not None:
        result["rerank_score"] = round(match.reranked, 6)
    if match.folded:
        result["folded"] = match.folded
    if match.explanation is not None:
        result["explanation"] = {"relevance": match.explanation.relevance, "fit": match.explanation.fit}
        if match.explanation.words is not None:
            result["explanation"]["words"] = _words(match.explanation.words)
    return result


def _words(words: Words) -> list[dict[str, Any]]:
    return [{"word": word, "weight": round(weight, 4)} for word, weight in words]


def _items(request: Request) -> str:
    """Where the items of the request's collection are, as a path."""
    collection = collection_of(request)
    prefix = "" if collection is None else f"/collections/{quote(collection, safe='')}"
    return f"{request.scope.get('root_path', '')}{prefix}/items"


def _image_url(items: str, item_id: str) -> str:
    return f"{items}/{quote(item_id, safe='')}/image"
