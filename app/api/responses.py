"""Responses: JSON bodies as plain dicts, whose types document the API and are the
source of truth for clients; errors.

- Handlers do not validate what they send; tests check it against the types.
  `app.search.results` has those of searches.
- Every foreseen error becomes the document of a `Problem`, so routes need no
  try/except; others pass to `guard`.
"""

import logging
import math
from typing import Any, Literal, NotRequired

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from app.api.routing import FieldError, state_of
from app.core.problems import Problem, field_problem, from_validation
from app.core.turns import ClosedError
from app.search import errors
from app.search.concepts import TaughtConcept
from app.search.results import SearchResponse, image_url, public_metadata
from app.search.served_version import ResultGroup
from app.service.collections import Collections
from dcar_core.util.errors import DataError, ImageError, StoreUnavailableError
from index_jobs.index.index_version import Item

logger = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI) -> None:
    kinds = (
        Problem,
        errors.SearchError,
        ClosedError,
        RequestValidationError,
        ImageError,
        DataError,
        StoreUnavailableError,
    )
    for kind in kinds:
        app.add_exception_handler(kind, _on_error)
    # The client is gone; the status is for the access log.
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=400))


async def _on_error(request: Request, error: Exception) -> Response:
    problem = to_problem(error)
    if problem.refused is not None:
        state_of(request).metrics.refused.labels(problem.refused).inc()
    return problem.response(request.scope)


def to_problem(error: Exception) -> Problem:
    """Return the problem document for an error. An unexpected error is raised again."""
    match error:
        case Problem():
            return error
        case RequestValidationError():
            return from_validation(error)
        case errors.BatchQueryError():
            cause = error.cause
            if isinstance(cause, ImageError):
                problem = field_problem("image", str(cause))
            else:
                problem = to_problem(cause)
            return problem.within(f"queries.{error.number}")
        case errors.InvalidQueryError():
            return field_problem(error.field, error.message)
        case errors.ItemNotFoundError() | errors.CollectionNotFoundError():
            status = 404 if error.field in ("id", "collection", "model") else 422
            return Problem(status, str(error), errors=[(error.field, str(error))])
        case errors.ImageUnavailableError():
            return Problem(404, str(error))
        case errors.UnsupportedQueryError():
            return Problem(
                409,
                str(error),
                errors=[] if error.field is None else [(error.field, str(error))],
            )
        case errors.UnavailableError():
            seconds = max(1, math.ceil(error.retry_after_s))
            detail = f"{str(error).rstrip('.')}. Try again in {seconds} s."
            return Problem(503, detail, headers={"Retry-After": str(seconds)})
        case ClosedError():
            return Problem(503, str(error), headers={"Retry-After": "1"})
        case StoreUnavailableError():
            logger.warning("%s", error)
            detail = "The vector store is unavailable. Try again later."
            return Problem(
                503,
                detail,
                headers={"Retry-After": "2"},
                refused="vector_store",
            )
        case ImageError():
            return field_problem("file", str(error))
        case DataError():
            return Problem(422, str(error))
    raise error


class BatchResponse(TypedDict):
    """One response for each query of a batch, in order, all from one index version."""

    index_version: int
    answers: list[SearchResponse]


class Collection(TypedDict):
    """One served collection. count is 0 until it is loaded.

    min_score: the calibrated cut-off that "auto" stands for; null if the index was not
    calibrated. reason: why the collection is degraded, as in /readyz; null if it is
    not.
    """

    name: str
    default: bool
    count: int
    index_version: int | None
    min_score: float | None
    reason: str | None


def collection_response(collections: Collections, name: str) -> Collection:
    collection = collections[name]
    served = collection.current
    return {
        "name": name,
        "default": name == collections.default,
        "count": served.index.manifest.count if served else 0,
        "index_version": served.version if served else None,
        "min_score": served.min_score if served else None,
        "reason": collection.fault,
    }


class CollectionsResponse(TypedDict):
    collections: list[Collection]


class GalleryItem(TypedDict):
    """One item of the gallery with all its metadata. width, height: as of a result.
    group: of a grouped listing.
    """

    id: str
    caption: str
    category: str
    metadata: dict[str, Any]
    image_url: str
    width: int | None
    height: int | None
    group: NotRequired[ResultGroup]


def gallery_item(items: str, item: Item) -> GalleryItem:
    """Return an item as it is sent. items: see `items_path`."""
    return {
        "id": item.id,
        "caption": item.caption,
        "category": item.category,
        "metadata": public_metadata(item),
        "image_url": image_url(items, item.id),
        "width": item.width,
        "height": item.height,
    }


class ItemResponse(GalleryItem):
    """One item and the index version it belongs to."""

    index_version: int


class ItemsResponse(TypedDict):
    """A page of items. count: number of matching items; next_offset: absent on the last
    page.
    """

    index_version: int
    count: int
    items: list[GalleryItem]
    next_offset: NotRequired[int]


class Embedding(TypedDict):
    """The vector of one input, of unit length: numbers, or base64 of little-endian
    float32.
    """

    object: str
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(TypedDict):
    """Embeddings in the order of the input. Only vectors of one fingerprint may be
    compared.

    model: the collection that embedded. fingerprint: of the model; the manifest of an
    index has the same. usage: always 0; tokens are not counted.
    """

    object: str
    data: list[Embedding]
    model: str
    fingerprint: str
    usage: dict[str, int]


class ConceptsResponse(TypedDict):
    concepts: list[TaughtConcept]


class JobProgress(TypedDict):
    done: int
    total: int


class JobFailure(TypedDict):
    id: str
    reason: str


class JobResponse(TypedDict):
    """A change of items, from its acceptance to a week after its end.

    items: number of items in the request, or that its filter matched then. accepted,
    ended: UTC, ISO 8601. index_version: a version that has all changes of the job.
    failed: items that could not be put; all others were. progress: encoded images, of
    all in its batch. reason: why the job failed, or why it waits. new_fields: metadata
    fields of the request that no item had, up to 20. changed: items whose fields a
    patch has changed. unknown: ids of a patch that the index lacks, the first 100.
    """

    id: str
    collection: str
    kind: Literal["put", "patch", "delete"]
    status: Literal["waiting", "running", "done", "failed"]
    items: int
    accepted: str
    ended: NotRequired[str]
    progress: NotRequired[JobProgress]
    index_version: NotRequired[int]
    failed: NotRequired[list[JobFailure]]
    reason: NotRequired[str]
    new_fields: NotRequired[list[str]]
    changed: NotRequired[int]
    unknown: NotRequired[list[str]]


class JobsResponse(TypedDict):
    jobs: list[JobResponse]


class HealthResponse(TypedDict):
    status: str


class ReadinessResponse(TypedDict):
    """ready: searches work in every open collection. degraded: they work, but not for a
    newer version or changed files.

    index_version and count belong to the default collection. model_note: tells of a
    model that stands in.
    """

    status: str
    index_version: int
    count: int
    reason: str | None
    model_note: str | None


class ReloadResponse(TypedDict):
    """After a reload: the default collection's version, every collection's version, and
    whether any changed.
    """

    index_version: int
    versions: dict[str, int]
    changed: bool


class FeedbackResponse(TypedDict):
    """The number of stored events; `ignored`: the first 20 that changed nothing, and
    why.
    """

    accepted: int
    ignored: list[FieldError]
