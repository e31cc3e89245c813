"""The last lines of `dcar train`."""

from dataclasses import replace

import numpy as np
import pytest

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.training.adapt import Verdict, verdict_of
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.util.bootstrap import Comparison, Scores


def verdict(adapted: range, untouched: range, images: int = 100, method: str = "dcar+") -> Verdict:
    """Return the verdict on models that find these images, and their captions."""
    hits = (np.isin(np.arange(images), found).astype(float) for found in (adapted, untouched))
    scores = [Scores(np.ones((2, images)), np.array([each, each])) for each in hits]
    return Verdict(method, Comparison.of(*scores, resamples=500), TrainConfig(lr=2e-3, epochs=20))


@pytest.mark.parametrize(
    ("adapted", "untouched", "answer"),
    [
        (range(75), range(50), "Yes: +25.0 points of mean R@1 among 100 validation images (95 % "),
        (
            range(51),
            range(1, 51),
            "Uncertain: +1.0 points of mean R@1 among 100 validation images (95 % ",
        ),
    ],
)
def test_a_gain_was_worth_it_if_it_is_certain(adapted: range, untouched: range, answer: str) -> None:
    found = verdict(adapted, untouched)
    assert found.is_worth_it
    text = str(found)
    assert f"Was it worth it? {answer}" in text
    assert "100 validation pairs" in text
    assert "adapted (dcar+)" in text
    assert "Caveat" not in text
    assert "Next" not in text


@pytest.mark.parametrize("adapted", [range(50), range(25)])
def test_a_model_that_is_no_better_was_not_worth_it(adapted: range) -> None:
    found = verdict(adapted, range(50))
    assert not found.is_worth_it
    assert "No: the untouched model is at least as good" in str(found)
    assert "Next: --method clip-adapter, --lr 0.0005, --epochs 40 --patience 0, more training pairs" in str(found)
    for name in ("clip-adapter", "block-adapters"):
        assert "Next: --lr 0.0005" in str(verdict(adapted, range(50), method=name)), "clip-adapter learns no more"


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (60, "With `rerank`: R@1 of 60.0 (50.0 to 70.0) text-to-image, +10.0 (+5.0 to +16.0) "),
        (50, "With `rerank`: no gain on these pairs"),
    ],
)
def test_the_second_stage_has_a_line_of_its_own(found: int, line: str) -> None:
    by_vectors = verdict(range(50), range(0))
    again = str(replace(by_vectors, reranked=verdict(range(found), range(50)).comparison))
    assert line in again
    plain = str(by_vectors).splitlines()
    assert [each for each in again.splitlines() if not each.startswith("With `rerank`")] == plain


def test_new_categories_are_resampled_whole(backbone: Backbone, pairs: tuple[Dataset, Dataset]) -> None:
    new = [replace(sample, category=f"new {row // 3}") for row, sample in enumerate(pairs[1].samples)]
    adapted, untouched = (seeded_model(backbone, method(name), 0) for name in ("clip-adapter", "clip"))
    for val, categories in ((pairs[1], None), (replace(pairs[1], samples=new), len(new) // 3)):
        splits, cache = {"train": pairs[0], "val": val}, FeatureCache(None, backbone)
        found = verdict_of(adapted, untouched, splits, cache, TrainConfig())
        assert (found.comparison.images, found.comparison.resampled) == (len(new), categories or len(new))
        assert (f"pairs of {categories} categories, resampled whole" in str(found)) == (categories is not None)


def test_few_validation_pairs_get_a_caveat() -> None:
    found = verdict(range(3), range(0), images=3)
    caveat = "Caveat: 3 validation pairs decide little; each is 33.3 points of R@1. Use at least 100."
    assert caveat in str(found)
    many_captions = replace(found, comparison=replace(found.comparison, queries=900))
    assert caveat.replace("pairs", "images") in str(many_captions), "images are resampled, with all their captions"
