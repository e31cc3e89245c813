"""What can be asked for, as pydantic models: the check of requests and their documentation.

One set of options serves every kind of search. Limits that are settings (characters, k, ...) are checked when a query
is read (see `queries`) and written into the OpenAPI document.
"""

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic_core import from_json

DEFAULT_K = 10
K = Annotated[int, Field(ge=1, description="how many results")]
LISTS = ("more_like", "less_like", "fields")  # of texts, which a form may also give one by one
MOST_QUERIES = 1000  # of one request, whatever the settings say
# FailFast: the first fault of a list is told, since telling all of a hostile one would take seconds.
Ids = Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=32), FailFast()]
Weight = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]

_CONTROL_TOKENS = re.compile(r"<\|?(?:start_of_text|end_of_text|startoftext|endoftext)\|?>", re.IGNORECASE)
_JOINERS = frozenset({0x200C, 0x200D, *range(0xE0020, 0xE0080)})  # inside emoji and some scripts: they carry meaning


def normalise(text: str) -> str:
    """The form in which a query is encoded and remembered: NFC, single spaces, nothing invisible, no control token."""
    if not text.isascii() or not text.isprintable():
        text = "".join(
            " " if char.isspace() else char
            for char in text
            if char.isspace() or ord(char) in _JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        )
        text = unicodedata.normalize("NFC", text)  # of what is left: something invisible may have stood between
    return " ".join(_CONTROL_TOKENS.sub(" ", text).split())


class Weights(BaseModel):
    """How much each part of a query counts; less and without are subtracted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Weight = 1.0
    image: Weight = 1.0
    more: Weight = 1.0
    less: Weight = 0.5
    without: Weight = 0.5


class Options(BaseModel):
    """What every search can be told beside the words or the picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: Annotated[int, Field(ge=1, strict=True, description="how many results")] = DEFAULT_K
    offset: Annotated[
        int, Field(ge=0, strict=True, description="results to skip: `next_offset` of the page before")
    ] = 0
    filter: Annotated[
        dict[str, Any] | None,
        Field(
            description="conditions on id, caption, category and metadata fields: a value, a list of values, or "
            '{"in", "not", "contains", "gt", "gte", "lt", "lte"}; null: it has none; {"$or": [filter, ..]}',
            examples=[{"category": ["cat face"], "base": True}],
        ),
    ] = None
    min_score: Annotated[
        Annotated[float, Field(strict=True, ge=-1, le=1)] | Literal["auto"] | None,
        Field(description='only results that score at least this; "auto": as calibrated, for searches by words alone'),
    ] = None
    more_like: Annotated[Ids, Field(description="ids of items that results should be like; they are left out")] = ()
    less_like: Annotated[Ids, Field(description="ids of items that results should not be like; left out")] = ()
    without: Annotated[
        str, Field(description="words for what results should not show, such as tears", examples=["tears"])
    ] = ""
    weights: Weights = Weights()
    fields: Annotated[
        Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=64), FailFast()],
        Field(description='metadata that each result is to have, ["*"] for all', examples=[["*"]]),
    ] = ()
    fold: Annotated[
        float | None,
        Field(
            strict=True,
            gt=0,
            le=1,
            description="show items whose cosine is at least this as one, the others under `folded`",
        ),
    ] = None
    rerank: Annotated[
        bool, Field(strict=True, description="score the first results again, with exact pair weights")
    ] = False
    explain: Annotated[bool, Field(strict=True, description="say which words and which parts of a picture count")] = (
        False
    )


class Page(BaseModel):
    """Which of the results of a search that needs no other options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: K = DEFAULT_K
    offset: Annotated[int, Field(ge=0)] = 0


class Listing(Page):
    """Which items of the gallery, in the order of the index."""

    filter: Annotated[
        dict[str, Any] | None,
        BeforeValidator(lambda given: from_json(given) if isinstance(given, str) else given),
        WithJsonSchema({"type": "string", "contentMediaType": "application/json"}),
        Field(description='conditions as searches have them, in JSON: {"category": "cat face"}'),
    ] = None


class TextQuery(Options):
    """A search by words, by items of the gallery (more_like, less_like), or both."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "crying cat", "k": 10}]})

    query: Annotated[str, Field(description="what the picture shows; may be absent where more_like is given")] = ""


class ImageForm(Options):
    """The fields beside the picture in a search by picture."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "but red", "k": 10}]})

    query: Annotated[str, Field(description="words that count as well")] = ""


class BatchQuery(BaseModel):
    """Several searches, answered together by one version of the index."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"queries": [{"query": "crying cat"}, {"query": "red apple"}]}]}
    )

    queries: Annotated[list[TextQuery], Field(min_length=1, max_length=MOST_QUERIES), FailFast()]
