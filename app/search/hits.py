"""Hits: the rows that answer a query, in order. Candidates are found, then put in
order.

- A filter applies inside the search of the index, so as many results return as were
  requested, if they exist.
- The order is by score, or by the field of `sort`, "-price" descending. Rows of equal
  score, such as equal images, are in the order of the index, so a longer list begins
  with the shorter.
- Only matches are sorted, wherever they are in the index: rows whose cosine reaches the
  `min_score` of the query, or without one the calibrated cut-off, and then also rows
  that contain the words of a hybrid query. At most `MAX_SORTED` of each, the best ones.
  Rows without a value come last in both directions.
- Near-duplicates are folded into the first of them, and the first row of a group stands
  for the others. The search widens until enough different results are found.
- A result is likely if its score reaches the calibrated cut-off, or if the item
  contains the words of the query. The scores of a query whose words no item has say
  little: it needs a strong score, and its other results that reach the cut-off are
  possible. A query by an image needs a strong score, too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from app.search.errors import UnsupportedQueryError
from app.search.query import Plan
from app.search.served_version import (
    GroupField,
    ServedVersion,
    first_positions,
    group_field,
    is_exact_index,
    row_vectors,
    sort_positions,
)
from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.lexical import LexicalIndex, text_bonus
from index_jobs.row_filter import NO_ROWS, RowFilter

Level = Literal["likely", "possible", "unlikely"]

MAX_SORTED = 10_000
_MAX_ROWS_FOLDED = 10_000  # searched for one page of different results
_MAX_ROWS_TIED = 2_048  # searched to put equal scores in order
_ROWS_PER_GROUP = 4  # rows requested at first for each group
_ROUNDING = 1e-6  # of a unit vector's product with itself
# share of the query's words that items have, from which on its scores count
_FAMILIAR = 0.5
# share of the words, by their rarity, from which on an item fits whatever its image
# shows
_CONTAINED = 0.6
_NEAR_SPELLING = 0.4  # the same where no item has the words
_TEXT_ROWS = 512  # rows of a query's words up to which the cosines of all are computed
_COMMON_TEXT_ROWS = 256  # rows of more common words whose cosines are computed
_COMMON_WIDTH = 64  # least number of cosines that common words are looked up among
_NO_SCORES: Floats = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Hits:
    """Rows that may answer a query, in any order, and then those of a plan in order, up
    to the next page.
    """

    rows: Rows = field(default_factory=lambda: NO_ROWS)  # int64 (m,)
    cosines: Floats = field(default_factory=lambda: _NO_SCORES)  # (m,)
    # (m,), 0 without words
    text_scores: Floats = field(default_factory=lambda: _NO_SCORES)
    # (m,), which order the results
    rank_scores: Floats = field(default_factory=lambda: _NO_SCORES)
    # the highest rank score that any other row may have; -inf if there is none
    unseen: float = -math.inf
    unseen_cosine: float = -math.inf  # its cosine
    # cosine of a likely hit; inf if no cut-off is known for the query
    likely: float = math.inf
    possible: float = -math.inf  # cosine of a possible one
    contained: float = math.inf  # text score of a likely one
    nothing_fits: bool = False  # whether there is a cut-off, and no hit is likely
    # near-duplicates of each hit; empty unless the plan folds them
    folded: list[Rows] = field(default_factory=list)
    matched: Rows | None = None  # all rows that fit a sorted query; None without `sort`
    count: int | None = None  # their number, or that of their groups
    is_exact: bool = True  # False if more rows may fit a sorted query
    # of hits that were scored again, by their rows
    rerank_scores: Mapping[int, float] = field(default_factory=dict)

    def take(self, positions: Any) -> "Hits":
        """Return the hits at these positions: numbers, a mask or a slice."""
        names = ("rows", "cosines", "text_scores", "rank_scores")
        return replace(self, **{name: getattr(self, name)[positions] for name in names})

    def reach(self, score: float) -> Mask:
        """Return which cosines reach a score, as responses round them: bool (m,)."""
        reached: Mask = self.cosines.astype(np.float64).round(6) >= score
        return reached

    def level(self, position: int) -> Level:
        score = round(self.cosines[position].item(), 6)
        if score >= self.likely or self.text_scores[position] >= self.contained:
            return "likely"
        return "possible" if score >= self.possible else "unlikely"


def find_hits(served: ServedVersion, plan: Plan, vector: Floats) -> Hits:
    """Return the hits of a plan for the vector (E,) of its query.

    Raises:
        SearchError: the index keeps no vectors or words, or a field cannot group.
    """
    index = served.index
    if not index.rows:
        return Hits(matched=NO_ROWS, count=0 if plan.sort else None)
    groups = group_field(served, plan.group_by) if plan.group_by else None
    if plan.sort:
        return _sorted_hits(served, plan, vector, groups)
    if groups is None:
        hits = best_rows(index, plan, vector, plan.depth, plan.allowed)
    else:
        hits = best_of_groups(index, plan, vector, groups)
    return _judged(
        index,
        plan,
        hits,
        float(hits.cosines.max()) if len(hits.rows) else math.inf,
    )


def best_rows(
    index: IndexVersion,
    plan: Plan,
    vector: Floats,
    count: int,
    allowed: RowFilter | None,
) -> Hits:
    """Return the `count` best rows of a plan among the allowed ones; it may fold their
    near-duplicates.

    Raises:
        UnsupportedQueryError: `fold` or `hybrid` needs vectors or words, and the index
            keeps none.
    """
    lowest = -np.inf if plan.min_score is None else plan.min_score
    total = index.rows
    widest = min(total, _MAX_ROWS_TIED if plan.fold is None else _MAX_ROWS_FOLDED)
    width = min(count + 1 + len(plan.excluded), total)
    while True:
        if plan.words_weight:
            best = hybrid_candidates(index, plan, vector, width, allowed)
        else:
            best = vector_candidates(index, vector, width, allowed)
        best = best.take(np.lexsort((best.rows, -best.rank_scores)))
        if plan.excluded:
            best = best.take(~np.isin(best.rows, plan.excluded))
        if plan.min_score is not None:
            best = best.take(best.reach(plan.min_score))
        if plan.fold is None:
            best = best.take(slice(count))
        else:
            best = fold_rows(index, best, plan.fold, count)
        if width >= widest or best.unseen == -np.inf or best.unseen_cosine < lowest:
            return best
        # no missing row ties with the last
        if len(best.rows) >= count and best.rank_scores[-1] > best.unseen:
            return best
        width = min(2 * width, total)


def best_of_groups(
    index: IndexVersion,
    plan: Plan,
    vector: Floats,
    groups: GroupField,
) -> Hits:
    """Return the best row of each of the best groups, up to the next page.

    The search goes on among rows of other groups until there are enough.
    """
    allowed = plan.allowed
    parts = list[Hits]()
    missing = plan.depth
    if plan.excluded:
        allowed = groups.outside(groups.codes[list(plan.excluded)], allowed)
    remaining = allowed
    while missing > 0:
        best = best_rows(index, plan, vector, _ROWS_PER_GROUP * missing, remaining)
        best = best.take(first_positions(groups.codes[best.rows])[:missing])
        parts.append(best)
        missing -= len(best.rows)
        if not len(best.rows):
            break
        remaining = groups.outside(groups.codes[best.rows], remaining)
    return Hits(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.cosines for part in parts]),
        np.concatenate([part.text_scores for part in parts]),
        np.concatenate([part.rank_scores for part in parts]),
    )


def vector_candidates(
    index: IndexVersion,
    vector: Floats,
    width: int,
    allowed: RowFilter | None,
    *,
    is_narrow: bool = False,
) -> Hits:
    """Return the `width` rows with the highest cosines."""
    # [1, width], [1, width]
    scores, rows = index.search(vector[None], width, allowed, is_narrow=is_narrow)
    last = float(scores[0, -1]) if rows[0, -1] >= 0 else -np.inf
    is_row = rows[0] >= 0
    cosines = scores[0][is_row]
    return Hits(rows[0][is_row], cosines, np.zeros_like(cosines), cosines, last, last)


def hybrid_candidates(
    index: IndexVersion,
    plan: Plan,
    vector: Floats,
    width: int,
    allowed: RowFilter | None,
) -> Hits:
    """Return the `width` or more rows with the highest cosines, and those with the
    highest text scores.

    - A rank score is cosine + bonus * text score; see `index_jobs.index.lexical`. Every
      candidate of one list gets its exact score in the other.
    - Words that `_TEXT_ROWS` items or more contain are ranked approximately: only the
      `_COMMON_TEXT_ROWS` best rows by the words are added. The number of rows by cosine
      then depends only on the page's depth, rounded.
    - First pages without a filter use a narrow index search, which returns twice as
      many rows in less time, though not exactly the highest.

    Raises:
        UnsupportedQueryError: the index keeps no vectors.
    """
    lexical = _require_words(index)
    mask = _word_mask(index, allowed)
    is_text_complete = lexical.count_matches(plan.text) < _TEXT_ROWS
    text_scores, text_rows = lexical.search(
        plan.text,
        _TEXT_ROWS if is_text_complete else _COMMON_TEXT_ROWS,
        mask,
    )
    is_narrow = not is_text_complete and mask is None and width <= _COMMON_WIDTH
    if not is_text_complete:
        wide = 1 << (max(width, _COMMON_WIDTH) - 1).bit_length()
        width = min(2 * _COMMON_WIDTH if is_narrow else wide, index.rows)
    near = vector_candidates(index, vector, width, allowed, is_narrow=is_narrow)
    is_same = near.rows[:, None] == text_rows  # [near, text]
    if is_text_complete:
        near_scores = is_same @ text_scores
    else:
        near_scores = lexical.score(plan.text, near.rows)
    near = replace(
        near,
        text_scores=near_scores,
        unseen=near.unseen if is_text_complete else -np.inf,
    )
    is_far = ~is_same.any(0)
    return _with_words(
        index,
        plan,
        vector,
        near,
        text_rows[is_far],
        text_scores[is_far],
    )


def _with_words(
    index: IndexVersion,
    plan: Plan,
    vector: Floats,
    near: Hits,
    far_rows: Rows,
    far_scores: Floats,
) -> Hits:
    """Return near rows, with cosines and text scores, and far rows, with text scores;
    and their rank scores.
    """
    rows = near.rows
    cosines = near.cosines
    text_scores = near.text_scores
    if len(far_rows):
        rows = np.concatenate((rows, far_rows))
        text_scores = np.concatenate((text_scores, far_scores))
        cosines = np.concatenate((cosines, row_vectors(index, far_rows) @ vector))
    bonus: Any = np.float32(text_bonus(index.sample_vectors, vector, plan.words_weight))
    scores = cosines + bonus * text_scores
    return replace(
        near,
        rows=rows,
        cosines=cosines,
        text_scores=text_scores,
        rank_scores=scores,
    )


def _require_words(index: IndexVersion) -> LexicalIndex:
    if not len(index.sample_vectors):
        raise UnsupportedQueryError(
            "Hybrid search needs vectors of items; the index keeps none.",
            field="hybrid",
        )
    return index.lexical


def _word_mask(index: IndexVersion, allowed: RowFilter | None) -> Mask | None:
    """Return the rows that may be found by their words, bool (rows,); None for all."""
    if allowed is None:
        return index.live if index.manifest.removed else None
    return allowed.mask


def fold_rows(index: IndexVersion, ranked: Hits, fold: float, count: int) -> Hits:
    """Return the first `count` rows that differ; near-duplicates fold into the one that
    they are most similar to.
    """
    threshold = fold - _ROUNDING
    end = len(ranked.rows)
    # [m, E]
    vectors = row_vectors(index, ranked.rows) if end else np.empty((0, 0), np.float32)
    # similarity of each row to a shown row before it
    closest = np.full(end, -np.inf, np.float32)
    owners = np.arange(end)  # position of this shown row
    shown: list[int] = []  # positions
    position = 0
    while position < end:
        if closest[position] < threshold:
            shown.append(position)
            owners[position] = position
            similarity = vectors[position + 1 : end] @ vectors[position]
            nearer = (
                position + 1 + np.flatnonzero(similarity > closest[position + 1 : end])
            )
            closest[nearer] = similarity[nearer - position - 1]
            owners[nearer] = position
            # of the rest, only rows that fold into these matter
            if len(shown) == count:
                end = 1 + int(np.flatnonzero(closest >= threshold).max(initial=-1))
        position += 1
    shown = shown[:count]
    owned = ((first, np.flatnonzero(owners[:end] == first)) for first in shown)
    return replace(
        ranked.take(shown),
        folded=[
            ranked.rows[positions[positions != first]] for first, positions in owned
        ],
    )


def _sorted_hits(
    served: ServedVersion,
    plan: Plan,
    vector: Floats,
    groups: GroupField | None,
) -> Hits:
    """Return the hits in the order of a field.

    The count is exact unless there are more than `MAX_SORTED`, or an approximate index
    may have missed some.
    """
    index = served.index
    excluded = np.array(plan.excluded, np.int64)
    hits = _fitting(index, plan, vector)
    keys, excluded = (
        rows if groups is None else groups.codes[rows] for rows in (hits.rows, excluded)
    )
    hits = hits.take(~np.isin(keys, excluded))
    hits = hits.take(
        np.lexsort(
            (hits.rows, -hits.rank_scores, sort_positions(served, plan.sort)[hits.rows])
        )
    )
    matched = hits.rows
    if groups is not None:
        hits = hits.take(first_positions(groups.codes[matched]))
    hits = replace(_with_verdict(hits), matched=matched, count=len(hits.rows))
    if plan.fold is not None:
        hits = fold_rows(index, hits, plan.fold, plan.depth)
    return hits.take(slice(plan.depth))


def _fitting(index: IndexVersion, plan: Plan, vector: Floats) -> Hits:
    """Return all rows that fit a plan, and their levels."""
    lowest = plan.min_score
    if lowest is None:
        lowest = plan.cutoff.get("min_score", np.inf)
    width = min(1 if lowest == np.inf else MAX_SORTED, index.rows)
    near = vector_candidates(index, vector, width, plan.allowed)
    is_reached = near.reach(lowest)
    is_complete = width == index.rows or near.unseen == -np.inf or not is_reached.all()
    hits = _judged(index, plan, near, float(near.cosines.max(initial=-np.inf))).take(
        is_reached
    )
    if plan.words_weight:
        lexical = _require_words(index)
        rows = NO_ROWS
        scores = _NO_SCORES
        if plan.min_score is None:
            if hits.likely < np.inf:
                contained = hits.contained
            else:
                contained = contained_share(index, plan.text)[0]
            scores, rows = lexical.search(
                plan.text,
                MAX_SORTED,
                _word_mask(index, plan.allowed),
            )
            is_complete &= len(rows) < MAX_SORTED or bool(scores[-1] < contained)
            is_added = (scores >= contained) & ~np.isin(rows, hits.rows)
            rows = rows[is_added]
            scores = scores[is_added]
        known = replace(hits, text_scores=lexical.score(plan.text, hits.rows))
        hits = _with_words(index, plan, vector, known, rows, scores)
    return replace(hits, is_exact=is_complete and is_exact_index(index))


def contained_share(index: IndexVersion, text: str) -> tuple[float, bool]:
    """Return the text score from which on an item contains the words of a query, and
    True if items have these words.
    """
    is_familiar = index.lexical.known_share(text) >= _FAMILIAR
    return _CONTAINED if is_familiar else _NEAR_SPELLING, is_familiar


def _judged(index: IndexVersion, plan: Plan, hits: Hits, best: float) -> Hits:
    """Set the levels of a query whose best score is `best`, if there is a cut-off for
    it.
    """
    if not plan.cutoff:
        return hits
    cutoff: float = plan.cutoff["min_score"]
    likely = cutoff
    contained = _CONTAINED
    strong = plan.cutoff.get("strong_score", -math.inf)
    if not plan.text:  # an image
        likely = strong
    elif best < strong:
        contained, is_familiar = contained_share(index, plan.text)
        likely = cutoff if is_familiar else strong
    return _with_verdict(
        replace(hits, likely=likely, possible=cutoff, contained=contained)
    )


def _with_verdict(hits: Hits) -> Hits:
    is_likely = hits.reach(hits.likely) | (hits.text_scores >= hits.contained)
    return replace(hits, nothing_fits=hits.likely < math.inf and not is_likely.any())
