"""Models with changed weights, the data prepared for them, and the loss in one pass."""

import torch
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.objective import MixedPrecision, objective
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
