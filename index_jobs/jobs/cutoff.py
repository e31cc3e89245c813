"""A score below which a search by words has found nothing: a cut-off from pairs that belong together, or from words.

- All but 5 % of validation texts reach the cut-off with their own images. A query about something that is not in the
  gallery may still find items above it; `benchmarks/cutoff.py` measures how many.
- Without pairs, the scores of common words tell how high those of words and images are that do not belong together.
"""

from typing import Any

import numpy as np

from dcar_core.util.arrays import Floats

MISSED = 0.05  # share of the true pairs below the cut-off [ours]
STRONG = 0.95  # share of the true pairs below a strong score [ours]
CHANCE = 0.01  # share of words and images without a relation that reach the cut-off [ours]


def compute_cutoff(scores: Floats) -> dict[str, Any]:
    """Return the cut-off for the scores (N,) of N >= 1 pairs.

    min_score: the cut-off. strong_score: one true pair in twenty reaches it. kept: the share of pairs that reach a
    cut-off chosen from the other half of them, None with a single pair. pairs: their number.
    """
    scores = scores.astype(np.float64)
    one, other = np.array_split(np.random.default_rng(0).permutation(scores), 2)
    reached = [half >= np.quantile(rest, MISSED) for half, rest in ((one, other), (other, one)) if len(rest)]
    min_score, strong_score = (round(float(np.quantile(scores, share)), 6) for share in (MISSED, STRONG))
    kept = round(float(np.concatenate(reached).mean()), 4) if len(scores) > 1 else None
    return {"min_score": min_score, "strong_score": strong_score, "kept": kept, "pairs": len(scores)}


def cutoff_of_words(scores: Floats, best: Floats) -> dict[str, Any]:
    """Return a cut-off by the scores (W, M) of W words with a sample of the items, and by their best (W,) of all items.

    min_score: one of a hundred scores reaches it. strong_score: half of the words reach it with their best item.
    words: their number.
    """
    min_score = float(np.quantile(scores.astype(np.float64), 1 - CHANCE))
    strong_score = max(min_score, float(np.median(best)))
    return {"min_score": round(min_score, 6), "strong_score": round(strong_score, 6), "words": len(scores)}
