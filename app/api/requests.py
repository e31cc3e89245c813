"""Request models: they validate requests and document them.

- One set of options (`SearchOptions`) serves every kind of search.
- Limits that are settings (query length, k, ...) are checked in `bodies` and `params` and written into the OpenAPI
  document.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, FailFast, Field, Tag, WithJsonSchema
from pydantic_core import from_json

from app.core.settings import DEFAULT_K, MAX_QUERIES
from app.search.query import SearchOptions

LIST_FIELDS = ("more_like", "less_like", "fields", "facets")  # a form may also repeat the field


class PageQuery(BaseModel):
    """A page of results, for searches without other options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: Annotated[int, Field(ge=1, description="number of results")] = DEFAULT_K
    offset: Annotated[int, Field(ge=0, description="results to skip")] = 0


class ItemsQuery(PageQuery):
    """A page of the gallery's items, in index order."""

    filter: Annotated[
        dict[str, Any] | None,
        BeforeValidator(lambda given: from_json(given) if isinstance(given, str) else given),
        WithJsonSchema({"type": "string", "contentMediaType": "application/json"}),
        Field(description='the same conditions as in searches, as JSON: {"category": "cat face"}'),
    ] = None


class TextQuery(SearchOptions):
    """A search by text, by items of the gallery (more_like, less_like), or both."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "crying cat", "k": 10}]})

    query: Annotated[str, Field(description="what the image shows; optional if more_like is given")] = ""


class ImageForm(SearchOptions):
    """The fields beside the file in a search by image."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "but red", "k": 10}]})

    query: Annotated[str, Field(description="text to combine with the image")] = ""


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


class BatchEntry(TextQuery):
    """One search of a batch: as a text search, or with an image, or both."""

    image: Annotated[str | None, Field(min_length=1, description="an image file in base64, or as a data URI")] = None


class BatchQuery(BaseModel):
    """Several searches, answered together from one index version."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"queries": [{"query": "crying cat"}, {"query": "red apple"}]}]}
    )

    queries: Annotated[list[BatchEntry], Field(min_length=1, max_length=MAX_QUERIES), FailFast()]
