"""Candidates of a search: by their vectors alone, or by vectors and words together.

- A hybrid rank score is cosine + bonus * text score. The text score is the share of the query's words that an item
  contains; see `index_jobs.store.lexical`. The bonus follows from the weight w of the words and from the spread of the
  query's cosines over the gallery: 3 standard deviations * w / (1 - w).
- Every candidate of one list gets its exact score in the other. No row outside the candidates can exceed
  `highest_unseen`, which tells the caller whether to request more.
- Words that more than `_TEXT_ROWS` items contain are ranked approximately: among the rows of the highest cosines, whose
  number is the same for every page of about the same depth, and the best rows by text score.
"""

from dataclasses import dataclass

import numpy as np

from app.search.errors import UnsupportedQueryError
from app.search.ranking.rows import RankableIndex, row_vectors
from dcar_core.util.arrays import Floats, Mask, Rows

_SPREADS = 3.0  # standard deviations of cosines that a full match is worth at equal weights
_TEXT_ROWS = 512  # rows of a query's words whose cosines are computed
_COMMON_WIDTH = 64  # least number of cosines that common words are looked up among
_LEAST_REST = 1e-4  # in place of 1 - w for a weight of 1; cosines then order equal matches only


@dataclass(frozen=True, slots=True)
class HybridQuery:
    """The words of a query and their weight, above 0 and at most 1."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows that may be the best, in any order.

    Attributes:
        rows: int64 (m,).
        cosines: to the query, (m,).
        text_scores: (m,), 0 without words.
        rank_scores: the order of the results, (m,).
        highest_unseen: rank score that no other row exceeds; -inf if there is none.
        highest_unseen_cosine: cosine that no other row exceeds.
    """

    rows: Rows
    cosines: Floats
    text_scores: Floats
    rank_scores: Floats
    highest_unseen: float
    highest_unseen_cosine: float


def vector_candidates(snapshot: RankableIndex, vector: Floats, width: int, mask: Mask | None) -> Candidates:
    """Return the `width` rows with the highest cosines."""
    scores, rows = snapshot.artifact.search(vector[None], width, mask)  # [1, width], [1, width]
    last = float(scores[0, -1]) if rows[0, -1] >= 0 else -np.inf
    found = rows[0] >= 0
    cosines = scores[0][found]
    return Candidates(rows[0][found], cosines, np.zeros_like(cosines), cosines, last, last)


def hybrid_candidates(
    snapshot: RankableIndex, vector: Floats, query: HybridQuery, width: int, mask: Mask | None
) -> Candidates:
    """Return the `width` or more rows with the highest cosines, and those with the highest text scores.

    Raises:
        UnsupportedQueryError: the version has no lexical index.
    """
    lexical = snapshot.artifact.lexical
    if not len(snapshot.sample_vectors):
        raise UnsupportedQueryError(
            "Hybrid search needs the vectors of items, and the index keeps none.", field="hybrid"
        )
    if lexical is None:
        message = "This index is older than hybrid search; rebuild it with `dcar index build`."
        raise UnsupportedQueryError(message, field="hybrid")
    artifact = snapshot.artifact
    allowed = mask
    if artifact.manifest.removed:
        allowed = artifact.live if mask is None else mask & artifact.live
    text_scores, text_rows = lexical.search(query.text, _TEXT_ROWS, allowed)
    is_text_complete = len(text_rows) < _TEXT_ROWS
    if not is_text_complete:
        width = min(max(_COMMON_WIDTH, 1 << (width - 1).bit_length()), artifact.rows)
    near = vector_candidates(snapshot, vector, width, mask)
    text_score_of = dict(zip(text_rows.tolist(), text_scores.tolist(), strict=True))
    unscored = np.array([row for row in near.rows.tolist() if row not in text_score_of], np.int64)
    if not is_text_complete:  # otherwise these rows contain no word
        text_score_of |= zip(unscored.tolist(), lexical.score(query.text, unscored).tolist(), strict=True)
    far_rows = np.setdiff1d(text_rows, near.rows)
    far_cosines = row_vectors(snapshot, far_rows.tolist()) @ vector if len(far_rows) else np.empty(0, np.float32)
    rows, cosines = np.concatenate((near.rows, far_rows)), np.concatenate((near.cosines, far_cosines))
    scores = np.array([text_score_of.get(row, 0.0) for row in rows.tolist()], np.float32)
    bonus = _bonus(snapshot, vector, query.weight)
    return Candidates(
        rows, cosines, scores, cosines + np.float32(bonus) * scores,
        near.highest_unseen if is_text_complete else -np.inf, near.highest_unseen_cosine,
    )  # fmt: skip


def _bonus(snapshot: RankableIndex, vector: Floats, weight: float) -> float:
    """Return the rank score of a text score of 1."""
    return _SPREADS * weight / max(1 - weight, _LEAST_REST) * float(np.std(snapshot.sample_vectors @ vector))
