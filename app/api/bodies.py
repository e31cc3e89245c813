"""Read request bodies into checked queries.

- JSON is parsed and validated by pydantic in one step. FastAPI's own body handling costs 11 to 15 % of a cached search.
- A form is read only after its content type, its charset and the model's queue are checked; an upload costs more than
  many text searches.
- Every error names the field as the request does.
"""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from app.api.image_urls import is_image_url
from app.api.requests import (
    MAX_PUT_ITEMS,
    BatchEntry,
    BatchQuery,
    EmbeddingsQuery,
    ImageForm,
)
from app.core.problems import Problem, field_problem, from_validation
from app.core.settings import Settings
from app.middleware.policy import PART_BYTES, query_bytes
from app.search.query import normalize, parse_fields

# Images make a body large, but not its number of values, each of which costs memory and time of the event loop.
_LARGE_JSON_BYTES = 2**20
_MAX_JSON_VALUES = 100_000
_PIECE = 2**20  # bytes looked at, or characters of base64, before other threads may have their turn
_MAX_FIELD_BYTES = 16 * 2**10
_MAX_EXPLAINED = 32  # results in one batch: on two cores about as many seconds as a search may take
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii", b"ascii", b"iso-8859-1", b"latin-1", b"windows-1252"})

M = TypeVar("M", bound=BaseModel)


def form_bytes(settings: Settings) -> int:
    """Return the largest size of a form with an image."""
    return settings.max_upload_bytes + PART_BYTES


def batch_bytes(settings: Settings) -> int:
    """Return the largest size of a batch in JSON, whose images in base64 are as large as one upload together."""
    return settings.max_upload_bytes * 4 // 3 + settings.max_queries * query_bytes(settings)


def items_bytes(settings: Settings) -> int:
    """Return the largest size of a change of items in JSON."""
    if not settings.writes:
        return query_bytes(settings)
    return settings.max_upload_bytes * 4 // 3 + MAX_PUT_ITEMS * PART_BYTES


async def read_batch(request: Request, settings: Settings) -> list[BatchEntry]:
    """Read the body of POST /search/batch."""
    queries = (await read_json(request, BatchQuery)).queries
    if len(queries) > settings.max_queries:
        raise field_problem("queries", f"at most {settings.max_queries}, not {len(queries)}")
    explained = sum(min(query.k, settings.explain_results) for query in queries if query.explain)
    if explained > max(_MAX_EXPLAINED, settings.explain_results):
        message = f"at most {_MAX_EXPLAINED} results with `explain` in a batch, not {explained}; lower k or send fewer"
        raise field_problem("queries", message)
    return queries


def decode_batch(queries: list[BatchEntry], settings: Settings) -> list[bytes | None]:
    """Return the image files of the queries of a batch; an error names the number of its query.

    Images with a URL are empty; see `app.api.image_urls`.
    """
    images: list[bytes | None] = []
    for number, query in enumerate(queries):
        if query.image is None or is_image_url(query.image):
            images.append(None if query.image is None else b"")
        else:
            images.append(decode_base64(query.image, settings, f"queries.{number}.image"))
    return images


async def read_embeddings(request: Request, settings: Settings) -> EmbeddingsQuery:
    """Read the body of POST /v1/embeddings. `embeddings_input` checks the inputs one by one."""
    query = await read_json(request, EmbeddingsQuery)
    if len(query.input) > settings.max_queries:
        raise field_problem("input", f"at most {settings.max_queries}, not {len(query.input)}")
    return query


def embeddings_input(query: EmbeddingsQuery, settings: Settings) -> list[str | bytes]:
    """Return normalized texts and image files; an error names its input."""
    inputs: list[str | bytes] = []
    for number, each in enumerate(query.input):
        field = f"input.{number}"
        if isinstance(each, str):
            if len(each) > settings.max_query_chars:
                raise field_problem(field, f"at most {settings.max_query_chars} characters, not {len(each)}")
            if not (text := normalize(each)):
                raise field_problem(field, "must not be empty")
            inputs.append(text)
            continue
        inputs.append(decode_base64(each.image, settings, f"{field}.image"))
    return inputs


def check_form_type(request: Request) -> None:
    """Check the content type of a form before its body is read."""
    content_type = _check_content_type(request, "multipart/form-data")
    # Starlette's parser would decode with any Python codec that the request names.
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8")
    if charset.lower() not in _CHARSETS:
        message = f"charset must be utf-8, not {charset.decode('latin-1')[:80]!r}"
        raise field_problem("Content-Type", message, status=400)


async def read_image_query(request: Request, settings: Settings) -> tuple[ImageForm, bytes]:
    """Read the form of POST /search/image: the query and the file. The parser spools large files to disk."""
    async with _form(request) as form:
        file = form.get("file")
        if isinstance(file, str):
            raise field_problem("file", "must be a file: send it with a file name")
        texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
        query = validated(ImageForm, parse_fields(texts), settings)
        if not isinstance(file, UploadFile):
            raise field_problem("file", "an image is required, as the form field `file`")
        if file.size is not None and file.size > settings.max_upload_bytes:
            raise _too_large("file", file.size, settings)
        data = await file.read()
    if not data:
        raise field_problem("file", "the file is empty")
    return query, data


def check_k(k: int, settings: Settings) -> None:
    if k > settings.max_k:
        raise field_problem("k", f"at most {settings.max_k}, not {k}")


def validated(model: type[M], fields: dict[str, Any], settings: Settings) -> M:
    """Return the model of fields, checked against the limits of the settings. Raise Problem if one is invalid."""
    try:
        return model.model_validate(fields, context=settings)
    except ValidationError as error:
        raise from_validation(error) from None


def _check_content_type(request: Request, expected: str) -> str:
    content_type: str = request.headers.get("content-type", "")
    media_type = content_type.split(";")[0].strip().lower()
    if media_type != expected:
        raise field_problem("Content-Type", f"must be {expected}, not {media_type or 'absent'}", status=415)
    return content_type


async def read_json(request: Request, model: type[M]) -> M:
    """Read a JSON body, which is checked against the limits of the settings; a large one in a thread."""
    body, settings = await request.body(), request.app.state.settings
    _check_content_type(request, "application/json")
    if len(body) > _LARGE_JSON_BYTES:
        return await asyncio.to_thread(_parse_large, body, model, settings)
    return _parse(body, model, settings)


def _parse_large(body: bytes, model: type[M], settings: Settings) -> M:
    starts = range(0, len(body), _PIECE)
    if sum(body.count(mark, start, start + _PIECE) for start in starts for mark in b",[{") > _MAX_JSON_VALUES:
        raise field_problem("body", f"at most {_MAX_JSON_VALUES:,} values", status=413)
    return _parse(body, model, settings)


def _parse(body: bytes, model: type[M], settings: Settings) -> M:
    try:
        return model.model_validate_json(body, context=settings)
    except ValidationError as error:
        raise from_validation(error) from None


def decode_base64(image: str, settings: Settings, field: str) -> bytes:
    """Return the file in a base64 text or data URI; an error names the field."""
    text = image.rpartition(",")[2]
    try:
        parts = [base64.b64decode(text[start : start + _PIECE], validate=True) for start in range(0, len(text), _PIECE)]
        data = b"".join(parts)
    except ValueError:
        raise field_problem(field, "must be base64, or a data URI with base64") from None
    if len(data) > settings.max_upload_bytes:
        raise _too_large(field, len(data), settings)
    return data


def _too_large(field: str, size: int, settings: Settings) -> Problem:
    message = f"at most {settings.max_upload_bytes / 2**20:.3g} MiB, not {size / 2**20:.3g}"
    return field_problem(field, message, status=413)


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    try:
        form = await request.form(max_files=1, max_fields=64, max_part_size=_MAX_FIELD_BYTES)
    except HTTPException as error:
        raise field_problem("body", error.detail, status=error.status_code) from None
    except OSError:
        detail = "There is no disk space for uploads. Try again later."
        raise Problem(503, detail, headers={"Retry-After": "10"}) from None
    try:
        yield form
    finally:
        await form.close()
