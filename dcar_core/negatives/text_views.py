"""Text functions for negatives, with or without a CLIP: features of names, and tokens after truncation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dcar_core.model.text.tokenizer import clip_token_ids
from dcar_core.negatives.generate import ReadTokens
from dcar_core.negatives.taxonomy import NameFeatures, letter_features
from dcar_core.util.arrays import Floats

if TYPE_CHECKING:  # torch takes seconds, and letters need none
    from dcar_core.model.backbone import Backbone

ROOM = 8


def load_text_views(
    model: str | None, pretrained: str | None = None, device: str = "cpu"
) -> tuple[NameFeatures, ReadTokens]:
    """Load the text functions from a CLIP by name, or from letters and CLIP's vocabulary without a model.

    Raises:
        ModelError: the model cannot be loaded.
    """
    if model is None:
        return letter_features, lambda texts: clip_token_ids(texts, ROOM)
    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.serving.encoder import pick_device

    return backbone_views(load_backbone(BackboneSource(model, pretrained), pick_device(device)))


def backbone_views(backbone: "Backbone") -> tuple[NameFeatures, ReadTokens]:
    """Return the text functions of a loaded CLIP."""
    return _features(backbone), _tokens(backbone)


def _features(backbone: "Backbone") -> NameFeatures:
    """Return a function from category names to CLIP text features, without prompts."""
    import torch
    import torch.nn.functional as F

    @torch.no_grad()
    def features(names: Sequence[str]) -> Floats:
        parts = []
        for i in range(0, len(names), 256):
            tokens = backbone.tokenize([f"a photo of a {name}" for name in names[i : i + 256]])
            parts.append(F.normalize(backbone.encode_text(tokens).double(), dim=-1).cpu().numpy())
        return np.concatenate(parts)

    return features


def _tokens(backbone: "Backbone") -> ReadTokens:
    """Return a function from texts to tokens that leaves room for ROOM prompt vectors."""
    return backbone.text_tokenizer(ROOM).encode
