"""Paired bootstrap over queries (Efron 1979): intervals of recall, and of the difference between two models.

- Each resample takes the same queries for both models, which removes the variance of the queries' difficulty.
- Images are resampled, each with all its captions: captions of one image are not independent [ours].
- Seeds are averaged before, so the intervals are about queries. The spread of seeds is another source of error.
"""

from collections.abc import Mapping, Sequence
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
    """R@1 of each query of I images, from 0 to 1 (fractions are means over seeds).

    texts: (I,) captions of each image. text_hits: (I,) the sum of its captions' hits. image_hits: (I,) its own hit.
    """

    texts: NDArray[np.float64]
    text_hits: NDArray[np.float64]
    image_hits: NDArray[np.float64]

    @classmethod
    def from_ranks(cls, ranks: Ranks, image_of_text: Rows) -> "Hits":
        image = np.searchsorted(ranks.described, image_of_text)
        count = len(ranks.described)
        return cls(
            np.bincount(image, minlength=count).astype(np.float64),
            np.bincount(image, weights=ranks.text < 1, minlength=count).astype(np.float64),
            (ranks.image < 1).astype(np.float64),
        )

    @classmethod
    def mean(cls, runs: Sequence["Hits"]) -> "Hits":
        """Return the mean over runs on the same queries."""
        return cls(
            runs[0].texts,
            np.mean([run.text_hits for run in runs], axis=0),
            np.mean([run.image_hits for run in runs], axis=0),
        )


@dataclass(frozen=True)
class Estimate:
    """A figure in percent (or percentage points) with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True)
class PairedDifference:
    """A model's figures, and their difference to a baseline's on the same queries.

    model, baseline, difference: an estimate for each of `MEASURES`.
    p: two-sided p-value of the difference in mean R@1.
    queries: number of captions. images: number of images.
    """

    model: Mapping[str, Estimate]
    baseline: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]
    p: float
    queries: int
    images: int


def compare_hits(model: Hits, baseline: Hits, *, resamples: int = RESAMPLES, seed: int = 0) -> PairedDifference:
    """Compare two models on the same queries. Raise ValueError if the hits are of different queries."""
    if not np.array_equal(model.texts, baseline.texts):
        raise ValueError(f"hits of {len(model.texts)} and {len(baseline.texts)} images are not of the same queries")
    samples = _resample((model, baseline), resamples, seed)  # [2, R, 3]
    values = [_recalls(hits, np.ones((1, len(hits.texts))))[0] for hits in (model, baseline)]
    difference = samples[0] - samples[1]
    tail = min((difference[:, 2] <= 0).sum(), (difference[:, 2] >= 0).sum())
    return PairedDifference(
        _estimates(values[0], samples[0]),
        _estimates(values[1], samples[1]),
        _estimates(values[0] - values[1], difference),
        p=min(1.0, 2 * (int(tail) + 1) / (resamples + 1)),
        queries=int(model.texts.sum()),
        images=len(model.texts),
    )


def _resample(models: Sequence[Hits], resamples: int, seed: int) -> NDArray[np.float64]:
    """Return (M, R, 3): the measures of each model in each resample, in percent."""
    images = len(models[0].texts)
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        counts = rng.multinomial(images, np.full(images, 1 / images), size=size)  # [r, I]
        parts.append(np.stack([_recalls(hits, counts) for hits in models]))
    return np.concatenate(parts, axis=1)


def _recalls(hits: Hits, counts: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (r, 3): text-to-image, image-to-text and mean R@1 with each image taken `counts` (r, I) times."""
    text = 100 * (counts @ hits.text_hits) / (counts @ hits.texts)
    image = 100 * (counts @ hits.image_hits) / counts.sum(1)
    return np.stack([text, image, (text + image) / 2], axis=1)


def _estimates(values: NDArray[np.float64], samples: NDArray[np.float64]) -> dict[str, Estimate]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
    return {name: Estimate(float(values[i]), float(low[i]), float(high[i])) for i, name in enumerate(MEASURES)}
