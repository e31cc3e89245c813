"""Dynamic token re-weighting (section 2 of the method): how much each token of a
caption has to do with its image.

- `pair_weights` needs the paired image, so it belongs to training.
- `TokenWeightHead` [ours] predicts the weight from the token alone, for queries, which
  have no image.

Letters: B batch, n tokens, P patches, W_t width, E joint space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone
from dcar_core.model.config import ReweightConfig


def token_text_features(
    backbone: Backbone,
    tokens: Tensor,
    config: ReweightConfig,
) -> Tensor:
    """(B, n) -> (B, n, E), not normalized, of the frozen text encoder without
    prompts.
    """
    if config.token_feature == "alone":
        return backbone.lone_token_features(tokens)
    return backbone.encode_text(tokens, rows=True)[:, 1:]


def image_features(
    backbone: Backbone,
    pixels: Tensor,
    config: ReweightConfig,
) -> Tensor:
    """(B, 3, S, S), standardized -> (B, E), or (B, P, E) by patches; not normalized, of
    the frozen image encoder.
    """
    by_patches = config.image_feature == "patches"
    if by_patches:
        return backbone.encode_image(pixels, rows=True)[:, 1:]
    return backbone.encode_image(pixels)


def pair_weights(token_features: Tensor, image: Tensor, blank: Tensor) -> Tensor:
    """w_j = | S(t_j, I_blank) - S(t_j, I) |, S the cosine (the paper's equation for the
    token weight).

    Args:
        token_features: (B, n, E) from `token_text_features`.
        image: (B, E) from `image_features`, or (B, P, E): then S is that of the patch
            most like the token.
        blank: (E,) or (P, E), the same of a white image [ours].

    Returns:
        Raw weights (B, n), about 0.02 in size; see `blend`.
    """
    tokens = F.normalize(token_features, dim=-1)
    # [B, P, E]
    patches = F.normalize(image if image.ndim == 3 else image[:, None], dim=-1)
    white = F.normalize(blank if blank.ndim == 2 else blank[None], dim=-1)  # [P, E]
    to_image = torch.einsum("bne,bpe->bnp", tokens, patches).amax(-1)
    to_blank = (tokens @ white.T).amax(-1)
    return (to_blank - to_image).abs()


def blend(raw: Tensor, mask: Tensor, config: ReweightConfig) -> Tensor:
    """Turn raw weights (B, n) into factors around 1 [ours]: 1 + strength * (w / mean -
    1), clipped.

    Raw weights would shrink the embeddings to nothing, so they are taken relative to
    the caption's mean.

    Args:
        mask: bool (B, n), the caption's own tokens; the factor of every other is
            exactly 1.
    """
    mean = (raw * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    factor = 1 + config.strength * (raw / mean.clamp(min=1e-8) - 1)
    return torch.where(
        mask,
        factor.clamp(config.low, config.high),
        torch.ones_like(factor),
    )


class TokenWeightHead(nn.Module):
    """One linear layer from a token's frozen embedding to its factor [ours].

    It reads the embedding table rather than contextual features, so a query needs a
    look-up per token instead of a second pass through the text encoder.
    Zero-initialised: before training every factor is 1.
    """

    def __init__(self, text_width: int, config: ReweightConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(text_width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """(B, n, W_t) and bool (B, n) -> factors (B, n); exactly 1 outside of the
        mask.
        """
        # CLIP's embeddings are small: 0.02
        scaled = F.layer_norm(embeddings, embeddings.shape[-1:])
        factor = (1 + self.linear(scaled).squeeze(-1)).clamp(
            self.config.low, self.config.high
        )
        return torch.where(mask, factor, torch.ones_like(factor))
