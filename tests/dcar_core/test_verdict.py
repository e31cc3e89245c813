"""The last lines of `dcar train`."""

from collections.abc import Sequence

import numpy as np
import pytest

from dcar_core.model.config import TrainConfig
from dcar_core.training.adapt import Verdict
from dcar_core.util.bootstrap import Hits, compare_hits


def verdict(adapted: Sequence[float], untouched: Sequence[float], method: str = "dcar+") -> Verdict:
    hits = [Hits(np.ones(len(each)), np.array(each), np.array(each)) for each in (adapted, untouched)]
    return Verdict(method, compare_hits(*hits, resamples=500), TrainConfig(lr=2e-3, epochs=20))


def test_a_certain_gain_was_worth_it() -> None:
    found = verdict([1.0] * 150 + [0.0] * 50, [1.0] * 100 + [0.0] * 100)
    text = str(found)
    assert found.is_worth_it
    assert found.is_certain
    assert "Was it worth it? Yes: +25.0 points of mean R@1 (95 % interval +" in text
    assert "200 validation pairs" in text
    assert "adapted (dcar+)" in text
    assert "Caveat" not in text
    assert "Next" not in text


def test_a_gain_within_the_interval_is_uncertain() -> None:
    found = verdict([1.0] * 51 + [0.0] * 49, [0.0] + [1.0] * 50 + [0.0] * 49)
    assert found.is_worth_it
    assert not found.is_certain
    assert "Uncertain: +1.0 points, but the interval includes 0" in str(found)


@pytest.mark.parametrize("adapted", [[1.0] * 100 + [0.0] * 100, [1.0] * 50 + [0.0] * 150])
def test_a_model_that_is_no_better_was_not_worth_it(adapted: list[float]) -> None:
    found = verdict(adapted, [1.0] * 100 + [0.0] * 100)
    assert not found.is_worth_it
    assert "No: the untouched model is at least as good" in str(found)
    assert "Next: --method clip-adapter, --lr 0.0005, --epochs 40 --patience 0, more training pairs" in str(found)
    for method in ("clip-adapter", "block-adapters"):
        assert "Next: --lr 0.0005" in str(verdict(adapted, [1.0] * 200, method=method)), "clip-adapter learns no more"


def test_few_validation_pairs_get_a_caveat() -> None:
    found = str(verdict([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]))
    assert "Caveat: 3 validation pairs decide little; each is 33.3 points of R@1. Use at least 100." in found


def test_many_captions_of_few_images_get_the_caveat() -> None:
    """The bootstrap resamples images: two of them decide little, however many captions they have."""
    untouched, adapted = (Hits(np.full(2, 300.0), np.full(2, 300 * hit), np.full(2, hit)) for hit in (0.0, 1.0))
    found = str(Verdict("dcar+", compare_hits(adapted, untouched, resamples=500), TrainConfig()))
    assert "Caveat: 2 validation images decide little; each is 50.0 points of R@1. Use at least 100." in found
