"""Queries, and plans: a query that is checked against a version of an index.

- A query is a pydantic model: JSON bodies, forms and Python callers are checked by the
  same rules, and its texts are normalized once. Limits that are settings apply where
  these are given as the context of the validation.
- A plan has all that the search needs. Its filter has become rows, and its ids have
  become row numbers.
- The vector of a query is the weighted sum of its parts; only the ratios of the weights
  matter.
"""

import math
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import from_json, to_json

from app.core.settings import DEFAULT_K, Settings
from app.search.concepts import FIELD
from app.search.errors import (
    InvalidQueryError,
    ItemNotFoundError,
    UnsupportedQueryError,
)
from app.search.served_version import ServedVersion, filter_rows, row_vectors
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import list_fields
from index_jobs.index.lexical import DEFAULT_WEIGHT
from index_jobs.row_filter import RowFilter

Weight = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=1024)]
# FailFast reports the first fault of a list: reporting every fault of a hostile one
# would take seconds.
Ids = Annotated[tuple[Name, ...], Field(max_length=32), FailFast()]
GroupBy = Annotated[
    str | None,
    Field(
        max_length=1024,
        description=(
            "metadata field whose values are returned once each, by their best item;"
            ' the default is the field that the index was built with, and "" returns'
            " every item"
        ),
    ),
]
Sort = Annotated[
    str,
    Field(
        max_length=1025,
        description=(
            'field that orders the results, "-price" descending; only items that fit'
            " the query are sorted, and items without a value are last"
        ),
    ),
]

_LIST_FIELDS = frozenset({"more_like", "less_like", "fields", "facets"})
_TEXT_FIELDS = frozenset({"query", "without", "sort"})
_OMITTED_IF_EMPTY = _LIST_FIELDS | {"filter", "weights", "crop"}
# of a number; the time to print one grows with the square of its length
_MAX_BITS = 1000
_MAX_FILTER_BYTES = 64 * 2**10  # as JSON; the body of a text search holds no more
_CROP_ROUNDING = 1e-6  # fractions from a page may add up to a little more than 1
# of the items on a page; a page of the largest items takes 14 MiB
MAX_TEXT_BYTES = 16 * 2**20
# of the sum of parts, relative to the sum of their weights; below it the direction is
# noise
_MIN_LENGTH = 1e-4
_NAME_WEIGHT = 0.7  # of a taught name beside a text of weight 1 (benchmarks/teach.py)
# share of their weight that words have beside a name, which they say nothing of (the
# same)
_NAMED_WORDS = 0.4
_MAX_CACHED_DEPTH = 50  # results up to the end of a page that is cached
# invisible, but meaningful in emoji and some scripts
_JOINERS = frozenset({0x200C, 0x200D, *range(0xE0020, 0xE0080)})


def normalize_text(text: str) -> str:
    """Return the form in which a text is encoded and cached: NFC, single spaces, no
    invisible characters.
    """
    if not text.isascii() or not text.isprintable():
        text = "".join(
            " " if char.isspace() else char
            for char in text
            if char.isspace()
            or ord(char) in _JOINERS
            or unicodedata.category(char) not in ("Cc", "Cf", "Cs")
        )
        # last: a letter and its mark may only now be neighbours
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def check_text(text: str, info: ValidationInfo) -> str:
    """Return a text in its normalized form. Raise ValueError if it is too long, or has
    no words.
    """
    if info.context is not None and len(text) > info.context.max_query_chars:
        raise ValueError(
            f"at most {info.context.max_query_chars} characters, not {len(text)}"
        )
    normalized = normalize_text(text)
    if text and not normalized:
        raise ValueError("must not be empty; leave it out instead")
    return normalized


Text = Annotated[str, AfterValidator(check_text)]


def _check_k(k: int, info: ValidationInfo) -> int:
    if info.context is not None and k > info.context.max_k:
        raise ValueError(f"at most {info.context.max_k}, not {k}")
    return k


def _check_offset(offset: int, info: ValidationInfo) -> int:
    if (
        info.context is not None
        and offset + info.data.get("k", 0) > info.context.max_window
    ):
        raise ValueError(f"offset and k together are at most {info.context.max_window}")
    return offset


def check_filter(
    filter: dict[str, Any] | None, info: ValidationInfo
) -> dict[str, Any] | None:
    if info.context is None or not filter:
        return filter
    if (
        all(True for _ in checked_parts(filter))
        and len(to_json(filter)) > _MAX_FILTER_BYTES
    ):
        raise ValueError(f"takes at most {_MAX_FILTER_BYTES // 2**10} KiB as JSON")
    return filter


def checked_parts(value: Any) -> Iterator[Any]:
    """Yield a JSON value and all that it contains, names included. Raise ValueError for
    a number of many digits.
    """
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
    """A part of the query image, in fractions of its width and height when it is
    upright.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    x: float = Field(strict=True, ge=0, lt=1)
    y: float = Field(strict=True, ge=0, lt=1)
    width: float = Field(strict=True, gt=0, le=1)
    height: float = Field(strict=True, gt=0, le=1)

    @model_validator(mode="after")
    def _check_edges(self) -> Self:
        if max(self.x + self.width, self.y + self.height) > 1 + _CROP_ROUNDING:
            raise ValueError(
                "must lie inside the image: x + width and y + height are at most 1"
            )
        return self

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width and height."""
        return self.x, self.y, self.width, self.height


class Query(BaseModel):
    """A search by text, by items of the gallery (more_like, less_like), by an image
    beside it, or by all of them.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"query": "cat", "k": 10}]},
    )

    query: Text = Field(
        "",
        description=(
            "what the image shows, or @NAME for a taught one; optional with more_like"
        ),
    )
    k: Annotated[int, AfterValidator(_check_k)] = Field(
        DEFAULT_K,
        ge=1,
        strict=True,
        description="number of results",
    )
    offset: Annotated[int, AfterValidator(_check_offset)] = Field(
        0,
        ge=0,
        strict=True,
        description="results to skip: `next_offset` of the previous page",
    )
    filter: Annotated[dict[str, Any] | None, AfterValidator(check_filter)] = Field(
        None,
        description=(
            "conditions on id, caption, category and metadata fields: a value, a list"
            ' of values, or {"in", "not", "contains", "gt", "gte", "lt", "lte"}; null'
            ' matches a missing value; {"$or": [filter, ..]}'
        ),
        examples=[{"category": ["cat face"], "base": True}],
    )
    min_score: (
        Annotated[float, Field(strict=True, ge=-1, le=1)] | Literal["auto"] | None
    ) = Field(
        None,
        description=(
            'lowest score of a result; "auto" uses the calibrated cut-off, for a text'
            " or an image alone"
        ),
    )
    more_like: Ids = Field(
        (),
        description=(
            "ids of items that results should resemble; these items are left out"
        ),
    )
    less_like: Ids = Field(
        (),
        description=(
            "ids of items that results should not resemble; these items are left out"
        ),
    )
    without: Text = Field(
        "",
        description="what results should not show, such as tears",
        examples=["tears"],
    )
    weights: Weights = Weights()
    fields: Annotated[tuple[Name, ...], FailFast()] = Field(
        (),
        max_length=64,
        description='metadata fields to return with each result, ["*"] for all',
        examples=[["*"]],
    )
    crop: Crop | None = Field(
        None, description="search with this part of the image; for image queries only"
    )
    fold: float | None = Field(
        None,
        strict=True,
        gt=0,
        le=1,
        description=(
            "show items with at least this cosine as one result; the others are listed"
            " under `folded`"
        ),
    )
    hybrid: (
        Annotated[bool, Field(strict=True)]
        | Annotated[float, Field(strict=True, ge=0, le=1)]
    ) = Field(
        False,
        description=(
            "look up the words of the query as well, in ids, captions, categories and"
            " metadata: true, or the weight of the words from 0 to 1"
        ),
    )
    group_by: GroupBy = None
    sort: Sort = ""
    facets: Annotated[tuple[Name, ...], FailFast()] = Field(
        (),
        max_length=8,
        description=(
            "fields whose values are counted over all items that fulfil `filter` and"
            " reach `min_score`"
        ),
        examples=[["category"]],
    )
    rerank: bool = Field(
        False,
        strict=True,
        description=(
            "score the first results again, by the model's second stage; 409 if it has"
            " none"
        ),
    )
    explain: bool = Field(
        False,
        strict=True,
        description="show which parts of images and words contribute to scores",
    )


def parse_fields(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of a query that are given as texts: those in `_TEXT_FIELDS`
    literally, the others as JSON.

    A list may also be given as repeated fields. Empty lists and objects count as
    omitted. Unknown fields stay in, so that validation reports a misspelt name.
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
            fields.setdefault(name, []).extend(
                value if isinstance(value, list) else [text]
            )
        else:
            fields[name] = value
    return fields


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search for, checked against a version of an index."""

    # normalized, with their weights; negative ones are subtracted
    texts: Sequence[tuple[float, str]] = ()
    image_weight: float = 0.0  # of the image that belongs to the query
    # rows of items whose mean vector is a part, with their weights
    examples: Sequence[tuple[float, list[int]]] = ()
    # of taught names (E,), with their weights
    directions: Sequence[tuple[float, Floats]] = ()
    text: str = ""  # of the query, without names
    words_weight: float = 0.0  # 0 if the words of the text are not looked up
    allowed: RowFilter | None = None  # rows that fulfil the filter; None for all
    excluded: tuple[int, ...] = ()  # rows that are left out
    # lowest cosine, compared with scores as responses round them
    min_score: float | None = None
    group_by: str = ""  # field whose values are returned once each; "" for none
    sort: str = ""
    fold: float | None = None
    facets: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    offset: int = 0  # position of the page's first result
    end: int = 10  # position after its last one
    next_offset: int | None = None  # None if no further page may be requested
    rerank_depth: int = 0  # number of first results to score again
    explained: int = 0  # number of results on the page to explain
    # calibrated for a text or an image alone; empty: unknown
    cutoff: Mapping[str, Any] = field(default_factory=dict)
    items_path: str = "/items"  # URL path of the items
    max_bytes: int = MAX_TEXT_BYTES  # of the texts of the page's items

    @property
    def depth(self) -> int:
        """Number of results to rank: one more than the page needs shows whether there
        is a next one.
        """
        return max(self.end + 1, self.rerank_depth)

    def page_key(self, vector: Floats) -> Hashable:
        """Return the key of the page in `ServedVersion.pages`; None for one that is not
        cached.
        """
        special = (
            self.allowed,
            self.group_by,
            self.sort,
            self.fold,
            self.facets,
            self.rerank_depth,
            self.explained,
        )
        if any(special) or FIELD in self.fields or self.end > _MAX_CACHED_DEPTH:
            return None
        page = (
            self.offset,
            self.end,
            self.fields,
            self.items_path,
            self.cutoff.get("min_score"),
        )
        return (
            vector.tobytes(),
            self.text,
            self.words_weight,
            self.excluded,
            self.min_score,
            page,
        )


def make_plan(
    served: ServedVersion,
    query: Query,
    settings: Settings,
    *,
    has_image: bool = False,
    items_path: str = "/items",
    max_bytes: int = MAX_TEXT_BYTES,
) -> Plan:
    """Check a query against a version of an index. A collection without items has any
    field, but no item.

    Raises:
        SearchError: a field does not fit the index, or the rest of the query.
    """
    if not (query.query or query.more_like or has_image):
        for field in ("less_like", "without"):
            if getattr(query, field):
                raise InvalidQueryError(
                    field, "needs a query or more_like to subtract from"
                )
        raise InvalidQueryError("query", "must not be empty")
    text, taught = (
        served.concepts.split(query.query, "query")
        if "@" in query.query
        else (query.query, [])
    )
    without, untaught = (
        served.concepts.split(query.without, "without")
        if "@" in query.without
        else (query.without, [])
    )
    if query.rerank and not text:
        raise InvalidQueryError(
            "rerank", "needs a text query, with which it scores the images"
        )
    if query.crop is not None and not has_image:
        raise InvalidQueryError("crop", "needs an image; leave it out")
    more_rows = [row_of(served, item_id, "more_like") for item_id in query.more_like]
    less_rows = [row_of(served, item_id, "less_like") for item_id in query.less_like]
    weights = query.weights
    end = query.offset + query.k
    texts = ((weights.text, text), (-weights.without, without))
    plan = Plan(
        texts=[(weight, words) for weight, words in texts if words],
        image_weight=weights.image,
        min_score=None if query.min_score == "auto" else query.min_score,
        sort=query.sort,
        facets=query.facets,
        offset=query.offset,
        end=end,
        items_path=items_path,
        max_bytes=max_bytes,
    )
    if not served.index.rows:
        return plan
    known = served.index.fields if query.fields else {}
    for name in query.fields:
        if name not in known and name != "*":
            raise InvalidQueryError(
                "fields", f"no item has {name[:80]!r}; available: {list_fields(known)}"
            )
    manifest = served.index.manifest
    words_weight = DEFAULT_WEIGHT if query.hybrid is True else float(query.hybrid)
    words_weight *= (_NAMED_WORDS if text else 0) if taught else 1
    if words_weight and not text:
        raise InvalidQueryError("hybrid", "needs a text query, whose words it looks up")
    if query.rerank and (words_weight or query.sort):
        field = "hybrid" if words_weight else "sort"
        raise InvalidQueryError(
            field,
            "cannot be combined with rerank, which orders results by scores of its own",
        )
    if query.fold is not None and query.group_by:
        raise InvalidQueryError("group_by", "cannot be combined with fold")
    if query.rerank and not served.encoder.state.reranks:
        reason = (
            "This model cannot re-rank: it has no second stage, or validation turned it"
            " off."
        )
        remedy = (
            "Leave `rerank` out, or train a model with `dcar train --method"
            " query-prompts`."
        )
        raise UnsupportedQueryError(f"{reason} {remedy}", field="rerank")
    is_alone = bool(text) + len(taught) + has_image == 1 and not (
        query.without or more_rows or less_rows
    )
    if is_alone:
        cutoff = manifest.image_cutoff if has_image else manifest.cutoff
    else:
        cutoff = {}
    if is_alone and taught:
        cutoff = dict.fromkeys(("min_score", "strong_score"), taught[0].cutoff)
    if query.sort:
        require_sortable(served, query.sort)
    needs_cutoff = query.min_score == "auto" or (
        query.sort and query.min_score is None and not words_weight
    )
    if needs_cutoff and not cutoff:
        field, remedy = (
            ("min_score", "") if query.min_score == "auto" else ("sort", ", or hybrid")
        )
        if not is_alone:
            raise InvalidQueryError(
                field,
                "a cut-off is known for a text or an image alone; give"
                f" min_score{remedy}",
            )
        reason = "has too few images" if has_image else "was built without --validation"
        message = f"This index {reason} and has no calibrated cut-off; "
        raise UnsupportedQueryError(
            f"{message}give min_score as a number{remedy}.", field=field
        )
    names = (_NAME_WEIGHT, taught), (-weights.without, untaught)
    return replace(
        plan,
        examples=[
            (weight, rows)
            for weight, rows in ((weights.more, more_rows), (-weights.less, less_rows))
            if rows
        ],
        directions=[
            (weight, name.direction) for weight, part in names for name in part
        ],
        text=text,
        words_weight=words_weight,
        allowed=filter_rows(served, query.filter) if query.filter else None,
        excluded=tuple(sorted({*more_rows, *less_rows})),
        min_score=cutoff["min_score"] if query.min_score == "auto" else query.min_score,
        group_by=(
            manifest.spec.group_field
            if query.group_by is None and query.fold is None
            else query.group_by or ""
        ),
        fold=query.fold,
        fields=query.fields,
        next_offset=end if end + query.k <= settings.max_window else None,
        rerank_depth=settings.rerank_depth if query.rerank else 0,
        explained=settings.explain_results if query.explain else 0,
        cutoff=cutoff,
    )


def require_sortable(served: ServedVersion, sort: str) -> None:
    """Raise InvalidQueryError unless items have the field of a `sort`, with one value
    each.
    """
    name = sort.removeprefix("-")
    fields = served.index.fields
    if name not in fields:
        raise InvalidQueryError(
            "sort", f"no item has {name[:80]!r}; available: {list_fields(fields)}"
        )
    if fields[name].startswith("list"):
        raise InvalidQueryError(
            "sort", f"{name!r} has several values per item; name a field with one"
        )


def row_of(served: ServedVersion, item_id: str, field: str = "id") -> int:
    """Return the row of an item, which `field` of the query names. Raise
    ItemNotFoundError if no item has this id.
    """
    row = served.index.row_of(item_id)
    if row is None:
        raise ItemNotFoundError(item_id, field)
    return row


def query_vector(
    served: ServedVersion,
    plan: Plan,
    vectors: Sequence[Floats],
) -> Floats:
    """Return the unit vector (E,) of a query.

    Args:
        vectors: (E,), of the plan's texts, and then of the image that belongs to the
            query.

    Raises:
        InvalidQueryError: all weights are 0, or the parts cancel out.
    """
    weights = [*(weight for weight, _ in plan.texts), plan.image_weight]
    if len(vectors) == 1 and weights[0] and not (plan.examples or plan.directions):
        return vectors[0]
    parts = [*zip(weights, vectors, strict=False), *plan.directions]
    return compose(
        [
            *parts,
            *(
                (weight, row_vectors(served.index, rows).mean(0))
                for weight, rows in plan.examples
            ),
        ]
    )


def compose(parts: Sequence[tuple[float, Floats]]) -> Floats:
    """Return the sum of vectors (E,) by their weights, of unit length. Weights of what
    is subtracted are negative.
    """
    scale = max((abs(weight) for weight, _ in parts), default=0.0)
    if scale == 0:
        raise InvalidQueryError(
            "weights", "at least one part of the query must have a weight above 0"
        )
    weights = [weight / scale for weight, _ in parts]  # tiny weights would underflow
    total = sum(
        weight * vector for weight, (_, vector) in zip(weights, parts, strict=True)
    )
    length = math.sqrt(np.dot(total, total))
    if length < _MIN_LENGTH * sum(map(abs, weights)):
        raise InvalidQueryError(
            "weights",
            "the parts of this query cancel each other out; change their weights",
        )
    return np.asarray(total / length, np.float32)
