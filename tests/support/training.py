"""Models with changed weights, the data prepared for them, and the loss in one pass or
in parts.
"""

import pytest
import torch
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.objective import (
    MixedPrecision,
    accumulate_gradients,
    objective,
)
from dcar_core.training.prepared_split import PreparedSplit, prepare_split
from dcar_core.util.arrays import Rows


def model_and_data(
    backbone: Backbone,
    data: Dataset,
    name: str,
) -> tuple[DCAR, PreparedSplit]:
    """Return a model with changed weights and its data; at the first weights some
    gradients are zero.
    """
    return move_weights(seeded_model(backbone, find_method(name).config, 0), data)


def move_weights(model: DCAR, data: Dataset) -> tuple[DCAR, PreparedSplit]:
    """Change the weights a little, and prepare the data for them."""
    with torch.no_grad():
        for _, parameter in model.trainables():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, prepare_split(data, model, for_training=True)


def batch_loss(model: DCAR, data: PreparedSplit, rows: Rows) -> Tensor:
    """Return L over the pairs `rows` in full precision."""
    return objective(model, data, rows, MixedPrecision("off", model.backbone.device))


def gradients(model: DCAR) -> dict[str, Tensor]:
    """Return the gradients by name, and reset them."""
    found = {
        name: p.grad.clone() for name, p in model.trainables() if p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def check_parts(model: DCAR, data: PreparedSplit, rows: Rows) -> dict[str, Tensor]:
    """Return the gradients of a batch, which in parts are the same."""
    whole = batch_loss(model, data, rows)
    whole.backward()  # type: ignore[no-untyped-call]
    expected = gradients(model)
    for parts in (1, 4, 20):
        value = accumulate_gradients(model, data, rows, parts=parts)
        found = gradients(model)
        assert expected.keys() == found.keys()
        assert value == pytest.approx(float(whole.detach()), rel=1e-5), parts
        for key in expected:
            torch.testing.assert_close(
                found[key],
                expected[key],
                rtol=1e-3,
                atol=1e-5,
                msg=f"{key}, {parts} parts",
            )
    return expected
