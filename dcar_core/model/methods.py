"""The methods by name: configurations of the shared model, some with losses and weight
changes of their own.

A method of another distribution is a plug-in: an entry point `NAME = "module:object"`
in the group `dcar.methods`, whose object is a `Method`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points

import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone
from dcar_core.model.config import (
    UNTOUCHED,
    AdapterConfig,
    LossConfig,
    ModelConfig,
    PromptConfig,
    RerankConfig,
    ReweightConfig,
    plain_config,
)
from dcar_core.model.weight_changes import WeightChanges
from dcar_core.util.errors import DcarError, ModelError

DEFAULT = "query-prompts"  # of `dcar train`, for a model that can run it
ENTRY_POINTS = "dcar.methods"  # the group
_ALL = r"^(?!logit_)"
_ATTENTION = r"(^|\.)(attn|self_attn|attention|SelfAttention)\..*weight$"
_PROJECTION = r"^visual\.(proj$|head\.|trunk\.head\.)"
_SHARES = (1.0, 0.75, 0.5, 0.25)  # the first wins a tie


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of adaptation.

    config: prompts, token weights, adapters and losses of the shared model. changes:
    creates the learned changes of a backbone's own weights; None leaves the backbone as
    it is. encoders: creates what a plug-in learns inside the towers: a module with
    `encode_text` and `encode_image`, called in
        place of `Backbone`'s with the backbone, tokens or pixels, and `rows`. No
        runtime serves it.
    penalty: a loss term of the changes alone. batch_loss: a further loss term, of text
    and image features (B, E), the frozen encoders' features, and 1 / tau. finish:
    called after training with the changes, and a function that returns the validation
    recall with them. lr_factor [ours]: multiplies the learning rate, so that one grid
    of rates fits every method.
    """

    config: ModelConfig
    changes: Callable[[Backbone], WeightChanges] | None = None
    encoders: Callable[[Backbone], nn.Module] | None = None
    penalty: Callable[[WeightChanges], Tensor] | None = None
    batch_loss: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    finish: Callable[[WeightChanges, Callable[[], float]], None] | None = None
    lr_factor: float = 1.0


def consistency_loss(
    text: Tensor,
    image: Tensor,
    frozen_text: Tensor,
    frozen_image: Tensor,
    scale: Tensor,
) -> Tensor:
    """Distance of a batch from the frozen encoders, with the weights of PromptSRC's own
    code.

    25 and 10 times the mean absolute difference of text and image features, plus the
    divergence of the similarities of each image to the captions, as the mean over all
    of them.

    Args:
        text, image, frozen_text, frozen_image: L2-normalized features (B, E) of the
            pairs.
        scale: 1 / tau.
    """
    adapted, frozen = (
        (scale * i @ t.T).log_softmax(1)
        for i, t in ((image, text), (frozen_image, frozen_text))
    )
    divergence = (
        F.kl_div(adapted, frozen, reduction="sum", log_target=True) / adapted.numel()
    )
    return (
        25 * F.l1_loss(text, frozen_text)
        + 10 * F.l1_loss(image, frozen_image)
        + divergence
    )


def interpolate(changes: WeightChanges, recall: Callable[[], float]) -> None:
    """Shrink the changes to the best share by validation recall.

    WiSE-FT (Wortsman et al. 2022): weights between the frozen and the trained ones are
    often better, and forget less.
    """
    recalls = dict[float, float]()
    before = 1.0
    for share in _SHARES:
        changes.shrink(share / before)
        recalls[share] = recall()
        before = share
    changes.shrink(max(recalls, key=lambda share: recalls[share]) / before)


# Goyal et al. 2023: every weight by the contrastive loss
_FLYP = Method(
    config=plain_config("flyp"),
    changes=partial(WeightChanges, names=_ALL, matrices=False),
    finish=interpolate,
    lr_factor=0.02,
)
_BASELINES = (
    Method(config=UNTOUCHED),
    # text prompts alone
    Method(config=replace(plain_config("coop"), prompt=PromptConfig(image=False))),
    # bottlenecks on the features of both towers
    Method(
        config=replace(
            plain_config("clip-adapter"), adapter=AdapterConfig(text=True, image=True)
        )
    ),
    # coupled prompts in several blocks
    Method(config=replace(plain_config("maple"), prompt=PromptConfig(depth=4))),
    # Khattak et al. 2023. The paper averages the prompts over epochs, for which one
    # epoch is chosen here [ours].
    Method(
        config=replace(plain_config("promptsrc"), prompt=PromptConfig(depth=4)),
        batch_loss=consistency_loss,
    ),
    # Hu et al. 2022. Query, key and value of a joint matrix share the lower factor
    # [ours].
    Method(
        config=plain_config("lora"),
        changes=partial(WeightChanges, names=_ATTENTION, rank=4),
        lr_factor=0.2,
    ),
    # Fahes et al. 2024: the image tower's projection alone, held to the frozen one
    Method(
        config=plain_config("prolip"),
        changes=partial(WeightChanges, names=_PROJECTION),
        penalty=WeightChanges.distance,
        lr_factor=0.2,
    ),
    _FLYP,
    # Yao et al. 2022, who also search by late interaction of words and patches. Here
    # vectors are searched, so it is half of the contrastive loss [ours]; all else is
    # FLYP's, for a comparison of the losses alone.
    replace(
        _FLYP,
        config=replace(plain_config("filip"), loss=replace(UNTOUCHED.loss, late=0.5)),
    ),
)
# Behind the image tower's blocks and on both features. Without prompts, the one on
# texts is the category adapter, too.
_ADAPTED = AdapterConfig(text=True, image=True, blocks=32)
_ANCHORED = LossConfig(anchor=1.0)
_PLUS = ModelConfig(
    method="dcar+",
    prompt=PromptConfig(depth=4),
    adapter=_ADAPTED,
    loss=_ANCHORED,
)
# dcar+ without prompts and token weights: the text tower stays as it is [ours]
_BLOCKS = replace(
    plain_config("block-adapters"),
    adapter=_ADAPTED,
    loss=replace(_ANCHORED, head=0),
)
_HARD = replace(
    _BLOCKS,
    method="block-adapters+",
    loss=replace(_BLOCKS.loss, hard_negatives=True),
)
# DCAR as the paper's figure shows it (dual prompts, token weights from the pair, a
# category adapter in the loss), its options and ablations, and its extensions
_DCAR = (
    ModelConfig(method="dcar"),
    # options: a token's feature apart from its caption; the patch most like it instead
    # of the whole image
    ModelConfig(method="dcar-alone", reweight=ReweightConfig(token_feature="alone")),
    ModelConfig(
        method="dcar-patches", reweight=ReweightConfig(image_feature="patches")
    ),
    # ablations
    ModelConfig(method="dcar-no-weights", reweight=UNTOUCHED.reweight),
    ModelConfig(method="dcar-no-category", loss=LossConfig(category=0)),
    replace(plain_config("dual"), prompt=PromptConfig()),
    # fresh prompts in each of the first four blocks [ours]
    ModelConfig(method="dcar-deep", prompt=PromptConfig(depth=4)),
    # without image prompts [ours]
    ModelConfig(method="dcar-text", prompt=PromptConfig(image=False)),
    # deep prompts and token weights with adapters, held to CLIP [ours]
    _PLUS,
    _BLOCKS,
    # the same with a second stage of training on hard negatives [ours]
    _HARD,
    # the same with image prompts that are made from the query, for its first results
    # [ours]
    replace(_HARD, method="query-prompts", rerank=RerankConfig(blocks=2)),
    # for image towers that take neither prompts nor block adapters
    replace(
        _PLUS,
        method="dcar+-text",
        prompt=PromptConfig(depth=4, image=False),
        adapter=replace(_ADAPTED, blocks=0),
    ),
)
METHODS = {
    method.config.method: method
    for method in (*_BASELINES, *(Method(config=config) for config in _DCAR))
}


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
        raise DcarError(
            f"no method is named {name!r}; there are:"
            f" {', '.join([*METHODS, *sorted(plug_ins.names)])}"
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
