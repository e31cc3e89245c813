"""Plans: a query is checked against a version of an index, and its vector is composed.

- The vector of a query is the weighted sum of its parts; only the ratios of the weights matter.
"""

import math
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from app.core.settings import Settings
from app.search.errors import InvalidQueryError, ItemNotFoundError, UnsupportedQueryError
from app.search.query import Query
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import list_fields

_MIN_LENGTH = 1e-4  # of the sum of parts, relative to the sum of their weights; below it the direction is noise
_MAX_CACHED_DEPTH = 50  # results up to the end of a page that is cached
_CACHED_OPTIONS = frozenset(
    {"query", "k", "offset", "hybrid", "min_score", "more_like", "less_like"}  # in `Plan.page_key`
    | {"without", "weights", "crop", "fields", "facets", "rerank", "explain"}  # in the vector, or not in the page
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A query, checked against a snapshot.

    Attributes:
        more_rows, less_rows: items that results should, and should not, resemble.
        excluded_rows: rows that are left out.
        min_score: lowest cosine, compared with scores as responses round them.
        words_weight: weight of the words of the query, 0 if they are not looked up.
        group_by: field whose values are returned once each; "" for none.
        rerank_depth: number of first results to score again; 0 without re-ranking.
        is_judged: True if the calibrated cut-off applies: to queries by text alone.
    """

    query: Query
    more_rows: Sequence[int] = ()
    less_rows: Sequence[int] = ()
    excluded_rows: Set[int] = frozenset()
    min_score: float | None = None
    words_weight: float = 0.0
    group_by: str = ""
    rerank_depth: int = 0
    is_judged: bool = False

    @property
    def end(self) -> int:
        """Rank of the last result on the page."""
        return self.query.offset + self.query.k

    @property
    def depth(self) -> int:
        """Number of results to rank: one more than the page needs shows whether there is a next one."""
        return max(self.end + 1, self.rerank_depth)

    def page_key(self, vector: Floats) -> Hashable:
        """Return the key of the page in `Snapshot.pages`; None for one that is not cached."""
        query = self.query
        is_plain = query.model_fields_set <= _CACHED_OPTIONS and not (self.group_by or query.rerank or query.explain)
        if not is_plain or self.end > _MAX_CACHED_DEPTH:
            return None
        ranking = self.words_weight, self.excluded_rows, self.min_score, self.is_judged
        return vector.tobytes(), query.query, query.offset, query.k, ranking


def make_plan(snapshot: Snapshot, query: Query, settings: Settings, *, has_image: bool = False) -> Plan:
    """Check a query against a snapshot. A collection without items has any field, but no item.

    Args:
        has_image: an image belongs to the query.

    Raises:
        SearchError: a field does not fit the index, or the rest of the query.
    """
    if not (query.query or query.more_like or has_image):
        subtracted = "less_like" if query.less_like else "without" if query.without else None
        if subtracted:
            raise InvalidQueryError(subtracted, "needs a query or more_like to subtract from")
        raise InvalidQueryError("query", "must not be empty")
    if query.rerank and not query.query:
        raise InvalidQueryError("rerank", "needs a text query, with which it scores the images")
    if query.crop is not None and not has_image:
        raise InvalidQueryError("crop", "needs an image; leave it out")
    more_rows = [row_of(snapshot, each, "more_like") for each in query.more_like]
    less_rows = [row_of(snapshot, each, "less_like") for each in query.less_like]
    if not snapshot.artifact.rows:
        return Plan(query, min_score=None if query.min_score == "auto" else query.min_score)
    known = snapshot.artifact.fields if query.fields else {}
    for name in query.fields:
        if name not in known and name != "*":
            raise InvalidQueryError("fields", f"no item has {name[:80]!r}; available: {list_fields(known)}")
    manifest, is_judged = snapshot.artifact.manifest, not (has_image or query.without or more_rows or less_rows)
    min_score = snapshot.min_score if query.min_score == "auto" else query.min_score
    if query.min_score == "auto" and not is_judged:
        raise InvalidQueryError("min_score", '"auto" is calibrated only for text queries; give a number')
    if query.min_score == "auto" and min_score is None:
        message = "This index was built without --validation and has no calibrated cut-off; give min_score as a number."
        raise UnsupportedQueryError(message, field="min_score")
    words_weight = manifest.words_weight if query.hybrid is True else float(query.hybrid)
    if words_weight and not query.query:
        raise InvalidQueryError("hybrid", "needs a text query, whose words it looks up")
    if words_weight and query.rerank:
        raise InvalidQueryError("hybrid", "cannot be combined with rerank, which orders results without the words")
    if query.fold is not None and query.group_by:
        raise InvalidQueryError("group_by", "cannot be combined with fold")
    plan = Plan(
        query,
        more_rows=more_rows,
        less_rows=less_rows,
        excluded_rows=frozenset((*more_rows, *less_rows)),
        min_score=min_score,
        words_weight=words_weight,
        group_by=manifest.spec.group_field if query.group_by is None and query.fold is None else query.group_by or "",
        rerank_depth=settings.rerank_depth if query.rerank else 0,
        is_judged=is_judged,
    )
    if query.sort:
        _check_sort(snapshot, plan)
    if query.rerank and not snapshot.encoder.state.reranks:
        reason = "This model cannot re-rank: it has no second stage, or validation turned it off."
        remedy = "Leave `rerank` out, or train a model with `dcar train --method query-prompts`."
        raise UnsupportedQueryError(f"{reason} {remedy}", field="rerank")
    return plan


def _check_sort(snapshot: Snapshot, plan: Plan) -> None:
    """Raise SearchError unless a query can be sorted: by a known field, with a way to tell what fits."""
    if plan.query.rerank:
        raise InvalidQueryError("sort", "cannot be combined with rerank, which orders results by their scores")
    require_sortable(snapshot, plan.query.sort)
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


def compose(parts: Sequence[tuple[float, Floats]]) -> Floats:
    """Return the unit vector (E,) of a query.

    Args:
        parts: weights, negative for what is subtracted, and vectors (E,).

    Raises:
        InvalidQueryError: all weights are 0, or the parts cancel out.
    """
    scale = max((abs(weight) for weight, _ in parts), default=0.0)
    if scale == 0:
        raise InvalidQueryError("weights", "at least one part of the query must have a weight above 0")
    weights = [weight / scale for weight, _ in parts]  # tiny weights would underflow
    total = sum(weight * vector for weight, (_, vector) in zip(weights, parts, strict=True))
    length = math.sqrt(np.dot(total, total))
    if length < _MIN_LENGTH * sum(map(abs, weights)):
        raise InvalidQueryError("weights", "the parts of this query cancel each other out; change their weights")
    return np.asarray(total / length, np.float32)
