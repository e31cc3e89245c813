"""Choice of the towers for a model, proven at load: without prompts they must give the model's own features.

A tower that fails the proof, because its family is unknown or a library changed, is replaced by the whole encoder. The
model then keeps what needs no access to the inside: feature adapters.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dcar_core.model.text.tokenizer import TextLayout
from dcar_core.model.towers.image import ImageTower, NativeImage, TimmImage, WholeImage
from dcar_core.model.towers.text import CocaText, HfText, NativeText, TextTower, WholeText

logger = logging.getLogger(__name__)

Level = Literal["full", "text", "features"]

# Modules of timm whose models are of the classes that `TimmImage` covers.
_TIMM_MODULES = {"vision_transformer", "vision_transformer_hybrid", "vitamin", "eva"}
_TOLERANCE = 1e-4  # of the difference, relative to the stock features


def select_towers(
    clip: nn.Module, layout: TextLayout, caption: Sequence[int], size: int
) -> tuple[TextTower, ImageTower]:
    """Return the towers of an open_clip model in eval mode.

    Args:
        layout: of its tokenizer; `reads_padding` is decided here.
        caption: ids of a sentence of at least four tokens, without start and end, for the proof.
        size: S, the side of its images in pixels.
    """
    text, image = text_tower(clip, layout), image_tower(clip, size)
    with torch.no_grad():
        if text.width and (fault := _fault(_check_text, clip, text, caption)):
            logger.warning("the text tower is used without prompts, since its proof failed: %s", fault)
            text = WholeText(clip, layout)
        if image.width and (fault := _fault(_check_image, clip, image, size)):
            logger.warning("the image tower is used without prompts, since its proof failed: %s", fault)
            image = WholeImage(clip, size)
    return text, image


def level_of(text: TextTower, image: ImageTower) -> Level:
    """Return full (both towers take prompts), text (the text tower alone does) or features (neither does)."""
    if not text.width:
        return "features"
    return "full" if image.width else "text"


def level_of_config(config: Mapping[str, Any]) -> Level:
    """Return the level of a model from its `model_cfg`, without building it.

    Every text tower of open_clip takes prompts; the level becomes `features` only where a proof fails at load.
    """
    vision = config["vision_cfg"]
    name = vision.get("timm_model_name")
    if name is None:
        return "text" if isinstance(vision.get("layers"), list | tuple) else "full"  # a list: ResNet
    from timm.models import model_entrypoint

    module = model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]
    return "full" if module in _TIMM_MODULES and "rope_mixed" not in name else "text"


def text_tower(clip: Any, layout: TextLayout) -> TextTower:
    """Choose a tower by the structure of the model, without a proof."""
    text = getattr(clip, "text", clip)
    if type(text).__name__ == "HFTextEncoder":
        return HfText(text, layout)
    needed = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "attn_mask")
    if not all(hasattr(text, name) for name in needed):
        return WholeText(clip, layout)
    if getattr(text, "cls_emb", None) is not None:
        return CocaText(text, layout)
    return NativeText(text, layout)


def image_tower(clip: Any, size: int) -> ImageTower:
    """Choose a tower by the structure of the model, without a proof."""
    visual = clip.visual
    trunk = getattr(visual, "trunk", None)
    if type(visual).__name__ == "VisionTransformer":
        return NativeImage(visual)
    if type(trunk).__name__ in ("VisionTransformer", "Eva") and not getattr(trunk, "rope_mixed", False):
        return TimmImage(visual)
    return WholeImage(clip, size)


def _fault(check: Callable[..., None], *given: Any) -> str | None:
    try:
        check(*given)
    except Exception as error:  # a library that changed may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _check_text(clip: Any, tower: TextTower, caption: Sequence[int]) -> None:
    """Require the stock encoder's feature for a trimmed text, also with its first words as prompts."""
    layout = tower.layout
    parameter = next(clip.parameters())
    ids = [*layout.start_ids, *caption[: layout.context_length - layout.start - 1], layout.end_id]
    tokens = torch.tensor([ids], device=parameter.device)
    whole = nn.functional.pad(tokens, (0, layout.context_length - len(ids)), value=layout.pad_id)
    stock = clip.encode_text(whole, normalize=False)
    _require_equal(tower.encode(tokens), stock, "without prompts")
    if not torch.isfinite(tower.token_features(tokens)).all():
        raise ValueError("features of tokens are not finite")
    first = slice(layout.start, layout.start + 2)
    prompts = tower.embed(tokens[:, first])  # [1, 2, W_t]
    rest = torch.cat([tokens[:, : layout.start], tokens[:, first.stop :]], 1)
    _require_equal(tower.encode(rest, prompts), stock, "with words as prompts")


def _check_image(clip: Any, tower: ImageTower, size: int) -> None:
    """Require the stock encoder's feature for an image, and a finite one with prompts in two blocks."""
    parameter = next(clip.parameters())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, size, size, generator=generator).to(parameter.device)
    _require_equal(tower.encode(pixels), clip.encode_image(pixels, normalize=False), "without prompts")
    prompts = torch.zeros(2, 2, tower.width, device=parameter.device)
    if not torch.isfinite(tower.encode(pixels, prompts)).all():
        raise ValueError("features with prompts are not finite")


def _require_equal(found: Tensor, stock: Tensor, what: str) -> None:
    difference = float((found - stock).norm() / stock.norm().clamp(min=1e-12))
    if not difference <= _TOLERANCE:
        raise ValueError(f"features {what} differ from the model's by {difference:.1e} of their length")
