"""Measures of rankings, and the comparison of two rankings of the same queries by a
paired bootstrap (Efron 1979).

- Ties and NaN scores count against the model.
- Scores of equal vectors differ in the last bits, depending on their place in a matrix
  product. Differences below TIE_TOLERANCE are therefore ties.
- Each resample takes the same queries for both rankings, which removes the variance of
  the queries' difficulty.
- Images are resampled, each with all its captions: captions of one image are not
  independent [ours]. Nor are images of a category that was not trained on, which
  `Scores.grouped` keeps together.
- Seeds are averaged before, so the intervals are about queries. The spread of seeds is
  another source of error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats, Rows

# about ten times the error of float32 in a product of unit vectors
TIE_TOLERANCE = 1e-6
CHUNK = 1024  # queries that are scored at a time
RESAMPLES = 10_000
CONFIDENCE = 0.95
MEASURES = ("t2i_r1", "i2t_r1", "mean_r1")
_CHUNK = 500  # resamples at a time


@dataclass(frozen=True)
class Ranks:
    """The number of wrong targets that score at least as high as the best true one;
    rank 0 is a hit at k = 1.

    text: (T,) rank of each text's image. image: (D,) rank of the text of each described
    image; described: (D,) rows of these images.
    """

    text: NDArray[np.int64]
    image: NDArray[np.int64]
    described: NDArray[np.int64]

    def reordered(self, first: Rows, scores: Floats, image_of_text: Rows) -> "Ranks":
        """Return the ranks after the first images (T, k) of each text are sorted by
        other scores (T, k).
        """
        is_own = first == image_of_text[:, None]
        own = np.where(is_own, scores, -np.inf).max(1)
        before = ~(scores < own[:, None] - TIE_TOLERANCE) & ~is_own
        return replace(self, text=np.where(is_own.any(1), before.sum(1), self.text))


def compute_ranks(
    text: Floats,
    image: Floats,
    image_of_text: NDArray[np.int64],
) -> Ranks:
    """Return the ranks in both directions; arguments as in `recall_at_k`."""
    t2i = _ranks(text, image, [np.array([i]) for i in image_of_text])
    described, counts = np.unique(image_of_text, return_counts=True)
    texts_of = np.split(
        np.argsort(image_of_text, kind="stable"), np.cumsum(counts)[:-1]
    )
    return Ranks(t2i, _ranks(image[described], text, texts_of), described)


def recall_at_k(
    text: Floats,
    image: Floats,
    image_of_text: Rows,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Return retrieval recall in percent.

    Args:
        text: (T, E) and image: (I, E), float32, L2-normalized.
        image_of_text: (T,) the row of each text's image; an image may have several
            texts.

    Returns:
        {"t2i_r1": .., "i2t_r1": .., ...}. Image-to-text counts a hit when any caption
        of the image is among the first k. A score equal to the true one ranks above it.
    """
    return recall_of_ranks(compute_ranks(text, image, image_of_text), ks)


def recall_of_ranks(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return recall in percent from ranks."""
    percent = {f"t2i_r{k}": 100 * float((ranks.text < k).mean()) for k in ks}
    return percent | {f"i2t_r{k}": 100 * float((ranks.image < k).mean()) for k in ks}


def _ranks(
    query: Floats,
    target: Floats,
    truth: list[NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Return for each query the number of wrong targets that do not score clearly below
    its best true one.
    """
    ranks = np.empty(len(query), np.int64)
    for i, (scores, own) in enumerate(zip(_scores(query, target), truth, strict=True)):
        below = scores < scores[own].max() - TIE_TOLERANCE  # False for NaN
        ranks[i] = (~below).sum() - (~below[own]).sum()
    return ranks


def graded_measures(
    grades: NDArray[np.int64], judged: Sequence[NDArray[np.int64]]
) -> dict[str, NDArray[np.float64]]:
    """Return nDCG@k, MRR@k and recall@k of each query in percent, as trec_eval computes
    them.

    The gain of a grade is linear. For MRR and recall, a grade above 0 is relevant. A
    query without any has 0.

    Args:
        grades: (Q, k) grades of the first k results; 0 where there is no judgement, or
            no further result.
        judged: every grade of each query.
    """
    k = grades.shape[1]
    discounts = 1 / np.log2(np.arange(2, k + 2))
    is_hit = grades > 0
    best = [np.sort(grades)[: -k - 1 : -1] for grades in judged]
    ideal = np.array([ranked @ discounts[: len(ranked)] for ranked in best])
    relevant = np.array([np.count_nonzero(grades > 0) for grades in judged])
    return {
        f"nDCG@{k}": 100 * (grades @ discounts) / np.where(ideal > 0, ideal, 1),
        f"MRR@{k}": 100 * is_hit.any(1) / (1 + is_hit.argmax(1)),
        f"recall@{k}": 100 * is_hit.sum(1) / np.maximum(relevant, 1),
    }


def first_targets(query: Floats, target: Floats, k: int) -> Rows:
    """Return (Q, k) the rows of the best targets of each query, at most all, best
    first.
    """
    return np.array(
        [np.argsort(-scores, kind="stable")[:k] for scores in _scores(query, target)]
    )


def hard_negative_accuracy(
    image: Floats,
    positive: Floats,
    negatives: Sequence[Floats],
) -> float | None:
    """Return the percentage of images whose caption scores above all of its negatives,
    among images that have some.
    """
    hits = [
        bool(own @ caption - TIE_TOLERANCE > (wrong @ own).max())
        for own, caption, wrong in zip(image, positive, negatives, strict=True)
        if len(wrong)
    ]
    return 100 * sum(hits) / len(hits) if hits else None


def _scores(query: Floats, target: Floats) -> Iterator[Floats]:
    for start in range(0, len(query), CHUNK):
        yield from query[start : start + CHUNK] @ target.T


@dataclass(frozen=True)
class Scores:
    """Scores of a ranking from 0 to 1, summed over the queries of each of I units:
    queries, images, or groups of these.

    queries, sums: (M, I), the number of queries and the sum of their scores, for each
    of M measures. measures: their names; one more is that of their mean.
    """

    queries: NDArray[np.floating[Any]]
    sums: NDArray[np.floating[Any]]
    measures: Sequence[str] = MEASURES

    @classmethod
    def of_ranks(cls, ranks: Ranks, image_of_text: Rows, k: int = 1) -> "Scores":
        """Return the hits among the first k of the texts and of the images, by
        image.
        """
        image = np.searchsorted(ranks.described, image_of_text)
        texts = np.bincount(image)
        hits = np.bincount(image, ranks.text < k)
        return cls(
            np.array([texts, np.ones(len(texts))]), np.array([hits, ranks.image < k])
        )

    @classmethod
    def mean(cls, runs: Sequence["Scores"]) -> "Scores":
        """Return the mean over runs on the same queries."""
        return replace(runs[0], sums=np.mean([run.sums for run in runs], axis=0))

    def grouped(self, group_of: Sequence[int] | Rows) -> "Scores":
        """Return the scores of groups, which are resampled whole. group_of: (I,)."""
        queries, sums = (
            np.array([np.bincount(group_of, row) for row in own])
            for own in (self.queries, self.sums)
        )
        return replace(self, queries=queries, sums=sums)

    def percent(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the measures, and their mean if it has a name, for units taken
        `counts` (R, I) times.
        """
        pairs = zip(self.sums, self.queries, strict=True)
        measures = [
            100 * (counts @ sums) / (counts @ queries) for sums, queries in pairs
        ]
        mean = [sum(measures) / len(measures)]
        return np.stack((measures + mean)[: len(self.measures)], axis=1)


@dataclass(frozen=True)
class Estimate:
    """A figure in percent (or percentage points) with the ends of its 95 % interval;
    f"{it:+}" shows the signs.
    """

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
        of = of and f" {of}"
        note = note and f"; {note}"
        return (
            f"{self.value:+.1f} points{of} (95 % interval {self.low:+.1f} to"
            f" {self.high:+.1f}{note})"
        )


@dataclass(frozen=True)
class Comparison:
    """Two rankings of the same queries: their figures, and the differences with
    intervals.

    model, baseline, difference: an estimate of each measure. queries, images,
    resampled: numbers of captions, of images, and of what is resampled: images or
    groups of them.
    """

    model: dict[str, Estimate]
    baseline: dict[str, Estimate]
    difference: dict[str, Estimate]
    queries: int
    images: int
    resampled: int

    @classmethod
    def of(
        cls,
        model: Scores,
        baseline: Scores,
        *,
        resamples: int = RESAMPLES,
    ) -> "Comparison":
        """Compare two rankings. Raise ValueError if they are of different queries."""
        if not np.array_equal(model.queries, baseline.queries):
            units = f"{model.queries.shape[1]} and {baseline.queries.shape[1]} images"
            raise ValueError(f"scores of {units} are not of the same queries")
        count = model.queries.shape[1]
        drawn = [
            (model.percent(counts), baseline.percent(counts))
            for counts in _resampled(count, resamples)
        ]
        own, other = map(np.concatenate, zip(*drawn, strict=True))  # [1 + R, M]
        return cls(
            _estimates(model.measures, own),
            _estimates(model.measures, other),
            _estimates(model.measures, own - other),
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
        """The smallest gain that is not chance: half of the interval, but at least a
        hit of one image.
        """
        return max((self.gain.high - self.gain.low) / 2, 100 / self.resampled)


def _resampled(units: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yield counts of the units, (r, n): first one of each, then those of the
    resamples.
    """
    yield np.ones((1, units), np.int64)
    rng = np.random.default_rng(0)
    shares = np.full(units, 1 / units)
    for start in range(0, resamples, _CHUNK):
        yield rng.multinomial(units, shares, size=min(_CHUNK, resamples - start))


def _estimates(
    measures: Sequence[str], figures: NDArray[np.float64]
) -> dict[str, Estimate]:
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(figures[1:], [tail, 1 - tail], axis=0)
    columns = zip(figures[0].tolist(), *ends.tolist(), strict=True)
    return {
        measure: Estimate(*column)
        for measure, column in zip(measures, columns, strict=True)
    }
