"""Exceptions as responses: every error of the service becomes `application/problem+json`.

- `install` registers the handlers, so routes need no try/except.
- A 4xx response never logs a traceback. An unforeseen exception passes through; `request_log` logs it and responds 500.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from app.core.problems import Problem, field_problem, from_validation
from app.search.errors import (
    BatchQueryError,
    CollectionNotFoundError,
    ImageUnavailableError,
    InvalidQueryError,
    ItemNotFoundError,
    SearchError,
    UnavailableError,
    UnsupportedQueryError,
)
from dcar_core.util.errors import DataError, ImageError, StoreUnavailableError

logger = logging.getLogger(__name__)


def search_problem(error: SearchError) -> Problem:
    """Return the problem document for an error of the search engine."""
    match error:
        case BatchQueryError():
            return search_problem(error.cause).within(f"queries.{error.number}")
        case InvalidQueryError():
            return field_problem(error.field, error.message)
        case ItemNotFoundError():
            status = 404 if error.field == "id" else 422
            return Problem(status, str(error), errors=[(error.field, f"unknown: {error.shown_id}")])
        case CollectionNotFoundError():
            return Problem(404, str(error), errors=[("collection", str(error))])
        case ImageUnavailableError():
            return Problem(404, str(error))
        case UnsupportedQueryError():
            return Problem(409, str(error), errors=[] if error.field is None else [(error.field, str(error))])
        case UnavailableError():
            seconds = max(1, math.ceil(error.retry_after_s))
            detail = f"{str(error).rstrip('.')}. Try again in {seconds} s."
            return Problem(503, detail, headers={"Retry-After": str(seconds)})
    raise error


def install(app: FastAPI) -> None:
    """Register the handlers."""
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)


async def response_to(request: Request, error: Exception) -> Response:
    """Return the response to an exception that was raised outside of FastAPI's routes.

    Raises:
        Exception: the error itself, if no handler knows it.
    """
    for kind in type(error).__mro__:
        if kind in _HANDLERS:
            return await _HANDLERS[kind](request, error)
    raise error


async def _on_problem(_: Request, error: Exception) -> Response:
    return cast(Problem, error).response()


async def _on_search_error(_: Request, error: Exception) -> Response:
    return search_problem(cast(SearchError, error)).response()


async def _on_validation(_: Request, error: Exception) -> Response:
    return from_validation(cast(RequestValidationError, error), located=True).response()


async def _on_image(_: Request, error: Exception) -> Response:
    return field_problem("file", str(error)).response()


async def _on_data(_: Request, error: Exception) -> Response:
    return Problem(422, str(error)).response()


async def _on_store_unavailable(_: Request, error: Exception) -> Response:
    logger.warning("%s", error)
    detail = "The vector store is unavailable. Try again later."
    return Problem(503, detail, headers={"Retry-After": "2"}).response()


async def _on_http(request: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    if error.status_code == 404:
        detail = f"There is nothing at {request.url.path[:200]}; see /docs for the routes."
    elif error.status_code == 405:
        detail = f"{request.method} is not allowed here."
        return Problem(405, detail, headers=_allow_head(error.headers)).response()
    else:
        detail = str(error.detail)
    return Problem(error.status_code, detail, headers=error.headers).response()


def _allow_head(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Add HEAD to an Allow header that has GET."""
    allowed = (headers or {}).get("Allow", "")
    return {"Allow": f"{allowed}, HEAD" if "GET" in allowed and "HEAD" not in allowed else allowed}


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # the client is gone; the status is for the access log


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    Problem: _on_problem,
    SearchError: _on_search_error,
    RequestValidationError: _on_validation,
    ImageError: _on_image,
    DataError: _on_data,
    StoreUnavailableError: _on_store_unavailable,
    HTTPException: _on_http,
    ClientDisconnect: _on_disconnect,
}
