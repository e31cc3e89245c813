"""The OpenAPI document, completed with what FastAPI cannot see.

- Request bodies are read by hand (see `requests`), so their schemas are written here, with the limits of the settings.
- Every error is a problem, or OpenAI's error, instead of FastAPI's validation error; each status has an example.
- The security of an operation follows from its policy.
"""

from functools import cache, partial
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from app.api.requests import BatchEntry, ImageForm
from app.api.schemas import OpenAIErrorResponse, ProblemResponse
from app.core.problems import MEDIA_TYPE, OPENAI_PATH, Problem
from app.core.settings import Settings
from app.http.access import Policy
from app.search.query import Query

_referenced: dict[str, type[BaseModel]] = {}  # models of bodies and errors by name, which FastAPI does not see
_COLLECTION = {
    "name": "collection",
    "in": "path",
    "required": True,
    "description": "a name from GET /collections",
    "schema": {"type": "string"},
}
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
    path: str, policy: Policy, accepts: type[BaseModel] | None, media_type: str, errors: tuple[int, ...]
) -> dict[str, Any]:
    """Return FastAPI's options of a route: its security, its body and its errors."""
    statuses = {*errors, *(_COLLECTION_ERRORS if policy.scope == "collection" else ())}
    statuses |= {*(_BODY_ERRORS if accepts else ()), *(_GUARDED_ERRORS if policy.access != "open" else ())}
    extra: dict[str, Any] = {"security": _SECURITY[policy.access]}
    if accepts is not None:
        extra["requestBody"] = {"required": True, "content": {media_type: {"schema": _reference(accepts)}}}
    return {
        "include_in_schema": not policy.is_private,
        "openapi_extra": extra,
        "responses": {status: _problem(path, status) for status in sorted(statuses)},
    }


def _problem(path: str, status: int) -> dict[str, Any]:
    problem = Problem(status, _ERRORS[status])
    content = {MEDIA_TYPE: {"schema": _reference(ProblemResponse), "example": problem.body()}}
    if path.startswith(OPENAI_PATH):
        content = {"application/json": {"schema": _reference(OpenAIErrorResponse), "example": problem.openai_body()}}
    return {"description": _ERRORS[status], "content": content}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    _referenced[model.__name__] = model
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def install(app: FastAPI) -> None:
    """Complete the document of an application when it is first read."""
    app.openapi = cache(partial(_document, app))  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = FastAPI.openapi(app)
    components = document["components"]
    for name, model in _referenced.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"] |= schema.pop("$defs", {}) | {name: schema}
    _add_limits(components["schemas"], app.state.settings)
    key = "An API key, if the service requires one; the header `X-API-Key` works too."
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": key},
        "admin": {"type": "http", "scheme": "bearer", "description": "The admin key."},
    }
    for path, operations in document["paths"].items():
        if "{collection}" in path:  # `collection_of` reads it
            for operation in operations.values():
                operation.setdefault("parameters", []).insert(0, _COLLECTION)
    return document


def _add_limits(schemas: dict[str, Any], settings: Settings) -> None:
    """Write the limits of the settings, and the file of a form, into the schemas of requests."""
    for model in (Query, BatchEntry, ImageForm):
        properties = schemas[model.__name__]["properties"]
        for name in ("query", "without"):
            properties[name]["maxLength"] = settings.max_query_chars
        properties["k"]["maximum"] = settings.max_k
        properties["offset"]["maximum"] = settings.max_window - 1
    schemas["BatchQuery"]["properties"]["queries"]["maxItems"] = settings.max_queries
    schemas["EmbeddingsQuery"]["properties"]["input"]["maxItems"] = settings.max_queries
    form = schemas["ImageForm"]
    file = {"type": "string", "format": "binary", "description": f"at most {settings.max_upload_bytes} bytes"}
    form |= {"properties": {"file": file, **form["properties"]}, "required": ["file"]}
    for name in ("filter", "weights", "crop"):  # OpenAPI would send an object as a file of its own
        description = form["properties"][name].get("description", "as in text searches")
        form["properties"][name] = {"type": "string", "default": "", "description": f"{description}; as JSON"}
