"""Request models: they validate requests and document them.

- `app.search.query.Query` is the body of text searches, and the base of the others.
- The OpenAPI document has the limits that are settings (query length, k, ...).
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    WithJsonSchema,
)
from pydantic_core import from_json, to_json

from app.core.settings import DEFAULT_K, MAX_QUERIES
from app.search.query import GroupBy, Query
from dcar_core.util.files import canonical_json
from index_jobs.checks import MAX_CAPTION_CHARS, MAX_METADATA_BYTES

MAX_PUT_ITEMS = 256
MAX_DELETED_ITEMS = 10_000
_OWN_FIELDS = ("id", "caption", "category", "file_name")  # of an item, beside its metadata
_ITEM_ID = re.compile(r"(?!\s|\.{1,2}$)[^\x00-\x1f\x7f]+(?<!\s)(?<!/image)(?<!/similar)")


class PageQuery(BaseModel):
    """A page of results, for searches without other options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: Annotated[int, Field(ge=1, description="number of results")] = DEFAULT_K
    offset: Annotated[int, Field(ge=0, description="results to skip")] = 0


class FilterQuery(BaseModel):
    """Conditions on items."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    filter: Annotated[
        dict[str, Any] | None,
        BeforeValidator(lambda given: from_json(given) if isinstance(given, str) else given),
        WithJsonSchema({"type": "string", "contentMediaType": "application/json"}),
        Field(description='the same conditions as in searches, as JSON: {"category": "cat face"}'),
    ] = None


class ItemsQuery(PageQuery, FilterQuery):
    """A page of the gallery's items, in index order."""

    group_by: GroupBy = None


class ImageForm(Query):
    """The fields beside the file in a search by image."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "but red", "k": 10}]})


class EmbeddingsImage(BaseModel):
    """An image to embed."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[str, Field(min_length=1, description="the file in base64, or as a data URI")]


class EmbeddingsQuery(BaseModel):
    """Texts and images to embed, in the shape of OpenAI's API."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"input": ["crying cat", "red apple"], "model": "twemoji"}]}
    )

    input: Annotated[
        list[
            Annotated[
                Annotated[str, Tag("constrained-text")] | Annotated[EmbeddingsImage, Tag("constrained-image")],
                Discriminator(lambda given: f"constrained-{'text' if isinstance(given, str) else 'image'}"),
            ]
        ],
        Field(min_length=1, description="texts and images; a single one needs no list"),
        FailFast(),
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

    image: Annotated[
        str | None, Field(min_length=1, description="an image file in base64, as a data URI, or its URL")
    ] = None


class BatchQuery(BaseModel):
    """Several searches, answered together from one index version."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"queries": [{"query": "crying cat"}, {"query": "red apple"}]}]}
    )

    queries: Annotated[list[BatchEntry], Field(min_length=1, max_length=MAX_QUERIES), FailFast()]


def _check_item_id(given: str) -> str:
    if not _ITEM_ID.fullmatch(given):
        raise ValueError(
            "must have no control characters, must not begin or end with a space, must not end in /image or /similar, "
            "and must not be . or .."
        )
    return given


def _check_metadata(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name in _OWN_FIELDS or not name.strip():
            raise ValueError(f"must not have the field {name!r}")
    values: dict[str, Any] = from_json(to_json(given, inf_nan_mode="null"))
    if len(canonical_json(values)) > MAX_METADATA_BYTES:
        raise ValueError(f"takes at most {MAX_METADATA_BYTES // 2**10} KiB as JSON")
    return values


NewItemId = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_check_item_id)]


class PutItem(BaseModel):
    """An item with its image."""

    model_config = ConfigDict(extra="forbid")

    id: NewItemId
    image: Annotated[
        str,
        Field(min_length=1, description="the file in base64, a data URI, or a URL of an allowed host"),
    ]
    caption: Annotated[str, Field(max_length=MAX_CAPTION_CHARS)] = ""
    category: Annotated[str, Field(max_length=1000)] = ""
    metadata: Annotated[
        dict[str, Any], AfterValidator(_check_metadata), Field(description="any other fields; a field keeps its type")
    ] = {}


class PutItems(BaseModel):
    """Items to add; they replace items with the same ids."""

    model_config = ConfigDict(extra="forbid")

    items: Annotated[list[PutItem], Field(min_length=1, max_length=MAX_PUT_ITEMS), FailFast()]


class DeleteItems(BaseModel):
    """Ids of items to remove; ids that the index lacks are ignored."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"ids": ["1f63f"]}]})

    ids: Annotated[list[NewItemId], Field(min_length=1, max_length=MAX_DELETED_ITEMS), FailFast()]
