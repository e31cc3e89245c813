"""Plans: a query is checked against a version of an index, and its vector is composed.

- A plan has all that the search needs. Its filter has become rows, and its ids have become row numbers.
- The vector of a query is the weighted sum of its parts; only the ratios of the weights matter.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.core.settings import Settings
from app.search.errors import InvalidQueryError, ItemNotFoundError, UnsupportedQueryError
from app.search.query import Crop, Query
from app.search.rows import filter_rows, mask_key, row_vectors
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import list_fields
from index_jobs.row_filter import RowFilter

MAX_TEXT_BYTES = 16 * 2**20  # of the items on a page; a page of the largest items takes 14 MiB
_MIN_LENGTH = 1e-4  # of the sum of parts, relative to the sum of their weights; below it the direction is noise
_MAX_CACHED_DEPTH = 50  # results up to the end of a page that is cached


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search for, checked against a version of an index.

    Attributes:
        texts: normalized texts that are encoded, with their weights; those that are subtracted have negative ones.
        image_weight, crop: of the image that belongs to the query.
        examples: rows of items whose mean vector is a part of the query, with their weights.
        text: of the query. words_weight: weight of its words, 0 if they are not looked up.
        allowed: rows that fulfil the filter; None for all. filter_key: names the filter, "" for none.
        excluded: rows that are left out.
        min_score: lowest cosine, compared with scores as responses round them.
        group_by: field whose values are returned once each; "" for none.
        sort, fold, facets, fields: as of the query.
        offset, end: places of the page's first result, and of the one after its last. next_offset: `end`, or None if
            no further page may be requested.
        rerank_depth, explained: number of first results to score again, and of those on the page to explain.
        is_judged: True if the calibrated cut-off applies: to queries by text alone.
        items_path: URL path of the items. max_bytes: of the texts of the page's items.
    """

    texts: Sequence[tuple[float, str]] = ()
    image_weight: float = 0.0
    crop: Crop | None = None
    examples: Sequence[tuple[float, list[int]]] = ()
    text: str = ""
    words_weight: float = 0.0
    allowed: RowFilter | None = None
    filter_key: str = ""
    excluded: tuple[int, ...] = ()
    min_score: float | None = None
    group_by: str = ""
    sort: str = ""
    fold: float | None = None
    facets: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    offset: int = 0
    end: int = 10
    next_offset: int | None = None
    rerank_depth: int = 0
    explained: int = 0
    is_judged: bool = False
    items_path: str = "/items"
    max_bytes: int = MAX_TEXT_BYTES

    @property
    def depth(self) -> int:
        """Number of results to rank: one more than the page needs shows whether there is a next one."""
        return max(self.end + 1, self.rerank_depth)

    def page_key(self, vector: Floats) -> Hashable:
        """Return the key of the page in `Snapshot.pages`; None for one that is not cached."""
        special = self.filter_key, self.group_by, self.sort, self.rerank_depth, self.explained
        if any(special) or self.fold is not None or self.end > _MAX_CACHED_DEPTH:
            return None
        page = self.offset, self.end, self.fields, self.items_path
        return vector.tobytes(), self.text, self.words_weight, self.excluded, self.min_score, self.is_judged, page


def make_plan(
    snapshot: Snapshot,
    query: Query,
    settings: Settings,
    *,
    has_image: bool = False,
    items_path: str = "/items",
    max_bytes: int = MAX_TEXT_BYTES,
) -> Plan:
    """Check a query against a snapshot. A collection without items has any field, but no item.

    Args:
        has_image: an image belongs to the query.
        items_path: URL path of the items.
        max_bytes: of the texts of the page's items.

    Raises:
        SearchError: a field does not fit the index, or the rest of the query.
    """
    _check_parts(query, has_image=has_image)
    more_rows = [row_of(snapshot, each, "more_like") for each in query.more_like]
    less_rows = [row_of(snapshot, each, "less_like") for each in query.less_like]
    weights, end = query.weights, query.offset + query.k
    texts = ((weights.text, query.query), (-weights.without, query.without))
    plan = Plan(
        texts=[(weight, text) for weight, text in texts if text],
        image_weight=weights.image,
        crop=query.crop,
        offset=query.offset,
        end=end,
        facets=query.facets,
        items_path=items_path,
        max_bytes=max_bytes,
    )
    if not snapshot.artifact.rows:
        return replace(plan, sort=query.sort, min_score=None if query.min_score == "auto" else query.min_score)
    known = snapshot.artifact.fields if query.fields else {}
    for name in query.fields:
        if name not in known and name != "*":
            raise InvalidQueryError("fields", f"no item has {name[:80]!r}; available: {list_fields(known)}")
    manifest, is_judged = snapshot.artifact.manifest, not (has_image or query.without or more_rows or less_rows)
    words_weight = manifest.words_weight if query.hybrid is True else float(query.hybrid)
    if words_weight and not query.query:
        raise InvalidQueryError("hybrid", "needs a text query, whose words it looks up")
    if words_weight and query.rerank:
        raise InvalidQueryError("hybrid", "cannot be combined with rerank, which orders results without the words")
    if query.fold is not None and query.group_by:
        raise InvalidQueryError("group_by", "cannot be combined with fold")
    plan = replace(
        plan,
        examples=[(weight, rows) for weight, rows in ((weights.more, more_rows), (-weights.less, less_rows)) if rows],
        text=query.query,
        words_weight=words_weight,
        excluded=tuple(sorted({*more_rows, *less_rows})),
        min_score=_min_score(snapshot, query, is_judged=is_judged),
        group_by=manifest.spec.group_field if query.group_by is None and query.fold is None else query.group_by or "",
        sort=query.sort,
        fold=query.fold,
        fields=query.fields,
        next_offset=end if end + query.k <= settings.max_window else None,
        rerank_depth=settings.rerank_depth if query.rerank else 0,
        explained=settings.explain_results if query.explain else 0,
        is_judged=is_judged,
    )
    if query.sort:
        _check_sort(snapshot, query, plan)
    if query.rerank and not snapshot.encoder.state.reranks:
        reason = "This model cannot re-rank: it has no second stage, or validation turned it off."
        remedy = "Leave `rerank` out, or train a model with `dcar train --method query-prompts`."
        raise UnsupportedQueryError(f"{reason} {remedy}", field="rerank")
    if query.filter:
        key = mask_key(query.filter)
        return replace(plan, allowed=filter_rows(snapshot, query.filter, key), filter_key=key)
    return plan


def _check_parts(query: Query, *, has_image: bool) -> None:
    """Raise InvalidQueryError unless a query has something to search for."""
    if not (query.query or query.more_like or has_image):
        subtracted = "less_like" if query.less_like else "without" if query.without else None
        if subtracted:
            raise InvalidQueryError(subtracted, "needs a query or more_like to subtract from")
        raise InvalidQueryError("query", "must not be empty")
    if query.rerank and not query.query:
        raise InvalidQueryError("rerank", "needs a text query, with which it scores the images")
    if query.crop is not None and not has_image:
        raise InvalidQueryError("crop", "needs an image; leave it out")


def _min_score(snapshot: Snapshot, query: Query, *, is_judged: bool) -> float | None:
    if query.min_score != "auto":
        return query.min_score
    if not is_judged:
        raise InvalidQueryError("min_score", '"auto" is calibrated only for text queries; give a number')
    if snapshot.min_score is None:
        message = "This index was built without --validation and has no calibrated cut-off; give min_score as a number."
        raise UnsupportedQueryError(message, field="min_score")
    return snapshot.min_score


def _check_sort(snapshot: Snapshot, query: Query, plan: Plan) -> None:
    """Raise SearchError unless a query can be sorted: by a known field, with a way to tell what fits."""
    if query.rerank:
        raise InvalidQueryError("sort", "cannot be combined with rerank, which orders results by their scores")
    require_sortable(snapshot, query.sort)
    if plan.min_score is not None or plan.words_weight or (plan.is_judged and snapshot.min_score is not None):
        return
    remedy = "only items that fit are sorted; give min_score, or hybrid to take the items with the words of the query"
    if not plan.is_judged:
        raise InvalidQueryError("sort", f"no cut-off is known for queries other than by text, and {remedy}")
    message = f"This index was built without --validation and has no calibrated cut-off, and {remedy}."
    raise UnsupportedQueryError(message, field="sort")


def require_sortable(snapshot: Snapshot, sort: str) -> None:
    """Raise InvalidQueryError unless items have the field of a `sort`, with one value each."""
    name, fields = sort.removeprefix("-"), snapshot.artifact.fields
    if name not in fields:
        raise InvalidQueryError("sort", f"no item has {name[:80]!r}; available: {list_fields(fields)}")
    if fields[name].startswith("list"):
        raise InvalidQueryError("sort", f"{name!r} has several values per item; name a field with one")


def row_of(snapshot: Snapshot, item_id: str, field: str = "id") -> int:
    """Return the row of an item, which `field` of the query names. Raise ItemNotFoundError if no item has this id."""
    row = snapshot.artifact.row_of(item_id)
    if row is None:
        raise ItemNotFoundError(item_id, field)
    return row


def query_vector(snapshot: Snapshot, plan: Plan, texts: Sequence[Floats], image: Floats | None = None) -> Floats:
    """Return the unit vector (E,) of a query.

    Args:
        texts: vectors (E,) of the plan's texts. image: of the image that belongs to the query.

    Raises:
        InvalidQueryError: all weights are 0, or the parts cancel out.
    """
    parts = [(weight, vector) for (weight, _), vector in zip(plan.texts, texts, strict=True)]
    if plan.is_judged and plan.texts[0][0]:  # a text alone
        return texts[0]
    if image is not None:
        parts.append((plan.image_weight, image))
    parts += [(weight, row_vectors(snapshot.artifact, rows).mean(0)) for weight, rows in plan.examples]
    return compose(parts)


def compose(parts: Sequence[tuple[float, Floats]]) -> Floats:
    """Return the sum of vectors (E,) by their weights, of unit length. Weights of what is subtracted are negative."""
    scale = max((abs(weight) for weight, _ in parts), default=0.0)
    if scale == 0:
        raise InvalidQueryError("weights", "at least one part of the query must have a weight above 0")
    weights = [weight / scale for weight, _ in parts]  # tiny weights would underflow
    total = sum(weight * vector for weight, (_, vector) in zip(weights, parts, strict=True))
    length = math.sqrt(np.dot(total, total))
    if length < _MIN_LENGTH * sum(map(abs, weights)):
        raise InvalidQueryError("weights", "the parts of this query cancel each other out; change their weights")
    return np.asarray(total / length, np.float32)
