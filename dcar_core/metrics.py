"""Recall@k in both directions and hard-negative accuracy, in chunks, ties counted against the model."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def recall_at_k(
    text: Floats, image: Floats, image_of_text: NDArray[np.int64], ks: Sequence[int] = (1, 5, 10), chunk: int = 1024
) -> dict[str, float]:
    """Retrieval recall in percent.

    Args:
        text: (T, E) and image: (I, E), float32, L2-normalised.
        image_of_text: (T,) the image that each text describes; an image may have several.

    Returns:
        {"t2i_r1": .., "i2t_r1": .., ...}. Image-to-text counts a hit when any caption of the image is among
        the first k. A score equal to the true one ranks above it.
    """
    t2i = _ranks(text, image, [np.array([i]) for i in image_of_text], chunk)
    texts_of: list[list[int]] = [[] for _ in range(len(image))]
    for t, i in enumerate(image_of_text):
        texts_of[i].append(t)
    described = [i for i, texts in enumerate(texts_of) if texts]
    i2t = _ranks(image[described], text, [np.array(texts_of[i]) for i in described], chunk)
    found = {f"t2i_r{k}": 100 * float((t2i < k).mean()) for k in ks}
    return found | {f"i2t_r{k}": 100 * float((i2t < k).mean()) for k in ks}


def _ranks(query: Floats, target: Floats, truth: list[NDArray[np.int64]], chunk: int) -> NDArray[np.int64]:
    """How many wrong targets score at least as high as the query's best true one."""
    ranks = np.empty(len(query), np.int64)
    for start in range(0, len(query), chunk):
        scores = query[start : start + chunk] @ target.T
        for row, own in enumerate(truth[start : start + chunk]):
            best = scores[row, own].max()
            ranks[start + row] = (scores[row] >= best).sum() - (scores[row, own] >= best).sum()
    return ranks


def hard_negative_accuracy(image: Floats, positive: Floats, negatives: Sequence[Floats]) -> float:
    """Percent of images whose caption scores above all of its swapped negatives; images without any are left out."""
    hits = [
        bool((image[i] @ positive[i]) > (negatives[i] @ image[i]).max()) for i in range(len(image)) if len(negatives[i])
    ]
    return 100 * sum(hits) / len(hits) if hits else float("nan")
