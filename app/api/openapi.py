"""The OpenAPI document, completed with what FastAPI cannot see.

- Request bodies are read by hand (see `requests`), so their schemas are written here, with the limits of the settings.
- Every error is a problem instead of FastAPI's validation error; each status has an example.
- The security of an operation follows from its policy.
"""

from functools import cache
from typing import Any, NotRequired

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_json
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from app.api.requests import BatchEntry, ImageForm
from app.core.problems import MEDIA_TYPE, Problem
from app.core.settings import Settings
from app.http.access import Policy
from app.search.query import Query


class FieldError(TypedDict):
    """One invalid field, under the name that the request used."""

    field: str
    message: str


class ProblemResponse(TypedDict):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: NotRequired[list[FieldError]]


_REFERENCE = "#/components/schemas/{model}"
_models: dict[str, Any] = {"ProblemResponse": ProblemResponse}  # and those of bodies
_COLLECTION = {"name": "collection", "in": "path", "required": True, "schema": {"type": "string"}}
_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "open": [],
    "read": [{}, {"key": []}],
    "monitor": [{}, {"key": []}, {"admin": []}],
    "write": [{"admin": []}, {"key": []}],
    "admin": [{"admin": []}],
}
_BODY_ERRORS = (400, 408, 413, 415, 422)
_COLLECTION_ERRORS = (404, 422, 503)
_GUARDED_ERRORS = (401, 403, 429, 500)
_ERRORS = {
    400: "The body cannot be parsed.",
    401: "The API key is missing or unknown.",
    403: "Admin routes or writing are disabled, or the scope of the key does not allow this.",
    404: "There is no such item or collection.",
    408: "The body took too long to arrive.",
    409: "The index does not support this request.",
    413: "The body is too large.",
    415: "The body has the wrong content type.",
    422: "A field is invalid; `errors` names it.",
    429: "Too many requests from this key or address; Retry-After gives the seconds to wait.",
    500: "Unexpected error; the log has the details under the request id.",
    503: "Not ready, busy or out of time; Retry-After gives the seconds to wait.",
}


def operation_options(
    path: str, policy: Policy, accepts: type[BaseModel] | None, errors: tuple[int, ...]
) -> dict[str, Any]:
    """Return FastAPI's options of a route: its security, its body and its errors."""
    statuses = {*errors, *(_COLLECTION_ERRORS if policy.scope == "collection" else ())}
    statuses |= {*(_BODY_ERRORS if accepts else ()), *(_GUARDED_ERRORS if policy.access != "open" else ())}
    extra: dict[str, Any] = {"security": _SECURITY[policy.access]}
    if accepts is not None:
        _models[accepts.__name__] = accepts
        kind = "multipart/form-data" if accepts is ImageForm else "application/json"
        extra["requestBody"] = {"required": True, "content": {kind: {"schema": _reference(accepts)}}}
    return {
        "include_in_schema": not policy.is_private,
        "openapi_extra": extra,
        "responses": {status: _problem(status) for status in sorted(statuses)},
    }


def _problem(status: int) -> dict[str, Any]:
    problem = Problem(status, _ERRORS[status])
    content = {MEDIA_TYPE: {"schema": _reference(ProblemResponse), "example": problem.body()}}
    return {"description": _ERRORS[status], "content": content}


def _reference(model: type[Any]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


@cache
def document(app: FastAPI) -> bytes:
    """Return the document of an application as JSON; the page and tools ask for it again and again."""
    complete = app.openapi()
    schemas = complete["components"]["schemas"]
    for name, model in _models.items():
        schema = TypeAdapter(model).json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {}) | {name: schema}
    _add_limits(schemas, app.state.settings)
    key = "An API key, if the service requires one; the header `X-API-Key` works too."
    complete["components"]["securitySchemes"] = {
        name: {"type": "http", "scheme": "bearer", "description": text}
        for name, text in (("key", key), ("admin", "The admin key."))
    }
    for path, operations in complete["paths"].items():
        if "{collection}" in path:  # `collection_of` reads it
            for operation in operations.values():
                operation.setdefault("parameters", []).insert(0, _COLLECTION)
    return to_json(complete)


def _add_limits(schemas: dict[str, Any], settings: Settings) -> None:
    """Write the limits of the settings, and the file of a form, into the schemas of requests."""
    for model in (Query, BatchEntry, ImageForm):
        properties = schemas[model.__name__]["properties"]
        properties["query"]["maxLength"] = properties["without"]["maxLength"] = settings.max_query_chars
        properties["k"]["maximum"], properties["offset"]["maximum"] = settings.max_k, settings.max_window - 1
    for name, field in (("BatchQuery", "queries"), ("EmbeddingsQuery", "input")):
        schemas[name]["properties"][field]["maxItems"] = settings.max_queries
    for name in ("filter", "weights", "crop"):  # of a form; OpenAPI would send an object as a file of its own
        description = properties[name].get("description", "as in text searches")
        properties[name] = {"type": "string", "default": "", "description": f"{description}; as JSON"}
    file = {"type": "string", "format": "binary", "description": f"at most {settings.max_upload_bytes} bytes"}
    schemas["ImageForm"] |= {"properties": {"file": file, **properties}, "required": ["file"]}
