"""Text functions for negatives, of a CLIP or only of letters: features of names, and tokens after truncation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dcar_core.model.text.tokenizer import TextTokenizer
from dcar_core.negatives.generate import ReadTokens
from dcar_core.negatives.taxonomy import NameFeatures, letter_features
from dcar_core.util.arrays import Floats

if TYPE_CHECKING:  # torch takes seconds, and letters need none
    from dcar_core.model.backbone import Backbone

_PROMPT_TOKENS = 8  # prompt vectors that the context leaves room for


class TextFunctions(NamedTuple):
    """features: of category names, (n, d), L2-normalized. tokens: of texts, as an encoder with prompts reads them."""

    features: NameFeatures
    tokens: ReadTokens


def _clip_tokens(texts: Sequence[str]) -> list[list[int]]:
    clip = TextTokenizer.for_clip()
    return clip.with_limit(clip.limit - _PROMPT_TOKENS).encode(texts)


LETTER_FUNCTIONS = TextFunctions(letter_features, _clip_tokens)


def backbone_functions(backbone: "Backbone") -> TextFunctions:
    """Return the text functions of a loaded CLIP, without prompts."""
    import torch
    import torch.nn.functional as F

    @torch.no_grad()
    def features(names: Sequence[str]) -> Floats:
        parts = []
        for i in range(0, len(names), 256):
            tokens = backbone.tokenize([f"a photo of a {name}" for name in names[i : i + 256]])
            parts.append(F.normalize(backbone.encode_text(tokens).double(), dim=-1).cpu().numpy())
        return np.concatenate(parts)

    return TextFunctions(features, backbone.text_tokenizer(_PROMPT_TOKENS).encode)
