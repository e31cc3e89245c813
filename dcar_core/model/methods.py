"""The methods by name: configurations of the shared model.

A method may add a loss and weight changes of its own. One of another distribution is a
plug-in: an entry point `NAME = "module:object"` in the group `dcar.methods`, whose
object is a `Method`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points

from torch import Tensor, nn

from dcar_core.model.backbone import Backbone
from dcar_core.model.config import (
    UNTOUCHED,
    AdapterConfig,
    LossConfig,
    LossDirection,
    ModelConfig,
    PromptConfig,
    RerankConfig,
    plain_config,
)
from dcar_core.model.weight_changes import WeightChanges
from dcar_core.util.errors import DcarError, ModelError

# The method of `dcar train` for a model that can run it
DEFAULT = "query-prompts"
ENTRY_POINTS = "dcar.methods"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of adaptation.

    config: prompts, token weights, adapters and losses of the shared model.
    changes: creates the learned changes of a backbone's own weights; None leaves the
        backbone as it is.
    encoders: creates what a plug-in learns inside the towers: a module with
        `encode_text` and `encode_image`, called in place of `Backbone`'s with the
        backbone, tokens or pixels, and `rows`. No runtime serves it.
    penalty: a loss term of the changes alone.
    batch_loss: a further loss term, of text and image features (B, E), the frozen
        encoders' features, and 1 / tau.
    late_loss: the share `LossConfig.late` of L_con, called as `contrastive_loss` is,
        but with the features of words (B, n, E), 0 for padding, and of patches
        (B, P, E).
    finish: called after training with the changes, and a function that returns the
        validation recall with them.
    lr_factor [ours]: multiplies the learning rate, so that one grid of rates fits every
        method.
    """

    config: ModelConfig
    changes: Callable[[Backbone], WeightChanges] | None = None
    encoders: Callable[[Backbone], nn.Module] | None = None
    penalty: Callable[[WeightChanges], Tensor] | None = None
    batch_loss: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    late_loss: (
        Callable[[Tensor, Tensor, Tensor, Tensor, LossDirection], Tensor] | None
    ) = None
    finish: Callable[[WeightChanges, Callable[[], float]], None] | None = None
    lr_factor: float = 1.0


# Adapters behind the image tower's blocks and on both features. Without prompts, the
# one on texts is the category adapter, too.
_ADAPTERS = AdapterConfig(text=True, image=True, blocks=32)
_CONFIGS = (
    UNTOUCHED,
    # text prompts alone
    plain_config("coop", prompt=PromptConfig(image=False)),
    # bottlenecks on the features of both towers
    plain_config("clip-adapter", adapter=AdapterConfig(text=True, image=True)),
    # coupled prompts in several blocks
    plain_config("maple", prompt=PromptConfig(depth=4)),
    # DCAR as the paper's figure shows it: dual prompts, token weights from the pair, a
    # category adapter in the loss
    ModelConfig(method="dcar"),
    # without image prompts [ours]
    ModelConfig(method="dcar-text", prompt=PromptConfig(image=False)),
    # deep prompts and token weights with adapters, held to CLIP [ours]
    ModelConfig(
        method="dcar+",
        prompt=PromptConfig(depth=4),
        adapter=_ADAPTERS,
        loss=LossConfig(anchor=1.0),
    ),
    # the same for image towers that take neither prompts nor block adapters
    ModelConfig(
        method="dcar+-text",
        prompt=PromptConfig(depth=4, image=False),
        adapter=AdapterConfig(text=True, image=True),
        loss=LossConfig(anchor=1.0),
    ),
    # dcar+ without prompts and token weights: the text tower stays as it is [ours]
    plain_config(
        "block-adapters",
        adapter=_ADAPTERS,
        loss=LossConfig(head=0, anchor=1.0),
    ),
    # the same with a second stage of training on hard negatives [ours]
    plain_config(
        "block-adapters+",
        adapter=_ADAPTERS,
        loss=LossConfig(head=0, anchor=1.0, hard_negatives=True),
    ),
    # the same with image prompts that are made from the query, for the first results
    # of a search [ours]
    plain_config(
        "query-prompts",
        adapter=_ADAPTERS,
        loss=LossConfig(head=0, anchor=1.0, hard_negatives=True),
        rerank=RerankConfig(blocks=2),
    ),
)
METHODS = {config.method: Method(config=config) for config in _CONFIGS}


def find_method(name: str) -> Method:
    """Return a method of this package or of a plug-in, which is imported here.

    Raises:
        DcarError: none has this name (the message lists all), or the plug-in cannot be
            loaded, or is no `Method`.
    """
    if name in METHODS:
        return METHODS[name]
    plug_ins = entry_points(group=ENTRY_POINTS)
    if name not in plug_ins.names:
        known = ", ".join([*METHODS, *sorted(plug_ins.names)])
        raise DcarError(
            f"no method is named {name!r}; there are: {known}. Other published methods"
            " are in a plug-in: pip install plugins/dcar-baselines"
        )
    try:
        method: Method = plug_ins[name].load()
        return replace(method, config=replace(method.config, method=name))
    except Exception as error:
        raise DcarError(
            f"the plug-in {plug_ins[name].value} is no method ({error}); update or"
            " uninstall it"
        ) from error


def default_method(backbone: Backbone) -> str:
    """Return the name of the method that `dcar train` uses by default."""
    if backbone.level == "text":
        return "dcar+-text"
    if has_second_stage(backbone, METHODS[DEFAULT].config):
        return DEFAULT
    return "block-adapters+"


def comparable_methods(backbone: Backbone) -> list[str]:
    """Return the names of the methods that `dcar evaluate` compares by default."""
    if backbone.level == "text":
        return ["clip", "coop", "clip-adapter", "dcar-text", "dcar+-text"]
    return [
        "clip",
        "coop",
        "clip-adapter",
        "maple",
        "dcar",
        "dcar+",
        default_method(backbone),
    ]


def has_second_stage(backbone: Backbone, config: ModelConfig) -> bool:
    """Return whether a model can run the second stage of a method that has one
    (`model.dcar.SecondStage`).
    """
    return (
        backbone.image_tower.pools_class_row
        and config.rerank.blocks <= backbone.image_tower.blocks
    )


def require_runnable(config: ModelConfig, backbone: Backbone) -> None:
    """Raise ModelError, which names another method, if the towers of a model cannot run
    a method.
    """
    prompt = config.prompt
    model = backbone.source.model
    needs_rows = (
        prompt.depths[1] > 0
        or config.reweight.image_feature == "patches"
        or config.adapter.blocks > 0
    )
    if backbone.level == "text" and (needs_rows or config.loss.late > 0):
        raise ModelError(
            f"{config.method} needs image prompts, block adapters or patches, which the"
            f" image tower of {model} does not have; use coop, dcar-text or dcar+-text"
        )
    if config.rerank.blocks and not has_second_stage(backbone, config):
        needed = (
            "prompts made from the query, which need an image tower of CLIP's own kind"
        )
        raise ModelError(
            f"{config.method} has {needed}; {model} has another: use block-adapters+"
        )
    room = backbone.context_length - backbone.layout.start
    if prompt.length > 0 and prompt.length > room - 1:
        raise ModelError(
            f"{prompt.length} prompts do not fit into the {room} tokens of {model}"
        )
