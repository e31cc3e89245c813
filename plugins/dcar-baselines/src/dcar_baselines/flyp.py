"""FLYP: every weight by the contrastive loss.

Goyal et al., "Finetune like you pretrain: Improved finetuning of zero-shot vision
models", CVPR 2023.
"""

from collections.abc import Callable
from functools import partial

import torch

from dcar_core.model.config import plain_config
from dcar_core.model.methods import Method
from dcar_core.model.weight_changes import WeightChanges

ALL_BUT_TEMPERATURE = r"^(?!logit_)"
# Shares of the changes to choose from; the first wins a tie
SHARES = (1.0, 0.75, 0.5, 0.25)
LR_FACTOR = 0.02

create_changes = partial(WeightChanges, names=ALL_BUT_TEMPERATURE, matrices=False)


@torch.no_grad()
def interpolate(changes: WeightChanges, recall: Callable[[], float]) -> None:
    """Shrink the changes to the best share by validation recall.

    WiSE-FT (Wortsman et al. 2022): weights between the frozen and the trained ones are
    often better, and forget less.
    """
    trained = [parameter.clone() for parameter in changes.parameters()]

    def keep(share: float) -> None:
        for parameter, whole in zip(changes.parameters(), trained, strict=True):
            parameter.copy_(share * whole)

    def recall_of(share: float) -> float:
        keep(share)
        return recall()

    keep(max(SHARES, key=recall_of))


METHOD = Method(
    config=plain_config("flyp"),
    changes=create_changes,
    finish=interpolate,
    lr_factor=LR_FACTOR,
)
