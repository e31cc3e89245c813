"""Candidates of a search: by their vectors alone, or by vectors and words together.

- A hybrid rank score is cosine + bonus * text score; see `index_jobs.store.lexical.fusion`. The text score is the share
  of the query's words that an item contains.
- Every candidate of one list gets its exact score in the other. No row outside the candidates can exceed
  `highest_unseen`, which tells the caller whether to request more.
- Words that `_TEXT_ROWS` items or more contain are ranked approximately. Candidates are the rows with the highest
  cosines, and the `_COMMON_TEXT_ROWS` best rows by the query's rarer words.
- The number of rows by cosine depends only on the page's depth, rounded up. First pages without a filter use a narrow
  index search, which returns twice as many rows in less time, though not exactly the highest.
"""

from dataclasses import dataclass

import numpy as np

from app.search.errors import UnsupportedQueryError
from app.search.ranking.rows import row_vectors
from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.store.artifact import Artifact
from index_jobs.store.lexical.fusion import text_bonus

_TEXT_ROWS = 512  # rows of a query's words up to which the cosines of all are computed
_COMMON_TEXT_ROWS = 256  # rows of more common words whose cosines are computed
_COMMON_WIDTH = 64  # least number of cosines that common words are looked up among


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


def vector_candidates(
    artifact: Artifact, vector: Floats, width: int, mask: Mask | None, *, is_narrow: bool = False
) -> Candidates:
    """Return the `width` rows with the highest cosines."""
    scores, rows = artifact.search(vector[None], width, mask, is_narrow=is_narrow)  # [1, width], [1, width]
    last = float(scores[0, -1]) if rows[0, -1] >= 0 else -np.inf
    found = rows[0] >= 0
    cosines = scores[0][found]
    return Candidates(rows[0][found], cosines, np.zeros_like(cosines), cosines, last, last)


def hybrid_candidates(
    artifact: Artifact, vector: Floats, text: str, weight: float, width: int, mask: Mask | None
) -> Candidates:
    """Return the `width` or more rows with the highest cosines, and those with the highest text scores.

    Args:
        text: the words of the query.
        weight: of the words, above 0 and at most 1.

    Raises:
        UnsupportedQueryError: the version has no lexical index.
    """
    lexical = artifact.lexical
    if not len(artifact.sample_vectors):
        raise UnsupportedQueryError(
            "Hybrid search needs the vectors of items, and the index keeps none.", field="hybrid"
        )
    if lexical is None:
        message = "This index is older than hybrid search; rebuild it with `dcar index build`."
        raise UnsupportedQueryError(message, field="hybrid")
    allowed = mask
    if artifact.manifest.removed:
        allowed = artifact.live if mask is None else mask & artifact.live
    is_text_complete = lexical.count_matches(text) < _TEXT_ROWS
    limit = _TEXT_ROWS if is_text_complete else _COMMON_TEXT_ROWS
    text_scores, text_rows = lexical.search(text, limit, allowed, by_rare_terms=not is_text_complete)
    is_narrow = not is_text_complete and allowed is None and width <= _COMMON_WIDTH
    if not is_text_complete:
        wide = 1 << (max(width, _COMMON_WIDTH) - 1).bit_length()
        width = min(2 * _COMMON_WIDTH if is_narrow else wide, artifact.rows)
    near = vector_candidates(artifact, vector, width, mask, is_narrow=is_narrow)
    is_same = near.rows[:, None] == text_rows  # [near, text]
    near_scores = is_same @ text_scores if is_text_complete else lexical.score(text, near.rows)
    is_far = ~is_same.any(0)
    far_rows = text_rows[is_far]
    far_cosines = row_vectors(artifact, far_rows) @ vector if len(far_rows) else np.empty(0, np.float32)
    cosines, scores = np.concatenate((near.cosines, far_cosines)), np.concatenate((near_scores, text_scores[is_far]))
    return Candidates(
        np.concatenate((near.rows, far_rows)), cosines, scores,
        cosines + np.float32(text_bonus(artifact.sample_vectors, vector, weight)) * scores,
        near.highest_unseen if is_text_complete else -np.inf, near.highest_unseen_cosine,
    )  # fmt: skip
