"""Comparison of two rankings of the same queries, by a paired bootstrap (Efron 1979).

- Each resample takes the same queries for both rankings, which removes the variance of the queries' difficulty.
- Images are resampled, each with all its captions: captions of one image are not independent [ours]. Nor are images of
  a category that was not trained on, which `Scores.grouped` keeps together.
- Seeds are averaged before, so the intervals are about queries. The spread of seeds is another source of error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Rows
from dcar_core.util.retrieval_metrics import Ranks

RESAMPLES = 10_000
CONFIDENCE = 0.95
MEASURES = ("t2i_r1", "i2t_r1", "mean_r1")
_CHUNK = 500  # resamples at a time


@dataclass(frozen=True)
class Scores:
    """Scores of a ranking from 0 to 1, summed over the queries of each of I units: queries, images, or groups of these.

    queries, sums: (M, I), the number of queries and the sum of their scores, for each of M measures.
    measures: their names; one more is that of their mean.
    """

    queries: NDArray[np.floating[Any]]
    sums: NDArray[np.floating[Any]]
    measures: Sequence[str] = MEASURES

    @classmethod
    def of_ranks(cls, ranks: Ranks, image_of_text: Rows, k: int = 1) -> "Scores":
        """Return the hits among the first k of the texts and of the images, by image."""
        image = np.searchsorted(ranks.described, image_of_text)
        texts, hits = (np.bincount(image, weights) for weights in (None, ranks.text < k))
        return cls(np.array([texts, np.ones(len(texts))]), np.array([hits, ranks.image < k]))

    @classmethod
    def mean(cls, runs: Sequence["Scores"]) -> "Scores":
        """Return the mean over runs on the same queries."""
        return replace(runs[0], sums=np.mean([run.sums for run in runs], axis=0))

    def grouped(self, group_of: Sequence[int] | Rows) -> "Scores":
        """Return the scores of groups, which are resampled whole. group_of: (I,)."""
        queries, sums = (np.array([np.bincount(group_of, row) for row in own]) for own in (self.queries, self.sums))
        return replace(self, queries=queries, sums=sums)

    def percent(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return each measure, and their mean if it has a name, with each unit taken `counts` (R, I) times."""
        pairs = zip(self.sums, self.queries, strict=True)
        found = [100 * (counts @ sums) / (counts @ queries) for sums, queries in pairs]
        mean = [sum(found) / len(found)]
        return np.stack((found + mean)[: len(self.measures)], axis=1)


@dataclass(frozen=True)
class Estimate:
    """A figure in percent (or percentage points) with the ends of its 95 % interval; f"{it:+}" shows the signs."""

    value: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def __neg__(self) -> "Estimate":
        return Estimate(0 - self.value, 0 - self.high, 0 - self.low)

    def __format__(self, sign: str) -> str:
        return f"{self.value:{sign}.1f} ({self.low:{sign}.1f} to {self.high:{sign}.1f})"

    def points(self, of: str = "", note: str = "") -> str:
        """Return a difference in words: "+1.2 points (95 % interval -0.3 to +2.7)"."""
        of, note = of and f" {of}", note and f"; {note}"
        return f"{self.value:+.1f} points{of} (95 % interval {self.low:+.1f} to {self.high:+.1f}{note})"


@dataclass(frozen=True)
class Comparison:
    """Two rankings of the same queries: their figures, and the differences with intervals.

    model, baseline, difference: an estimate of each measure.
    p: two-sided p-value of the difference in the last measure.
    queries, images, resampled: numbers of captions, of images, and of what is resampled: images or groups of them.
    """

    model: dict[str, Estimate]
    baseline: dict[str, Estimate]
    difference: dict[str, Estimate]
    p: float
    queries: int
    images: int
    resampled: int

    @classmethod
    def of(cls, model: Scores, baseline: Scores, *, resamples: int = RESAMPLES) -> "Comparison":
        """Compare two rankings. Raise ValueError if they are of different queries."""
        if not np.array_equal(model.queries, baseline.queries):
            units = f"{model.queries.shape[1]} and {baseline.queries.shape[1]} images"
            raise ValueError(f"scores of {units} are not of the same queries")
        count = model.queries.shape[1]
        drawn = [(model.percent(counts), baseline.percent(counts)) for counts in _resampled(count, resamples)]
        own, other = map(np.concatenate, zip(*drawn, strict=True))  # [1 + R, M]
        difference = own - other
        tail = min((difference[1:, -1] <= 0).sum(), (difference[1:, -1] >= 0).sum())
        return cls(
            _estimates(model.measures, own),
            _estimates(model.measures, other),
            _estimates(model.measures, difference),
            p=min(1.0, 2 * (int(tail) + 1) / (resamples + 1)),
            queries=int(model.queries[0].sum()),
            images=int(model.queries[-1].sum()),
            resampled=count,
        )

    @property
    def gain(self) -> Estimate:
        """The difference in the last measure, such as mean R@1."""
        return [*self.difference.values()][-1]

    @property
    def visible(self) -> float:
        """The smallest gain that is not chance: half of the interval, but at least a hit of one image."""
        return max((self.gain.high - self.gain.low) / 2, 100 / self.resampled)


def _resampled(units: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yield how often each unit is taken, (r, n): first without resampling, then in each resample."""
    yield np.ones((1, units), np.int64)
    rng, shares = np.random.default_rng(0), np.full(units, 1 / units)
    for start in range(0, resamples, _CHUNK):
        yield rng.multinomial(units, shares, size=min(_CHUNK, resamples - start))


def _estimates(measures: Sequence[str], figures: NDArray[np.float64]) -> dict[str, Estimate]:
    """Return the estimates of (1 + R, M) figures: the values, and those of all resamples."""
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(figures[1:], [tail, 1 - tail], axis=0)
    columns = zip(figures[0].tolist(), *ends.tolist(), strict=True)
    return {measure: Estimate(*column) for measure, column in zip(measures, columns, strict=True)}
