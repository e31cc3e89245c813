"""Queries, the composition of their vectors, and results.

- The options are pydantic models: JSON bodies, forms and Python callers are checked by the same rules.
- Limits that are settings (characters, k, ...) are checked in `app.api`.
- The vector of a query is the weighted sum of its parts: see `compose`. Only the ratios of the weights matter.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from app.core.settings import DEFAULT_K
from app.search.errors import InvalidQueryError
from dcar_core.model.text.cleaning import strip_control_tokens
from dcar_core.util.arrays import Floats
from index_jobs.store.artifact import Item

# FailFast reports the first fault of a list: reporting every fault of a hostile one would take seconds.
Ids = Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=32), FailFast()]
Weight = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
ObjectFit = Literal["cover", "fill", "contain"]  # values of CSS's object-fit
WordEffects = list[tuple[str, float]]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
GroupBy = Annotated[
    str | None,
    Field(
        max_length=1024,
        description="metadata field whose values are returned once each, by their best item; the default is the "
        'field that the index was built with, and "" returns every item',
    ),
]


_MIN_LENGTH = 1e-4  # of the sum of parts, relative to the sum of their weights; below it the direction is noise
_CROP_ROUNDING = 1e-6  # fractions from a page may add up to a little more than 1
_JOINERS = frozenset({0x200C, 0x200D, *range(0xE0020, 0xE0080)})  # invisible, but meaningful in emoji and some scripts


def normalise(text: str) -> str:
    """Return the form in which a text is encoded and cached: NFC, single spaces, no invisible or control tokens."""
    if not text.isascii() or not text.isprintable():
        text = "".join(
            " " if char.isspace() else char
            for char in text
            if char.isspace() or ord(char) in _JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        )
        text = unicodedata.normalize("NFC", text)  # last: a letter and its mark may only now be neighbours
    return " ".join(strip_control_tokens(text).split())


class Weights(BaseModel):
    """Weights of the parts of a query. `less` and `without` are subtracted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Weight = 1.0
    image: Weight = 1.0
    more: Weight = 1.0
    less: Weight = 0.5
    without: Weight = 0.5


class Crop(BaseModel):
    """A part of the query image, in fractions of its width and height when it is upright."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    x: Annotated[float, Field(strict=True, ge=0, lt=1)]
    y: Annotated[float, Field(strict=True, ge=0, lt=1)]
    width: Annotated[float, Field(strict=True, gt=0, le=1)]
    height: Annotated[float, Field(strict=True, gt=0, le=1)]

    @model_validator(mode="after")
    def _check_edges(self) -> Self:
        if max(self.x + self.width, self.y + self.height) > 1 + _CROP_ROUNDING:
            raise ValueError("must lie inside the image: x + width and y + height are at most 1")
        return self

    def apply(self, image: Image.Image) -> Image.Image:
        """Return this part of an upright image, at least one pixel."""
        left, top = int(self.x * image.width), int(self.y * image.height)
        right, bottom = round((self.x + self.width) * image.width), round((self.y + self.height) * image.height)
        return image.crop((left, top, max(left + 1, right), max(top + 1, bottom)))


class SearchOptions(BaseModel):
    """Options of every kind of search."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: Annotated[int, Field(ge=1, strict=True, description="number of results")] = DEFAULT_K
    offset: Annotated[
        int, Field(ge=0, strict=True, description="results to skip: `next_offset` of the previous page")
    ] = 0
    filter: Annotated[
        dict[str, Any] | None,
        Field(
            description="conditions on id, caption, category and metadata fields: a value, a list of values, or "
            '{"in", "not", "contains", "gt", "gte", "lt", "lte"}; null matches a missing value; {"$or": [filter, ..]}',
            examples=[{"category": ["cat face"], "base": True}],
        ),
    ] = None
    min_score: Annotated[
        Annotated[float, Field(strict=True, ge=-1, le=1)] | Literal["auto"] | None,
        Field(description='lowest score of a result; "auto" uses the calibrated cut-off, for text queries alone'),
    ] = None
    more_like: Annotated[
        Ids, Field(description="ids of items that results should resemble; these items are left out")
    ] = ()
    less_like: Annotated[
        Ids, Field(description="ids of items that results should not resemble; these items are left out")
    ] = ()
    without: Annotated[str, Field(description="what results should not show, such as tears", examples=["tears"])] = ""
    weights: Weights = Weights()
    fields: Annotated[
        Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=64), FailFast()],
        Field(description='metadata fields to return with each result, ["*"] for all', examples=[["*"]]),
    ] = ()
    crop: Annotated[Crop | None, Field(description="search with this part of the image; for image queries alone")] = (
        None
    )
    fold: Annotated[
        float | None,
        Field(
            strict=True,
            gt=0,
            le=1,
            description="show items with at least this cosine as one result; the others are listed under `folded`",
        ),
    ] = None
    hybrid: Annotated[
        Annotated[bool, Field(strict=True)] | Share,
        Field(
            description="look up the words of the query as well, in ids, captions, categories and metadata: true, or "
            "the weight of the words from 0 to 1"
        ),
    ] = False
    group_by: GroupBy = None
    facets: Annotated[
        Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=8), FailFast()],
        Field(
            description="fields whose values are counted over all items that fulfil `filter` and reach `min_score`",
            examples=[["category"]],
        ),
    ] = ()
    rerank: Annotated[
        bool,
        Field(
            strict=True,
            description="score the first results again, with exact token weights; 409 if the model has none",
        ),
    ] = False
    explain: Annotated[
        bool, Field(strict=True, description="show which parts of an image, and which words, contribute to a score")
    ] = False


@dataclass(frozen=True, slots=True)
class Query:
    """One search: by normalised texts, an image file, an item (`item_id`), or the items of its options."""

    options: SearchOptions
    text: str = ""
    image: bytes | None = None
    item_id: str | None = None
    without_text: str = ""


@dataclass(frozen=True, slots=True)
class QueryPart:
    """A text, an image, or the mean of some items: its weight, negative if it is subtracted, and its vector (E,)."""

    weight: float
    vector: Floats


def compose(parts: Sequence[QueryPart]) -> Floats:
    """Return the unit vector (E,) of a query. Raise InvalidQueryError if all weights are 0, or the parts cancel out."""
    scale = max((abs(part.weight) for part in parts), default=0.0)
    if scale == 0:
        raise InvalidQueryError("weights", "at least one part of the query must have a weight above 0")
    weights = [part.weight / scale for part in parts]  # tiny weights would underflow
    total = sum(weight * part.vector for weight, part in zip(weights, parts, strict=True))
    length = math.sqrt(np.dot(total, total))
    if length < _MIN_LENGTH * sum(map(abs, weights)):
        raise InvalidQueryError("weights", "the parts of this query cancel each other out; change their weights")
    return np.asarray(total / length, np.float32)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a result has its score; see `app.api.schemas.ResultExplanation`."""

    relevance: list[list[float]]
    fit: ObjectFit
    words: WordEffects | None


@dataclass(frozen=True, slots=True)
class Match:
    """One result; see `app.api.schemas.Result`. group: the value that it stands for, and the number of its items."""

    item: Item
    score: float
    folded: list[str]
    rerank_score: float | None
    explanation: Explanation | None
    text_score: float | None
    group: tuple[Any, int] | None


@dataclass(frozen=True, slots=True)
class SearchResults:
    """The matches of one query; see `app.api.schemas.SearchResponse`."""

    version: int
    matches: list[Match]
    is_cached: bool
    took_ms: float
    offset: int
    next_offset: int | None
    min_score: float | None
    facets: dict[str, list[dict[str, Any]]] | None
    fields: tuple[str, ...] = ()
    has_exact_facets: bool = True


@dataclass(frozen=True, slots=True)
class ItemPage:
    """One page of items; `count` is the number of all, `next_offset` is None after the last page."""

    version: int
    count: int
    items: list[Item]
    next_offset: int | None
