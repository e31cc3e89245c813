"""The position-based click model, estimated from clicks.

    P(click on item i for query q at position k) = examined[k] * attractive[q, i]

- Source: Chuklin, Markov, de Rijke, "Click Models for Web Search" (2015), sections 3.3 and 4.3.
- Only items that one query showed at several positions, after a retraining or for another filter, tell the two factors
  apart [ours]; all others would only repeat the starting values.
- The values equate the clicks at each position with those expected, where each pair's attraction is its clicks by what
  was examined. Equations that are linear in the clicks hold for pairs with few impressions too; expectation
  maximization, which fits a value to each pair, was up to 150 % off there (`benchmarks/loop.py`) [ours].
- Positions with few observations take the value of the nearest one before them [ours].
"""

import numpy as np

_MIN_CLICKS = 20  # of a position, for a value of its own
_MIN_SHOWN = 100
_ROUNDS = 2000
_TOLERANCE = 1e-6


def estimate(pair: np.ndarray, position: np.ndarray, clicked: np.ndarray) -> tuple[np.ndarray, int]:
    """Estimate the chance that each position is looked at, as a part of that of position 1.

    Args:
        pair, position, clicked: (N,) of each impression: a code of query and item, the position from 1, 0 or 1.

    Returns:
        (P,) the chances, and the number of pairs seen at several positions, which they come from; with 0, all are 1.
    """
    last = int(position.max(initial=1))
    _, pair = np.unique(pair, return_inverse=True)
    keys, cell = np.unique(pair * last + position - 1, return_inverse=True)
    shown, clicked = np.bincount(cell), np.bincount(cell, clicked)
    pair, position = np.divmod(keys, last)
    is_several = np.bincount(pair) > 1
    used = is_several[pair]
    clicks, views = (np.bincount(position[used], counts[used], last) for counts in (clicked, shown))
    known = (clicks >= _MIN_CLICKS) & (views >= _MIN_SHOWN)
    used &= known[position]
    if not known[0] or known.sum() < 2:
        return np.ones(last), 0
    examined = _solve(last, *(values[used] for values in (pair, position, shown, clicked)))
    for place in np.flatnonzero(~known):
        examined[place] = examined[place - 1]
    return examined, int(is_several.sum())


def _solve(last: int, pair: np.ndarray, position: np.ndarray, shown: np.ndarray, clicked: np.ndarray) -> np.ndarray:
    clicks, of_pair = np.bincount(position, clicked, last), np.bincount(pair, clicked)
    examined = np.where(clicks > 0, 1.0, 0.0)
    for _ in range(_ROUNDS):
        before = examined
        attractive = of_pair / np.maximum(np.bincount(pair, shown * before[position]), 1e-9)
        expected = np.bincount(position, shown * attractive[pair], last)
        examined = np.minimum(np.divide(clicks, expected, out=np.zeros(last), where=expected > 0), 1e9)
        examined = examined / examined[0]
        if np.abs(examined - before).max() < _TOLERANCE:
            break
    return examined
