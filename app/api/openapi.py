"""The OpenAPI document, completed: what FastAPI cannot know, since errors and bodies are made and read by hand.

- Every error is `application/problem+json`, in place of FastAPI's own form, which is never sent; each status says what
  it means and shows an example.
- What the middleware may answer (no key, too often, too slow) is added to every operation that it guards.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.schemas import ProblemResponse
from app.core.problems import MEDIA_TYPE, Problem, field_problem

_OPEN = frozenset({"/healthz", "/readyz"})
_GUARDED = ("401", "429", "500")
_WITH_BODY = ("408",)

_ERRORS: dict[str, tuple[str, Problem]] = {
    "400": ("The body cannot be parsed.", field_problem("body", "not valid JSON", status=400)),
    "401": (
        "A key is needed, and none or an unknown one was given.",
        field_problem("Authorization", "must be `Bearer` and an API key that is known here", status=401),
    ),
    "403": (
        "Admin routes are disabled.",
        Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them."),
    ),
    "404": (
        "There is no such item or collection.",
        Problem(404, "There is no item 'x.png' in the index.", errors=[("id", "unknown: 'x.png'")]),
    ),
    "408": ("The body took too long to arrive.", Problem(408, "The body did not arrive in 30 seconds.")),
    "409": (
        "This index cannot do it.",
        Problem(409, "This needs the items' vectors, which the index does not keep."),
    ),
    "413": (
        "The body is too large.",
        Problem(
            413, "The body is too large; at most 20 MiB are accepted.", errors=[("file", "at most 20971520 bytes")]
        ),
    ),
    "415": (
        "The body is of another type.",
        field_problem("Content-Type", "must be application/json, not text/plain", status=415),
    ),
    "422": ("A field is at fault; `errors` names it.", field_problem("query", "must not be empty")),
    "429": (
        "Too many requests from this key or address; Retry-After says when to come back.",
        Problem(429, "Too many requests from shop. Try again in 3 s."),
    ),
    "500": (
        "Something unforeseen; the log has it under the request's id.",
        Problem(500, "Something went wrong on our side; the log of the service has the details."),
    ),
    "503": (
        "Not ready, busy, or out of time; Retry-After says when to come back.",
        Problem(503, "The service is busy. Try again in 1 s."),
    ),
}


def complete(app: FastAPI) -> None:
    """Make the application answer /openapi.json with the whole document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        openapi_version=app.openapi_version,
        routes=app.routes,
    )
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    problem = ProblemResponse.model_json_schema(ref_template="#/components/schemas/{model}")
    components["schemas"] |= problem.pop("$defs", {})
    components["schemas"][ProblemResponse.__name__] = problem
    key = "An API key, where the service asks for one; `X-API-Key` will do as well."
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": key},
        "admin": {"type": "http", "scheme": "bearer", "description": "The admin key."},
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            _complete(path, operation)
    return document


def _complete(path: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    if path not in _OPEN:
        operation["security"] = [{"admin": []}] if path.startswith("/admin/") else [{}, {"key": []}]
        for status in (*_GUARDED, *(_WITH_BODY if "requestBody" in operation else ())):
            answers.setdefault(status, {})
    for status, (description, problem) in _ERRORS.items():
        if status in answers:
            schema = {"$ref": f"#/components/schemas/{ProblemResponse.__name__}"}
            content = {MEDIA_TYPE: {"schema": schema, "example": problem.body()}}
            answers[status] = {"description": description, "content": content}
    operation["responses"] = dict(sorted(answers.items()))
