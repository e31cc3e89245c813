"""The best rows of a query, best first, and how likely each fits.

- A filter applies inside the search of the index, so as many results return as were requested, if they exist.
- Near-duplicates are folded into the best of them. The search widens until enough different results are found.
- Rows of equal score, such as equal images, are in the order of the index, so a longer list begins with the shorter.
- A result is likely if its score reaches the calibrated cut-off, or if the item contains the words of the query. The
  scores of a query whose words no item has say little: it needs a strong score, and its other results that reach the
  cut-off are possible.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from app.search.errors import UnsupportedQueryError
from app.search.plan import Plan
from app.search.query import Level, Match
from app.search.rows import row_vectors
from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.lexical.fusion import text_bonus
from index_jobs.index.lexical.lexical_index import LexicalIndex
from index_jobs.row_filter import RowFilter

_MAX_ROWS_FOLDED = 10_000  # searched for one page of different results
_MAX_ROWS_TIED = 2_048  # searched to put equal scores in order
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
    highest_unseen: float  # rank score that no other row exceeds; -inf if there is none
    highest_unseen_cosine: float


def vector_candidates(
    artifact: IndexVersion, vector: Floats, width: int, allowed: RowFilter | None, *, is_narrow: bool = False
) -> Candidates:
    """Return the `width` rows with the highest cosines."""
    scores, rows = artifact.search(vector[None], width, allowed, is_narrow=is_narrow)  # [1, width], [1, width]
    last = float(scores[0, -1]) if rows[0, -1] >= 0 else -np.inf
    found = rows[0] >= 0
    cosines = scores[0][found]
    return Candidates(rows[0][found], cosines, np.zeros_like(cosines), cosines, last, last)


def hybrid_candidates(
    artifact: IndexVersion, vector: Floats, text: str, weight: float, width: int, allowed: RowFilter | None
) -> Candidates:
    """Return the `width` or more rows with the highest cosines, and those with the highest text scores.

    - A rank score is cosine + bonus * text score; see `index_jobs.index.lexical.fusion`. Every candidate of one list
      gets its exact score in the other.
    - Words that `_TEXT_ROWS` items or more contain are ranked approximately: only the `_COMMON_TEXT_ROWS` best rows by
      the words are added. The number of rows by cosine then depends only on the page's depth, rounded.
    - First pages without a filter use a narrow index search, which returns twice as many rows in less time, though not
      exactly the highest.

    Args:
        weight: of the words of `text`, above 0 and at most 1.

    Raises:
        UnsupportedQueryError: the index keeps no vectors.
    """
    lexical = require_words(artifact)
    mask = word_mask(artifact, allowed)
    is_text_complete = lexical.count_matches(text) < _TEXT_ROWS
    text_scores, text_rows = lexical.search(text, _TEXT_ROWS if is_text_complete else _COMMON_TEXT_ROWS, mask)
    is_narrow = not is_text_complete and mask is None and width <= _COMMON_WIDTH
    if not is_text_complete:
        wide = 1 << (max(width, _COMMON_WIDTH) - 1).bit_length()
        width = min(2 * _COMMON_WIDTH if is_narrow else wide, artifact.rows)
    near = vector_candidates(artifact, vector, width, allowed, is_narrow=is_narrow)
    is_same = near.rows[:, None] == text_rows  # [near, text]
    near_scores = is_same @ text_scores if is_text_complete else lexical.score(text, near.rows)
    is_far = ~is_same.any(0)
    far_rows = text_rows[is_far]
    far_cosines = row_vectors(artifact, far_rows) @ vector
    cosines, scores = np.concatenate((near.cosines, far_cosines)), np.concatenate((near_scores, text_scores[is_far]))
    bonus: Any = np.float32(text_bonus(artifact.sample_vectors, vector, weight))
    return Candidates(
        np.concatenate((near.rows, far_rows)), cosines, scores, cosines + bonus * scores,
        near.highest_unseen if is_text_complete else -np.inf, near.highest_unseen_cosine,
    )  # fmt: skip


def require_words(artifact: IndexVersion) -> LexicalIndex:
    """Return the lexical index. Raise UnsupportedQueryError if the index keeps no vectors."""
    if not len(artifact.sample_vectors):
        raise UnsupportedQueryError("Hybrid search needs vectors of items; the index keeps none.", field="hybrid")
    return artifact.lexical


def word_mask(artifact: IndexVersion, allowed: RowFilter | None) -> Mask | None:
    """Return the rows that may be found by their words, bool (rows,); None for all."""
    if allowed is None:
        return artifact.live if artifact.manifest.removed else None
    return allowed.mask


def rank(
    artifact: IndexVersion, vector: Floats, plan: Plan, count: int, allowed: RowFilter | None = None
) -> list[Match]:
    """Return the `count` best rows of a plan among the allowed ones; see `rows.filter_rows`.

    Raises:
        UnsupportedQueryError: `fold` or `hybrid` needs vectors or words, and the index keeps none.
    """
    lowest, fold = -np.inf if plan.min_score is None else plan.min_score, plan.query.fold
    total = artifact.rows
    widest = min(total, _MAX_ROWS_TIED if fold is None else _MAX_ROWS_FOLDED)
    width = min(count + 1 + len(plan.excluded_rows), total)
    while True:
        if plan.words_weight:
            found = hybrid_candidates(artifact, vector, plan.query.query, plan.words_weight, width, allowed)
        else:
            found = vector_candidates(artifact, vector, width, allowed)
        best = _sorted_matches(found, plan, count if fold is None else None)
        if fold is not None:
            best = fold_matches(artifact, best, fold, count)
        is_complete = width >= widest or found.highest_unseen == -np.inf or found.highest_unseen_cosine < lowest
        if is_complete:
            return best
        if len(best) >= count:
            last = float(found.rank_scores[found.rows == best[-1].row][0])
            if last > found.highest_unseen:  # no missing row ties with the last
                return best
        width = min(2 * width, total)


def _sorted_matches(found: Candidates, plan: Plan, count: int | None) -> list[Match]:
    """Return the candidates that a plan allows, best first; `count` of them, None for all."""
    order = np.lexsort((found.rows, -found.rank_scores))
    if plan.excluded_rows:
        order = order[~np.isin(found.rows[order], list(plan.excluded_rows))]
    if plan.min_score is not None:
        reached = [round(cosine, 6) >= plan.min_score for cosine in found.cosines[order].tolist()]
        order = order[np.array(reached, np.bool_)]
    order = order[:count]
    texts = found.text_scores[order].tolist() if plan.words_weight else [None] * len(order)
    return list(map(Match, found.rows[order].tolist(), found.cosines[order].tolist(), texts))


def fold_matches(artifact: IndexVersion, ranked: list[Match], fold: float, count: int) -> list[Match]:
    """Return the first `count` rows that differ, each with the near-duplicates that are most similar to it."""
    if not ranked:
        return []
    threshold = fold - _ROUNDING
    vectors = row_vectors(artifact, [match.row for match in ranked])  # [m, E]
    closest = np.full(len(ranked), -np.inf, np.float32)  # similarity of each row to a shown row before it
    owners = np.arange(len(ranked))  # place of this shown row
    shown: list[int] = []  # places
    place, end = 0, len(ranked)
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
    for first in shown[:count]:
        ranked[first].near = [ranked[each].row for each in np.flatnonzero(owners[:end] == first) if each != first]
    return [ranked[first] for first in shown[:count]]


class Levels(NamedTuple):
    """What the level of a match follows from. Scores are compared as responses round them."""

    likely: float  # score of a likely match
    possible: float  # score of a possible one
    contained: float  # text score of a likely one

    def level_of(self, score: float, text_score: float) -> Level:
        if (rounded := round(score, 6)) >= self.likely or text_score >= self.contained:
            return "likely"
        return "possible" if rounded >= self.possible else "unlikely"


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
        contained, is_familiar = contained_share(artifact, plan.query.query)
        return Levels(cutoff if is_familiar else strong, cutoff, contained)
    return Levels(cutoff, cutoff, _CONTAINED)


def judge(artifact: IndexVersion, plan: Plan, ranked: list[Match]) -> float | None:
    """Set the levels of matches, from the first one on, and return the score of a likely one, None without levels."""
    levels = find_levels(artifact, plan, max((match.score for match in ranked), default=math.inf))
    if levels is None:
        return None
    for match in ranked:
        match.level = levels.level_of(match.score, match.text_score or 0.0)
    return levels.likely
