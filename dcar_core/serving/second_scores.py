"""Second scores outside of training, by the second stage of a model (`model.query_prompts`)."""

import torch

from dcar_core.model.dcar import SecondStage
from dcar_core.model.query_prompts import take
from dcar_core.serving.encoder import Encoder
from dcar_core.util.arrays import Floats, Pixels


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
