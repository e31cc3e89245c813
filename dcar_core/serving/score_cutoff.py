"""A score below which a search by words has found nothing: a cut-off from pairs that belong together.

All but 5 % of validation texts reach the cut-off with their own images, by the scores that a search gives. It is
cautious, because true pairs must not be lost: a query about something that is not in the gallery may still find items
above it. `benchmarks/cutoff.py` measures how many.
"""

from dataclasses import dataclass

import numpy as np

from dcar_core.util.arrays import Floats

MISSED = 0.05  # share of the true pairs below the cut-off [ours]
STRONG = 0.95  # share of the true pairs below a strong score [ours]


@dataclass(frozen=True)
class Cutoff:
    """A cut-off and its evidence.

    strong_score: the score that one true pair in twenty reaches, and hardly any pair that does not belong together.
    kept: share (0 to 1) of pairs that reach a cut-off chosen from the other half of them; None with a single pair.
    pairs: how many there were.
    """

    min_score: float
    strong_score: float
    kept: float | None
    pairs: int


def compute_cutoff(scores: Floats) -> Cutoff:
    """Compute the cut-off for the scores (N,) of N >= 1 pairs."""
    order = np.random.default_rng(0).permutation(len(scores))
    halves = np.array_split(scores[order], 2)
    kept = None
    if len(scores) > 1:
        judged = zip(halves, reversed(halves), strict=True)
        kept = round(sum(int((half >= _quantile(other)).sum()) for half, other in judged) / len(scores), 4)
    return Cutoff(round(_quantile(scores), 6), round(_quantile(scores, STRONG), 6), kept, len(scores))


def _quantile(scores: Floats, share: float = MISSED) -> float:
    return float(np.quantile(scores.astype(np.float64), share))
