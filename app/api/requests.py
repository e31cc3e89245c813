"""What can be asked for, as pydantic models: the check of requests and their documentation.

One set of options serves every kind of search. Limits that are settings (characters, k, ...) are checked when a query
is read (see `queries`) and written into the OpenAPI document.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic_core import from_json

from app.core.settings import DEFAULT_K, MOST_QUERIES
from app.search.query import SearchOptions

K = Annotated[int, Field(ge=1, description="how many results")]
LISTS = ("more_like", "less_like", "fields")  # of texts, which a form may also give one by one


class PageQuery(BaseModel):
    """Which of the results of a search that needs no other options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: K = DEFAULT_K
    offset: Annotated[int, Field(ge=0)] = 0


class ItemsQuery(PageQuery):
    """Which items of the gallery, in the order of the index."""

    filter: Annotated[
        dict[str, Any] | None,
        BeforeValidator(lambda given: from_json(given) if isinstance(given, str) else given),
        WithJsonSchema({"type": "string", "contentMediaType": "application/json"}),
        Field(description='conditions as searches have them, in JSON: {"category": "cat face"}'),
    ] = None


class TextQuery(SearchOptions):
    """A search by words, by items of the gallery (more_like, less_like), or both."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "crying cat", "k": 10}]})

    query: Annotated[str, Field(description="what the picture shows; may be absent where more_like is given")] = ""


class ImageForm(SearchOptions):
    """The fields beside the picture in a search by picture."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "but red", "k": 10}]})

    query: Annotated[str, Field(description="words that count as well")] = ""


class BatchQuery(BaseModel):
    """Several searches, answered together by one version of the index."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"queries": [{"query": "crying cat"}, {"query": "red apple"}]}]}
    )

    queries: Annotated[list[TextQuery], Field(min_length=1, max_length=MOST_QUERIES), FailFast()]
