"""Recall@k in both directions, hard-negative accuracy, and measures of graded judgements.

- Ties and NaN scores count against the model.
- Scores of equal vectors differ in the last bits, depending on their place in a matrix product. Differences below
  TIE_TOLERANCE are therefore ties.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats, Rows

TIE_TOLERANCE = 1e-6  # about ten times the error of float32 in a product of unit vectors
CHUNK = 1024  # queries that are scored at a time


@dataclass(frozen=True)
class Ranks:
    """The number of wrong targets that score at least as high as the best true one; rank 0 is a hit at k = 1.

    text: (T,) rank of each text's image. image: (D,) rank of the text of each described image; described: (D,) rows of
    these images.
    """

    text: NDArray[np.int64]
    image: NDArray[np.int64]
    described: NDArray[np.int64]

    def reordered(self, first: Rows, scores: Floats, image_of_text: Rows) -> "Ranks":
        """Return the ranks after the first images (T, k) of each text are sorted by other scores (T, k)."""
        is_own = first == image_of_text[:, None]
        own = np.where(is_own, scores, -np.inf).max(1)
        before = ~(scores < own[:, None] - TIE_TOLERANCE) & ~is_own
        return replace(self, text=np.where(is_own.any(1), before.sum(1), self.text))


def compute_ranks(text: Floats, image: Floats, image_of_text: NDArray[np.int64]) -> Ranks:
    """Return the ranks in both directions; arguments as in `recall_at_k`."""
    t2i = _ranks(text, image, [np.array([i]) for i in image_of_text])
    described, counts = np.unique(image_of_text, return_counts=True)
    texts_of = np.split(np.argsort(image_of_text, kind="stable"), np.cumsum(counts)[:-1])
    return Ranks(t2i, _ranks(image[described], text, texts_of), described)


def recall_at_k(text: Floats, image: Floats, image_of_text: Rows, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return retrieval recall in percent.

    Args:
        text: (T, E) and image: (I, E), float32, L2-normalized.
        image_of_text: (T,) the row of each text's image; an image may have several texts.

    Returns:
        {"t2i_r1": .., "i2t_r1": .., ...}. Image-to-text counts a hit when any caption of the image is among
        the first k. A score equal to the true one ranks above it.
    """
    return recall_of_ranks(compute_ranks(text, image, image_of_text), ks)


def recall_of_ranks(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return recall in percent from ranks."""
    percent = {f"t2i_r{k}": 100 * float((ranks.text < k).mean()) for k in ks}
    return percent | {f"i2t_r{k}": 100 * float((ranks.image < k).mean()) for k in ks}


def _ranks(query: Floats, target: Floats, truth: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return for each query the number of wrong targets that do not score clearly below its best true one."""
    ranks = np.empty(len(query), np.int64)
    for i, (scores, own) in enumerate(zip(_scores(query, target), truth, strict=True)):
        below = scores < scores[own].max() - TIE_TOLERANCE  # False for NaN
        ranks[i] = (~below).sum() - (~below[own]).sum()
    return ranks


def ndcg(query: Floats, target: Floats, right: Sequence[NDArray[np.int64]], k: int = 10) -> float:
    """Return the mean normalized discounted cumulative gain among the first k targets, in percent.

    Args:
        right: the rows of every right target of each query, all equally right. A wrong target with an equal score
            ranks above them.
    """
    discounts, gains = 1 / np.log2(np.arange(2, k + 2)), list[float]()
    for scores, own in zip(_scores(query, target), right, strict=True):
        best = np.sort(scores[own])[::-1][:k]
        wrong = np.delete(scores, own)
        places = np.arange(len(best)) + (~(wrong < best[:, None] - TIE_TOLERANCE)).sum(1)
        gains.append(discounts[places[places < k]].sum() / discounts[: len(own)].sum())
    return 100 * float(np.mean(gains))


def graded_measures(found: NDArray[np.int64], judged: Sequence[NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
    """Return nDCG@k, MRR@k and recall@k of each query in percent, as trec_eval computes them.

    The gain of a grade is linear. For MRR and recall, a grade above 0 is relevant. A query without any has 0.

    Args:
        found: (Q, k) grades of the first k results; 0 where there is no judgement, or no further result.
        judged: every grade of each query.
    """
    k = found.shape[1]
    discounts, is_hit = 1 / np.log2(np.arange(2, k + 2)), found > 0
    best = [np.sort(grades)[: -k - 1 : -1] for grades in judged]
    ideal = np.array([grades @ discounts[: len(grades)] for grades in best])
    relevant = np.array([np.count_nonzero(grades > 0) for grades in judged])
    return {
        f"nDCG@{k}": 100 * (found @ discounts) / np.where(ideal > 0, ideal, 1),
        f"MRR@{k}": 100 * is_hit.any(1) / (1 + is_hit.argmax(1)),
        f"recall@{k}": 100 * is_hit.sum(1) / np.maximum(relevant, 1),
    }


def first_targets(query: Floats, target: Floats, k: int) -> Rows:
    """Return (Q, k) the rows of the best targets of each query, at most all, best first."""
    return np.array([np.argsort(-scores, kind="stable")[:k] for scores in _scores(query, target)])


def hard_negative_accuracy(image: Floats, positive: Floats, negatives: Sequence[Floats]) -> float | None:
    """Return the percentage of images whose caption scores above all of its negatives, among images that have some."""
    hits = [
        bool(own @ caption - TIE_TOLERANCE > (wrong @ own).max())
        for own, caption, wrong in zip(image, positive, negatives, strict=True)
        if len(wrong)
    ]
    return 100 * sum(hits) / len(hits) if hits else None


def _scores(query: Floats, target: Floats) -> Iterator[Floats]:
    """Yield the scores of each query with all targets."""
    for start in range(0, len(query), CHUNK):
        yield from query[start : start + CHUNK] @ target.T
