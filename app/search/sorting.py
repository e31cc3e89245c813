"""Results in the order of a field: `"price"`, or `"-price"` descending.

- Only matches are sorted, wherever they are in the index: rows whose cosine reaches the `min_score` of the query, or
  without one the calibrated cut-off, and then also rows that contain the words of a hybrid query. At most `MAX_SORTED`
  of each, the best ones.
- Rows without a value come last in both directions. Matches of equal value are in the order of their relevance.
- The first row of a group, or of near-duplicates, stands for the others.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.search.facets import count_values, is_exact_index
from app.search.plan import Plan
from app.search.query import Match
from app.search.rank import (
    Candidates,
    Levels,
    contained_share,
    find_levels,
    fold_matches,
    require_words,
    vector_candidates,
    word_mask,
)
from app.search.rows import field_values, group_field, row_vectors
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats, Rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.lexical.fusion import text_bonus
from index_jobs.row_filter import RowFilter

MAX_SORTED = 10_000
Found = tuple[list[Match], dict[str, Any]]  # matches up to the next page, and other fields of the results
FIRST_WIDTH = 1_000  # nearest rows that are looked at before `MAX_SORTED` of them


@dataclass(frozen=True)
class SortOrder:
    """The order of a field. places: of each row, int32 (rows,); rows of equal value share one."""

    places: Rows

    @cached_property
    def rows(self) -> Rows:
        """All rows in order, int64 (rows,); those of equal value in the order of the index."""
        return np.argsort(self.places, kind="stable")


def sort_order(snapshot: Snapshot, sort: str) -> SortOrder:
    """Return the order of a field, which is cached. Texts are in order regardless of case; "" is missing."""

    def read() -> SortOrder:
        column = field_values(snapshot.artifact, sort.removeprefix("-"), "sort")
        if pa.types.is_string(column.type):
            column = pc.if_else(pc.equal(column, ""), None, pc.utf8_lower(column))
        elif pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        direction = "descending" if sort.startswith("-") else "ascending"
        return SortOrder(pc.rank(column, direction, tiebreaker="dense").to_numpy().astype(np.int32))

    order: SortOrder = snapshot.orders.find(sort, read)
    return order


def sort_rows(snapshot: Snapshot, sort: str, allowed: RowFilter | None) -> Rows:
    """Return the allowed rows, None for all live ones, in the order of a field; those of equal value in the index's."""
    mask, order = (allowed or snapshot.artifact.live_rows).mask, sort_order(snapshot, sort).rows
    return order[mask[order]]


def sort_matches(snapshot: Snapshot, plan: Plan, vector: Floats, allowed: RowFilter | None) -> Found:
    """Return the sorted matches of a plan among the allowed rows up to the next page, and other fields of the results.

    Counts are exact unless there are more than `MAX_SORTED`, or an approximate index may have missed some.

    Raises:
        SearchError: a field cannot group or be counted, or the index keeps no vectors or words.
    """
    artifact, query = snapshot.artifact, plan.query
    groups = group_field(snapshot, plan.group_by) if plan.group_by else None
    found, levels, is_complete = _find_matches(artifact, plan, vector, allowed)
    excluded = np.fromiter(plan.excluded_rows, np.int64)
    keys, excluded = (rows if groups is None else groups.codes[rows] for rows in (found.rows, excluded))
    is_excluded = np.isin(keys, excluded)
    sequence = np.lexsort((found.rows, -found.rank_scores, sort_order(snapshot, query.sort).places[found.rows]))
    sequence = sequence[~is_excluded[sequence]]
    matched = np.zeros(artifact.rows, np.bool_)
    matched[found.rows[sequence]] = True
    if groups is not None:
        _, first = np.unique(keys[sequence], return_index=True)
        sequence = sequence[np.sort(first)]
    shown = sequence if query.fold is not None else sequence[: plan.depth]
    text_scores = found.text_scores[shown].tolist() if plan.words_weight else [None] * len(shown)
    matches = list(map(Match, found.rows[shown].tolist(), found.cosines[shown].tolist(), text_scores))
    if query.fold is not None:
        matches = fold_matches(artifact, matches, query.fold, plan.depth)
    if levels is not None:
        for match in matches:
            match.level = levels.level_of(match.score, match.text_score or 0.0)
    is_exact = is_complete and is_exact_index(artifact)
    return matches, {
        "count": len(sequence),
        "has_exact_count": is_exact,
        "cutoff": None if levels is None else levels.likely,
        "nothing_fits": levels is not None and not _has_likely(levels, found, sequence),
        "facets": {name: count_values(artifact, name, matched, groups) for name in query.facets} or None,
        "has_exact_facets": is_exact,
    }


def _has_likely(levels: Levels, found: Candidates, places: Rows) -> bool:
    scores = zip(found.cosines[places].tolist(), found.text_scores[places].tolist(), strict=True)
    return any(levels.level_of(*each) == "likely" for each in scores)


def _find_matches(
    artifact: IndexVersion, plan: Plan, vector: Floats, allowed: RowFilter | None
) -> tuple[Candidates, Levels | None, bool]:
    """Return the matches of a plan, the levels of its query, and False if there may be more matches."""
    near, best, is_complete = _find_near(artifact, plan, vector, allowed)
    levels = find_levels(artifact, plan, best)
    if not plan.words_weight:
        return near, levels, is_complete
    lexical, text = require_words(artifact), plan.query.query
    bonus = np.float32(text_bonus(artifact.sample_vectors, vector, plan.words_weight))
    rows, cosines, scores = near.rows, near.cosines, lexical.score(text, near.rows)
    if plan.min_score is None:
        contained = contained_share(artifact, text)[0] if levels is None else levels.contained
        text_scores, text_rows = lexical.search(text, MAX_SORTED, word_mask(artifact, allowed))
        is_complete &= len(text_rows) < MAX_SORTED or bool(text_scores[-1] < contained)
        is_added = (text_scores >= contained) & ~np.isin(text_rows, rows)
        if is_added.any():
            added = text_rows[is_added]
            rows, scores = np.concatenate((rows, added)), np.concatenate((scores, text_scores[is_added]))
            cosines = np.concatenate((cosines, row_vectors(artifact, added) @ vector))
    near = near._replace(rows=rows, cosines=cosines, text_scores=scores, rank_scores=cosines + bonus * scores)
    return near, levels, is_complete


def _find_near(
    artifact: IndexVersion, plan: Plan, vector: Floats, allowed: RowFilter | None
) -> tuple[Candidates, float, bool]:
    """Return the rows that reach the cut-off, the best cosine of all, and False if more rows may reach it."""
    lowest = plan.min_score
    if lowest is None:
        lowest = artifact.manifest.cutoff.get("min_score", np.inf) if plan.is_judged else np.inf
    widths = (1,) if lowest == np.inf else (FIRST_WIDTH, MAX_SORTED)
    for width in widths:
        found = vector_candidates(artifact, vector, min(width, artifact.rows), allowed)
        is_reached = np.array([round(cosine, 6) >= lowest for cosine in found.cosines.tolist()], np.bool_)
        is_complete = width >= artifact.rows or found.highest_unseen == -np.inf or not is_reached.all()
        if is_complete:
            break
    best = float(found.cosines.max(initial=-np.inf))
    reached = found._replace(
        rows=found.rows[is_reached],
        cosines=found.cosines[is_reached],
        text_scores=found.text_scores[is_reached],
        rank_scores=found.rank_scores[is_reached],
    )
    return reached, best, is_complete
