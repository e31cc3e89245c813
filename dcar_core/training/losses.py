"""The terms of L = L_con + lambda L_cate + mu L_head + nu L_anchor, as pure functions (section 4 of the method)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_core.model.config import LossDirection


def contrastive_loss(
    text: Tensor, image: Tensor, positives: Tensor, scale: Tensor, direction: LossDirection = "both"
) -> Tensor:
    """InfoNCE (L_con) in which a row may have several positives; symmetric by default.

    Args:
        text, image: L2-normalized features (B, E) of the pairs.
        positives: bool (B, B), true on the diagonal. True where caption i describes image j: it equals one of the
            image's captions or attributes. Such a pair is never a negative.
        scale: 1 / tau, CLIP's frozen temperature.
        direction: "image-to-text" classifies each image over the captions of the batch, and no caption over images.

    Each row's target is distributed evenly over its positives.
    """
    logits = scale * text @ image.T  # [B texts, B images]
    target = positives.float()
    rows = target / target.sum(1, keepdim=True)
    columns = target / target.sum(0, keepdim=True)
    image_to_text = -(columns * logits.log_softmax(0)).sum(0).mean()
    if direction == "image-to-text":
        return image_to_text
    text_to_image = -(rows * logits.log_softmax(1)).sum(1).mean()
    return (text_to_image + image_to_text) / 2


def category_loss(image: Tensor, captions: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of an image over its positive caption and its negatives (L_cate).

    Args:
        image: (B, E), prompted and normalized.
        captions: (B, 1 + N, E), normalized; the positive comes first.
        weights: category-matching weights (B, 1 + N): 1 + alpha for negatives of another category, 1 for the positive
            and for negatives of the image's category, 0 for padding.

    Logits are s / tau + log w [ours: the paper shows w, but not where it enters]. So the gradient emphasises the
    differences between subcategories.
    """
    scores = scale * torch.einsum("be,bne->bn", image, captions) + weights.log()
    return F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.long))


def head_loss(predicted: Tensor, target: Tensor, real: Tensor) -> Tensor:
    """Mean squared error of the predicted token weights (L_head [ours]) over real tokens.

    Args:
        predicted, target: (B, n).
        real: bool (B, n), true for the caption's own tokens.
    """
    return ((predicted - target) ** 2 * real).sum() / real.sum().clamp(min=1)


def anchor_loss(adapted: Tensor, frozen: Tensor) -> Tensor:
    """Mean of 1 - cosine between adapted and frozen features (L_anchor [ours]); both (B, E), L2-normalized."""
    return (1 - (adapted * frozen).sum(-1)).mean()
