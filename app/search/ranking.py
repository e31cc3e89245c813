"""Planning and ranking: a query is checked against a snapshot, and its vector becomes rows of the index.

- A filter applies inside the search of the index, so as many results return as were requested, if they exist.
- Near-duplicates are folded into the best of them. The search widens until enough different results are found.
"""

import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.core.settings import Settings
from app.search.errors import InvalidQueryError, ItemNotFoundError, UnsupportedQueryError
from app.search.query import Query, SearchOptions
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats, Mask
from dcar_core.util.errors import ArtifactError, StoreUnavailableError
from index_jobs.store import filters

_MAX_ROWS_FOLDED = 10_000  # searched for one page of different results
_MAX_ROWS_TIED = 2_048  # searched to put equal scores in order
_ROUNDING = 1e-6  # of a unit vector's product with itself
_MAX_MASKS = 16  # cached for one version; a byte an item each
_FOLD_BLOCK = 128  # rows compared at once


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


@dataclass(frozen=True, slots=True)
class RankedRow:
    """A row of the index, its cosine to the query, and the rows of its near-duplicates."""

    row: int
    score: float
    folded: tuple[int, ...] = ()
    rerank_score: float | None = None


def rank(
    snapshot: Snapshot,
    vector: Floats,
    count: int,
    *,
    excluded_rows: Set[int] = frozenset(),
    mask: Mask | None = None,
    min_score: float | None = None,
    fold: float | None = None,
) -> list[RankedRow]:
    """Return the `count` best rows, best first.

    Rows of equal score, such as equal images, are in the order of the index, so a longer list begins with the shorter.

    Args:
        vector: (E,), L2-normalised.
        mask: rows that may be returned, bool (rows,); see `filter_mask`.
        min_score: compared with scores as responses round them.
        fold: cosine from which on two items are shown as one.

    Raises:
        UnsupportedQueryError: `fold` needs vectors, and the index keeps none.
    """
    artifact = snapshot.artifact
    lowest = -np.inf if min_score is None else min_score
    widest = min(artifact.rows, _MAX_ROWS_TIED if fold is None else _MAX_ROWS_FOLDED)
    width = min(count + 1 + len(excluded_rows), artifact.rows)
    while True:
        scores, rows = artifact.search(vector[None], width, mask)  # [1, width], [1, width]
        last_score = scores[0, -1]
        ranked = [
            RankedRow(int(row), float(score))
            for row, score in zip(rows[0], scores[0], strict=True)
            if row >= 0 and row not in excluded_rows and round(float(score), 6) >= lowest
        ]
        ranked.sort(key=lambda each: (-each.score, each.row))
        best = ranked[:count] if fold is None else _fold(snapshot, ranked, fold - _ROUNDING, count)
        is_complete = width >= widest or rows[0, -1] < 0 or last_score < lowest
        if is_complete or (len(best) >= count and best[-1].score > last_score):  # no missing row ties with the last
            return best
        width = min(2 * width, artifact.rows)


def mask_key(filter: dict[str, Any]) -> str:
    """Return the key of a filter in `Snapshot.masks`."""
    return json.dumps(filter, sort_keys=True)


def filter_mask(snapshot: Snapshot, filter: dict[str, Any]) -> Mask:
    """Return bool (rows,): the rows that fulfil a filter; see `index_jobs.store.filters`. Masks are cached.

    Raises:
        InvalidQueryError: the filter does not fit the index.
    """
    key, masks = mask_key(filter), snapshot.masks
    mask = masks.get(key)
    if mask is None:
        try:
            mask = masks[key] = filters.match_rows(snapshot.artifact, filter)
        except filters.FilterError as error:
            raise InvalidQueryError(f"filter.{error.field}", error.message) from None
        while len(masks) > _MAX_MASKS:
            del masks[next(iter(masks))]
    return mask


def row_vectors(snapshot: Snapshot, rows: list[int]) -> Floats:
    """Return the vectors, float32 (m, E), that the index keeps.

    Raises:
        UnsupportedQueryError: this kind of index keeps none.
    """
    try:
        return snapshot.artifact.vectors(np.array(rows, np.int64))
    except StoreUnavailableError:
        raise
    except ArtifactError as error:
        message = f"This query needs the vectors of items, and the index does not keep them: {error}"
        raise UnsupportedQueryError(message) from None


def _fold(snapshot: Snapshot, ranked: list[RankedRow], threshold: float, count: int) -> list[RankedRow]:
    """Return the best `count` rows that differ, each with the near-duplicates that are most similar to it.

    Rows are compared in blocks: one product of matrices is many times as fast as one product for each row.
    """
    if not ranked:
        return []
    vectors = row_vectors(snapshot, [each.row for each in ranked])  # [m, E]
    shown = np.empty_like(vectors)  # vectors of the rows that are shown
    positions: list[int] = []  # of the rows that are shown, in `ranked`
    members: list[list[int]] = []
    start, end = 0, len(ranked)
    while start < end:
        block, shown_before = vectors[start : min(start + _FOLD_BLOCK, end)], len(positions)
        new: list[int] = []  # positions in the block
        similarities = zip(block @ shown[:shown_before].T, block @ block.T, strict=True)
        for place, (to_shown, to_block) in enumerate(similarities):
            similarity = np.concatenate((to_shown, to_block[new]))
            if len(similarity) and similarity.max() >= threshold:
                members[int(similarity.argmax())].append(ranked[start + place].row)
            else:
                shown[len(positions)] = block[place]
                new.append(place)
                positions.append(start + place)
                members.append([])
        start += len(block)
        if shown_before < count <= len(positions):  # enough: of the rest, only rows that fold into these matter
            similarity = vectors[start:end] @ shown[:count].T
            end = start + 1 + int(np.flatnonzero((similarity >= threshold).any(1)).max(initial=-1))
    return [
        RankedRow(ranked[place].row, ranked[place].score, tuple(rows))
        for place, rows in zip(positions[:count], members, strict=False)
    ]
