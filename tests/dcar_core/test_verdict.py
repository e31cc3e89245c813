"""The last lines of `dcar train`."""

from collections.abc import Sequence
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


def verdict(adapted: Sequence[float], untouched: Sequence[float], method: str = "dcar+") -> Verdict:
    scores = [Scores(np.ones((2, len(each))), np.array([each, each])) for each in (adapted, untouched)]
    return Verdict(method, Comparison.of(*scores, resamples=500), TrainConfig(lr=2e-3, epochs=20))


@pytest.mark.parametrize(
    ("adapted", "untouched", "is_certain", "answer"),
    [
        (
            [1.0] * 150 + [0.0] * 50,
            [1.0] * 100 + [0.0] * 100,
            True,
            "Yes: +25.0 points of mean R@1 among 200 validation images (95",
        ),
        (
            [1.0] * 51 + [0.0] * 49,
            [0.0] + [1.0] * 50 + [0.0] * 49,
            False,
            "Uncertain: +1.0 points of mean R@1 among 100 validation images (95",
        ),
    ],
)
def test_a_gain_was_worth_it_if_it_is_certain(
    adapted: list[float], untouched: list[float], is_certain: bool, answer: str
) -> None:
    found = verdict(adapted, untouched)
    assert (found.is_worth_it, found.comparison.gain.is_certain) == (True, is_certain)
    text = str(found)
    assert f"Was it worth it? {answer}" in text
    assert f"{len(adapted)} validation pairs" in text
    assert "adapted (dcar+)" in text
    assert "Caveat" not in text
    assert "Next" not in text


@pytest.mark.parametrize("adapted", [[1.0] * 100 + [0.0] * 100, [1.0] * 50 + [0.0] * 150])
def test_a_model_that_is_no_better_was_not_worth_it(adapted: list[float]) -> None:
    found = verdict(adapted, [1.0] * 100 + [0.0] * 100)
    assert not found.is_worth_it
    assert "No: the untouched model is at least as good" in str(found)
    assert "Next: --method clip-adapter, --lr 0.0005, --epochs 40 --patience 0, more training pairs" in str(found)
    for name in ("clip-adapter", "block-adapters"):
        assert "Next: --lr 0.0005" in str(verdict(adapted, [1.0] * 200, method=name)), "clip-adapter learns no more"


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ([1.0] * 60 + [0.0] * 40, "With `rerank`: R@1 of 60.0 (50.0 to 70.0) text-to-image, +10.0 (+5.0 to +16.0) "),
        ([1.0] * 50 + [0.0] * 50, "With `rerank`: no gain on these pairs"),
    ],
)
def test_the_second_stage_has_a_line_of_its_own(found: list[float], line: str) -> None:
    by_vectors = verdict([1.0] * 50 + [0.0] * 50, [0.0] * 100)
    plain, again = (
        str(by_vectors),
        str(replace(by_vectors, reranked=verdict(found, [1.0] * 50 + [0.0] * 50).comparison)),
    )
    assert line in again
    assert [each for each in again.splitlines() if not each.startswith("With `rerank`")] == plain.splitlines()


def test_new_categories_are_resampled_whole(backbone: Backbone, pairs: tuple[Dataset, Dataset]) -> None:
    new = [replace(sample, category=f"new {row // 3}") for row, sample in enumerate(pairs[1].samples)]
    adapted, untouched = (seeded_model(backbone, method(name), 0) for name in ("clip-adapter", "clip"))
    for val, categories in ((pairs[1], None), (replace(pairs[1], samples=new), len(new) // 3)):
        splits, cache = {"train": pairs[0], "val": val}, FeatureCache(None, backbone)
        found = verdict_of(adapted, untouched, splits, cache, TrainConfig())
        assert (found.comparison.images, found.comparison.resampled) == (len(new), categories or len(new))
        assert (f"pairs of {categories} categories, resampled whole" in str(found)) == (categories is not None)


def test_few_validation_pairs_get_a_caveat() -> None:
    found = str(verdict([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]))
    assert "Caveat: 3 validation pairs decide little; each is 33.3 points of R@1. Use at least 100." in found


def test_many_captions_of_few_images_get_the_caveat() -> None:
    """The bootstrap resamples images: two of them decide little, however many captions they have."""
    captions = np.array([[300.0, 300.0], [1.0, 1.0]])
    untouched, adapted = (Scores(captions, hit * captions) for hit in (0, 1))
    found = str(Verdict("dcar+", Comparison.of(adapted, untouched, resamples=500), TrainConfig()))
    assert "Caveat: 2 validation images decide little; each is 50.0 points of R@1. Use at least 100." in found
