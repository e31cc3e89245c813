"""One search as the engine takes it: normalised words, an image, items, and the options.

The options are pydantic models, so that a request body, a form and a Python caller are checked by the same rules.
Limits that are settings (characters, k, ...) are checked by the API; see `app.api.params`.
"""

import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from app.core.settings import DEFAULT_K
from dcar_core.model.text_cleaning import strip_control_tokens

# FailFast: report the first fault of a list; reporting every fault of a hostile one would take seconds.
Ids = Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=32), FailFast()]
Weight = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]

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
    return " ".join(strip_control_tokens(text).split())


class Weights(BaseModel):
    """How much each part of a query counts; less and without are subtracted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Weight = 1.0
    image: Weight = 1.0
    more: Weight = 1.0
    less: Weight = 0.5
    without: Weight = 0.5


class SearchOptions(BaseModel):
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


@dataclass(frozen=True, slots=True)
class Query:
    """One search: normalised words, a picture's file, an item's id, the options; something says what to look for.

    without: normalised words for what results should not show.
    """

    options: SearchOptions
    text: str = ""
    picture: bytes | None = None
    item: str | None = None
    without: str = ""
