"""Methods of others: configurations of the shared model, with their own losses and changes of weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from dcar_core.model.config import AdapterConfig, PromptConfig
from dcar_core.model.methods.method import CONTRASTIVE, Method, plain_config
from dcar_core.model.methods.weight_changes import WeightChanges

_ALL = r"^(?!logit_)"
_ATTENTION = r"(^|\.)(attn|self_attn|attention|SelfAttention)\..*weight$"
_PROJECTION = r"^visual\.(proj$|head\.|trunk\.head\.)"
_SHARES = (1.0, 0.75, 0.5, 0.25)  # the first wins a tie


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


def interpolate(changes: WeightChanges, recall: Callable[[], float]) -> None:
    """Shrink the changes to the best share by validation recall.

    WiSE-FT (Wortsman et al. 2022): weights between the frozen and the trained ones are often better, and forget less.
    """
    recalls, before = dict[float, float](), 1.0
    for share in _SHARES:
        changes.shrink(share / before)
        recalls[share], before = recall(), share
    changes.shrink(max(recalls, key=lambda share: recalls[share]) / before)


# Goyal et al. 2023: every weight by the contrastive loss
_FLYP = Method(
    config=plain_config("flyp"),
    changes=partial(WeightChanges, names=_ALL, matrices=False),
    finish=interpolate,
    lr_factor=0.02,
)
METHODS = (
    # zero-shot
    Method(config=plain_config("clip")),
    # text prompts alone
    Method(config=replace(plain_config("coop"), prompt=PromptConfig(image=False))),
    # bottlenecks on the features of both towers
    Method(config=replace(plain_config("clip-adapter"), adapter=AdapterConfig(text=True, image=True))),
    # coupled prompts in several blocks
    Method(config=replace(plain_config("maple"), prompt=PromptConfig(depth=4))),
    # Khattak et al. 2023. The paper averages the prompts over epochs, for which one epoch is chosen here [ours].
    Method(config=replace(plain_config("promptsrc"), prompt=PromptConfig(depth=4)), batch_loss=consistency_loss),
    # Hu et al. 2022. Query, key and value of a joint matrix share the lower factor [ours].
    Method(config=plain_config("lora"), changes=partial(WeightChanges, names=_ATTENTION, rank=4), lr_factor=0.2),
    # Fahes et al. 2024: the image tower's projection alone, held to the frozen one
    Method(
        config=plain_config("prolip"),
        changes=partial(WeightChanges, names=_PROJECTION),
        penalty=WeightChanges.distance,
        lr_factor=0.2,
    ),
    _FLYP,
    # Yao et al. 2022, who also search by late interaction of words and patches. Here vectors are searched, so it is
    # half of the contrastive loss [ours]; all else is FLYP's, for a comparison of the losses alone.
    replace(_FLYP, config=replace(plain_config("filip"), loss=replace(CONTRASTIVE, late=0.5))),
)
