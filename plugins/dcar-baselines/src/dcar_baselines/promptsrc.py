"""PromptSRC: deep prompts, held to the frozen encoders.

Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without
Forgetting", ICCV 2023. The paper averages the prompts over epochs, for which one epoch
is chosen here [ours].
"""

import torch.nn.functional as F
from torch import Tensor

from dcar_core.model.config import PromptConfig, plain_config
from dcar_core.model.methods import Method

TEXT_WEIGHT = 25
IMAGE_WEIGHT = 10


def consistency_loss(
    text: Tensor,
    image: Tensor,
    frozen_text: Tensor,
    frozen_image: Tensor,
    scale: Tensor,
) -> Tensor:
    """Distance of a batch from the frozen encoders, with the weights of PromptSRC's own
    code.

    25 and 10 times the mean absolute difference of text and image features, plus the
    divergence of the similarities of each image to the captions, as the mean over all
    of them.

    Args:
        text, image, frozen_text, frozen_image: L2-normalized features (B, E) of the
            pairs.
        scale: 1 / tau.
    """
    adapted = (scale * image @ text.T).log_softmax(1)
    frozen = (scale * frozen_image @ frozen_text.T).log_softmax(1)
    divergence = F.kl_div(adapted, frozen, reduction="sum", log_target=True)
    return (
        TEXT_WEIGHT * F.l1_loss(text, frozen_text)
        + IMAGE_WEIGHT * F.l1_loss(image, frozen_image)
        + divergence / adapted.numel()
    )


METHOD = Method(
    config=plain_config("promptsrc", prompt=PromptConfig(depth=4)),
    batch_loss=consistency_loss,
)
