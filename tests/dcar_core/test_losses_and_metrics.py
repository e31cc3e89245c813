import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcar_core.model.config import ModelConfig, ReweightConfig
from dcar_core.model.token_weights import TokenWeightHead, blend, pair_weights
from dcar_core.training.losses import anchor_loss, category_loss, contrastive_loss, head_loss
from dcar_core.util import retrieval_metrics
from dcar_core.util.retrieval_metrics import best_targets, compute_ranks, hard_negative_accuracy, ndcg, recall_at_k


def features(n: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss_equals_clips_with_one_positive_per_row() -> None:
    text, image, scale = features(5, 0), features(5, 1), torch.tensor(20.0)
    logits = scale * text @ image.T
    target = torch.arange(5)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive_loss(text, image, torch.eye(5, dtype=torch.bool), scale), expected)


def test_equal_captions_are_positives_never_negatives() -> None:
    image = features(2, 1)
    image[1] = image[0]
    text = image.clone()  # a perfect model, two pairs that read the same
    scale = torch.tensor(50.0)
    as_negatives = contrastive_loss(text, image, torch.eye(2, dtype=torch.bool), scale)
    as_positives = contrastive_loss(text, image, torch.ones(2, 2, dtype=torch.bool), scale)
    gradient = torch.autograd.grad(
        contrastive_loss(text.requires_grad_(), image, torch.ones(2, 2, dtype=torch.bool), scale), text
    )[0]
    torch.testing.assert_close(as_positives, as_negatives)  # both ln 2: the floor when the target is spread
    assert gradient.abs().max() < 1e-5


def test_positives_need_not_be_symmetric() -> None:
    """Caption 0 also matches image 1, caption 1 only its own: rows and columns have different targets."""
    text, image, scale = features(3, 0), features(3, 1), torch.tensor(20.0)
    positives = torch.eye(3, dtype=torch.bool)
    positives[0, 1] = True
    logits = scale * text @ image.T
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    to_image = -((rows[0, 0] + rows[0, 1]) / 2 + rows[1, 1] + rows[2, 2]) / 3
    to_text = -(columns[0, 0] + (columns[0, 1] + columns[1, 1]) / 2 + columns[2, 2]) / 3
    torch.testing.assert_close(contrastive_loss(text, image, positives, scale), (to_image + to_text) / 2)


def test_category_loss_equals_a_hand_calculation_and_ignores_padding() -> None:
    image, scale = features(1, 0), torch.tensor(10.0)
    captions = features(3, 1).unsqueeze(0)
    weights = torch.tensor([[1.5, 1.5, 1.0]])
    scores = 10 * captions[0] @ image[0]
    odds = torch.tensor([1.5, 1.5, 1.0]) * scores.exp()
    torch.testing.assert_close(category_loss(image, captions, weights, scale), -(odds[0] / odds.sum()).log())
    padded = torch.cat([captions, torch.zeros(1, 1, 8)], 1)
    torch.testing.assert_close(
        category_loss(image, padded, torch.tensor([[1.5, 1.5, 1.0, 0.0]]), scale),
        category_loss(image, captions, weights, scale),
    )


def test_anchor_loss_is_zero_at_the_frozen_features_and_two_opposite_them() -> None:
    frozen = features(4, 0)
    assert anchor_loss(frozen, frozen).abs() < 1e-6
    torch.testing.assert_close(anchor_loss(-frozen, frozen), torch.tensor(2.0))


def test_head_loss_counts_real_tokens_only() -> None:
    real = torch.tensor([[False, True, True, False]])
    loss = head_loss(torch.tensor([[9.0, 1.0, 2.0, 9.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]]), real)
    assert loss.item() == 2.0
    assert head_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)) == 0  # no words at all


def test_pair_weights_and_their_blend_equal_a_hand_calculation() -> None:
    words = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    raw = pair_weights(words, image=torch.tensor([[0.0, 2.0]]), blank=torch.tensor([1.0, 1.0]))
    half = 2**-0.5
    torch.testing.assert_close(raw, torch.tensor([[half, half, 1 - half, half]]))
    real = torch.tensor([[False, True, True, False]])  # SOS, two words, EOT
    weights = blend(raw, real, ReweightConfig(strength=0.5, low=0.8, high=1.2))
    assert weights[0, 0] == weights[0, 3] == 1
    torch.testing.assert_close(weights[0, 1:3], torch.tensor([1.2, 0.8]))  # 1.207 and 0.793, clipped
    gentle = blend(raw, real, ReweightConfig(strength=0.1))[0, 1:3]
    torch.testing.assert_close(gentle, 1 + 0.1 * torch.tensor([2 * half - 1, 1 - 2 * half]))
    torch.testing.assert_close(pair_weights(3 * words, torch.tensor([[0.0, 2.0]]), torch.tensor([1.0, 1.0])), raw)
    assert blend(torch.zeros(1, 4), real, ReweightConfig()).isfinite().all()  # a white image


def test_predicted_weights_follow_the_direction_of_an_embedding_and_stay_in_bounds() -> None:
    head, real = TokenWeightHead(8, ReweightConfig(low=0.8, high=1.2)), torch.ones(1, 6, dtype=torch.bool)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    embeddings = features(6, 2)[None]
    factors = head(embeddings, real).detach()
    assert [float(factors.min()), float(factors.max())] == pytest.approx([0.8, 1.2])
    with torch.no_grad():
        head.linear.weight.mul_(0.02)
    torch.testing.assert_close(head(embeddings, real), head(50 * embeddings, real), rtol=1e-3, atol=1e-4)
    assert head(embeddings, real).std() > 0.01


def test_pair_weights_can_use_the_most_similar_patch() -> None:
    words = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    patches = torch.tensor([[[3.0, 4.0], [0.0, -1.0]]])
    white = torch.tensor([[1.0, 0.0], [5.0, 12.0]])
    found = pair_weights(words, patches, white)
    torch.testing.assert_close(found, torch.tensor([[1 - 0.6, 12 / 13 - 0.8]]))
    same = pair_weights(words, patches[:, :1], white[:1])
    torch.testing.assert_close(same, pair_weights(words, patches[:, 0], white[0]))


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


def test_recall_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(20, 6)).astype(np.float32)
    of = rng.integers(0, 20, 50)
    whole = recall_at_k(text, image, of)
    monkeypatch.setattr(retrieval_metrics, "_CHUNK", 7)
    assert recall_at_k(text, image, of) == whole


def test_best_caption_of_an_image_counts() -> None:
    image = np.eye(2, dtype=np.float32)
    text = np.array([[0.6, 0], [0.9, 0], [0.9, 0], [0.8, 0.1]], np.float32)
    assert compute_ranks(text, image, np.array([0, 0, 0, 1])).image.tolist() == [0, 0]


def test_an_image_without_a_caption_is_a_target_and_no_query() -> None:
    image = np.eye(3, dtype=np.float32)
    found = compute_ranks(image[[0, 2]], image, np.array([0, 2]))
    assert found.described.tolist() == [0, 2]
    assert (found.text.tolist(), found.image.tolist()) == ([0, 0], [0, 0])


def test_scores_that_differ_in_the_last_bit_are_ties() -> None:
    """On any machine: whether a product of matrices rounds equal rows alike depends on its library."""
    below = np.nextafter(np.float32(1), np.float32(0))
    same, almost = np.array([[1, 0], [1, 0]], np.float32), np.array([[1, 0], [below, 0]], np.float32)
    assert set(recall_at_k(same, almost, np.arange(2), ks=(1,)).values()) == {0}
    assert hard_negative_accuracy(same, same, [almost[1:], almost[1:]]) == 0


def test_the_nearest_target_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    query, target = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(20, 6)).astype(np.float32)
    monkeypatch.setattr(retrieval_metrics, "_CHUNK", 7)
    np.testing.assert_array_equal(best_targets(query, target), (query @ target.T).argmax(1))


def test_hard_negative_accuracy_equals_a_hand_calculation() -> None:
    image = np.eye(2, dtype=np.float32)
    negatives = [np.array([[0.5, 0]], np.float32), np.array([[0, 1]], np.float32)]
    assert hard_negative_accuracy(image, image, negatives) == 50  # the second is a tie
    both = [np.array([[0.5, 0], [1, 0]], np.float32), np.array([[0, 0.5], [0, 0.6]], np.float32)]
    assert hard_negative_accuracy(image, image, both) == 50  # above one of its negatives is not above all


def test_the_one_directional_loss_classifies_images_over_captions() -> None:
    torch.manual_seed(0)
    text, image = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    scale, own = torch.tensor(10.0), torch.eye(5, dtype=torch.bool)
    expected = torch.nn.functional.cross_entropy(scale * image @ text.T, torch.arange(5))
    one = contrastive_loss(text, image, own, scale, "image-to-text")
    torch.testing.assert_close(one, expected)
    other = torch.nn.functional.cross_entropy(scale * text @ image.T, torch.arange(5))
    torch.testing.assert_close(contrastive_loss(text, image, own, scale), (expected + other) / 2)


def test_a_default_direction_leaves_configurations_unchanged() -> None:
    config = ModelConfig()
    assert "direction" not in config.to_dict()["loss"]
    one = config.with_loss_direction("image-to-text")
    assert ModelConfig.from_dict(one.to_dict()) == one
    with pytest.raises(ValueError, match="direction must be both or image-to-text, not 'text'"):
        ModelConfig.from_dict({"loss": {"direction": "text"}})


def test_ndcg_counts_every_right_target() -> None:
    target = np.eye(4, dtype=np.float32)
    query = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.1, 0.0]], np.float32)
    right = [np.array([0, 2]), np.array([3]), np.array([1])]  # the last has the score of a wrong target
    gains = [(1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3)), 1 / np.log2(5), 1 / np.log2(3)]
    assert ndcg(query, target, right) == pytest.approx(100 * np.mean(gains))
    assert ndcg(query, target, right, k=1) == pytest.approx(100 / 3)
    assert ndcg(np.full_like(query, np.nan), target, right, k=3) < 100 / 3
