"""Recall, hard-negative accuracy and nDCG against hand calculations, with ties and NaN."""

import numpy as np
import pytest

from dcar_core.util import retrieval_metrics
from dcar_core.util.retrieval_metrics import best_targets, compute_ranks, hard_negative_accuracy, ndcg, recall_at_k


@pytest.mark.parametrize(("width", "count"), [(256, 60), (512, 33), (512, 122)])
@pytest.mark.parametrize("chunk", [37, 1024])
def test_equal_vectors_tie_at_any_position_of_a_product(
    width: int, count: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval_metrics, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    one = rng.standard_normal((1, width)).astype(np.float32)
    one /= np.linalg.norm(one)
    same = np.repeat(one, count, 0)
    assert set(recall_at_k(same, same, np.arange(count)).values()) == {0.0}
    twice = rng.standard_normal((count, width)).astype(np.float32)
    twice = np.concatenate([twice, twice]) / np.linalg.norm(twice, axis=1).mean()
    found = recall_at_k(twice, twice, np.arange(2 * count))
    assert (found["t2i_r1"], found["i2t_r1"], found["t2i_r5"]) == (0, 0, 100)
    assert hard_negative_accuracy(twice, twice, [row[None] for row in twice]) == 0


def test_recall_counts_ties_against_the_model() -> None:
    flat = np.full((10, 4), 0.5, np.float32)
    found = recall_at_k(flat, flat, np.arange(10))
    assert found["t2i_r1"] == found["i2t_r5"] == 0
    assert found["t2i_r10"] == 100


def test_nan_vectors_are_no_hits() -> None:
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(2, 20, 8)).astype(np.float32)
    assert set(recall_at_k(np.full_like(text, np.nan), image, np.arange(20)).values()) == {0}
    assert set(recall_at_k(text, np.full_like(image, np.nan), np.arange(20)).values()) == {0}
    text, image = np.eye(20, dtype=np.float32), np.eye(20, dtype=np.float32)
    image[0] = np.nan
    found = recall_at_k(text, image, np.arange(20), ks=(1,))
    assert found == {"t2i_r1": 0, "i2t_r1": 95}  # the broken image may come before any other


def test_recall_equals_a_hand_calculation_with_two_captions_per_image() -> None:
    image = np.eye(3, dtype=np.float32)
    text = np.array([[1, 0, 0], [0.9, 0.8, 0], [0.1, 0.6, 0.5], [0, 0.9, 0.2]], np.float32)
    of = np.array([0, 1, 1, 2])
    found = recall_at_k(text, image, of, ks=(1, 2))
    assert found["t2i_r1"] == 50  # texts 0 and 2
    assert found["t2i_r2"] == 100
    assert round(found["i2t_r1"], 1) == 33.3  # image 0 finds text 0; image 1 finds text 3, image 2 text 2
    assert found["i2t_r2"] == 100


def test_results_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(20, 6)).astype(np.float32)
    of = rng.integers(0, 20, 50)
    whole = recall_at_k(text, image, of)
    monkeypatch.setattr(retrieval_metrics, "_CHUNK", 7)
    assert recall_at_k(text, image, of) == whole
    np.testing.assert_array_equal(best_targets(text, image), (text @ image.T).argmax(1))


def test_the_best_caption_of_an_image_counts_and_an_image_without_one_is_a_target_and_no_query() -> None:
    image = np.eye(3, dtype=np.float32)
    text = np.array([[0.6, 0, 0], [0.9, 0, 0], [0.9, 0, 0], [0.8, 0, 0.1]], np.float32)
    found = compute_ranks(text, image, np.array([0, 0, 0, 2]))
    assert (found.described.tolist(), found.image.tolist()) == ([0, 2], [0, 0])
    assert found.text.tolist() == [0, 0, 0, 1]


def test_scores_that_differ_in_the_last_bit_are_ties() -> None:
    """On any machine: whether a product of matrices rounds equal rows alike depends on its library."""
    below = np.nextafter(np.float32(1), np.float32(0))
    same, almost = np.array([[1, 0], [1, 0]], np.float32), np.array([[1, 0], [below, 0]], np.float32)
    assert set(recall_at_k(same, almost, np.arange(2), ks=(1,)).values()) == {0}
    assert hard_negative_accuracy(same, same, [almost[1:], almost[1:]]) == 0


def test_hard_negative_accuracy_equals_a_hand_calculation() -> None:
    image = np.eye(2, dtype=np.float32)
    negatives = [np.array([[0.5, 0]], np.float32), np.array([[0, 1]], np.float32)]
    assert hard_negative_accuracy(image, image, negatives) == 50  # the second is a tie
    both = [np.array([[0.5, 0], [1, 0]], np.float32), np.array([[0, 0.5], [0, 0.6]], np.float32)]
    assert hard_negative_accuracy(image, image, both) == 50  # above one of its negatives is not above all


def test_ndcg_counts_every_right_target() -> None:
    target = np.eye(4, dtype=np.float32)
    query = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.1, 0.0]], np.float32)
    right = [np.array([0, 2]), np.array([3]), np.array([1])]  # the last has the score of a wrong target
    gains = [(1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3)), 1 / np.log2(5), 1 / np.log2(3)]
    assert ndcg(query, target, right) == pytest.approx(100 * np.mean(gains))
    assert ndcg(query, target, right, k=1) == pytest.approx(100 / 3)
    assert ndcg(np.full_like(query, np.nan), target, right, k=3) < 100 / 3
