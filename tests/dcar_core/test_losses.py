"""The loss terms against hand calculations."""

import pytest
import torch
import torch.nn.functional as F

from dcar_core.model.config import ModelConfig
from dcar_core.training.objective import anchor_loss, category_loss, contrastive_loss, head_loss


def features(n: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss_equals_clips_with_one_positive_per_row() -> None:
    text, image, scale = features(5, 0), features(5, 1), torch.tensor(20.0)
    logits = scale * text @ image.T
    target = torch.arange(5)
    to_image, to_text = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)
    own = torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(contrastive_loss(text, image, own, scale), (to_image + to_text) / 2)
    torch.testing.assert_close(contrastive_loss(text, image, own, scale, "image-to-text"), to_text)


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
    weights = torch.tensor([[1.0, 1.0, 1.5]])
    scores = 10 * captions[0] @ image[0]
    odds = torch.tensor([1.0, 1.0, 1.5]) * scores.exp()
    torch.testing.assert_close(category_loss(image, captions, weights, scale), -(odds[0] / odds.sum()).log())
    padded = torch.cat([captions, torch.zeros(1, 1, 8)], 1)
    torch.testing.assert_close(
        category_loss(image, padded, torch.tensor([[1.0, 1.0, 1.5, 0.0]]), scale),
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


def test_a_default_direction_leaves_configurations_unchanged() -> None:
    config = ModelConfig()
    assert "direction" not in config.to_dict()["loss"]
    one = config.with_loss_direction("image-to-text")
    assert ModelConfig.from_dict(one.to_dict()) == one
    with pytest.raises(ValueError, match=r"loss\.direction: Input should be 'both' or 'image-to-text'"):
        ModelConfig.from_dict({"loss": {"direction": "text"}})
