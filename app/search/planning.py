"""Planning: a query is checked against a snapshot before any vector is computed."""

from dataclasses import dataclass

from app.core.settings import Settings
from app.search.errors import InvalidQueryError, ItemNotFoundError, UnsupportedQueryError
from app.search.query import Query, SearchOptions
from app.search.snapshots import Snapshot


@dataclass(frozen=True, slots=True)
class Plan:
    """A query, checked against a snapshot.

    Attributes:
        more_rows, less_rows: items that results should, and should not, resemble.
        end: rank of the last result on the page.
        rerank_depth: number of first results to score again; 0 without re-ranking.
    """

    query: Query
    more_rows: list[int]
    less_rows: list[int]
    min_score: float | None
    end: int
    rerank_depth: int

    @property
    def options(self) -> SearchOptions:
        return self.query.options


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
    )


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
