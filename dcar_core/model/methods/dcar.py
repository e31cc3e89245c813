"""DCAR as the paper's figure shows it: dual prompts, token weights from the pair, a category adapter in the loss.

Its options and ablations, forms for image towers that take no prompts, and its extension `dcar+` [ours]: deep prompts
and token weights with adapters, held to CLIP.
"""

from dataclasses import replace

from dcar_core.model.config import AdapterConfig, LossConfig, ModelConfig, PromptConfig, RerankConfig, ReweightConfig
from dcar_core.model.methods.method import NO_PROMPTS, NO_WEIGHTS, Method, plain_config

# behind the image tower's blocks and on both features; without prompts, the one on texts is the category adapter, too
_ADAPTERS = AdapterConfig(text=True, image=True, blocks=32)
_ANCHORED = LossConfig(anchor=1.0)

_CONFIGS = (
    ModelConfig(method="dcar"),
    # options: a token's feature apart from its caption; the patch most like it instead of the whole image
    ModelConfig(method="dcar-alone", reweight=ReweightConfig(token_feature="alone")),
    ModelConfig(method="dcar-patches", reweight=ReweightConfig(image_feature="patches")),
    # ablations
    ModelConfig(method="dcar-no-weights", reweight=NO_WEIGHTS),
    ModelConfig(method="dcar-no-category", loss=LossConfig(category=0)),
    replace(plain_config("dual"), prompt=PromptConfig()),
    # fresh prompts in each of the first four blocks [ours]
    ModelConfig(method="dcar-deep", prompt=PromptConfig(depth=4)),
    # without image prompts [ours]
    ModelConfig(method="dcar-text", prompt=PromptConfig(image=False)),
    ModelConfig(method="dcar+", prompt=PromptConfig(depth=4), adapter=_ADAPTERS, loss=_ANCHORED),
    # the ablation without prompts and token weights: the text tower stays as it is
    ModelConfig(
        method="block-adapters", prompt=NO_PROMPTS, reweight=NO_WEIGHTS, adapter=_ADAPTERS,
        loss=replace(_ANCHORED, head=0),
    ),
    # the same with a second stage on hard negatives [ours]
    ModelConfig(
        method="block-adapters+", prompt=NO_PROMPTS, reweight=NO_WEIGHTS, adapter=_ADAPTERS,
        loss=replace(_ANCHORED, head=0, hard_negatives=True),
    ),
    # the same with image prompts that are made from the query, for its first results [ours]
    ModelConfig(
        method="query-prompts", prompt=NO_PROMPTS, reweight=NO_WEIGHTS, adapter=_ADAPTERS,
        loss=replace(_ANCHORED, head=0, hard_negatives=True), rerank=RerankConfig(blocks=2),
    ),
    # for image towers that take neither prompts nor block adapters
    ModelConfig(
        method="dcar+-text", prompt=PromptConfig(depth=4, image=False), adapter=replace(_ADAPTERS, blocks=0),
        loss=_ANCHORED,
    ),
)  # fmt: skip
METHODS = tuple(Method(config=config) for config in _CONFIGS)
