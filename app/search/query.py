"""Queries and results.

- A query is a pydantic model: JSON bodies, forms and Python callers are checked by the same rules, and its texts are
  normalized once.
- Limits that are settings (characters, k, ...) apply where the settings are given as the context of the validation.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, overload

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationInfo, model_validator
from pydantic_core import from_json, to_json

from app.core.settings import DEFAULT_K
from dcar_core.model.text.cleaning import strip_control_tokens
from index_jobs.store.artifact import Item

# FailFast reports the first fault of a list: reporting every fault of a hostile one would take seconds.
Ids = Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=32), FailFast()]
Weight = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
ObjectFit = Literal["cover", "fill", "contain"]  # values of CSS's object-fit
Level = Literal["likely", "possible", "unlikely"]
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


_LIST_FIELDS = frozenset({"more_like", "less_like", "fields", "facets"})
_TEXT_FIELDS = frozenset({"query", "without"})
_OMITTED_IF_EMPTY = _LIST_FIELDS | {"filter", "weights", "crop"}
_MAX_FILTER_BYTES = 64 * 2**10  # as JSON; the body of a text search holds no more
_CROP_ROUNDING = 1e-6  # fractions from a page may add up to a little more than 1
_JOINERS = frozenset({0x200C, 0x200D, *range(0xE0020, 0xE0080)})  # invisible, but meaningful in emoji and some scripts


def normalize(text: str) -> str:
    """Return the form in which a text is encoded and cached: NFC, single spaces, no invisible or control tokens."""
    if not text.isascii() or not text.isprintable():
        text = "".join(
            " " if char.isspace() else char
            for char in text
            if char.isspace() or ord(char) in _JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        )
        text = unicodedata.normalize("NFC", text)  # last: a letter and its mark may only now be neighbours
    return " ".join(strip_control_tokens(text).split())


def check_text(text: str, info: ValidationInfo) -> str:
    """Return a text in its normalized form. Raise ValueError if it is too long, or has no words."""
    if info.context is not None and len(text) > info.context.max_query_chars:
        raise ValueError(f"at most {info.context.max_query_chars} characters, not {len(text)}")
    normalized = normalize(text)
    if text and not normalized:
        raise ValueError("must not be empty; leave it out instead")
    return normalized


def _check_k(k: int, info: ValidationInfo) -> int:
    if info.context is not None and k > info.context.max_k:
        raise ValueError(f"at most {info.context.max_k}, not {k}")
    return k


def _check_offset(offset: int, info: ValidationInfo) -> int:
    if info.context is not None and offset + info.data.get("k", 0) > info.context.max_window:
        raise ValueError(f"offset and k together are at most {info.context.max_window}")
    return offset


def _check_filter(filter: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
    if info.context is not None and filter and len(to_json(filter)) > _MAX_FILTER_BYTES:
        raise ValueError(f"takes at most {_MAX_FILTER_BYTES // 2**10} KiB as JSON")
    return filter


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

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width and height."""
        return self.x, self.y, self.width, self.height


class Query(BaseModel):
    """A search by text, by items of the gallery (more_like, less_like), by an image beside it, or by all of them."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"query": "crying cat", "k": 10}]}
    )

    query: Annotated[
        str, AfterValidator(check_text), Field(description="what the image shows; optional if more_like is given")
    ] = ""
    k: Annotated[int, Field(ge=1, strict=True, description="number of results"), AfterValidator(_check_k)] = DEFAULT_K
    offset: Annotated[
        int,
        Field(ge=0, strict=True, description="results to skip: `next_offset` of the previous page"),
        AfterValidator(_check_offset),
    ] = 0
    filter: Annotated[
        dict[str, Any] | None,
        Field(
            description="conditions on id, caption, category and metadata fields: a value, a list of values, or "
            '{"in", "not", "contains", "gt", "gte", "lt", "lte"}; null matches a missing value; {"$or": [filter, ..]}',
            examples=[{"category": ["cat face"], "base": True}],
        ),
        AfterValidator(_check_filter),
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
    without: Annotated[
        str,
        AfterValidator(check_text),
        Field(description="what results should not show, such as tears", examples=["tears"]),
    ] = ""
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
    level: Level
    folded: list[str] = field(default_factory=list)
    rerank_score: float | None = None
    explanation: Explanation | None = None
    text_score: float | None = None
    group: tuple[Any, int] | None = None


@dataclass(frozen=True, slots=True)
class SearchResults(Sequence[Match]):
    """The matches of one query; see `app.api.schemas.SearchResponse`."""

    version: int
    matches: list[Match]
    is_cached: bool = False
    took_ms: float = 0.0
    offset: int = 0
    next_offset: int | None = None
    min_score: float | None = None
    cutoff: float | None = None
    nothing_fits: bool = False
    fields: tuple[str, ...] = ()
    facets: dict[str, list[dict[str, Any]]] | None = None
    has_exact_facets: bool = True

    def __len__(self) -> int:
        return len(self.matches)

    @overload
    def __getitem__(self, place: int) -> Match: ...
    @overload
    def __getitem__(self, place: slice) -> list[Match]: ...
    def __getitem__(self, place: int | slice) -> Match | list[Match]:
        return self.matches[place]


@dataclass(frozen=True, slots=True)
class ItemPage:
    """One page of items; `count` is the number of all, `next_offset` is None after the last page."""

    version: int
    count: int
    items: list[Item]
    next_offset: int | None


def parse_fields(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of a query that are given as texts: `query` and `without` literally, the others as JSON.

    A list may also be given as repeated fields. Empty lists and objects count as omitted. Unknown fields stay in, so
    that validation reports a misspelt name.
    """
    fields: dict[str, Any] = {}
    for name, text in texts:
        if text == "" and name in _OMITTED_IF_EMPTY:
            continue
        value: Any = text
        if name not in _TEXT_FIELDS:
            with suppress(ValueError):
                value = from_json(text)  # rejects lone surrogates, as JSON bodies do
        if name in _LIST_FIELDS:
            fields.setdefault(name, []).extend(value if isinstance(value, list) else [text])
        else:
            fields[name] = value
    return fields
