"""Error responses: `application/problem+json` (RFC 9457).

- A faulty field is listed as `errors: [{"field", "message"}]`, under the name that the
  caller used.
- `app.api.responses` turns exceptions into these documents.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, cast

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"
# RFC 9110's; Python before 3.13 has older ones
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
# in pydantic's location of a union's fault
_UNION_BRANCH = re.compile(r"constrained-\w+|literal\[.*\]|bool")
_MAX_FAULTS = 20  # listed in one response
_MAX_CHARS = 1000  # of each name and message, which may be the caller's
# a hostile body has many thousands, and each takes microseconds in the event loop
_MAX_EXAMINED = 1000


@dataclass(eq=False)
class Problem(Exception):  # noqa: N818 - the name in RFC 9457
    """An error response."""

    status: int
    detail: str  # one sentence for the caller: the fault and the remedy
    errors: Sequence[tuple[str, str]] = ()  # (field, message) pairs of faulty fields
    # beside the usual ones, such as Retry-After
    headers: dict[str, str] = field(default_factory=dict)
    # the reason to count if the request is refused to protect the service
    refused: str | None = None

    def __post_init__(self) -> None:
        self.detail = self.detail[:_MAX_CHARS]
        self.errors = [
            (name[:_MAX_CHARS], message[:_MAX_CHARS]) for name, message in self.errors
        ]

    def __str__(self) -> str:
        return self.detail

    def within(self, part: str) -> "Problem":
        """Return the same problem for a part of a request: its fields are named below
        `part`.
        """
        errors = [(f"{part}.{name}", message) for name, message in self.errors]
        return replace(self, detail=f"{part}: {self.detail}", errors=errors)

    def without(self, part: str) -> "Problem":
        """Return the same problem with `part` removed from the names of fields."""
        errors = [(name.removeprefix(part), message) for name, message in self.errors]
        return replace(self, detail=self.detail.replace(part, ""), errors=errors)

    def body(self) -> dict[str, Any]:
        """Return the document of RFC 9457. Its type is `about:blank` when the status
        code says everything.
        """
        document: dict[str, Any] = {
            "type": "about:blank",
            "title": _TITLES.get(self.status) or HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            document["type"] = "urn:dcar:problem:invalid-field"
            document["errors"] = [
                {"field": name, "message": message} for name, message in self.errors
            ]
        return document

    def response(self, scope: Scope) -> Response:
        """Return the response to a request; below /v1/ it has the message where clients
        of OpenAI's API look for it.
        """
        body = self.body() | (
            {"error": {"message": self.detail}}
            if scope["path"].startswith("/v1/")
            else {}
        )
        return Response(
            to_json(body),
            self.status,
            headers=self.headers,
            media_type=MEDIA_TYPE,
        )


def field_problem(
    name: str,
    message: str,
    *,
    status: int = 422,
    **options: Any,
) -> Problem:
    """Return a problem with one field; its detail repeats the message. options: other
    arguments of `Problem`.
    """
    return Problem(status, f"{name}: {message}", errors=[(name, message)], **options)


def from_validation(error: ValidationError | RequestValidationError) -> Problem:
    """Turn the faults that pydantic, or FastAPI on its behalf, found into one
    problem.
    """
    # a location begins with the part of the request
    if isinstance(error, RequestValidationError):
        entries = [{**entry, "loc": entry["loc"][1:]} for entry in error.errors()]
    elif error.error_count() > _MAX_EXAMINED:
        return field_problem(
            "body",
            f"has {error.error_count():,} faults; send only the fields that /docs"
            " names",
        )
    else:  # the options leave out the costly parts
        entries = cast(
            list[Any],
            error.errors(include_url=False, include_context=False, include_input=False),
        )
    if any(entry["type"] == "json_invalid" for entry in entries):
        return field_problem("body", "not valid JSON", status=400)
    faults = [(_field_name(entry), _message(entry)) for entry in entries[:_MAX_FAULTS]]
    detail = "; ".join(f"{name}: {message}" for name, message in faults)
    if len(entries) > _MAX_FAULTS:
        more = f"; and {len(entries) - _MAX_FAULTS:,} more"
    else:
        more = ""
    return Problem(422, detail + more, errors=faults)


def _field_name(fault: Mapping[str, Any]) -> str:
    parts = [str(part) for part in fault["loc"]]
    # the caller's own word
    unknown = [parts.pop()] if fault["type"] == "extra_forbidden" else []
    return (
        ".".join(
            [*(part for part in parts if not _UNION_BRANCH.fullmatch(part)), *unknown]
        )
        or "body"
    )


def _message(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "unknown field; /docs names the fields"
    message: str = fault["msg"].removeprefix("Value error, ")
    # acronyms such as EOF stay
    return message[0].lower() + message[1:] if message[1:2].islower() else message
