"""Second scores outside of training: for re-ranking, where query and candidate are both known.

A model has a second stage of its own (`model.query_prompts`), or exact pair weights.

The weight of a token comes from the frozen encoders without prompts (section 2 of the method), so a candidate needs one
feature beside its vector: the frozen image encoder's. Every candidate of a query is weighted the same way.
"""

from functools import cached_property

import torch
from torch import Tensor

from dcar_core.model import token_weights
from dcar_core.model.dcar import SecondStage
from dcar_core.model.query_prompts import take
from dcar_core.model.token_weights import blend, pair_weights, token_text_features
from dcar_core.serving.encoder import Encoder
from dcar_core.util.arrays import Floats, Pixels


class PairWeights:
    """Token factors of one encoder's queries for given images. Creating it loads the encoder's model."""

    def __init__(self, encoder: Encoder) -> None:
        self._model = encoder.model

    @cached_property
    def _blank(self) -> Tensor:
        backbone = self._model.backbone
        return torch.from_numpy(self.image_features(backbone.preprocess.blank()[None])[0]).to(backbone.device)

    @torch.inference_mode()
    def image_features(self, pixels: Pixels) -> Floats:
        """uint8 (C, 3, S, S), from `preprocess` -> frozen float32 (C, E), or (C, P, E) by patches; not normalized."""
        backbone = self._model.backbone
        config = self._model.config.reweight
        return token_weights.image_features(backbone, backbone.normalized(pixels), config).float().cpu().numpy()

    @torch.inference_mode()
    def factors(self, text: str, image_features: Floats) -> Floats:
        """Return the factors (C, n) around 1 of a text's tokens with each image, given by its `image_features`."""
        backbone, config = self._model.backbone, self._model.config.reweight
        tokens = backbone.tokenize([text], self._model.prompt_tokens)  # [1, n]
        images = torch.from_numpy(image_features).to(tokens.device)
        features = token_text_features(backbone, tokens, config).expand(len(images), -1, -1)  # [C, n, E]
        mask = backbone.layout.caption_mask(tokens).expand(len(images), -1)
        return blend(pair_weights(features, images, self._blank), mask, config).float().cpu().numpy()


class QueryReranker:
    """Second scores of one encoder's queries with given images. Creating it loads the encoder's model."""

    def __init__(self, encoder: Encoder) -> None:
        self._model = encoder.model
        self._stage = SecondStage(self._model)

    @torch.inference_mode()
    def image_features(self, pixels: Pixels) -> Floats:
        """uint8 (C, 3, S, S), from `preprocess` -> what `scores` needs of images, float16 (C, 1 + P, W_v)."""
        rows: Floats = self._stage.image_rows(self._model.backbone.normalized(pixels)).half().cpu().numpy()
        return rows

    @torch.inference_mode()
    def scores(self, text: str, image_features: Floats) -> Floats:
        """Return the second scores (C,) of a text with each image, times their weight."""
        backbone = self._model.backbone
        texts = self._stage.texts(backbone.tokenize([text], self._model.prompt_tokens))
        images = self._stage.images(torch.from_numpy(image_features).to(backbone.device).float())
        pairs = take(texts, torch.zeros(len(image_features), dtype=torch.long))
        scores: Floats = self._stage.scores(pairs, images).float().cpu().numpy()
        return scores * self._model.config.rerank.weight
