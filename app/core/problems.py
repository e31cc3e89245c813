"""Every error of the service becomes `application/problem+json` (RFC 9457), in this one place.

- Routes raise `Problem`, or let the errors of the rooms below pass; `install` maps both, so routes need no try/except.
- A fault of a field is listed as `errors: [{"field", "message"}]`, under the name that the caller used.
- 4xx never reaches the log as a traceback. An unforeseen exception passes through; `observe` logs it and answers 500.
"""

import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from dcar_core.util.errors import DataError, ImageError, StoreUnavailableError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_TRIED = re.compile(r"constrained-\w+|literal\[.*\]")
_TOLD = 20  # faults of one request
_PLACES = frozenset({"body", "query", "path", "header", "cookie"})


class Problem(Exception):  # noqa: N818 - RFC 9457 calls it so
    """An answer other than the one asked for.

    Args:
        status: HTTP status code.
        detail: one sentence for the caller: what was given and what would do.
        errors: (field, message) pairs, when fields are at fault.
        headers: extra response headers, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    def within(self, place: str) -> "Problem":
        """The same with a part of a request: its fields are named below `place`."""
        errors = [(f"{place}.{field}", message) for field, message in self.errors]
        return Problem(self.status, f"{place}: {self.detail}", errors=errors, headers=self.headers)

    def body(self) -> dict[str, Any]:
        """The document of RFC 9457. `about:blank` says that the status code is the whole type."""
        document: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            document["type"] = "urn:dcar:problem:invalid-field"
            document["errors"] = [{"field": field, "message": message} for field, message in self.errors]
        return document

    def response(self) -> Response:
        """The answer, with the headers that every answer carries, since some are sent outside of the middleware."""
        headers = {**SAFE_HEADERS, **self.headers}
        return Response(to_json(self.body()), self.status, headers=headers, media_type=MEDIA_TYPE)


class NotReady(Problem):
    """No index is loaded yet."""

    def __init__(self, reason: str) -> None:
        super().__init__(503, reason, headers={"Retry-After": "2"})


class Overloaded(Problem):
    """More searches are under way than the service takes on. wait_s: when it is worth trying again."""

    def __init__(self, wait_s: float = 1.0) -> None:
        seconds = max(1, math.ceil(wait_s))
        detail = f"The service is busy. Try again in {seconds} s."
        super().__init__(503, detail, headers={"Retry-After": str(seconds)})


class Late(Problem):
    """A search was not done by its deadline."""

    def __init__(self) -> None:
        super().__init__(503, "The search took too long and was given up. Try again.", headers={"Retry-After": "1"})


def field_problem(field: str, message: str, *, status: int = 422) -> Problem:
    """A problem with one field; the detail repeats it, for callers that read only this."""
    return Problem(status, f"{field}: {message}", errors=[(field, message)])


def from_validation(error: ValidationError | RequestValidationError, *, located: bool = False) -> Problem:
    """Turn pydantic's findings into one problem.

    Args:
        error: what pydantic, or FastAPI on its behalf, has found.
        located: whether each location begins with the part of the request ("query", "path", ...), as FastAPI's do.
    """
    found: list[tuple[str, str]] = []
    if isinstance(error, RequestValidationError):
        entries = list(error.errors())
    else:  # of a hostile body there may be many thousands
        entries = cast(list[Any], error.errors(include_url=False, include_context=False, include_input=False))
    for entry in entries[:_TOLD]:
        place = list(entry["loc"])
        if located and place and place[0] in _PLACES:
            place = place[1:]
        if entry["type"] == "json_invalid":
            return field_problem("body", "not valid JSON", status=400)
        message = str(entry["msg"]).removeprefix("Value error, ")
        # Where a field may be of several types, pydantic adds which of them it has tried.
        place = [part for part in place if not _TRIED.fullmatch(str(part))]
        if message[1:2].islower():  # not "EOF while parsing"
            message = message[0].lower() + message[1:]
        found.append((".".join(map(str, place)) or "body", message))
    detail = "; ".join(f"{field}: {message}" for field, message in found)
    if len(entries) > _TOLD:
        detail += f"; and {len(entries) - _TOLD:,} more"
    return Problem(422, detail, errors=found)


async def _on_problem(_: Request, error: Exception) -> Response:
    return cast(Problem, error).response()


async def _on_validation(_: Request, error: Exception) -> Response:
    return from_validation(cast(RequestValidationError, error), located=True).response()


async def _on_image(_: Request, error: Exception) -> Response:
    return field_problem("file", str(error)).response()


async def _on_data(_: Request, error: Exception) -> Response:
    return Problem(422, str(error)).response()


async def _on_unreachable(_: Request, error: Exception) -> Response:
    log.warning("%s", error)
    detail = "What holds the index's vectors does not answer. Try again later."
    return Problem(503, detail, headers={"Retry-After": "2"}).response()


async def _on_http(request: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    if error.status_code == 404:
        detail = f"There is nothing at {request.url.path[:200]}; see /docs for what there is."
    elif error.status_code == 405:
        detail = f"{request.method} is not possible here."
        return Problem(405, detail, headers=_with_head(error.headers)).response()
    else:
        detail = str(error.detail)
    return Problem(error.status_code, detail, headers=error.headers).response()


def _with_head(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Where GET is allowed, so is HEAD."""
    allowed = (headers or {}).get("Allow", "")
    return {"Allow": f"{allowed}, HEAD" if "GET" in allowed and "HEAD" not in allowed else allowed}


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it; the status is for the access log


_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    Problem: _on_problem,
    RequestValidationError: _on_validation,
    ImageError: _on_image,
    DataError: _on_data,
    StoreUnavailableError: _on_unreachable,
    HTTPException: _on_http,
    ClientDisconnect: _on_disconnect,
}


def install(app: FastAPI) -> None:
    """Register the mapping from exception to answer."""
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
