"""Recall@k in both directions and hard-negative accuracy, computed in chunks.

- Ties and NaN scores count against the model.
- Scores of equal vectors differ in the last bits, depending on their place in a matrix product. Differences below
  TIE_TOLERANCE are therefore ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats

TIE_TOLERANCE = 1e-6  # about ten times the error of float32 in a product of unit vectors
_CHUNK = 1024  # queries that are scored at a time


@dataclass(frozen=True)
class Ranks:
    """The number of wrong targets that score at least as high as the best true one; rank 0 is a hit at k = 1.

    text: (T,) rank of each text's image. image: (D,) rank of the text of each described image; described: (D,) rows of
    these images.
    """

    text: NDArray[np.int64]
    image: NDArray[np.int64]
    described: NDArray[np.int64]


def compute_ranks(text: Floats, image: Floats, image_of_text: NDArray[np.int64]) -> Ranks:
    """Return the ranks in both directions; arguments as in `recall_at_k`."""
    t2i = _ranks(text, image, [np.array([i]) for i in image_of_text])
    texts_of: list[list[int]] = [[] for _ in range(len(image))]
    for t, i in enumerate(image_of_text):
        texts_of[i].append(t)
    described = np.array([i for i, texts in enumerate(texts_of) if texts], np.int64)
    i2t = _ranks(image[described], text, [np.array(texts_of[i]) for i in described])
    return Ranks(t2i, i2t, described)


def recall_at_k(
    text: Floats, image: Floats, image_of_text: NDArray[np.int64], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
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
    for start in range(0, len(query), _CHUNK):
        scores = query[start : start + _CHUNK] @ target.T
        for row, own in enumerate(truth[start : start + _CHUNK]):
            below = scores[row] < scores[row, own].max() - TIE_TOLERANCE  # False for NaN
            ranks[start + row] = (~below).sum() - (~below[own]).sum()
    return ranks


def ndcg(query: Floats, target: Floats, right: Sequence[NDArray[np.int64]], k: int = 10) -> float:
    """Return the mean normalized discounted cumulative gain among the first k targets, in percent.

    Args:
        right: the rows of every right target of each query, all equally right. A wrong target with an equal score
            ranks above them.
    """
    discounts, gains = 1 / np.log2(np.arange(2, k + 2)), list[float]()
    for start in range(0, len(query), _CHUNK):
        scores = query[start : start + _CHUNK] @ target.T
        for row, own in zip(scores, right[start : start + _CHUNK], strict=True):
            best = np.sort(row[own])[::-1][:k]
            wrong = np.delete(row, own)
            places = np.arange(len(best)) + (~(wrong < best[:, None] - TIE_TOLERANCE)).sum(1)
            gains.append(discounts[places[places < k]].sum() / discounts[: len(own)].sum())
    return 100 * float(np.mean(gains))


def best_targets(query: Floats, target: Floats) -> NDArray[np.int64]:
    """Return (Q,) the row of the best target of each query."""
    parts = [(query[i : i + _CHUNK] @ target.T).argmax(1) for i in range(0, len(query), _CHUNK)]
    return np.concatenate(parts)


def hard_negative_accuracy(image: Floats, positive: Floats, negatives: Sequence[Floats]) -> float:
    """Return the percentage of images whose caption scores above all of its negatives, among images that have some."""
    hits = [
        bool(image[i] @ positive[i] - TIE_TOLERANCE > (negatives[i] @ image[i]).max())
        for i in range(len(image))
        if len(negatives[i])
    ]
    return 100 * sum(hits) / len(hits) if hits else float("nan")
