"""FLYP (Goyal et al. 2023): every weight by the contrastive loss; WiSE-FT then interpolates towards the frozen ones."""

from collections.abc import Callable
from functools import partial

from dcar_core.model.methods.method import Method, plain_config
from dcar_core.model.methods.weight_changes import WeightChanges

_ALL = r"^(?!logit_)"
_SHARES = (1.0, 0.75, 0.5, 0.25)  # the first wins a tie


def interpolate(changes: WeightChanges, recall: Callable[[], float]) -> None:
    """Shrink the changes to the best share by validation recall.

    WiSE-FT (Wortsman et al. 2022): weights between the frozen and the trained ones are often better, and forget less.
    """
    recalls, before = dict[float, float](), 1.0
    for share in _SHARES:
        changes.shrink(share / before)
        recalls[share], before = recall(), share
    changes.shrink(max(recalls, key=lambda share: recalls[share]) / before)


METHODS = (
    Method(
        config=plain_config("flyp"),
        changes=partial(WeightChanges, names=_ALL, matrices=False),
        finish=interpolate,
        lr_factor=0.02,
    ),
)
