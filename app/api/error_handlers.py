"""Exceptions as responses: every error of the service becomes the document of a `Problem`.

- `install` registers the handlers, so routes need no try/except.
- A 4xx response never logs a traceback. An unforeseen exception passes through; `envelope` logs it and responds 500.
"""

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from app.core.problems import Problem, field_problem, from_validation
from app.search import errors
from dcar_core.util.errors import DataError, ImageError, StoreUnavailableError

logger = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    for kind in (Problem, errors.SearchError, RequestValidationError, ImageError, DataError, StoreUnavailableError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def to_problem(error: Exception) -> Problem:
    """Return the problem document for an error. An unexpected error is raised again."""
    match error:
        case Problem():
            return error
        case RequestValidationError():
            return from_validation(error)
        case errors.BatchQueryError():
            cause = error.cause
            problem = field_problem("image", str(cause)) if isinstance(cause, ImageError) else to_problem(cause)
            return problem.within(f"queries.{error.number}")
        case errors.InvalidQueryError():
            return field_problem(error.field, error.message)
        case errors.ItemNotFoundError():
            status = 404 if error.field == "id" else 422
            return Problem(status, str(error), errors=[(error.field, f"unknown: {error.shown_id}")])
        case errors.CollectionNotFoundError():
            detail = f"{str(error).rstrip('.')}; GET /collections lists the served ones."
            return Problem(404, detail, errors=[(error.field, detail)])
        case errors.ImageUnavailableError():
            return Problem(404, str(error))
        case errors.UnsupportedQueryError():
            return Problem(409, str(error), errors=[] if error.field is None else [(error.field, str(error))])
        case errors.UnavailableError():
            seconds = max(1, math.ceil(error.retry_after_s))
            detail = f"{str(error).rstrip('.')}. Try again in {seconds} s."
            return Problem(503, detail, headers={"Retry-After": str(seconds)})
        case StoreUnavailableError():
            logger.warning("%s", error)
            detail = "The vector store is unavailable. Try again later."
            return Problem(503, detail, headers={"Retry-After": "2"}, refused="vector_store")
        case ImageError():
            return field_problem("file", str(error))
        case DataError():
            return Problem(422, str(error))
    raise error


async def _on_error(request: Request, error: Exception) -> Response:
    problem = to_problem(error)
    if problem.refused is not None:
        request.app.state.metrics.refused.labels(problem.refused).inc()
    return problem.response(request.scope)


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # the client is gone; the status is for the access log
