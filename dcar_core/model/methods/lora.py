"""LoRA (Hu et al. 2022): a low-rank change of each attention matrix of both towers.

Query, key and value of a joint matrix share the lower factor [ours].
"""

from functools import partial

from dcar_core.model.methods.method import Method, plain_config
from dcar_core.model.methods.weight_changes import WeightChanges

_ATTENTION = r"(^|\.)(attn|self_attn|attention|SelfAttention)\..*weight$"

METHODS = (
    Method(config=plain_config("lora"), changes=partial(WeightChanges, names=_ATTENTION, rank=4), lr_factor=0.2),
)
