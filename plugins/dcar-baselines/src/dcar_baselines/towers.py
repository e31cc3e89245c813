"""The frozen towers of CLIP's own kind, run with additions to their blocks."""

from typing import Any

from torch import Tensor

from dcar_core.model.backbone import Backbone
from dcar_core.model.towers.image import ImageTower
from dcar_core.model.towers.text import NativeText, PromptRows, TextTower
from dcar_core.util.errors import ModelError


def require_clip(backbone: Backbone, method: str) -> None:
    """Raise ModelError unless both towers are CLIP's own: a causal text tower, and a
    class row with the patches.
    """
    text = backbone.text_tower
    if (
        not isinstance(text, NativeText)
        or text.layout.reads_padding
        or not backbone.image_tower.pools_class_row
    ):
        raise ModelError(
            f"{method} needs both towers of CLIP's own kind; {backbone.source.model}"
            " has others: use lora"
        )


def blocks(tower: TextTower | ImageTower) -> list[Any]:
    """Return the transformer blocks of a tower."""
    return list(tower.module.transformer.resblocks)


def encode_text(backbone: Backbone, tokens: Tensor, added: PromptRows) -> Tensor:
    """Text features (B, E), not normalized, of tokens (B, n) with additions."""
    tower = backbone.text_tower
    return tower.project(
        tower.pool(tower.run(tower.embed(tokens), tokens, added), tokens, added)
    )


def encode_image(backbone: Backbone, pixels: Tensor, added: PromptRows) -> Tensor:
    """Image features (B, E), not normalized, of pixels (B, 3, S, S) with additions."""
    tower = backbone.image_tower
    return tower.project(tower.pool(tower.run(tower.embed(pixels), added)))
