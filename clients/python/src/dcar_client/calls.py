"""One `Call` for each route of the service: the HTTP request to send, and how to read
the response.

No I/O takes place here, so the synchronous and the asynchronous client share every
route.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Required, TypedDict, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from dcar_client.errors import error_from
from dcar_client.limits import is_image, json_of
from dcar_client.models import (
    BatchResponse,
    Collection,
    CollectionsResponse,
    ConceptsResponse,
    EmbeddingsResponse,
    FeedbackResponse,
    HealthResponse,
    ItemResponse,
    ItemsResponse,
    JobResponse,
    JobsResponse,
    ReadinessResponse,
    ReloadResponse,
    SearchOptions,
    SearchResponse,
    TaughtConcept,
    TextQuery,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class NewItem(TypedDict, total=False):
    """An item to put. image: the file, as a path or as bytes, or its URL."""

    id: Required[str]
    image: Required[Path | bytes | str]
    caption: str
    category: str
    metadata: dict[str, Any]


class ItemFields(TypedDict, total=False):
    """What to merge into an item; None removes a field."""

    caption: str | None
    category: str | None
    metadata: dict[str, Any]


class NewEvent(TypedDict, total=False):
    """What a client did with a result: impression, click, save, purchase, or judge with
    a `rating` of 0 to 3.
    """

    query_id: Required[str]
    client_id: Required[str]
    action_name: Required[str]
    object_id: Required[str]
    rating: int


class NewQuery(TextQuery, total=False):
    """A search of a batch. image: the file, as a path or as bytes, or its URL."""

    image: Path | bytes | str


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and the parser of its response. arguments: keyword arguments of
    `httpx.Client.request`.
    """

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def search_text(
    prefix: str,
    query: str,
    options: SearchOptions,
) -> Call[SearchResponse]:
    """POST /search/text."""
    return Call(
        "POST",
        f"{prefix}/search/text",
        _reader(SearchResponse),
        {"json": {"query": query, **options}},
    )


def search_image(
    prefix: str,
    image: Path | str | bytes,
    query: str,
    options: SearchOptions,
) -> Call[SearchResponse]:
    """POST /search/image, as a multipart form in which every option but texts is
    JSON.
    """
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    fields = {"query": query} if query else {}
    for name, value in options.items():
        fields[name] = str(value) if name in ("without", "sort") else json.dumps(value)
    arguments = {"files": {"file": ("image", data)}, "data": fields}
    return Call("POST", f"{prefix}/search/image", _reader(SearchResponse), arguments)


def search_batch(
    prefix: str,
    queries: Sequence[str | NewQuery],
    options: SearchOptions,
) -> Call[list[SearchResponse]]:
    """POST /search/batch. An option of a query takes precedence over the common
    `options`.
    """
    own = [
        {"query": query} if isinstance(query, str) else _with_image(query)
        for query in queries
    ]
    body = {"queries": [{**options, **query} for query in own]}
    read = _reader(BatchResponse)
    return Call(
        "POST",
        f"{prefix}/search/batch",
        lambda response: read(response).answers,
        {"json": body},
    )


def embeddings(
    inputs: Sequence[str | bytes], model: str | None
) -> Call[EmbeddingsResponse]:
    """POST /v1/embeddings, with image files as base64."""
    sent = [
        part if isinstance(part, str) else {"image": base64.b64encode(part).decode()}
        for part in inputs
    ]
    body = {"input": sent, "model": model}
    return Call("POST", "/v1/embeddings", _reader(EmbeddingsResponse), {"json": body})


def similar(prefix: str, item_id: str, k: int, offset: int) -> Call[SearchResponse]:
    """GET /items/{id}/similar."""
    path = f"{prefix}/items/{path_segment(item_id)}/similar"
    return Call(
        "GET",
        path,
        _reader(SearchResponse),
        {"params": {"k": k, "offset": offset}},
    )


def items(
    prefix: str,
    filter: Mapping[str, Any] | None,
    k: int,
    offset: int,
    sort: str,
    group_by: str | None,
) -> Call[ItemsResponse]:
    """GET /items."""
    params: dict[str, str | int] = {"k": k, "offset": offset}
    if filter is not None:
        params["filter"] = json.dumps(filter)
    if sort:
        params["sort"] = sort
    if group_by is not None:
        params["group_by"] = group_by
    return Call("GET", f"{prefix}/items", _reader(ItemsResponse), {"params": params})


def item(prefix: str, item_id: str) -> Call[ItemResponse]:
    """GET /items/{id}."""
    return Call("GET", f"{prefix}/items/{path_segment(item_id)}", _reader(ItemResponse))


def image(prefix: str, item_id: str, size: int | None) -> Call[bytes]:
    """GET /items/{id}/image."""
    params = {} if size is None else {"size": size}
    return Call(
        "GET",
        f"{prefix}/items/{path_segment(item_id)}/image",
        _image_bytes,
        {"params": params},
    )


def feedback(events: Sequence[NewEvent]) -> Call[FeedbackResponse]:
    """POST /feedback."""
    return Call(
        "POST",
        "/feedback",
        _reader(FeedbackResponse),
        {"json": {"events": [*events]}},
    )


def put_items(prefix: str, items: Sequence[NewItem]) -> Call[JobResponse]:
    """PUT /items."""
    sent = [_with_image(item) for item in items]
    arguments = {"json": {"items": sent}}
    return Call("PUT", f"{prefix}/items", _reader(JobResponse), arguments)


def put_item(prefix: str, item: NewItem) -> Call[JobResponse]:
    """PUT /items/{id}."""
    sent = _with_image(item)
    path = f"{prefix}/items/{path_segment(sent.pop('id'))}"
    return Call("PUT", path, _reader(JobResponse), {"json": sent})


def patch_items(
    prefix: str,
    fields: ItemFields,
    ids: Sequence[str] | None,
    filter: Mapping[str, Any] | None,
) -> Call[JobResponse]:
    """PATCH /items."""
    arguments = {"json": {**_chosen(ids, filter), **fields}}
    return Call("PATCH", f"{prefix}/items", _reader(JobResponse), arguments)


def patch_each(
    prefix: str,
    changes: Mapping[str, Mapping[str, Any]],
    by: str,
) -> Call[JobResponse]:
    """PATCH /items with `changes`."""
    return Call(
        "PATCH",
        f"{prefix}/items",
        _reader(JobResponse),
        {"json": {"changes": changes, "by": by}},
    )


def patch_item(prefix: str, item_id: str, fields: ItemFields) -> Call[JobResponse]:
    """PATCH /items/{id}."""
    path = f"{prefix}/items/{path_segment(item_id)}"
    return Call("PATCH", path, _reader(JobResponse), {"json": fields})


def delete_items(
    prefix: str,
    ids: Sequence[str] | None,
    filter: Mapping[str, Any] | None,
) -> Call[JobResponse]:
    """DELETE /items."""
    return Call(
        "DELETE",
        f"{prefix}/items",
        _reader(JobResponse),
        {"json": _chosen(ids, filter)},
    )


def delete_item(prefix: str, item_id: str) -> Call[JobResponse]:
    """DELETE /items/{id}."""
    return Call(
        "DELETE",
        f"{prefix}/items/{path_segment(item_id)}",
        _reader(JobResponse),
    )


def jobs(limit: int) -> Call[list[JobResponse]]:
    """GET /jobs."""
    read = _reader(JobsResponse)
    return Call(
        "GET",
        "/jobs",
        lambda response: read(response).jobs,
        {"params": {"limit": limit}},
    )


def job(job_id: str) -> Call[JobResponse]:
    """GET /jobs/{id}."""
    return Call("GET", f"/jobs/{path_segment(job_id)}", _reader(JobResponse))


def job_wait(status: JobResponse, waited_s: float, timeout_s: float) -> float | None:
    """Return the seconds to wait before the next look at a job; None if it has ended.

    Raises:
        TimeoutError: it has not ended in time.
    """
    if status.status in ("done", "failed"):
        return None
    if waited_s >= timeout_s:
        raise TimeoutError(
            f"job {status.id} is {status.status} after {timeout_s:g} s:"
            f" {status.reason or 'no reason given'}"
        )
    return min(2.0, 0.2 + waited_s / 4)


def teach(
    prefix: str,
    name: str,
    ids: Sequence[str],
    not_ids: Sequence[str],
    kind: str,
) -> Call[TaughtConcept]:
    """PUT /concepts/{name}."""
    arguments = {"json": {"ids": [*ids], "not_ids": [*not_ids], "kind": kind}}
    return Call(
        "PUT",
        f"{prefix}/concepts/{path_segment(name)}",
        _reader(TaughtConcept),
        arguments,
    )


def concepts(prefix: str) -> Call[list[TaughtConcept]]:
    """GET /concepts."""
    read = _reader(ConceptsResponse)
    return Call("GET", f"{prefix}/concepts", lambda response: read(response).concepts)


def concept(prefix: str, name: str) -> Call[TaughtConcept]:
    """GET /concepts/{name}."""
    return Call(
        "GET",
        f"{prefix}/concepts/{path_segment(name)}",
        _reader(TaughtConcept),
    )


def forget(prefix: str, name: str) -> Call[None]:
    """DELETE /concepts/{name}."""
    return Call("DELETE", f"{prefix}/concepts/{path_segment(name)}", _nothing)


def collections() -> Call[list[Collection]]:
    """GET /collections."""
    read = _reader(CollectionsResponse)
    return Call("GET", "/collections", lambda response: read(response).collections)


def put_collection(name: str, model: str | None) -> Call[Collection]:
    """PUT /collections/{collection}."""
    params = {} if model is None else {"model": model}
    return Call(
        "PUT",
        f"/collections/{path_segment(name)}",
        _reader(Collection),
        {"params": params},
    )


def delete_collection(name: str) -> Call[None]:
    """DELETE /collections/{collection}."""
    return Call("DELETE", f"/collections/{path_segment(name)}", _nothing)


def health() -> Call[HealthResponse]:
    """GET /healthz."""
    return Call("GET", "/healthz", _reader(HealthResponse))


def readiness() -> Call[ReadinessResponse]:
    """GET /readyz."""
    return Call("GET", "/readyz", _reader(ReadinessResponse))


def reload() -> Call[ReloadResponse]:
    """POST /admin/reload."""
    return Call("POST", "/admin/reload", _reader(ReloadResponse))


def path_segment(name: str) -> str:
    """Quote a name as one segment of a URL's path.

    Raises:
        ValueError: the name is "." or "..", which URLs resolve to other paths.
    """
    if name in {".", ".."}:
        raise ValueError(f"{name!r} cannot be the name of an item or a collection")
    return quote(name, safe="")


def _with_image(fields: Mapping[str, Any]) -> dict[str, Any]:
    image = fields.get("image")
    if isinstance(image, Path):
        image = image.read_bytes()
    if isinstance(image, bytes):
        image = base64.b64encode(image).decode()
    return {**fields} if image is None else {**fields, "image": image}


def _chosen(
    ids: Sequence[str] | None, filter: Mapping[str, Any] | None
) -> dict[str, Any]:
    selection = {"ids": None if ids is None else [*ids], "filter": filter}
    return {name: value for name, value in selection.items() if value is not None}


def _reader(model: type[M]) -> Callable[[httpx.Response], M]:
    def read(response: httpx.Response) -> M:
        try:
            return model.model_validate(json_of(response))
        except ValueError:
            raise error_from(response) from None

    return read


def _image_bytes(response: httpx.Response) -> bytes:
    if not is_image(response):
        raise error_from(response)
    return response.content


def _nothing(response: httpx.Response) -> None:
    if response.status_code != 204:
        raise error_from(response)
