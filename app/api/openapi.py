"""The OpenAPI document, completed with what FastAPI cannot see.

- Request bodies are read by hand (see `bodies`), so their schemas are written here, with the limits of the settings.
- Every error is `application/problem+json` instead of FastAPI's validation error; each status has an example.
- The security of an operation follows from its policy.
"""

from functools import cache, partial
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from app.api.requests import BatchEntry, BatchQuery, DeleteItems, EmbeddingsQuery, ImageForm, PutItems
from app.api.routing import PROBLEM_REF
from app.api.schemas import ProblemResponse
from app.core.problems import MEDIA_TYPE, Problem, field_problem
from app.core.settings import Settings
from app.middleware.policy import Policies
from app.search.query import Query

_MODELS: tuple[type[BaseModel], ...] = (
    Query, BatchEntry, ImageForm, BatchQuery, EmbeddingsQuery, PutItems, DeleteItems, ProblemResponse
)  # fmt: skip
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
_ERRORS: dict[str, tuple[str, Problem]] = {
    "400": ("The body cannot be parsed.", field_problem("body", "not valid JSON", status=400)),
    "401": (
        "The API key is missing or unknown.",
        field_problem("Authorization", "must be `Bearer` and a known API key", status=401),
    ),
    "403": (
        "Admin routes or writing are disabled, or the scope of the key does not allow this.",
        Problem(403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them."),
    ),
    "404": (
        "There is no such item or collection.",
        Problem(404, "There is no item 'x.png' in the index.", errors=[("id", "unknown: 'x.png'")]),
    ),
    "408": ("The body took too long to arrive.", Problem(408, "The body did not arrive within 30 seconds.")),
    "409": (
        "The index does not support this request.",
        Problem(409, "This needs the items' vectors, which the index does not store."),
    ),
    "413": (
        "The body is too large.",
        Problem(413, "The body is too large; the limit is 20 MiB.", errors=[("file", "at most 20 MiB")]),
    ),
    "415": (
        "The body has the wrong content type.",
        field_problem("Content-Type", "must be application/json, not text/plain", status=415),
    ),
    "422": ("A field is invalid; `errors` names it.", field_problem("query", "must not be empty")),
    "429": (
        "Too many requests from this key or address; Retry-After gives the seconds to wait.",
        Problem(429, "Too many requests from shop. Try again in 3 s."),
    ),
    "500": (
        "Unexpected error; the log has the details under the request id.",
        Problem(500, "Unexpected error. The log of the service has the details."),
    ),
    "503": (
        "Not ready, busy or out of time; Retry-After gives the seconds to wait.",
        Problem(503, "The service is busy. Try again in 1 s."),
    ),
}


def install(app: FastAPI, policies: Policies) -> None:
    """Complete the document of an application when it is first read."""
    app.openapi = cache(partial(_document, app, policies))  # type: ignore[method-assign]


def _document(app: FastAPI, policies: Policies) -> dict[str, Any]:
    document = FastAPI.openapi(app)
    components = document["components"]
    schemas = components["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in _MODELS:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {model.__name__: schema}
    _add_limits(schemas, app.state.settings)
    key = "An API key, if the service requires one; the header `X-API-Key` works too."
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": key},
        "admin": {"type": "http", "scheme": "bearer", "description": "The admin key."},
    }
    templates = {getattr(route, "path_format", ""): getattr(route, "path", "") for route in app.routes}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if "{collection}" in path:  # `collection_of` reads it
                operation.setdefault("parameters", []).insert(0, _COLLECTION)
            operation["security"] = _SECURITY[policies.of(templates[path], method.upper()).access]
            for status, (description, problem) in _ERRORS.items():
                if status in operation["responses"]:
                    content = {MEDIA_TYPE: {"schema": PROBLEM_REF, "example": problem.body()}}
                    operation["responses"][status] = {"description": description, "content": content}
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
