"""PromptSRC (Khattak et al. 2023): deep prompts, with features and similarities held to the frozen encoders'.

The paper averages the prompts over epochs, for which one epoch is chosen here [ours].
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from dcar_core.model.config import PromptConfig
from dcar_core.model.methods.method import Method, plain_config


def consistency_loss(text: Tensor, image: Tensor, frozen_text: Tensor, frozen_image: Tensor, scale: Tensor) -> Tensor:
    """Distance of a batch from the frozen encoders, with the weights of PromptSRC's own code.

    25 and 10 times the mean absolute difference of text and image features, plus the divergence of the similarities of
    each image to the captions, as the mean over all of them.

    Args:
        text, image, frozen_text, frozen_image: L2-normalized features (B, E) of the pairs.
        scale: 1 / tau.
    """
    adapted, frozen = ((scale * i @ t.T).log_softmax(1) for i, t in ((image, text), (frozen_image, frozen_text)))
    divergence = F.kl_div(adapted, frozen, reduction="sum", log_target=True) / adapted.numel()
    return 25 * F.l1_loss(text, frozen_text) + 10 * F.l1_loss(image, frozen_image) + divergence


METHODS = (
    Method(config=replace(plain_config("promptsrc"), prompt=PromptConfig(depth=4)), batch_loss=consistency_loss),
)
