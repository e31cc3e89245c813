"""Hits: the rows that answer a query, in order. Candidates are found, then put in order.

- A filter applies inside the search of the index, so as many results return as were requested, if they exist.
- The order is by score, or by the field of `sort`, "-price" descending. Rows of equal score, such as equal images, are
  in the order of the index, so a longer list begins with the shorter.
- Only matches are sorted, wherever they are in the index: rows whose cosine reaches the `min_score` of the query, or
  without one the calibrated cut-off, and then also rows that contain the words of a hybrid query. At most `MAX_SORTED`
  of each, the best ones. Rows without a value come last in both directions.
- Near-duplicates are folded into the first of them, and the first row of a group stands for the others. The search
  widens until enough different results are found.
- A result is likely if its score reaches the calibrated cut-off, or if the item contains the words of the query. The
  scores of a query whose words no item has say little: it needs a strong score, and its other results that reach the
  cut-off are possible.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from app.search.errors import UnsupportedQueryError
from app.search.plan import Plan
from app.search.rows import GroupField, first_places, group_field, is_exact_index, row_vectors, sort_order
from app.search.snapshots import Snapshot
from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.lexical.fusion import text_bonus
from index_jobs.index.lexical.lexical_index import LexicalIndex
from index_jobs.row_filter import NO_ROWS, RowFilter

Level = Literal["likely", "possible", "unlikely"]

MAX_SORTED = 10_000
FIRST_WIDTH = 1_000  # nearest rows that are looked at before `MAX_SORTED` of them
_MAX_ROWS_FOLDED = 10_000  # searched for one page of different results
_MAX_ROWS_TIED = 2_048  # searched to put equal scores in order
_ROWS_PER_GROUP = 4  # rows requested at first for each group
_ROUNDING = 1e-6  # of a unit vector's product with itself
_FAMILIAR = 0.5  # share of the query's words that items have, from which on its scores count
_CONTAINED = 0.6  # share of the words, by their rarity, from which on an item fits whatever its image shows
_NEAR_SPELLING = 0.4  # the same where no item has the words
_TEXT_ROWS = 512  # rows of a query's words up to which the cosines of all are computed
_COMMON_TEXT_ROWS = 256  # rows of more common words whose cosines are computed
_COMMON_WIDTH = 64  # least number of cosines that common words are looked up among


class Candidates(NamedTuple):
    """Rows that may be the best, in any order. Their rank scores order the results."""

    rows: Rows  # int64 (m,)
    cosines: Floats  # (m,)
    text_scores: Floats  # (m,), 0 without words
    rank_scores: Floats  # (m,)

    def joined(self, other: "Candidates") -> "Candidates":
        pairs: Any = zip(self, other, strict=True)
        return Candidates(*map(np.concatenate, pairs))

    def take(self, places: Any) -> "Candidates":
        return Candidates(*(part[places] for part in self))

    def reach(self, score: float) -> Mask:
        """Return which cosines reach a score, as responses round them: bool (m,)."""
        reached: Mask = self.cosines.astype(np.float64).round(6) >= score
        return reached


NOTHING = Candidates(NO_ROWS, *np.empty((3, 0), np.float32))


class Unseen(NamedTuple):
    """The highest scores that any other row may have; -inf if there is none."""

    rank_score: float
    cosine: float


class Levels(NamedTuple):
    """What the level of a hit follows from. Scores are compared as responses round them."""

    likely: float = math.inf  # score of a likely hit
    possible: float = -math.inf  # score of a possible one
    contained: float = math.inf  # text score of a likely one

    def level_of(self, score: float, text_score: float) -> Level:
        if (rounded := round(score, 6)) >= self.likely or text_score >= self.contained:
            return "likely"
        return "possible" if rounded >= self.possible else "unlikely"


@dataclass(frozen=True, slots=True)
class Hits:
    """The hits of a plan in order, up to the next page.

    Attributes:
        found: rows and their scores.
        folded: rows of the near-duplicates of each hit; empty unless the plan folds them.
        levels: None without a cut-off, and for a query that is not by text alone; then every hit is possible.
        nothing_fits: True if no hit is likely.
        matched: all rows that fit a sorted query; None without `sort`. count: their number, or that of their groups.
        is_exact: False if more rows may fit a sorted query.
        rerank_scores: of the hits that were scored again, by their rows.
    """

    found: Candidates
    folded: list[Rows]
    levels: Levels | None
    nothing_fits: bool
    matched: Rows | None = None
    count: int | None = None
    is_exact: bool = True
    rerank_scores: Mapping[int, float] = field(default_factory=dict)


def find_hits(snapshot: Snapshot, plan: Plan, vector: Floats) -> Hits:
    """Return the hits of a plan for the vector (E,) of its query.

    Raises:
        SearchError: the index keeps no vectors or words, or a field cannot group.
    """
    if not snapshot.artifact.rows:
        return Hits(NOTHING, [], None, nothing_fits=False, matched=NO_ROWS, count=0 if plan.sort else None)
    groups = group_field(snapshot, plan.group_by) if plan.group_by else None
    if plan.sort:
        return _sorted_hits(snapshot, plan, vector, groups)
    if groups is None:
        found, folded = best_rows(snapshot.artifact, plan, vector, plan.depth, plan.allowed)
    else:
        found, folded = best_of_groups(snapshot.artifact, plan, vector, groups), []
    levels = find_levels(snapshot.artifact, plan, float(found.cosines.max()) if len(found.rows) else math.inf)
    return Hits(found, folded, levels, _nothing_fits(levels, found))


def best_rows(
    artifact: IndexVersion, plan: Plan, vector: Floats, count: int, allowed: RowFilter | None
) -> tuple[Candidates, list[Rows]]:
    """Return the `count` best rows of a plan among the allowed ones, and the near-duplicates of each if it folds them.

    Raises:
        UnsupportedQueryError: `fold` or `hybrid` needs vectors or words, and the index keeps none.
    """
    lowest, total = -np.inf if plan.min_score is None else plan.min_score, artifact.rows
    widest = min(total, _MAX_ROWS_TIED if plan.fold is None else _MAX_ROWS_FOLDED)
    width = min(count + 1 + len(plan.excluded), total)
    while True:
        if plan.words_weight:
            found, unseen = hybrid_candidates(artifact, plan, vector, width, allowed)
        else:
            found, unseen = vector_candidates(artifact, vector, width, allowed)
        best = found.take(np.lexsort((found.rows, -found.rank_scores)))
        if plan.excluded:
            best = best.take(~np.isin(best.rows, plan.excluded))
        if plan.min_score is not None:
            best = best.take(best.reach(plan.min_score))
        if plan.fold is None:
            best, folded = best.take(slice(count)), list[Rows]()
        else:
            best, folded = fold_rows(artifact, best, plan.fold, count)
        if width >= widest or unseen.rank_score == -np.inf or unseen.cosine < lowest:
            return best, folded
        if len(best.rows) >= count and best.rank_scores[-1] > unseen.rank_score:  # no missing row ties with the last
            return best, folded
        width = min(2 * width, total)


def best_of_groups(artifact: IndexVersion, plan: Plan, vector: Floats, groups: GroupField) -> Candidates:
    """Return the best row of each of the best groups, up to the next page.

    The search goes on among rows of other groups until there are enough.
    """
    allowed, best = plan.allowed, NOTHING
    if plan.excluded:
        allowed = groups.outside(groups.codes[list(plan.excluded)], allowed)
    remaining = allowed
    while (missing := plan.depth - len(best.rows)) > 0:
        found, _ = best_rows(artifact, plan, vector, _ROWS_PER_GROUP * missing, remaining)
        found = found.take(first_places(groups.codes[found.rows]))
        if not len(found.rows):
            break
        best = best.joined(found)
        remaining = groups.outside(groups.codes[best.rows], allowed)
    return best.take(slice(plan.depth))


def vector_candidates(
    artifact: IndexVersion, vector: Floats, width: int, allowed: RowFilter | None, *, is_narrow: bool = False
) -> tuple[Candidates, Unseen]:
    """Return the `width` rows with the highest cosines."""
    scores, rows = artifact.search(vector[None], width, allowed, is_narrow=is_narrow)  # [1, width], [1, width]
    last = float(scores[0, -1]) if rows[0, -1] >= 0 else -np.inf
    found = rows[0] >= 0
    cosines = scores[0][found]
    return Candidates(rows[0][found], cosines, np.zeros_like(cosines), cosines), Unseen(last, last)


def hybrid_candidates(
    artifact: IndexVersion, plan: Plan, vector: Floats, width: int, allowed: RowFilter | None
) -> tuple[Candidates, Unseen]:
    """Return the `width` or more rows with the highest cosines, and those with the highest text scores.

    - A rank score is cosine + bonus * text score; see `index_jobs.index.lexical.fusion`. Every candidate of one list
      gets its exact score in the other.
    - Words that `_TEXT_ROWS` items or more contain are ranked approximately: only the `_COMMON_TEXT_ROWS` best rows by
      the words are added. The number of rows by cosine then depends only on the page's depth, rounded.
    - First pages without a filter use a narrow index search, which returns twice as many rows in less time, though not
      exactly the highest.

    Raises:
        UnsupportedQueryError: the index keeps no vectors.
    """
    lexical, mask = _require_words(artifact), _word_mask(artifact, allowed)
    is_text_complete = lexical.count_matches(plan.text) < _TEXT_ROWS
    text_scores, text_rows = lexical.search(plan.text, _TEXT_ROWS if is_text_complete else _COMMON_TEXT_ROWS, mask)
    is_narrow = not is_text_complete and mask is None and width <= _COMMON_WIDTH
    if not is_text_complete:
        wide = 1 << (max(width, _COMMON_WIDTH) - 1).bit_length()
        width = min(2 * _COMMON_WIDTH if is_narrow else wide, artifact.rows)
    near, unseen = vector_candidates(artifact, vector, width, allowed, is_narrow=is_narrow)
    is_same = near.rows[:, None] == text_rows  # [near, text]
    near_scores = is_same @ text_scores if is_text_complete else lexical.score(plan.text, near.rows)
    is_far = ~is_same.any(0)
    far = text_rows[is_far], text_scores[is_far]
    found = _with_words(artifact, plan, vector, (near.rows, near.cosines, near_scores), far)
    return found, unseen if is_text_complete else unseen._replace(rank_score=-np.inf)


def _with_words(
    artifact: IndexVersion, plan: Plan, vector: Floats, near: tuple[Rows, Floats, Floats], far: tuple[Rows, Floats]
) -> Candidates:
    """Return candidates of near rows, with cosines and text scores, and of far rows, with text scores."""
    (rows, cosines, text_scores), (far_rows, far_scores) = near, far
    if len(far_rows):
        rows, text_scores = np.concatenate((rows, far_rows)), np.concatenate((text_scores, far_scores))
        cosines = np.concatenate((cosines, row_vectors(artifact, far_rows) @ vector))
    bonus: Any = np.float32(text_bonus(artifact.sample_vectors, vector, plan.words_weight))
    return Candidates(rows, cosines, text_scores, cosines + bonus * text_scores)


def _require_words(artifact: IndexVersion) -> LexicalIndex:
    if not len(artifact.sample_vectors):
        raise UnsupportedQueryError("Hybrid search needs vectors of items; the index keeps none.", field="hybrid")
    return artifact.lexical


def _word_mask(artifact: IndexVersion, allowed: RowFilter | None) -> Mask | None:
    """Return the rows that may be found by their words, bool (rows,); None for all."""
    if allowed is None:
        return artifact.live if artifact.manifest.removed else None
    return allowed.mask


def fold_rows(artifact: IndexVersion, ranked: Candidates, fold: float, count: int) -> tuple[Candidates, list[Rows]]:
    """Return the first `count` rows that differ, and the near-duplicates that are most similar to each."""
    threshold, end = fold - _ROUNDING, len(ranked.rows)
    vectors = row_vectors(artifact, ranked.rows) if end else np.empty((0, 0), np.float32)  # [m, E]
    closest = np.full(end, -np.inf, np.float32)  # similarity of each row to a shown row before it
    owners = np.arange(end)  # place of this shown row
    shown: list[int] = []  # places
    place = 0
    while place < end:
        if closest[place] < threshold:
            shown.append(place)
            owners[place] = place
            similarity = vectors[place + 1 : end] @ vectors[place]
            nearer = place + 1 + np.flatnonzero(similarity > closest[place + 1 : end])
            closest[nearer], owners[nearer] = similarity[nearer - place - 1], place
            if len(shown) == count:  # of the rest, only rows that fold into these matter
                end = 1 + int(np.flatnonzero(closest >= threshold).max(initial=-1))
        place += 1
    shown = shown[:count]
    owned = (np.flatnonzero(owners[:end] == first) for first in shown)
    return ranked.take(shown), [ranked.rows[each[each != first]] for first, each in zip(shown, owned, strict=True)]


def _sorted_hits(snapshot: Snapshot, plan: Plan, vector: Floats, groups: GroupField | None) -> Hits:
    """Return the hits in the order of a field.

    The count is exact unless there are more than `MAX_SORTED`, or an approximate index may have missed some.
    """
    artifact, excluded = snapshot.artifact, np.array(plan.excluded, np.int64)
    found, levels, is_complete = _fitting(artifact, plan, vector)
    keys, excluded = (rows if groups is None else groups.codes[rows] for rows in (found.rows, excluded))
    found = found.take(~np.isin(keys, excluded))
    found = found.take(np.lexsort((found.rows, -found.rank_scores, sort_order(snapshot, plan.sort).places[found.rows])))
    matched = found.rows
    if groups is not None:
        found = found.take(first_places(groups.codes[found.rows]))
    count, nothing_fits, folded = len(found.rows), _nothing_fits(levels, found), list[Rows]()
    if plan.fold is not None:
        found, folded = fold_rows(artifact, found, plan.fold, plan.depth)
    found, is_exact = found.take(slice(plan.depth)), is_complete and is_exact_index(artifact)
    return Hits(found, folded, levels, nothing_fits, matched, count, is_exact)


def _fitting(artifact: IndexVersion, plan: Plan, vector: Floats) -> tuple[Candidates, Levels | None, bool]:
    """Return all rows that fit a plan, the levels of its query, and False if there may be more."""
    lowest = plan.min_score
    if lowest is None:
        lowest = artifact.manifest.cutoff.get("min_score", np.inf) if plan.is_judged else np.inf
    for width in (1,) if lowest == np.inf else (FIRST_WIDTH, MAX_SORTED):
        found, unseen = vector_candidates(artifact, vector, min(width, artifact.rows), plan.allowed)
        is_reached = found.reach(lowest)
        is_complete = width >= artifact.rows or unseen.rank_score == -np.inf or not is_reached.all()
        if is_complete:
            break
    levels = find_levels(artifact, plan, float(found.cosines.max(initial=-np.inf)))
    near = found.take(is_reached)
    if not plan.words_weight:
        return near, levels, is_complete
    lexical, rows, scores = _require_words(artifact), NO_ROWS, np.empty(0, np.float32)
    if plan.min_score is None:
        contained = contained_share(artifact, plan.text)[0] if levels is None else levels.contained
        scores, rows = lexical.search(plan.text, MAX_SORTED, _word_mask(artifact, plan.allowed))
        is_complete &= len(rows) < MAX_SORTED or bool(scores[-1] < contained)
        is_added = (scores >= contained) & ~np.isin(rows, near.rows)
        rows, scores = rows[is_added], scores[is_added]
    known = near.rows, near.cosines, lexical.score(plan.text, near.rows)
    return _with_words(artifact, plan, vector, known, (rows, scores)), levels, is_complete


def contained_share(artifact: IndexVersion, text: str) -> tuple[float, bool]:
    """Return the text score from which on an item contains the words of a query, and True if items have these words."""
    is_familiar = artifact.lexical.known_share(text) >= _FAMILIAR
    return _CONTAINED if is_familiar else _NEAR_SPELLING, is_familiar


def find_levels(artifact: IndexVersion, plan: Plan, best: float) -> Levels | None:
    """Return the levels of a query whose best score is `best`.

    Without a cut-off, and for a query that is not by text alone, there are none, and every result is possible.
    """
    cutoff: float | None = artifact.manifest.cutoff.get("min_score")
    if cutoff is None or not plan.is_judged:
        return None
    strong: float = artifact.manifest.cutoff.get("strong_score", -math.inf)
    if best < strong:
        contained, is_familiar = contained_share(artifact, plan.text)
        return Levels(cutoff if is_familiar else strong, cutoff, contained)
    return Levels(cutoff, cutoff, _CONTAINED)


def _nothing_fits(levels: Levels | None, found: Candidates) -> bool:
    if levels is None:
        return False
    return not (found.reach(levels.likely) | (found.text_scores >= levels.contained)).any()
