"""Request models: they validate requests and document them.

- One set of options (`SearchOptions`) serves every kind of search.
- Limits that are settings (query length, k, ...) are checked in `bodies` and `params` and written into the OpenAPI
  document.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic_core import from_json

from app.core.settings import DEFAULT_K, MAX_QUERIES
from app.search.query import SearchOptions

LIST_FIELDS = ("more_like", "less_like", "fields")  # a form may also repeat the field


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


class BatchQuery(BaseModel):
    """Several text searches, answered together from one index version."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"queries": [{"query": "crying cat"}, {"query": "red apple"}]}]}
    )

    queries: Annotated[list[TextQuery], Field(min_length=1, max_length=MAX_QUERIES), FailFast()]
