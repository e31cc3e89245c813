"""Exact pair weights outside of training: for re-ranking and explaining, where query and candidate are both known.

The weight of a word comes from the frozen encoders without prompts (section 2 of the method), so a candidate needs one
feature beside its vector: the frozen image encoder's. Every candidate of a query is weighed the same way.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcar_core.model import token_weights
from dcar_core.model.token_weights import blend, pair_weights, real_tokens, token_text_features
from dcar_core.util.arrays import Floats

if TYPE_CHECKING:
    from dcar_core.serving.encoder import Encoder


class PairWeights:
    """The weights of one encoder's queries for given pictures. The encoder's model is loaded if it is not."""

    def __init__(self, encoder: "Encoder") -> None:
        self._model = encoder.model

    @cached_property
    def _blank(self) -> Tensor:
        """As one of `frozen`, at first need, by whoever owns the model."""
        backbone = self._model.backbone
        return torch.from_numpy(self.image_features(backbone.preprocess.blank()[None])[0]).to(backbone.device)

    @torch.inference_mode()
    def image_features(self, pixels: NDArray[np.uint8]) -> Floats:
        """uint8 (C, 3, S, S), from `preprocess` -> float32 (C, E), or (C, P, E) where patches count; not normalised."""
        backbone = self._model.backbone
        batch = torch.from_numpy(backbone.preprocess.normalize(pixels)).to(backbone.device)
        return token_weights.image_features(backbone, batch, self._model.config.reweight).float().cpu().numpy()

    @torch.inference_mode()
    def factors(self, text: str, frozen: Floats) -> Floats:
        """Factors around 1 for each token of a text, with each picture: what `frozen` gave -> (C, n)."""
        backbone, config = self._model.backbone, self._model.config.reweight
        tokens = backbone.tokenize([text], self._model.prompt_tokens)  # [1, n]
        images = torch.from_numpy(frozen).to(tokens.device)
        features = token_text_features(backbone, tokens, config).expand(len(images), -1, -1)  # [C, n, E]
        real = real_tokens(tokens).expand(len(images), -1)
        factors = blend(pair_weights(features, images, self._blank), real, config)
        return factors.float().cpu().numpy()

    @torch.inference_mode()
    def predicted_factors(self, text: str) -> Floats:
        """Factors (n,) from the text alone, as the head predicts them; 1 where the model has no head."""
        tokens = self._model.backbone.tokenize([text], self._model.prompt_tokens)
        factors = self._model.predicted_weights(tokens)
        return np.ones(tokens.shape[1], np.float32) if factors is None else factors[0].float().cpu().numpy()

    def word_factors(self, text: str, factors: Floats) -> list[tuple[str, float]]:
        """The words of a text as the tokenizer splits it, each with the mean of its tokens' factors (n,)."""
        tokens = self._model.backbone.tokenize([text], self._model.prompt_tokens)[0]
        return [(word, float(factors[place].mean())) for word, place in self._model.backbone.split_words(tokens)]
