"""Requests: the models of bodies and parameters, which validate and document them, and the reading of bodies.

- `app.search.query.Query` is the body of text searches, and the base of the others.
- JSON is parsed and validated by pydantic in one step. FastAPI's own body handling costs 11 to 15 % of a cached search.
- A form is read only after its content type, its charset and the caller's room are checked; an upload costs more than
  many text searches.
- Every error names the field as the request does.
"""

import asyncio
import re
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar

from fastapi import Request
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException

from app.api.image_urls import require_size
from app.core.problems import Problem, field_problem, from_validation
from app.core.settings import DEFAULT_K, MAX_QUERIES, Settings
from app.http.access import PART_BYTES, query_bytes
from app.search.query import GroupBy, Query, check_filter, check_text, checked_parts, parse_fields
from dcar_core.util.files import canonical_json
from index_jobs.checks import MAX_CAPTION_CHARS, MAX_METADATA_BYTES, MAX_METADATA_LEVELS, is_too_deep

MAX_PUT_ITEMS = 256
MAX_CHOSEN_ITEMS = 10_000
MAX_LISTED_JOBS = 100
_MAX_NAME, _SHOWN_NAME = 256, 40  # characters of a metadata field's name, allowed and in a message
_OWN_FIELDS = ("id", "caption", "category", "file_name")  # of an item, beside its metadata
_ITEM_ID = re.compile(r"(?!\s|\.{1,2}$)[^\x00-\x1f\x7f]+(?<!\s)(?<!/image)(?<!/similar)")

_LARGE_JSON_BYTES = 64 * 2**10
_MAX_JSON_VALUES = 50_000  # images make a body large, but not its number of values, which take time and memory
_MAX_FIELD_BYTES = 16 * 2**10
_MAX_CONTENT_TYPE = 300  # characters; the time to parse one grows with the square of its length
_UTF8 = re.compile(r"""; *charset *= *"?utf-8"? *(?=;|$)""", re.IGNORECASE)

M = TypeVar("M", bound=BaseModel)


def _check_count(given: list[Any], info: ValidationInfo) -> list[Any]:
    if info.context is not None and len(given) > info.context.max_queries:
        raise ValueError(f"at most {info.context.max_queries}, not {len(given)}")
    return given


class Strict(BaseModel):
    """A part of a request without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PageQuery(Strict):
    """A page of results, for searches without other options."""

    k: Annotated[int, Field(ge=1, description="number of results")] = DEFAULT_K
    offset: Annotated[int, Field(ge=0, description="results to skip")] = 0


class FilterQuery(Strict):
    """Conditions on items."""

    filter: Annotated[
        dict[str, Any] | None,
        BeforeValidator(lambda given: from_json(given) if isinstance(given, str) else given),
        WithJsonSchema({"type": "string", "contentMediaType": "application/json"}),
        Field(description='the same conditions as in searches, as JSON: {"category": "cat face"}'),
    ] = None


class ItemsQuery(PageQuery, FilterQuery):
    """A page of the gallery's items, in index order or sorted."""

    sort: Annotated[str, Field(max_length=1025, description='sort by a field; "-price" descends; without it last')] = ""
    group_by: GroupBy = None


class ImageForm(Query, json_schema_extra={"examples": [{"query": "but red", "k": 10}]}):
    """The fields beside the file in a search by image."""


def _kind(given: Any) -> str:
    return "constrained-text" if isinstance(given, str) else "constrained-image"


class EmbeddingsImage(Strict):
    """An image to embed."""

    image: Annotated[str, Field(min_length=1, description="the file in base64, or as a data URI")]


_Text = Annotated[str, Field(min_length=1), AfterValidator(check_text), Tag("constrained-text")]
_Image = Annotated[EmbeddingsImage, Tag("constrained-image")]


class EmbeddingsQuery(Strict, json_schema_extra={"examples": [{"input": ["crying cat", "apple"], "model": "twemoji"}]}):
    """Texts and images to embed, in the shape of OpenAI's API."""

    input: Annotated[
        list[Annotated[_Text | _Image, Discriminator(_kind)]],
        Field(min_length=1, description="texts and images; a single one needs no list"),
        FailFast(),
        BeforeValidator(_check_count),
        BeforeValidator(lambda given: given if isinstance(given, list) else [given]),
    ]
    model: Annotated[str | None, Field(description="the collection that embeds; the default one if absent")] = None
    encoding_format: Annotated[
        Literal["float", "base64"], Field(description="numbers, or base64 of little-endian float32")
    ] = "float"
    dimensions: Annotated[int | None, Field(description="must be the length of the model's vectors")] = None
    user: Annotated[str | None, Field(description="ignored")] = None


class BatchEntry(Query):
    """One search of a batch: as a text search, or with an image, or both."""

    image: Annotated[str | None, Field(min_length=1, description="an image file as base64, data URI, or URL")] = None


class BatchQuery(Strict, json_schema_extra={"examples": [{"queries": [{"query": "crying cat"}, {"query": "apple"}]}]}):
    """Several searches, answered together from one index version."""

    queries: Annotated[
        list[BatchEntry], Field(min_length=1, max_length=MAX_QUERIES), FailFast(), AfterValidator(_check_count)
    ]


def _check_item_id(given: str) -> str:
    if not _ITEM_ID.fullmatch(given):
        message = "must have no control characters, must not begin or end with a space, "
        raise ValueError(message + "must not end in /image or /similar, and must not be . or ..")
    return given


def _check_metadata(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name in _OWN_FIELDS or not name.strip():
            raise ValueError(f"must not have the field {name!r}")
        if len(name) > _MAX_NAME:
            raise ValueError(f"the name of the field {name[:_SHOWN_NAME]!r}... has more than {_MAX_NAME} characters")
    for _ in checked_parts(given):  # refuses long numbers
        pass
    if is_too_deep(given):
        raise ValueError(f"has more than {MAX_METADATA_LEVELS} nested levels; flatten it")
    values: dict[str, Any] = from_json(to_json(given, inf_nan_mode="null"))
    if len(canonical_json(values)) > MAX_METADATA_BYTES:
        raise ValueError(f"takes at most {MAX_METADATA_BYTES // 2**10} KiB as JSON")
    return values


NewItemId = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_check_item_id)]


def _require_image(given: str) -> str:
    if not given:
        raise ValueError("is required; PATCH /items/{id} changes an item's metadata without an image")
    return given


def _declare_required(schema: dict[str, Any]) -> None:
    schema["properties"]["image"].pop("default")
    schema["required"] = [*schema.get("required", ()), "image"]


Caption = Annotated[str, Field(max_length=MAX_CAPTION_CHARS)]
Category = Annotated[str, Field(max_length=1000)]
Metadata = Annotated[dict[str, Any], AfterValidator(_check_metadata)]


class PutFields(Strict, json_schema_extra=_declare_required):
    """An item without its id."""

    image: Annotated[
        str,
        Field(validate_default=True, description="the file in base64, a data URI, or a URL of an allowed host"),
        AfterValidator(_require_image),
    ] = ""
    caption: Caption = ""
    category: Category = ""
    metadata: Annotated[Metadata, Field(description="any other fields; a field keeps its type")] = {}


class PutItem(PutFields):
    """An item with its image."""

    id: NewItemId


class PutItems(Strict):
    """Items to add; they replace items with the same ids."""

    items: Annotated[list[PutItem], Field(min_length=1, max_length=MAX_PUT_ITEMS), FailFast()]


class PatchItem(Strict, json_schema_extra={"examples": [{"metadata": {"price": 49.9, "sale": None}}]}):
    """Fields to merge into an item; null removes one, and the others stay."""

    caption: Caption | None = None
    category: Category | None = None
    metadata: Annotated[Metadata, Field(description="any other fields; a field keeps its type")] = {}

    @model_validator(mode="after")
    def _require_fields(self) -> Self:
        if not self.fields:
            raise ValueError("must have metadata, a caption or a category")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """What to merge, caption and category included; None removes a field."""
        given = self.model_fields_set & {"caption", "category"}
        return self.metadata | {name: getattr(self, name) or None for name in sorted(given)}


class ChosenItems(Strict, json_schema_extra={"examples": [{"ids": ["1f63f"]}]}):
    """Items, by `ids`, of which the index may lack some, or by a `filter` as in searches."""

    ids: Annotated[list[NewItemId] | None, Field(min_length=1, max_length=MAX_CHOSEN_ITEMS), FailFast()] = None
    filter: Annotated[
        dict[str, Any] | None,
        Field(min_length=1, description="instead of ids, as in searches"),
        AfterValidator(check_filter),
    ] = None


class PatchItems(PatchItem, ChosenItems, json_schema_extra={"examples": [{"ids": ["1f63f"], "metadata": {"size": 3}}]}):
    """Fields to merge into chosen items; null removes one, and the others stay."""


def batch_bytes(settings: Settings) -> int:
    """Return the largest size of a batch in JSON, whose images in base64 are as large as one upload together."""
    return settings.max_upload_bytes * 4 // 3 + settings.max_queries * query_bytes(settings)


def items_bytes(settings: Settings) -> int:
    """Return the largest size of a change of items in JSON."""
    return settings.max_upload_bytes * 4 // 3 + MAX_PUT_ITEMS * PART_BYTES if settings.writes else query_bytes(settings)


async def read_image_query(request: Request, settings: Settings) -> tuple[ImageForm, bytes]:
    """Read the form of POST /search/image: the query and the file. The parser spools large files to disk."""
    content_type = _check_content_type(request, "multipart/form-data")
    if "charset" in _UTF8.sub("", content_type).lower():  # Starlette's parser would decode with any Python codec
        raise field_problem("Content-Type", "charset must be utf-8", status=400)
    try:
        async with request.form(max_files=1, max_fields=64, max_part_size=_MAX_FIELD_BYTES) as form:
            file = form.get("file")
            if isinstance(file, str):
                raise field_problem("file", "must be a file: send it with a file name")
            texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
            query = validated(ImageForm, parse_fields(texts), settings)
            if file is None:
                raise field_problem("file", "an image is required, as the form field `file`")
            require_size(file.size or 0, settings.max_upload_bytes, "file")
            data = await file.read()
    except HTTPException as error:
        raise field_problem("body", error.detail, status=error.status_code) from None
    except OSError:
        detail = "There is no disk space for uploads. Try again later."
        raise Problem(503, detail, headers={"Retry-After": "10"}) from None
    if not data:
        raise field_problem("file", "the file is empty")
    return query, data


def validated(model: type[M], fields: dict[str, Any] | bytes, settings: Settings) -> M:
    """Return the model of fields, or of JSON, checked against the limits of the settings. Raise Problem if invalid."""
    try:
        if isinstance(fields, bytes):
            return model.model_validate_json(fields, context=settings)
        return model.model_validate(fields, context=settings)
    except ValidationError as error:
        raise from_validation(error, _field_names(model)) from None


@cache
def _field_names(model: type[BaseModel]) -> frozenset[str]:
    """Return the names of a model's fields, and of the models inside it."""
    schema = model.model_json_schema()
    parts = (schema, *schema.get("$defs", {}).values())
    return frozenset(name for part in parts for name in part.get("properties", ()))


def _check_content_type(request: Request, expected: str, *others: str) -> str:
    content_type: str = request.headers.get("content-type", "")
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise field_problem("Content-Type", f"at most {_MAX_CONTENT_TYPE} characters", status=400)
    media_type = content_type.split(";")[0].strip().lower()
    if media_type not in (expected, *others):
        raise field_problem("Content-Type", f"must be {expected}, not {media_type or 'absent'}", status=415)
    return content_type


async def read_json(request: Request, model: type[M], *media_types: str) -> M:
    """Read a JSON body, which is checked against the limits of the settings; a large one in a thread.

    Args:
        media_types: accepted beside that of JSON.
    """
    body, settings = await request.body(), request.app.state.settings
    _check_content_type(request, "application/json", *media_types)
    if len(body) <= _LARGE_JSON_BYTES:
        return validated(model, body, settings)
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise field_problem("body", f"at most {_MAX_JSON_VALUES:,} values", status=413)
    return await asyncio.to_thread(validated, model, body, settings)
