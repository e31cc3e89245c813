"""Ablations of DCAR, and options that its paper leaves open."""

from dcar_core.model.config import (
    LossConfig,
    ModelConfig,
    PromptConfig,
    ReweightConfig,
    plain_config,
)
from dcar_core.model.methods import Method

# a token's feature apart from its caption
ALONE = Method(
    config=ModelConfig(
        method="dcar-alone",
        reweight=ReweightConfig(token_feature="alone"),
    )
)
# the patch most like a token instead of the whole image
PATCHES = Method(
    config=ModelConfig(
        method="dcar-patches",
        reweight=ReweightConfig(image_feature="patches"),
    )
)
NO_WEIGHTS = Method(
    config=ModelConfig(
        method="dcar-no-weights",
        reweight=ReweightConfig(train="none"),
    )
)
NO_CATEGORY = Method(
    config=ModelConfig(
        method="dcar-no-category",
        loss=LossConfig(category=0),
    )
)
# the dual prompts alone
DUAL = Method(config=plain_config("dual", prompt=PromptConfig()))
# fresh prompts in each of the first four blocks [ours]
DEEP = Method(
    config=ModelConfig(
        method="dcar-deep",
        prompt=PromptConfig(depth=4),
    )
)
