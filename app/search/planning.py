"""Planning: a query is checked against a snapshot before any vector is computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.core.settings import Settings
from app.search.errors import InvalidQueryError, ItemNotFoundError, NotCalibratedError
from app.search.query import Query, SearchOptions
from app.search.snapshots import Snapshot


@dataclass(frozen=True, slots=True)
class Plan:
    """A query, checked against a snapshot.

    Attributes:
        more_rows: items that results should resemble.
        less_rows: items that results should not resemble.
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
        NotCalibratedError: "auto" is requested as min_score of an index without calibration.
    """
    options = query.options
    _require_fields(snapshot, options.fields)
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
    """Return the row of an item.

    Args:
        field: the field of the query that names the item.

    Raises:
        ItemNotFoundError: no item has this id.
    """
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
        raise NotCalibratedError
    return snapshot.min_score


def _require_fields(snapshot: Snapshot, fields: Sequence[str]) -> None:
    known = snapshot.artifact.fields if fields else {}
    for name in fields:
        if name not in known and name != "*":
            raise InvalidQueryError("fields", f"no item has {name[:80]!r}; available: {', '.join(sorted(known))}")
