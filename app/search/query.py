"""Queries.

- A query is a pydantic model: JSON bodies, forms and Python callers are checked by the same rules, and its texts are
  normalized once.
- Limits that are settings (characters, k, ...) apply where the settings are given as the context of the validation.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationInfo, model_validator
from pydantic_core import from_json, to_json

from app.core.settings import DEFAULT_K
from dcar_core.model.text.cleaning import strip_control_tokens

Weight = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=1024)]
# FailFast reports the first fault of a list: reporting every fault of a hostile one would take seconds.
Ids = Annotated[tuple[Name, ...], Field(max_length=32), FailFast()]
GroupBy = Annotated[
    str | None,
    Field(
        max_length=1024,
        description="metadata field whose values are returned once each, by their best item; the default is the "
        'field that the index was built with, and "" returns every item',
    ),
]
Sort = Annotated[
    str,
    Field(
        max_length=1025,
        description='field that orders the results, "-price" descending; only items that fit the query are sorted, and '
        "items without a value are last",
    ),
]

_LIST_FIELDS = frozenset({"more_like", "less_like", "fields", "facets"})
_TEXT_FIELDS = frozenset({"query", "without", "sort"})
_OMITTED_IF_EMPTY = _LIST_FIELDS | {"filter", "weights", "crop"}
_MAX_BITS = 1000  # of a number; the time to print one grows with the square of its length
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


Text = Annotated[str, AfterValidator(check_text)]


def _check_k(k: int, info: ValidationInfo) -> int:
    if info.context is not None and k > info.context.max_k:
        raise ValueError(f"at most {info.context.max_k}, not {k}")
    return k


def _check_offset(offset: int, info: ValidationInfo) -> int:
    if info.context is not None and offset + info.data.get("k", 0) > info.context.max_window:
        raise ValueError(f"offset and k together are at most {info.context.max_window}")
    return offset


def check_filter(filter: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
    if info.context is None or not filter:
        return filter
    sizes = accumulate(len(part) if isinstance(part, str | list | dict) else 1 for part in checked_parts(filter))
    # most that are too long need not become JSON again
    if any(size > _MAX_FILTER_BYTES for size in sizes) or len(to_json(filter)) > _MAX_FILTER_BYTES:
        raise ValueError(f"takes at most {_MAX_FILTER_BYTES // 2**10} KiB as JSON")
    return filter


def checked_parts(value: Any) -> Iterator[Any]:
    """Yield a JSON value and all that it contains, names included. Raise ValueError for a number of many digits."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, int) and part.bit_length() > _MAX_BITS:
            raise ValueError("numbers have at most 300 digits")
        yield part
        if isinstance(part, list | dict):
            parts += [*part, *part.values()] if isinstance(part, dict) else part


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

    x: float = Field(strict=True, ge=0, lt=1)
    y: float = Field(strict=True, ge=0, lt=1)
    width: float = Field(strict=True, gt=0, le=1)
    height: float = Field(strict=True, gt=0, le=1)

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

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"examples": [{"query": "cat", "k": 10}]})

    query: Text = Field("", description="what the image shows; optional if more_like is given")
    k: Annotated[int, AfterValidator(_check_k)] = Field(DEFAULT_K, ge=1, strict=True, description="number of results")
    offset: Annotated[int, AfterValidator(_check_offset)] = Field(
        0, ge=0, strict=True, description="results to skip: `next_offset` of the previous page"
    )
    filter: Annotated[dict[str, Any] | None, AfterValidator(check_filter)] = Field(
        None,
        description="conditions on id, caption, category and metadata fields: a value, a list of values, or "
        '{"in", "not", "contains", "gt", "gte", "lt", "lte"}; null matches a missing value; {"$or": [filter, ..]}',
        examples=[{"category": ["cat face"], "base": True}],
    )
    min_score: Annotated[float, Field(strict=True, ge=-1, le=1)] | Literal["auto"] | None = Field(
        None, description='lowest score of a result; "auto" uses the calibrated cut-off, for text queries only'
    )
    more_like: Ids = Field((), description="ids of items that results should resemble; these items are left out")
    less_like: Ids = Field((), description="ids of items that results should not resemble; these items are left out")
    without: Text = Field("", description="what results should not show, such as tears", examples=["tears"])
    weights: Weights = Weights()
    fields: Annotated[tuple[Name, ...], FailFast()] = Field(
        (), max_length=64, description='metadata fields to return with each result, ["*"] for all', examples=[["*"]]
    )
    crop: Crop | None = Field(None, description="search with this part of the image; for image queries only")
    fold: float | None = Field(
        None,
        strict=True,
        gt=0,
        le=1,
        description="show items with at least this cosine as one result; the others are listed under `folded`",
    )
    hybrid: Annotated[bool, Field(strict=True)] | Annotated[float, Field(strict=True, ge=0, le=1)] = Field(
        False,
        description="look up the words of the query as well, in ids, captions, categories and metadata: true, or "
        "the weight of the words from 0 to 1",
    )
    group_by: GroupBy = None
    sort: Sort = ""
    facets: Annotated[tuple[Name, ...], FailFast()] = Field(
        (),
        max_length=8,
        description="fields whose values are counted over all items that fulfil `filter` and reach `min_score`",
        examples=[["category"]],
    )
    rerank: bool = Field(
        False,
        strict=True,
        description="score the first results again, by the model's second stage; 409 if it has none",
    )
    explain: bool = Field(False, strict=True, description="show which parts of images and words contribute to scores")


def parse_fields(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of a query that are given as texts: those in `_TEXT_FIELDS` literally, the others as JSON.

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
