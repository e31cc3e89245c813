"""From a query's vector to ranked rows of an index, in one call that a thread can make.

- A filter is applied inside the index's own search, so as many results come back as were asked for, where they exist.
- Near-duplicates fold into the best of them. The search is widened until there are enough different ones.
"""

import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.core.problems import Problem, field_problem
from app.search.batching import Vector
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Mask
from dcar_core.util.errors import ArtifactError, StoreUnavailableError
from index_jobs.store.filters import FilterError

_WIDEST = 10_000  # rows looked at for one page of different results
_MOST_EQUAL = 2_048  # rows looked at to put equal scores in order
_ROUNDING = 1e-6  # of a vector's product with itself
_BLOCK = 128  # rows compared at once for near-duplicates


@dataclass(frozen=True, slots=True)
class Hit:
    """A row, its cosine to the query, the rows that were folded into it, and its score after re-ranking."""

    row: int
    score: float
    folded: tuple[int, ...] = ()
    reranked: float | None = None


def find(
    snapshot: Snapshot,
    vector: Vector,
    count: int,
    *,
    without: Set[int] = frozenset(),
    filter: dict[str, Any] | None = None,
    min_score: float | None = None,
    fold: float | None = None,
) -> list[Hit]:
    """The `count` best rows, best first.

    Of equal scores, as equal pictures have, the lowest row comes first: a longer answer begins with the shorter one.

    Args:
        vector: (E,), L2-normalised.
        without: rows to leave out.
        filter: see `index_jobs.store.filters`.
        min_score: lower ones are left out; scores are compared as answers round them.
        fold: cosine from which on two items are shown as one.

    Raises:
        Problem: the filter does not fit the index, or its kind keeps no vectors to fold by.
    """
    artifact = snapshot.artifact
    allowed = None
    if filter:
        allowed = matching(snapshot, filter)
    wide = min(count + 1 + len(without), artifact.rows)
    while True:
        scores, rows = artifact.search(vector[None], wide, allowed)  # [1, wide], [1, wide]
        least, last = -np.inf if min_score is None else min_score, scores[0, -1]
        found = [
            Hit(int(row), float(score))
            for row, score in zip(rows[0], scores[0], strict=True)
            if row >= 0 and row not in without and (min_score is None or round(float(score), 6) >= least)
        ]
        found.sort(key=lambda hit: (-hit.score, hit.row))
        hits = found[:count] if fold is None else _folded(snapshot, found, fold - _ROUNDING, count)
        ended = wide >= min(artifact.rows, _MOST_EQUAL if fold is None else _WIDEST) or rows[0, -1] < 0 or last < least
        if ended or (len(hits) >= count and hits[-1].score > last):  # what is not here may score as much as the last
            return hits
        wide = min(2 * wide, artifact.rows)


def matching(snapshot: Snapshot, filter: dict[str, Any]) -> Mask:
    """bool (rows,): the items that fulfil a filter; see `index_jobs.store.filters`.

    Raises:
        Problem: it does not fit the index.
    """
    try:
        return snapshot.matching(json.dumps(filter, sort_keys=True))
    except FilterError as error:
        raise field_problem(f"filter.{error.field}", error.message) from None


def vectors_of(snapshot: Snapshot, rows: list[int]) -> Vector:
    """float32 (m, E), as the index keeps them.

    Raises:
        Problem: this kind of index keeps none.
    """
    try:
        return snapshot.artifact.vectors(np.array(rows, np.int64))
    except StoreUnavailableError:
        raise
    except ArtifactError as error:
        raise Problem(409, f"This needs the items' vectors, which the index does not keep: {error}") from None


def _folded(snapshot: Snapshot, found: list[Hit], fold: float, count: int) -> list[Hit]:
    """The best `count` that differ, each with those that are folded into it: the most like it of all that are shown.

    Rows are compared by the block, since a product of matrices takes a fraction of the time of one for each row.
    """
    if not found:
        return []
    vectors = vectors_of(snapshot, [hit.row for hit in found])  # (m, E)
    kept = np.empty_like(vectors)  # of what is shown
    shown: list[int] = []  # places in `found`
    members: list[list[int]] = []
    start, end = 0, len(found)
    while start < end:
        block, known = vectors[start : min(start + _BLOCK, end)], len(shown)
        fresh: list[int] = []  # places in the block
        for place, (before, within) in enumerate(zip(block @ kept[:known].T, block @ block.T, strict=True)):
            alike = np.concatenate((before, within[fresh]))
            if len(alike) and alike.max() >= fold:
                members[int(alike.argmax())].append(found[start + place].row)
            else:
                kept[len(shown)] = block[place]
                fresh.append(place)
                shown.append(start + place)
                members.append([])
        start += len(block)
        if known < count <= len(shown):  # enough: to the end comes only what folds into these
            alike = vectors[start:end] @ kept[:count].T
            end = start + 1 + int(np.flatnonzero((alike >= fold).any(1)).max(initial=-1))
    return [
        Hit(found[place].row, found[place].score, tuple(rows))
        for place, rows in zip(shown[:count], members, strict=False)
    ]
