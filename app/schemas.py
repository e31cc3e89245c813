"""What goes in and out, as pydantic models: the documentation of the API and the check of its requests.

Answers are built as plain dicts by the routes and not validated again; the tests check them against these models.
Limits that are settings (characters, k) are checked when a query is read, and written into the OpenAPI document.
"""

import re
import unicodedata
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_K = 10
K = Annotated[int, Field(ge=1, description="how many results")]

_CONTROL_TOKENS = re.compile(r"<\|?(?:start_of_text|end_of_text|startoftext|endoftext)\|?>", re.IGNORECASE)
_JOINERS = frozenset({0x200C, 0x200D, *range(0xE0020, 0xE0080)})  # inside emoji and some scripts: they carry meaning


def normalise(text: str) -> str:
    """The form in which a query is encoded and remembered: NFC, single spaces, nothing invisible, no control token."""
    text = unicodedata.normalize("NFC", text)
    if not text.isascii() or not text.isprintable():
        text = "".join(
            " " if char.isspace() else char
            for char in text
            if char.isspace() or ord(char) in _JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        )
    return " ".join(_CONTROL_TOKENS.sub(" ", text).split())


class TextQuery(BaseModel):
    """A search by words."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"query": "crying cat", "k": 10}]})

    query: str = Field(min_length=1, description="what the picture shows")
    k: Annotated[int, Field(ge=1, strict=True, description="how many results")] = DEFAULT_K


class ImageForm(BaseModel):
    """The fields beside the picture in a search by picture."""

    k: K = DEFAULT_K


class Result(BaseModel):
    """One result. score is the cosine between query and item, at most 1."""

    rank: int = Field(examples=[1])
    id: str = Field(examples=["1f63f.png"])
    score: float = Field(examples=[0.4213])
    caption: str = Field(examples=["crying cat"])
    category: str = Field(examples=["cat face"])
    image_url: str = Field(examples=["/items/1f63f.png/image"])


class SearchAnswer(BaseModel):
    """Results, best first, and the index version that they are from."""

    index_version: int
    took_ms: float = Field(description="from the parsed query to the results, in milliseconds")
    cached: bool = Field(description="whether the query's embedding was remembered")
    results: list[Result]


class ItemAnswer(BaseModel):
    """One item of the gallery, with everything that is known about it."""

    index_version: int
    id: str
    caption: str
    category: str
    metadata: dict[str, Any]
    image_url: str


class Health(BaseModel):
    """The process lives."""

    status: str = Field(examples=["ok"])


class Readiness(BaseModel):
    """ready: searches are answered. degraded: they are, by an older version than the published one; reason says why."""

    status: str = Field(examples=["ready", "degraded"])
    index_version: int
    count: int = Field(description="items in the index")
    reason: str | None = None


class Reloaded(BaseModel):
    """What is served after a reload."""

    index_version: int
    changed: bool


class FieldError(BaseModel):
    """A field at fault, under the caller's name for it."""

    field: str = Field(examples=["query"])
    message: str = Field(examples=["must not be empty"])


class ProblemAnswer(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field(examples=["urn:dcar:problem:invalid-field"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["query: must not be empty"])
    errors: list[FieldError] | None = None
