"""What the OpenAPI document says of bodies and errors that FastAPI cannot see, since `queries` reads bodies itself."""

from typing import Any

from pydantic import BaseModel

from app.api.requests import BatchQuery, ImageForm, TextQuery
from app.api.schemas import ProblemResponse
from app.core.problems import MEDIA_TYPE
from app.core.settings import Settings


def documented(model: type[Any], *statuses: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of a route: what it answers, its errors and, where it reads the body itself, the body."""
    arguments: dict[str, Any] = {"responses": {200: {"model": model}, **problem_responses(*statuses)}}
    if body is not None:
        arguments["openapi_extra"] = {"requestBody": {"required": True, "content": body}}
    return arguments


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Entries of `responses` for errors."""
    schema = {"$ref": f"#/components/schemas/{ProblemResponse.__name__}"}
    return {status: {"description": "problem", "content": {MEDIA_TYPE: {"schema": schema}}} for status in statuses}


def text_body(settings: Settings) -> dict[str, Any]:
    """The body of /search/text."""
    return {"application/json": {"schema": _limited(TextQuery, settings)}}


def batch_body(settings: Settings) -> dict[str, Any]:
    """The body of /search/batch."""
    schema = _inlined(BatchQuery)
    schema["properties"]["queries"] |= {"maxItems": settings.max_queries, "items": _limited(TextQuery, settings)}
    return {"application/json": {"schema": schema}}


def image_body(settings: Settings) -> dict[str, Any]:
    """The form of /search/image."""
    schema = _limited(ImageForm, settings)
    file = {"type": "string", "format": "binary", "description": f"at most {settings.max_upload_bytes} bytes"}
    schema["properties"] = {"file": file, **schema["properties"]}
    schema["required"] = ["file"]
    for name in ("filter", "weights"):  # as objects they would be sent as files of their own
        known = schema["properties"][name]
        about = known.get("description", "as in searches by words")
        schema["properties"][name] = {"type": "string", "default": "", "description": f"{about}; in JSON"}
    return {"multipart/form-data": {"schema": schema}}


def _limited(model: type[BaseModel], settings: Settings) -> dict[str, Any]:
    schema = _inlined(model)
    for name in ("query", "without"):
        schema["properties"][name]["maxLength"] = settings.max_query_chars
    schema["properties"]["k"]["maximum"] = settings.max_k
    schema["properties"]["offset"]["maximum"] = settings.max_window - 1
    return schema


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A schema without references: the document has no place for what they would refer to."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]] | {k: v for k, v in node.items() if k != "$ref"}
        return {name: resolved(value) for name, value in node.items()}

    found: dict[str, Any] = resolved(schema)
    return found
