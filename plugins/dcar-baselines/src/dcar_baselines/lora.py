"""LoRA: low-rank changes of both towers' attention.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Query, key
and value of a joint matrix share the lower factor [ours].
"""

import torch
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone
from dcar_core.model.config import plain_config
from dcar_core.model.methods import Method
from dcar_core.model.weight_changes import WeightChanges, parameter_key

ATTENTION = r"(^|\.)(attn|self_attn|attention|SelfAttention)\..*weight$"
RANK = 4


class LowRankChanges(WeightChanges):
    """Differences that are products of two factors, the upper one zero at the start."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, ATTENTION)
        self.low = nn.ParameterDict()
        for name in self.names:
            rows, columns = backbone.clip.get_parameter(name).shape
            low = torch.randn(RANK, columns) / RANK
            self.low[parameter_key(name)] = nn.Parameter(low)
            self.high[parameter_key(name)] = nn.Parameter(torch.zeros(rows, RANK))

    def difference(self, name: str) -> Tensor:
        low: Tensor = self.low[parameter_key(name)]
        return super().difference(name) @ low


METHOD = Method(
    config=plain_config("lora"),
    changes=LowRankChanges,
    lr_factor=0.2,
)
