"""The best rows of a query, best first.

- A filter applies inside the search of the index, so as many results return as were requested, if they exist.
- Near-duplicates are folded into the best of them. The search widens until enough different results are found.
- Rows of equal score, such as equal images, are in the order of the index, so a longer list begins with the shorter.
"""

from dataclasses import dataclass, replace

import numpy as np

from app.search.plan import Plan
from app.search.ranking.hybrid import Candidates, hybrid_candidates, vector_candidates
from app.search.ranking.rows import row_vectors
from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.store.artifact import Artifact

_MAX_ROWS_FOLDED = 10_000  # searched for one page of different results
_MAX_ROWS_TIED = 2_048  # searched to put equal scores in order
_ROUNDING = 1e-6  # of a unit vector's product with itself
_FOLD_BLOCK = 128  # rows compared at once


@dataclass(frozen=True, slots=True)
class RankedRow:
    """A row of the index.

    Attributes:
        score: cosine to the query.
        folded: rows of its near-duplicates.
        rerank_score: cosine under the exact pair weights; None without re-ranking.
        text_score: share of the query's words that the item contains; None unless the search is hybrid.
    """

    row: int
    score: float
    folded: tuple[int, ...] = ()
    rerank_score: float | None = None
    text_score: float | None = None


def rank(artifact: Artifact, vector: Floats, plan: Plan, count: int, mask: Mask | None = None) -> list[RankedRow]:
    """Return the `count` best rows of a plan among those of a mask, bool (rows,); see `rows.filter_mask`.

    Args:
        vector: of the query, (E,), L2-normalized.

    Raises:
        UnsupportedQueryError: `fold` or `hybrid` needs vectors or words, and the index keeps none.
    """
    lowest, fold = -np.inf if plan.min_score is None else plan.min_score, plan.query.fold
    total = artifact.rows
    widest = min(total, _MAX_ROWS_TIED if fold is None else _MAX_ROWS_FOLDED)
    width = min(count + 1 + len(plan.excluded_rows), total)
    while True:
        if plan.words_weight:
            found = hybrid_candidates(artifact, vector, plan.query.query, plan.words_weight, width, mask)
        else:
            found = vector_candidates(artifact, vector, width, mask)
        order = _sorted_places(found, plan)
        best = _ranked_rows(found, order if fold is not None else order[:count], plan)
        if fold is not None:
            best = _fold(artifact, best, fold - _ROUNDING, count)
        is_complete = width >= widest or found.highest_unseen == -np.inf or found.highest_unseen_cosine < lowest
        if is_complete:
            return best
        if len(best) >= count:
            last = float(found.rank_scores[found.rows == best[-1].row][0])
            if last > found.highest_unseen:  # no missing row ties with the last
                return best
        width = min(2 * width, total)


def _sorted_places(found: Candidates, plan: Plan) -> Rows:
    """Return the places of the candidates that a plan allows, best first."""
    order: Rows = np.lexsort((found.rows, -found.rank_scores))
    if plan.excluded_rows:
        order = order[~np.isin(found.rows[order], list(plan.excluded_rows))]
    if plan.min_score is not None:
        reached = [round(cosine, 6) >= plan.min_score for cosine in found.cosines[order].tolist()]
        order = order[np.array(reached, np.bool_)]
    return order


def _ranked_rows(found: Candidates, places: Rows, plan: Plan) -> list[RankedRow]:
    texts = [None] * len(places) if not plan.words_weight else found.text_scores[places].tolist()
    values = zip(found.rows[places].tolist(), found.cosines[places].tolist(), texts, strict=True)
    return [RankedRow(row, cosine, text_score=text_score) for row, cosine, text_score in values]


def _fold(artifact: Artifact, ranked: list[RankedRow], threshold: float, count: int) -> list[RankedRow]:
    """Return the best `count` rows that differ, each with the near-duplicates that are most similar to it.

    Rows are compared in blocks: one product of matrices is many times as fast as one product for each row.
    """
    if not ranked:
        return []
    vectors = row_vectors(artifact, [each.row for each in ranked])  # [m, E]
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
    return [replace(ranked[place], folded=tuple(rows)) for place, rows in zip(positions[:count], members, strict=False)]
