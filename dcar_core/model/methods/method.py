"""The type of a method, and settings that several methods share."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dcar_core.model.backbone import Backbone
from dcar_core.model.config import LossConfig, ModelConfig, PromptConfig, ReweightConfig
from dcar_core.model.methods.weight_changes import WeightChanges

NO_PROMPTS = PromptConfig(length=0)
NO_WEIGHTS = ReweightConfig(train="none")
CONTRASTIVE = LossConfig(category=0, head=0)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of adaptation.

    config: prompts, token weights, adapters and losses of the shared model.
    changes: creates the learned changes of a backbone's own weights; None leaves the backbone as it is.
    penalty: a loss term of these changes alone.
    batch_loss: a further loss term, of text and image features (B, E), the frozen encoders' features, and 1 / tau.
    finish: called after training with the changes, and a function that returns the validation recall with them.
    lr_factor [ours]: multiplies the learning rate, so that one grid of rates fits every method.
    """

    config: ModelConfig
    changes: Callable[[Backbone], WeightChanges] | None = None
    penalty: Callable[[WeightChanges], Tensor] | None = None
    batch_loss: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    finish: Callable[[WeightChanges, Callable[[], float]], None] | None = None
    lr_factor: float = 1.0


def plain_config(name: str) -> ModelConfig:
    """Return a configuration without any part of the shared model."""
    return ModelConfig(method=name, prompt=NO_PROMPTS, reweight=NO_WEIGHTS, loss=CONTRASTIVE)
