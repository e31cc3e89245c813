"""The methods by name: each a configuration of the one model, so that all share data, loop and evaluation."""

from dataclasses import replace
from typing import Any

from dcar_core.model.config import AdapterConfig, FineTuneConfig, LossConfig, ModelConfig, PromptConfig, ReweightConfig
from dcar_core.util.errors import DcarError, ModelError

MAX_DEPTH = 128  # more blocks than any tower has
_NO_WEIGHTS = ReweightConfig(train="none")
_CONTRASTIVE = LossConfig(category=0, head=0)


def _prompts_alone(name: str, **prompt: int | bool) -> ModelConfig:
    return ModelConfig(method=name, prompt=PromptConfig.from_dict(prompt), reweight=_NO_WEIGHTS, loss=_CONTRASTIVE)


def _fine_tuned(name: str, *, distance: float = 0.0, **settings: Any) -> ModelConfig:
    return ModelConfig(
        method=name,
        prompt=PromptConfig(length=0),
        reweight=_NO_WEIGHTS,
        loss=replace(_CONTRASTIVE, distance=distance),
        fine_tune=FineTuneConfig(**settings),
    )


METHODS: dict[str, ModelConfig] = {
    config.method: config
    for config in (
        # zero-shot
        _prompts_alone("clip", length=0),
        # text prompts alone
        _prompts_alone("coop", image=False),
        # bottlenecks on the features of both towers
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
        # its options: a token's feature apart from its caption; the patch most like it instead of the whole image
        ModelConfig(method="dcar-alone", reweight=ReweightConfig(word="alone")),
        ModelConfig(method="dcar-patches", reweight=ReweightConfig(picture="patches")),
        # its ablations
        ModelConfig(method="dcar-no-weights", reweight=_NO_WEIGHTS),
        ModelConfig(method="dcar-no-category", loss=LossConfig(category=0)),
        _prompts_alone("dual"),
        # DCAR with fresh prompts in each of the first four blocks [ours]
        ModelConfig(method="dcar-deep", prompt=PromptConfig(depth=4)),
        # the extension [ours]: deep prompts, adapters behind the image tower's blocks and on both features (text: CAA,
        # kept for queries), held to CLIP
        ModelConfig(
            method="dcar+",
            prompt=PromptConfig(depth=4),
            adapter=AdapterConfig(text=True, image=True, blocks=32),
            loss=LossConfig(anchor=1.0),
        ),
        # its ablation without prompts and token weights [ours]: the adapters alone; the text tower stays as it is
        ModelConfig(
            method="block-adapters",
            prompt=PromptConfig(length=0),
            reweight=_NO_WEIGHTS,
            adapter=AdapterConfig(text=True, image=True, blocks=32),
            loss=LossConfig(head=0, anchor=1.0),
        ),
        # PromptSRC's regularisation on deep prompts: features and similarities are held to the frozen encoders'; it
        # averages the prompts over epochs, for which one epoch is chosen here [ours]
        ModelConfig(
            method="promptsrc",
            prompt=PromptConfig(depth=4),
            reweight=_NO_WEIGHTS,
            loss=LossConfig(category=0, head=0, consistency=1.0),
        ),
        # weights of the backbone: attention at low rank; the image projection alone; everything, interpolated
        _fine_tuned("lora", scope="attention", rank=4, lr_factor=0.2),
        _fine_tuned("prolip", scope="projection", lr_factor=0.2, distance=1.0),
        _fine_tuned("flyp", scope="all", lr_factor=0.02, interpolate=True),
        # both without image prompts, for image towers that take none [ours]
        ModelConfig(method="dcar-text", prompt=PromptConfig(image=False)),
        ModelConfig(
            method="dcar+-text",
            prompt=PromptConfig(depth=4, image=False),
            adapter=AdapterConfig(text=True, image=True),
            loss=LossConfig(anchor=1.0),
        ),
    )
}


def method(name: str) -> ModelConfig:
    if name not in METHODS:
        raise DcarError(f"no method is named {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]


def default_method(level: str) -> str:
    """Return the name of the method that `dcar train` uses by default at a `towers.select.Level`."""
    return {"full": "block-adapters", "text": "dcar+-text"}.get(level, "clip-adapter")


def comparable_methods(level: str) -> list[str]:
    """Return the names of the methods that `dcar evaluate` compares by default at a `towers.select.Level`."""
    return {
        "full": ["clip", "coop", "clip-adapter", "maple", "dcar", "dcar+", "block-adapters"],
        "text": ["clip", "coop", "clip-adapter", "dcar-text", "dcar+-text"],
    }.get(level, ["clip", "clip-adapter"])


def require_runnable(config: ModelConfig, level: str, model: str, context: int) -> None:
    """Raise ModelError, which names another method, if the towers of a model cannot run a method.

    context: token positions behind the start tokens.
    """
    prompt, has_prompts = config.prompt, config.prompt.length > 0
    needs_text = any(prompt.depths) or config.reweight.train != "none"
    needs_rows = prompt.depths[1] > 0 or config.reweight.picture == "patches" or config.adapter.blocks > 0
    if level == "adapters" and needs_text:
        raise ModelError(
            f"{config.method} needs prompts or token weights, which the towers of {model} do not take; "
            f"use the method clip-adapter"
        )
    if level != "full" and needs_rows:
        raise ModelError(
            f"{config.method} needs image prompts, block adapters or patches, which the image tower of {model} does "
            f"not have; "
            f"use the method {_text_variant(config) if level == 'text' else 'clip-adapter'}"
        )
    if has_prompts and prompt.length > context - 1:
        raise ModelError(f"{prompt.length} prompts do not fit into the {context} tokens of {model}")
    if has_prompts and prompt.depth > MAX_DEPTH:
        raise ModelError(f"prompts for {prompt.depth} blocks are too many; a tower has at most {MAX_DEPTH}")


def _text_variant(config: ModelConfig) -> str:
    """The method that is most like this one without image prompts."""
    if config.adapter != AdapterConfig():
        return "dcar+-text"
    return "coop" if config.reweight.train == "none" and config.loss.category == 0 else "dcar-text"
