"""The extension of DCAR [ours]: deep prompts and token weights with adapters, held to CLIP.

Adapters follow the image tower's blocks and both features. Without prompts, the one on text features is also the
category adapter.
"""

from dcar_core.model.config import AdapterConfig, LossConfig, ModelConfig, PromptConfig
from dcar_core.model.methods.method import NO_PROMPTS, NO_WEIGHTS, Method

_ADAPTERS = AdapterConfig(text=True, image=True, blocks=32)

METHODS = (
    Method(
        config=ModelConfig(method="dcar+", prompt=PromptConfig(depth=4), adapter=_ADAPTERS, loss=LossConfig(anchor=1.0))
    ),
    # the ablation without prompts and token weights: the text tower stays as it is
    Method(
        config=ModelConfig(
            method="block-adapters",
            prompt=NO_PROMPTS,
            reweight=NO_WEIGHTS,
            adapter=_ADAPTERS,
            loss=LossConfig(head=0, anchor=1.0),
        )
    ),
    # for image towers that take neither prompts nor block adapters
    Method(
        config=ModelConfig(
            method="dcar+-text",
            prompt=PromptConfig(depth=4, image=False),
            adapter=AdapterConfig(text=True, image=True),
            loss=LossConfig(anchor=1.0),
        )
    ),
)
