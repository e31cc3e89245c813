"""Token weights from pairs and from the text alone, against hand calculations."""

import pytest
import torch

from dcar_core.model.config import ReweightConfig
from dcar_core.model.token_weights import TokenWeightHead, blend, pair_weights


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
    embeddings = torch.nn.functional.normalize(torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(2)), dim=-1)
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
