"""Outputs of the frozen encoders on a data set: computed once, because training never changes them."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dcar_core.data import Dataset, Sample
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import ReweightConfig
from dcar_core.model.token_weights import blend, image_features, pair_weights, token_text_features
from dcar_core.negatives.words import fold_name
from dcar_core.training.feature_cache import FeatureCache, digest
from dcar_core.util.arrays import Pixels
from dcar_core.util.errors import DataError, ImageError
from dcar_core.util.machine import available_cores

MAX_NEGATIVES = 8  # of a pair, in training
IMAGE_BATCH, TEXT_BATCH = 64, 256


class FrozenFeatures:
    """Frozen features of one split, read from `cache` or computed on request.

    Shapes: N pairs, I images, E the joint space.
    """

    def __init__(self, data: Dataset, backbone: Backbone, cache: FeatureCache, progress: bool) -> None:
        self.data, self.backbone, self.cache, self.progress = data, backbone, cache, progress
        self.names = data.images
        row_of = {name: row for row, name in enumerate(self.names)}
        self.image_of = np.array([row_of[sample.image] for sample in data.samples])
        self.image_key = cache.image_key(data)
        self._pixels: Pixels | None = None

    def pixels(self) -> Pixels:
        """Return the decoded images, uint8 (I, 3, S, S)."""
        if self._pixels is None:
            size = self.backbone.preprocess.size
            self._pixels = self.cache.array("pixels", self.image_key, (len(self.names), 3, size, size), self._decode)
        return self._pixels

    def images(self) -> Tensor:
        """Return image features (I, E), normalized, without prompts."""
        return self.cache.tensor("images", self.image_key, lambda: self._encode_images(self.pixels()))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return text features (len(texts), E), normalized, without prompts; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        row_of = {text: row for row, text in enumerate(unique)}
        features = self.cache.tensor("texts", digest(unique), lambda: self._encode_texts(unique))
        return features[torch.tensor([row_of[text] for text in texts], device=features.device)]

    def pair_weights(self, tokens: Tensor, config: ReweightConfig) -> Tensor:
        """Return token factors (N, n) of the captions, each from its own image."""
        texts = [s.caption for s in self.data.samples]
        features = config.token_feature, config.image_feature
        key = digest(self.image_key, texts, self.image_of.tolist(), tokens.shape[1], *features)
        raw = self.cache.tensor("weights", key, lambda: self._raw_weights(tokens, config))
        return blend(raw, self.backbone.layout.caption_mask(tokens), config)

    def candidates(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return features (N, 1 + M, E) of captions and negatives, and their category-matching weights (N, 1 + M)."""
        samples, device = self.data.samples, self.backbone.device
        width = min(MAX_NEGATIVES, max((len(s.negatives) for s in samples), default=0))
        places = [(i, j) for i, s in enumerate(samples) for j in range(min(width, len(s.negatives)))]
        features = torch.zeros(len(samples), 1 + width, self.backbone.embed_dim, device=device)
        weights = torch.zeros(len(samples), 1 + width, device=device)
        features[:, 0], weights[:, 0] = self.texts([s.caption for s in samples]), 1
        if places:
            rows, columns = torch.tensor(places, device=device).T
            features[rows, 1 + columns] = self.texts([samples[i].negatives[j] for i, j in places])
            is_other = [_has_other_category(samples[i], j) for i, j in places]
            weights[rows, 1 + columns] = 1 + alpha * torch.tensor(is_other, device=device).float()
        return features, weights

    def _decode(self, out: Pixels) -> None:
        def decode(row: int) -> None:
            name = self.names[row]
            try:
                out[row] = self.backbone.preprocess(self.data.read(name))
            except ImageError as error:
                message = f"{self.data.split}: {name}: {error}; replace the image, or leave it out with --skip-broken"
                raise DataError(message) from error

        with ThreadPoolExecutor(min(8, available_cores())) as pool:  # Pillow releases the GIL while it decodes
            rows = range(len(self.names))
            for _ in self._bar(pool.map(decode, rows), f"reading {self.data.split} images", len(rows)):
                pass

    @torch.no_grad()
    def _encode_images(self, pixels: Pixels) -> Tensor:
        backbone, parts = self.backbone, []
        for i in self._bar(range(0, len(pixels), IMAGE_BATCH), "frozen image features"):
            batch = backbone.normalized(pixels[i : i + IMAGE_BATCH])
            parts.append(F.normalize(backbone.encode_image(batch), dim=-1))
        return torch.cat(parts)

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode in order of length, so that short texts need little padding."""
        tokens = self.backbone.tokenize(texts)
        lengths = self.backbone.layout.lengths(tokens)
        order = torch.argsort(lengths)
        out = torch.empty(len(texts), self.backbone.embed_dim, device=tokens.device)
        for i in self._bar(range(0, len(texts), TEXT_BATCH), "frozen text features"):
            rows = order[i : i + TEXT_BATCH]
            part = tokens[rows, : int(lengths[rows[-1]])]
            out[rows] = F.normalize(self.backbone.encode_text(part), dim=-1)
        return out

    @torch.no_grad()
    def _raw_weights(self, tokens: Tensor, config: ReweightConfig) -> Tensor:
        blank, parts = self._image_features(self.backbone.preprocess.blank()[None], config)[0], []
        pooled = self.images() if config.image_feature == "pooled" else None
        for i in self._bar(range(0, len(tokens), TEXT_BATCH), "token weights"):
            words = token_text_features(self.backbone, tokens[i : i + TEXT_BATCH], config)
            rows = self.image_of[i : i + TEXT_BATCH]
            if pooled is not None:
                images = pooled[rows]
            else:  # patch features are computed per batch: an image has dozens of patches, too many to keep
                chunks = [rows[j : j + IMAGE_BATCH] for j in range(0, len(rows), IMAGE_BATCH)]
                images = torch.cat([self._image_features(self.pixels()[chunk], config) for chunk in chunks])
            parts.append(pair_weights(words, images, blank))
        return torch.cat(parts)

    def _image_features(self, pixels: Pixels, config: ReweightConfig) -> Tensor:
        return image_features(self.backbone, self.backbone.normalized(pixels), config)

    def _bar(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
        return tqdm(items, label, total, disable=not self.progress, leave=False)


def _has_other_category(sample: Sample, negative: int) -> bool:
    """True if a negative caption is known to be of another category than the sample."""
    category = sample.negative_categories[negative : negative + 1]
    return any(category) and fold_name(category[0]) != fold_name(sample.category)
