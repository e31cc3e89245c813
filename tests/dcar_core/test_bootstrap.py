"""The paired bootstrap: exact values, intervals that cover, and p-values that are uniform without a difference."""

import numpy as np
import pytest

from dcar_core.util.bootstrap import Hits, compare_hits
from dcar_core.util.retrieval_metrics import compute_ranks, recall_of_ranks


def hits(text: list[float], image: list[float] | None = None, texts: list[float] | None = None) -> Hits:
    return Hits(np.array(texts or [1.0] * len(text)), np.array(text), np.array(image or text))


def test_hits_of_ranks_have_the_recall_of_the_ranks() -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(9, 4)).astype(np.float32)
    image = rng.normal(size=(6, 4)).astype(np.float32)
    image_of_text = np.array([0, 0, 2, 2, 2, 3, 4, 4, 5])  # image 1 has no caption
    ranks = compute_ranks(text, image, image_of_text)
    found = Hits.from_ranks(ranks, image_of_text)
    assert found.texts.tolist() == [2, 3, 1, 2, 1]
    recall, estimate = recall_of_ranks(ranks), compare_hits(found, found, resamples=10).model
    for measure in ("t2i_r1", "i2t_r1"):
        assert estimate[measure].value == pytest.approx(recall[measure])
    assert estimate["mean_r1"].value == pytest.approx((recall["t2i_r1"] + recall["i2t_r1"]) / 2)


def test_equal_models_differ_by_nothing() -> None:
    one = hits([1, 0, 1, 1, 0])
    found = compare_hits(one, one, resamples=200)
    assert (found.difference["mean_r1"].low, found.difference["mean_r1"].high, found.p) == (0, 0, 1)
    assert found.queries == 5


def test_a_model_that_is_better_on_every_query_is_so_in_every_resample() -> None:
    found = compare_hits(hits([1.0] * 50), hits([0.0] * 50), resamples=999)
    assert f"{found.difference['t2i_r1']}" == "100.0 (100.0 to 100.0)"
    assert found.p == pytest.approx(2 / 1000)


def test_interval_of_a_proportion_equals_the_normal_approximation() -> None:
    one = hits([1.0] * 60 + [0.0] * 40)
    estimate = compare_hits(one, one, resamples=4000).model["t2i_r1"]
    half_width = 196 * np.sqrt(0.6 * 0.4 / 100)
    assert estimate.low == pytest.approx(60 - half_width, abs=1.5)
    assert estimate.high == pytest.approx(60 + half_width, abs=1.5)


def test_pairing_removes_the_difficulty_of_the_queries() -> None:
    """Both fail on the same hard queries, so a small difference is certain although each recall is not."""
    easy = np.arange(200) < 100
    better, worse = easy.astype(float), easy.astype(float)
    worse[:12] = 0
    found = compare_hits(hits(list(better)), hits(list(worse)), resamples=2000)
    assert found.difference["mean_r1"].low > 0
    assert found.model["mean_r1"].low < found.baseline["mean_r1"].high
    assert found.p < 0.01


def test_p_values_are_rarely_small_without_a_difference() -> None:
    rng = np.random.default_rng(1)
    p = [
        compare_hits(hits(list(rng.binomial(1, 0.5, 100))), hits(list(rng.binomial(1, 0.5, 100))), resamples=300).p
        for _ in range(100)
    ]
    assert np.mean(np.array(p) < 0.05) < 0.15


def test_seeds_are_averaged_by_query_and_a_seed_gives_the_same_interval() -> None:
    one, other = hits([1, 0]), hits([1, 1])
    assert Hits.mean([one, other]).text_hits.tolist() == [1, 0.5]
    assert compare_hits(one, other, resamples=500) == compare_hits(one, other, resamples=500)


def test_hits_of_different_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="not of the same queries"):
        compare_hits(hits([1, 0]), hits([1, 0, 1]))
