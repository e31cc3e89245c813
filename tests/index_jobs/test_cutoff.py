"""The cut-off of poor results, from known scores."""

import numpy as np
import pytest

from dcar_core.model.text.tokenizer import common_words
from index_jobs.jobs.cutoff import compute_cutoff, cutoff_of_words


def test_cutoff_keeps_95_percent_of_the_pairs() -> None:
    scores = np.random.default_rng(1).permutation(np.linspace(0, 1, 1001)).astype(np.float32)
    found = compute_cutoff(scores)
    assert (found["min_score"], found["strong_score"]) == (pytest.approx(0.05), pytest.approx(0.95))
    assert (found["kept"], found["pairs"]) == (pytest.approx(0.95, abs=0.02), 1001)


def test_kept_share_is_measured_on_held_out_pairs() -> None:
    """Of two pairs each is a half: the lower one does not reach what the higher one alone would set."""
    assert compute_cutoff(np.array([0.2, 0.4], np.float32))["kept"] == 0.5
    alone = compute_cutoff(np.array([0.3], np.float32))
    assert (alone["min_score"], alone["kept"]) == (pytest.approx(0.3), None)


def test_without_pairs_a_hundredth_of_the_scores_of_words_reaches_the_cutoff() -> None:
    words = common_words(300)
    assert len(set(words)) == 300
    assert all(word.isalpha() and word.islower() for word in words)
    scores = np.random.default_rng(0).normal(0.2, 0.03, (300, 256)).astype(np.float32)
    found = cutoff_of_words(scores, scores.max(1))
    assert (scores >= found["min_score"]).mean() == pytest.approx(0.01, abs=2e-4)
    assert (scores.max(1) >= found["strong_score"]).mean() == pytest.approx(0.5, abs=0.01)
    assert found["words"] == 300
    few = cutoff_of_words(scores[:, :5], scores[:, :5].max(1))
    assert few["strong_score"] >= few["min_score"]
