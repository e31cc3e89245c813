"""Plan of a search: a query is checked against a snapshot, and its vector becomes ranked rows and results."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from app.core.settings import Settings
from app.search.errors import InvalidQueryError, ItemNotFoundError, UnsupportedQueryError
from app.search.query import Explanation, Match, Query, SearchOptions, SearchResults
from app.search.ranking.groups import group_field, rank_groups
from app.search.ranking.hybrid import HybridQuery
from app.search.ranking.rank import RankedRow, RankQuery, rank
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats, Mask


@dataclass(frozen=True, slots=True)
class Plan:
    """A query, checked against a snapshot.

    Attributes:
        more_rows, less_rows: items that results should, and should not, resemble.
        end: rank of the last result on the page.
        rerank_depth: number of first results to score again; 0 without re-ranking.
        hybrid: the words of the query, if they are looked up.
        group_by: field whose values are returned once each; "" for none.
    """

    query: Query
    more_rows: list[int]
    less_rows: list[int]
    min_score: float | None
    end: int
    rerank_depth: int
    hybrid: HybridQuery | None
    group_by: str

    @property
    def options(self) -> SearchOptions:
        return self.query.options

    @property
    def depth(self) -> int:
        """Number of results to rank: one more than the page needs shows whether there is a next one."""
        return max(self.end + 1, self.rerank_depth)


def make_plan(snapshot: Snapshot, query: Query, settings: Settings) -> Plan:
    """Check a query against a snapshot.

    Raises:
        InvalidQueryError: a field does not fit the index or the rest of the query.
        ItemNotFoundError: the query names an unknown item.
        UnsupportedQueryError: "auto" is requested as min_score of an index without calibration.
    """
    options = query.options
    known = snapshot.artifact.fields if options.fields else {}
    for name in options.fields:
        if name not in known and name != "*":
            raise InvalidQueryError("fields", f"no item has {name[:80]!r}; available: {', '.join(sorted(known))}")
    if options.rerank and not query.text:
        raise InvalidQueryError("rerank", "needs a text query, whose words it weighs")
    if options.crop is not None and query.image is None:
        raise InvalidQueryError("crop", "needs an image; leave it out")
    more_rows = [row_of(snapshot, each, "more_like") for each in options.more_like]
    if query.item_id is not None:
        more_rows.append(row_of(snapshot, query.item_id, "id"))
    return Plan(
        query,
        more_rows=more_rows,
        less_rows=[row_of(snapshot, each, "less_like") for each in options.less_like],
        min_score=_min_score(snapshot, query),
        end=options.offset + options.k,
        rerank_depth=settings.rerank_depth if options.rerank else 0,
        hybrid=_hybrid(snapshot, query),
        group_by=_group_by(snapshot, options),
    )


def no_results(query: Query) -> SearchResults:
    """Return the results in a collection without items. The query may name fields that items will have.

    Raises:
        ItemNotFoundError: the query names an item.
    """
    options = query.options
    ids = {"id": filter(None, [query.item_id]), "more_like": options.more_like, "less_like": options.less_like}
    for field, named in ids.items():
        for item_id in named:
            raise ItemNotFoundError(item_id, field)
    return SearchResults(
        version=0, matches=[], is_cached=False, took_ms=0.0, offset=options.offset, next_offset=None,
        min_score=None if options.min_score == "auto" else options.min_score,
        facets={name: [] for name in options.facets} if options.facets else None,
    )  # fmt: skip


def _hybrid(snapshot: Snapshot, query: Query) -> HybridQuery | None:
    options = query.options
    weight = snapshot.artifact.manifest.words_weight if options.hybrid is True else float(options.hybrid)
    if not weight:
        return None
    if not query.text:
        raise InvalidQueryError("hybrid", "needs a text query, whose words it looks up")
    if options.rerank:
        raise InvalidQueryError("hybrid", "cannot be combined with rerank, which orders results without the words")
    return HybridQuery(query.text, weight)


def _group_by(snapshot: Snapshot, options: SearchOptions) -> str:
    if options.fold is None:
        return snapshot.artifact.manifest.group_field if options.group_by is None else options.group_by
    if options.group_by:
        raise InvalidQueryError("group_by", "cannot be combined with fold")
    return ""


def row_of(snapshot: Snapshot, item_id: str, field: str = "id") -> int:
    """Return the row of an item, which `field` of the query names. Raise ItemNotFoundError if no item has this id."""
    row = snapshot.artifact.row_of(item_id)
    if row is None:
        raise ItemNotFoundError(item_id, field)
    return row


def _min_score(snapshot: Snapshot, query: Query) -> float | None:
    options = query.options
    if options.min_score != "auto":
        return options.min_score
    if query.image is not None or query.item_id or query.without_text or options.more_like or options.less_like:
        raise InvalidQueryError("min_score", '"auto" is calibrated for text queries alone; give a number')
    if snapshot.min_score is None:
        message = "This index was built without --validation and has no calibrated cut-off; give min_score as a number."
        raise UnsupportedQueryError(message, field="min_score")
    return snapshot.min_score


def rank_rows(snapshot: Snapshot, plan: Plan, vector: Floats, mask: Mask | None) -> list[RankedRow]:
    """Return the ranked rows, or the best row of each group, up to the next page."""
    excluded_rows = {*plan.more_rows, *plan.less_rows}
    groups = group_field(snapshot, plan.group_by) if plan.group_by else None
    if groups is not None and excluded_rows:  # a mask costs less: excluded rows widen the search
        mask, excluded_rows = groups.outside(groups.codes[[*excluded_rows]], mask), set()
    query = RankQuery(vector, plan.hybrid, excluded_rows, plan.min_score, plan.options.fold)
    if groups is None:
        return rank(snapshot.artifact, query, plan.depth, mask)
    return rank_groups(partial(rank, snapshot.artifact, query), plan.depth, groups, mask)


def ranking_key(plan: Plan, vector: Floats) -> Hashable:
    """Return the key, in `Snapshot.rankings`, of a plan without a filter, folding and groups."""
    return vector.tobytes(), plan.hybrid, frozenset((*plan.more_rows, *plan.less_rows)), plan.min_score, plan.depth


def matches_of(
    snapshot: Snapshot,
    plan: Plan,
    ranked: Sequence[RankedRow],
    mask: Mask | None,
    explanations: Sequence[Explanation | None] = (),
) -> list[Match]:
    """Return the results of a page of ranked rows; explanations belong to the first of them."""
    item, rows = snapshot.artifact.item, [each.row for each in ranked]
    groups: list[tuple[Any, int]] = []
    if plan.group_by:
        field = group_field(snapshot, plan.group_by)
        groups = [(field.value(row), size) for row, size in zip(rows, field.sizes(rows, mask), strict=True)]
    return [
        Match(
            item(each.row), each.score, [item(row).id for row in each.folded], each.rerank_score, explanation,
            each.text_score, group,
        )
        for each, explanation, group in zip_longest(ranked, explanations, groups)
    ]  # fmt: skip
