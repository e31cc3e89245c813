"""The position-based click model, estimated from counts of clicks.

    P(click on item i for query q at position k) = examined[k] * attractive[q, i]

- Source: Chuklin, Markov, de Rijke, "Click Models for Web Search" (2015), sections 3.3 and 4.3.
- Only items that one query showed at several positions, after a retraining or for another filter, tell the two factors
  apart [ours]; all others would only repeat the starting values.
- The values equate the clicks at each position with those expected, where each pair's attraction is its clicks by what
  was examined. Equations that are linear in the clicks hold for pairs with few impressions too; expectation
  maximization, which fits a value to each pair, was up to 150 % off there (`benchmarks/loop.py`) [ours].
- Positions with few observations take the value of the nearest one before them [ours].
"""

from dataclasses import dataclass

import numpy as np

_MIN_CLICKS = 20  # of a position, for a value of its own
_MIN_SHOWN = 100
_ROUNDS = 2000
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Cells:
    """Counts of impressions, one entry for each pair (a code) and position (from 1)."""

    pair: np.ndarray
    position: np.ndarray
    shown: np.ndarray
    clicked: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Cells":
        return Cells(self.pair[chosen], self.position[chosen], self.shown[chosen], self.clicked[chosen])


@dataclass(frozen=True)
class Propensities:
    """examined: (P,) chance that a position is looked at, as a part of that of position 1.

    pairs: number of pairs of query and item that were seen at several positions, which the values come from; with 0,
    all values are 1.
    """

    examined: np.ndarray
    pairs: int

    def at(self, position: np.ndarray) -> np.ndarray:
        """Return the values at positions, from 1; beyond the last one, that of the last one."""
        values: np.ndarray = self.examined[np.minimum(position, len(self.examined)) - 1]
        return values


def estimate(cells: Cells) -> Propensities:
    """Estimate the propensities of positions from counts."""
    last = int(cells.position.max(initial=1))
    several = np.flatnonzero(np.bincount(cells.pair) > 1)
    used = cells[np.isin(cells.pair, several)]
    clicks, shown = (np.bincount(used.position, each, last + 1)[1:] for each in (used.clicked, used.shown))
    known = (clicks >= _MIN_CLICKS) & (shown >= _MIN_SHOWN)
    used = used[known[used.position - 1]]
    if not known[0] or known.sum() < 2:
        return Propensities(np.ones(last), 0)
    examined = _maximize(used, last)
    examined /= examined[0]
    for position in np.flatnonzero(~known):
        examined[position] = examined[position - 1]
    return Propensities(examined, len(several))


def _maximize(cells: Cells, last: int) -> np.ndarray:
    _, pair = np.unique(cells.pair, return_inverse=True)
    position = cells.position - 1
    clicks, of_pair = np.bincount(position, cells.clicked, last), np.bincount(pair, cells.clicked)
    examined = np.where(clicks > 0, 1.0, 0.0)
    for _ in range(_ROUNDS):
        before = examined
        attractive = of_pair / np.maximum(np.bincount(pair, cells.shown * before[position]), 1e-9)
        expected = np.bincount(position, cells.shown * attractive[pair], last)
        examined = np.minimum(np.divide(clicks, expected, out=np.zeros(last), where=expected > 0), 1e9)
        examined = examined / examined[0]
        if np.abs(examined - before).max() < _TOLERANCE:
            break
    return examined
