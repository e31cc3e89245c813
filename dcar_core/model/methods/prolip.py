"""ProLIP (Fahes et al. 2024): the image tower's projection alone, held to the frozen one."""

from functools import partial

from dcar_core.model.methods.method import Method, plain_config
from dcar_core.model.methods.weight_changes import WeightChanges

_PROJECTION = r"^visual\.(proj$|head\.|trunk\.head\.)"

METHODS = (
    Method(
        config=plain_config("prolip"),
        changes=partial(WeightChanges, names=_PROJECTION),
        penalty=WeightChanges.distance,
        lr_factor=0.2,
    ),
)
