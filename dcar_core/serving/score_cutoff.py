"""From which score on a search by words has found something: a cut-off from pairs that belong together.

    scores    of validation texts with their own pictures, as a search gives them
    cut-off   the score that all but 5 % of them reach

It is chosen by what must not be lost, so it is cautious: what is far from every query goes, but a query about something
that is not in the gallery at all may still find strangers above it. How many is measured by `benchmarks/cutoff.py`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MISSED = 0.05  # of the true pairs lie below the cut-off [ours]


@dataclass(frozen=True)
class Cutoff:
    """A cut-off, and what it rests on.

    kept: the share (0 to 1) of pairs that reach a cut-off chosen without them: each half is judged by the other's. None
        with a single pair.
    pairs: how many there were.
    """

    min_score: float
    kept: float | None
    pairs: int


def cutoff(scores: NDArray[np.float32]) -> Cutoff:
    """The cut-off for the scores (N,) of N >= 1 pairs."""
    order = np.random.default_rng(0).permutation(len(scores))
    halves = np.array_split(scores[order], 2)
    kept = None
    if len(scores) > 1:
        judged = zip(halves, reversed(halves), strict=True)
        kept = round(sum(int((half >= _lowest(other)).sum()) for half, other in judged) / len(scores), 4)
    return Cutoff(round(_lowest(scores), 6), kept, len(scores))


def _lowest(scores: NDArray[np.float32]) -> float:
    return float(np.quantile(scores.astype(np.float64), MISSED))
