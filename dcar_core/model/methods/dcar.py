"""DCAR as the paper's figure shows it: dual prompts, token weights from the pair, a category adapter in the loss.

Its options, its ablations, and a form for image towers that take no prompts.
"""

from dataclasses import replace

from dcar_core.model.config import LossConfig, ModelConfig, PromptConfig, ReweightConfig
from dcar_core.model.methods.method import NO_WEIGHTS, Method, plain_config

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
)
METHODS = tuple(Method(config=config) for config in _CONFIGS)
