"""FILIP: late interaction of words and patches as half of the contrastive loss.

Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022.
They also search by late interaction. Here vectors are searched, so it is half of the
contrastive loss [ours]; all else is FLYP's, for a comparison of the losses alone.
"""

import torch
from torch import Tensor

from dcar_baselines import flyp
from dcar_core.model.config import LossConfig, LossDirection, plain_config
from dcar_core.model.methods import Method
from dcar_core.training.objective import matching_loss


def late_interaction_loss(
    words: Tensor,
    patches: Tensor,
    positives: Tensor,
    scale: Tensor,
    direction: LossDirection = "both",
) -> Tensor:
    """FILIP's form of `contrastive_loss`: the score of a pair is a mean of maximum
    similarities.

    A caption scores images by the mean over its words of the best patch, an image
    scores captions by the mean over its patches of the best word.

    Args:
        words: L2-normalized features (B, n, E), 0 for padding.
        patches: L2-normalized features (B, P, E).
    """
    similarity = torch.einsum("ane,bpe->abnp", words, patches)
    is_word = words.any(-1)  # [B, n]
    lengths = is_word.sum(1, keepdim=True).clamp(min=1)
    by_words = (similarity.amax(3) * is_word[:, None]).sum(2) / lengths
    without_padding = similarity.masked_fill(~is_word[:, None, :, None], -1)
    by_patches = without_padding.amax(2).mean(2)
    return matching_loss(scale * by_words, scale * by_patches, positives, direction)


METHOD = Method(
    config=plain_config("filip", loss=LossConfig(category=0, head=0, late=0.5)),
    changes=flyp.create_changes,
    late_loss=late_interaction_loss,
    finish=flyp.interpolate,
    lr_factor=flyp.LR_FACTOR,
)
