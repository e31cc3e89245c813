"""The cut-off below which a search has found nothing."""

import numpy as np
import pytest

from dcar_core.serving.score_cutoff import compute_cutoff


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
