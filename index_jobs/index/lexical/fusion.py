"""Fusion of cosines and text scores, and the weight of the words that suits a gallery.

- A hybrid rank score is cosine + bonus * text score. The bonus follows from the weight w of the words and from the
  spread of the query's cosines over the gallery: 3 standard deviations * w / (1 - w).
- The weight is chosen by validation texts. A text that equals the caption of its item does not count, since the lexical
  index contains it. If few texts remain, the weight is the default.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats, Rows
from index_jobs.index.manifest import DEFAULT_WEIGHT

if TYPE_CHECKING:
    from index_jobs.engines.protocol import ScoredRows
    from index_jobs.index.lexical.lexical_index import LexicalIndex
    from index_jobs.row_filter import RowFilter

WEIGHTS = (0.3, 0.5, DEFAULT_WEIGHT, 0.9)
_SPREADS = 3.0  # standard deviations of cosines that a full match is worth at equal weights
_LEAST_REST = 1e-4  # in place of 1 - w for a weight of 1; cosines then order equal matches only
_SAMPLE = 256  # rows that tell how widely cosines spread
DEPTH = 100  # rows of each list; an image below this rank counts as not found


class _Vectors(Protocol):
    def search(self, vectors: Floats, k: int, rows: "RowFilter | None" = None, /) -> "ScoredRows": ...
    def vectors(self, rows: Rows, /) -> Floats: ...


def text_bonus(sample_vectors: Floats, vector: Floats, weight: float) -> float:
    """Return the rank score of a text score of 1.

    Args:
        sample_vectors: of evenly spread items, (m, E).
    """
    return _SPREADS * weight / max(1 - weight, _LEAST_REST) * float(np.std(sample_vectors @ vector))


def spread_rows(count: int) -> Rows:
    """Return evenly spread rows of so many, whose vectors are `sample_vectors`."""
    return np.arange(0, count, max(1, count // _SAMPLE))[:_SAMPLE]


def hybrid_gains(
    index: _Vectors,
    lexical: "LexicalIndex",
    sample_vectors: Floats,
    queries: Sequence[tuple[str, Floats, int]],
    weights: Sequence[float],
    allowed: "RowFilter | None" = None,
) -> NDArray[np.float64]:
    """Return 1 / log2(1 + rank) of each query's item under each weight, 0 below rank 100: (queries, weights).

    Args:
        queries: text, vector (E,) and the row of the item.
    """
    gains, mask = np.zeros((len(queries), len(weights))), None if allowed is None else allowed.mask
    for number, (text, vector, target) in enumerate(queries):
        near = index.search(vector[None], DEPTH, allowed)[1][0]
        rows = np.union1d(near[near >= 0], lexical.search(text, DEPTH, mask)[1])
        position = int(np.searchsorted(rows, target))
        if position == len(rows) or rows[position] != target:
            continue
        cosines, scores = index.vectors(rows) @ vector, lexical.score(text, rows)
        for column, weight in enumerate(weights):
            ranks = cosines + text_bonus(sample_vectors, vector, weight) * scores
            rank = 1 + int(np.count_nonzero(ranks > ranks[position]))
            gains[number, column] = 1 / np.log2(1 + rank) if rank <= DEPTH else 0.0
    return gains


def choose_weight(
    index: _Vectors, lexical: "LexicalIndex", sample_vectors: Floats, queries: Sequence[tuple[str, Floats, int]]
) -> float:
    """Return the weight of the highest mean gain."""
    means = hybrid_gains(index, lexical, sample_vectors, queries, WEIGHTS).mean(0).round(6).tolist()
    return max(zip(means, WEIGHTS, strict=True), key=lambda each: (each[0], each[1] == DEFAULT_WEIGHT))[1]
