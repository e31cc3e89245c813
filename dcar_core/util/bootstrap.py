"""Paired bootstrap over queries (Efron 1979): intervals of recall, and of the difference between two models.

- Each resample takes the same queries for both models, which removes the variance of the queries' difficulty.
- Images are resampled, each with all its captions: captions of one image are not independent [ours]. Nor are images of
  a category that was not trained on, which `Hits.grouped` keeps together.
- Seeds are averaged before, so the intervals are about queries. The spread of seeds is another source of error.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Rows
from dcar_core.util.retrieval_metrics import Ranks

RESAMPLES = 10_000
CONFIDENCE = 0.95
MEASURES = ("t2i_r1", "i2t_r1", "mean_r1")
_CHUNK = 500  # resamples at a time


@dataclass(frozen=True)
class Hits:
    """R@1 of each query of I images or groups of images, from 0 to 1 (fractions are means over seeds).

    texts: (I,) captions of each. text_hits, image_hits: (I,) the sums of its captions' and of its images' hits.
    images: (I,) images of each group; None if each is one image.
    """

    texts: NDArray[np.float64]
    text_hits: NDArray[np.float64]
    image_hits: NDArray[np.float64]
    images: NDArray[np.float64] | None = None

    @classmethod
    def from_ranks(cls, ranks: Ranks, image_of_text: Rows, k: int = 1) -> "Hits":
        """Return the hits among the first k, in place of those at 1."""
        image = np.searchsorted(ranks.described, image_of_text)
        texts, hits = (np.bincount(image, weights).astype(np.float64) for weights in (None, ranks.text < k))
        return cls(texts, hits, (ranks.image < k).astype(np.float64))

    @classmethod
    def mean(cls, runs: Sequence["Hits"]) -> "Hits":
        """Return the mean over runs on the same queries."""
        text_hits = np.mean([run.text_hits for run in runs], axis=0)
        return cls(runs[0].texts, text_hits, np.mean([run.image_hits for run in runs], axis=0), runs[0].images)

    @property
    def sizes(self) -> NDArray[np.float64]:
        """The number of images of each."""
        return np.ones_like(self.texts) if self.images is None else self.images

    def grouped(self, group_of: Rows) -> "Hits":
        """Return the hits of groups, which are resampled whole. group_of: (I,)."""
        own = (self.texts, self.text_hits, self.image_hits, self.sizes)
        return Hits(*(np.bincount(group_of, values).astype(np.float64) for values in own))


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

    def __format__(self, sign: str) -> str:
        return f"{self.value:{sign}.1f} ({self.low:{sign}.1f} to {self.high:{sign}.1f})"


@dataclass(frozen=True)
class PairedDifference:
    """A model's figures, and their difference to a baseline's on the same queries.

    model, baseline, difference: an estimate for each of `MEASURES`.
    p: two-sided p-value of the difference in mean R@1.
    queries, images, resampled: numbers of captions, of images, and of what is resampled: images or groups of them.
    """

    model: Mapping[str, Estimate]
    baseline: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]
    p: float
    queries: int
    images: int
    resampled: int


def compare_hits(model: Hits, baseline: Hits, *, resamples: int = RESAMPLES) -> PairedDifference:
    """Compare two models on the same queries. Raise ValueError if the hits are of different queries."""
    if not np.array_equal(model.texts, baseline.texts):
        raise ValueError(f"hits of {len(model.texts)} and {len(baseline.texts)} images are not of the same queries")
    figures = [_recalls((model, baseline), counts) for counts in _resampled(len(model.texts), resamples)]
    own, other = np.concatenate(figures, axis=1)  # [1 + R, 3]
    difference = own - other
    estimates = [dict(zip(MEASURES, _estimates(each), strict=True)) for each in (own, other, difference)]
    tail = min((difference[1:, 2] <= 0).sum(), (difference[1:, 2] >= 0).sum())
    return PairedDifference(
        estimates[0],
        estimates[1],
        estimates[2],
        p=min(1.0, 2 * (int(tail) + 1) / (resamples + 1)),
        queries=int(model.texts.sum()),
        images=int(model.sizes.sum()),
        resampled=len(model.texts),
    )


def _recalls(models: Sequence[Hits], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (M, r, 3): text-to-image, image-to-text and mean R@1 with each unit taken `counts` (r, I) times."""
    text = [100 * (counts @ hits.text_hits) / (counts @ hits.texts) for hits in models]
    image = [100 * (counts @ hits.image_hits) / (counts @ hits.sizes) for hits in models]
    return np.stack([text, image, np.add(text, image) / 2], axis=2)


def estimate_means(values: NDArray[np.float64], *, resamples: int = RESAMPLES) -> list[Estimate]:
    """Return the mean over queries of each of M measures (Q, M); of paired differences, if the values are these."""
    means = [counts @ values / len(values) for counts in _resampled(len(values), resamples)]
    return _estimates(np.concatenate(means))


def _resampled(items: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Yield how often each item is taken, (r, n): first without resampling, then in each resample."""
    yield np.ones((1, items), np.int64)
    rng, shares = np.random.default_rng(0), np.full(items, 1 / items)
    for start in range(0, resamples, _CHUNK):
        yield rng.multinomial(items, shares, size=min(_CHUNK, resamples - start))


def _estimates(figures: NDArray[np.float64]) -> list[Estimate]:
    """Return the estimates of (1 + R, M) figures: the values, and those of all resamples."""
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(figures[1:], [tail, 1 - tail], axis=0)
    return [Estimate(*map(float, column)) for column in zip(figures[0], *ends, strict=True)]
