"""Error responses: `application/problem+json` (RFC 9457), and below /v1/ OpenAI's error.

- A faulty field is listed as `errors: [{"field", "message"}]`, under the name that the caller used.
- `app.api.error_handlers` turns exceptions into these documents.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from http import HTTPStatus
from typing import Any, cast

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"
OPENAI_PATH = "/v1/"  # of the routes in the shape of OpenAI's API
_OPENAI_CODES = {(401, "Authorization"): "invalid_api_key", (404, "model"): "model_not_found"}
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110's; Python before 3.13 has older ones
_UNION_BRANCH = re.compile(r"constrained-\w+|literal\[.*\]|bool")  # in pydantic's location of a union's fault
_MAX_FAULTS = 20  # listed in one response
_MAX_NAME, _MAX_MESSAGE, _MAX_DETAIL = 200, 1000, 5000  # characters; names and values may be the caller's
_MAX_GUESSED = 40  # characters of an unknown field that is compared with the known ones
_MAX_EXAMINED = 1000  # a hostile body has many thousands, and each takes microseconds in the event loop


@dataclass(eq=False)
class Problem(Exception):  # noqa: N818 - the name in RFC 9457
    """An error response.

    Attributes:
        status: HTTP status code.
        detail: one sentence for the caller: the fault and the remedy.
        errors: (field, message) pairs of faulty fields.
        headers: extra response headers, such as Retry-After.
        refused: the reason to count if the request is refused to protect the service.
    """

    status: int
    detail: str
    errors: Sequence[tuple[str, str]] = ()
    headers: dict[str, str] = field(default_factory=dict)
    refused: str | None = None

    def __post_init__(self) -> None:
        self.detail = _shortened(self.detail, _MAX_DETAIL)
        self.errors = [(_shortened(name, _MAX_NAME), _shortened(text, _MAX_MESSAGE)) for name, text in self.errors]

    def __str__(self) -> str:
        return self.detail

    def within(self, place: str) -> "Problem":
        """Return the same problem for a part of a request: its fields are named below `place`."""
        errors = [(f"{place}.{name}", message) for name, message in self.errors]
        return replace(self, detail=f"{place}: {self.detail}", errors=errors)

    def without(self, place: str) -> "Problem":
        """Return the same problem with `place` removed from the names of fields."""
        errors = [(name.removeprefix(place), message) for name, message in self.errors]
        return replace(self, detail=self.detail.replace(place, ""), errors=errors)

    def body(self) -> dict[str, Any]:
        """Return the document of RFC 9457. Its type is `about:blank` when the status code says everything."""
        document: dict[str, Any] = {
            "type": "about:blank",
            "title": _TITLES.get(self.status) or HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            document["type"] = "urn:dcar:problem:invalid-field"
            document["errors"] = [{"field": name, "message": message} for name, message in self.errors]
        return document

    def openai_body(self) -> dict[str, Any]:
        """Return the error of OpenAI's API."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        field = self.errors[0][0] if self.errors else None
        code = _OPENAI_CODES.get((self.status, field or ""))
        return {"error": {"message": self.detail, "type": kind, "param": field, "code": code}}

    def response(self, scope: Scope) -> Response:
        """Return the response to a request, in the shape that its path asks for."""
        if scope["path"].startswith(OPENAI_PATH):
            return Response(to_json(self.openai_body()), self.status, self.headers, "application/json")
        return Response(to_json(self.body()), self.status, headers=self.headers, media_type=MEDIA_TYPE)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def field_problem(name: str, message: str, *, status: int = 422, **options: Any) -> Problem:
    """Return a problem with one field; its detail repeats the message. options: other arguments of `Problem`."""
    return Problem(status, f"{name}: {message}", errors=[(name, message)], **options)


def from_validation(
    error: ValidationError | RequestValidationError, known: Collection[str] = (), missing: Collection[str] = ()
) -> Problem:
    """Turn the faults that pydantic, or FastAPI on its behalf, found into one problem.

    Args:
        known: names that an unknown field may have been meant to be.
        missing: fields to name as missing if others are unknown.
    """
    if isinstance(error, RequestValidationError):  # a location begins with the part of the request
        entries = [{**entry, "loc": entry["loc"][1:]} for entry in error.errors()]
    elif error.error_count() > _MAX_EXAMINED:
        return field_problem("body", f"has {error.error_count():,} faults; send only the fields that /docs names")
    else:  # the options leave out the costly parts
        entries = cast(list[Any], error.errors(include_url=False, include_context=False, include_input=False))
    if any(entry["type"] == "json_invalid" for entry in entries):
        return field_problem("body", "not valid JSON", status=400)
    faults = [(_field_name(entry), _message(entry, known)) for entry in entries[:_MAX_FAULTS]]
    if any(entry["type"] == "extra_forbidden" for entry in entries):
        faults += [(name, "is missing") for name in missing]
    detail = "; ".join(f"{name}: {message}" for name, message in faults)
    if len(entries) > _MAX_FAULTS:
        detail += f"; and {len(entries) - _MAX_FAULTS:,} more"
    return Problem(422, detail, errors=faults)


def _field_name(fault: Mapping[str, Any]) -> str:
    places = [_shortened(str(place), _MAX_NAME) for place in fault["loc"]]
    unknown = [places.pop()] if fault["type"] == "extra_forbidden" else []  # the caller's own word
    return ".".join([*(place for place in places if not _UNION_BRANCH.fullmatch(place)), *unknown]) or "body"


def _message(fault: Mapping[str, Any], known: Collection[str]) -> str:
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][-1])[:_MAX_GUESSED]
        if name in known:
            return "belongs to another part of the body"
        begun = sorted((each for each in known if each.startswith(name)), key=len)
        meant = [*begun, *get_close_matches(name, known, 1)]
        return f"unknown field; did you mean {meant[0]}?" if meant else "unknown field"
    message: str = fault["msg"].removeprefix("Value error, ")
    if message[1:2].islower():  # leaves acronyms such as "EOF" alone
        message = message[0].lower() + message[1:]
    return message
