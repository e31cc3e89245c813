"""The methods by name: each a configuration of the one model, so that all share data, loop and evaluation."""

from dcar_core.model.config import AdapterConfig, LossConfig, ModelConfig, PromptConfig, ReweightConfig
from dcar_core.util.errors import DcarError

_NO_WEIGHTS = ReweightConfig(train="none")
_CONTRASTIVE = LossConfig(category=0, head=0)


def _prompts_alone(name: str, **prompt: int | bool) -> ModelConfig:
    return ModelConfig(method=name, prompt=PromptConfig.from_dict(prompt), reweight=_NO_WEIGHTS, loss=_CONTRASTIVE)


METHODS: dict[str, ModelConfig] = {
    config.method: config
    for config in (
        # zero-shot
        _prompts_alone("clip", length=0),
        # text prompts alone
        _prompts_alone("coop", image=False),
        # bottlenecks on both towers' features
        ModelConfig(
            method="clip-adapter",
            prompt=PromptConfig(length=0),
            reweight=_NO_WEIGHTS,
            adapter=AdapterConfig(text=True, image=True),
            loss=_CONTRASTIVE,
        ),
        # coupled prompts in several blocks
        _prompts_alone("maple", depth=4),
        # the paper's figure: dual prompts, token weights from the pair in training, category adapter in the loss
        ModelConfig(method="dcar"),
        # its options: a token's feature apart from its caption; the patch most like it in place of the whole picture
        ModelConfig(method="dcar-alone", reweight=ReweightConfig(word="alone")),
        ModelConfig(method="dcar-patches", reweight=ReweightConfig(picture="patches")),
        # its ablations
        ModelConfig(method="dcar-no-weights", reweight=_NO_WEIGHTS),
        ModelConfig(method="dcar-no-category", loss=LossConfig(category=0)),
        _prompts_alone("dual"),
        # DCAR with fresh prompts in each of the first four blocks [ours]
        ModelConfig(method="dcar-deep", prompt=PromptConfig(depth=4)),
        # the extension [ours]: deep prompts, adapters on both features (text: CAA, kept for queries), held to CLIP
        ModelConfig(
            method="dcar+",
            prompt=PromptConfig(depth=4),
            adapter=AdapterConfig(text=True, image=True),
            loss=LossConfig(anchor=1.0),
        ),
    )
}


def method(name: str) -> ModelConfig:
    """The configuration of a method.

    Raises:
        DcarError: no method has this name; the message lists those that exist.
    """
    if name not in METHODS:
        raise DcarError(f"no method is named {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]
