"""What the frozen encoders say of a data set, computed once: nothing of it changes during training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dcar_core.backbone import Backbone
from dcar_core.data import Dataset
from dcar_core.errors import DataError, ImageError
from dcar_core.model import DCAR
from dcar_core.reweight import blend, pair_weights, real_tokens

MAX_NEGATIVES = 8


@dataclass(frozen=True)
class Prepared:
    """A split ready for the loop; N pairs, I images.

    pixels: uint8 (I, 3, S, S). image_of: int64 (N,), the row of each pair's image.
    tokens: int64 (N, n), with room for the prompts. caption_group: int64 (N,), equal where captions read the same.
    pair_weights: (N, n) blended factors from each caption's own image, or None.
    caption_features: (N, 1 + M, E) of the frozen text encoder, positive first, or None.
    matching: (N, 1 + M) category-matching weights, 0 for padding, or None.
    frozen_images, frozen_captions: (I, E) and (N, E) of the frozen encoders, normalised, or None.
    """

    pixels: NDArray[np.uint8]
    image_of: NDArray[np.int64]
    tokens: Tensor
    caption_group: Tensor
    pair_weights: Tensor | None = None
    caption_features: Tensor | None = None
    matching: Tensor | None = None
    frozen_images: Tensor | None = None
    frozen_captions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_of)


def prepare(data: Dataset, model: DCAR, *, for_training: bool, progress: bool = True) -> Prepared:
    """Decode the pictures, tokenise the captions and, for training, run the frozen encoders once.

    Raises:
        DataError: a picture is missing or broken; the message names it.
    """
    names = list(dict.fromkeys(sample.image for sample in data.samples))
    row_of = {name: row for row, name in enumerate(names)}
    image_of = np.array([row_of[sample.image] for sample in data.samples])
    first = {sample.image: sample for sample in reversed(data.samples)}
    backbone = model.backbone
    pixels = np.empty((len(names), 3, backbone.preprocess.size, backbone.preprocess.size), np.uint8)
    for row, name in enumerate(
        tqdm(names, f"reading {data.split} pictures", unit="img", disable=not progress, leave=False)
    ):
        try:
            pixels[row] = backbone.preprocess(data.read(first[name]))
        except ImageError as error:
            raise DataError(f"{data.split}: {name}: {error}") from error
    tokens = backbone.tokenize([sample.caption for sample in data.samples], model.room)
    groups: dict[str, int] = {}
    group = torch.tensor([groups.setdefault(s.caption.casefold(), len(groups)) for s in data.samples])
    if not for_training:
        return Prepared(pixels, image_of, tokens, group)
    config = model.config
    weights = features = matching = None
    if config.reweight.train == "pair" or model.head is not None:
        weights = _pair_weights(backbone, model, pixels, image_of, tokens, progress)
    if model.category_adapter() is not None:
        features, matching = _captions(backbone, data, config.loss.alpha, progress)
    anchors: tuple[Tensor | None, Tensor | None] = (None, None)
    if config.loss.anchor > 0:
        anchors = (F.normalize(frozen_images(backbone, pixels), dim=-1), _frozen_captions(backbone, data))
    return Prepared(pixels, image_of, tokens, group, weights, features, matching, *anchors)


@torch.inference_mode()
def frozen_images(backbone: Backbone, pixels: NDArray[np.uint8], batch: int = 64) -> Tensor:
    """uint8 (I, 3, S, S) -> (I, E), not normalised, without prompts."""
    parts = [
        backbone.encode_image(
            torch.from_numpy(backbone.preprocess.normalize(pixels[i : i + batch])).to(backbone.device)
        )
        for i in range(0, len(pixels), batch)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def _pair_weights(
    backbone: Backbone,
    model: DCAR,
    pixels: NDArray[np.uint8],
    image_of: NDArray[np.int64],
    tokens: Tensor,
    progress: bool,
) -> Tensor:
    images = frozen_images(backbone, pixels)
    blank = frozen_images(backbone, backbone.preprocess.blank()[None])[0]
    parts = []
    for i in tqdm(range(0, len(tokens), 256), "token weights", unit="batch", disable=not progress, leave=False):
        part = tokens[i : i + 256]
        raw = pair_weights(backbone.token_features(part), images[image_of[i : i + 256]], blank)
        parts.append(blend(raw, real_tokens(part), model.config.reweight))
    return torch.cat(parts)


@torch.inference_mode()
def _captions(backbone: Backbone, data: Dataset, alpha: float, progress: bool) -> tuple[Tensor, Tensor]:
    """Frozen features of positives and negatives, and their category-matching weights."""
    most = min(MAX_NEGATIVES, max((len(s.negatives) for s in data.samples), default=0))
    features = torch.zeros(len(data), 1 + most, backbone.embed_dim, device=backbone.device)
    matching = torch.zeros(len(data), 1 + most, device=backbone.device)
    for i in tqdm(range(0, len(data), 64), "frozen captions", unit="batch", disable=not progress, leave=False):
        for j, sample in enumerate(data.samples[i : i + 64], start=i):
            texts = [sample.caption, *sample.negatives[:most]]
            features[j, : len(texts)] = _frozen_texts(backbone, texts)
            same = [True, *(c == sample.category for c in sample.negative_categories[:most])]
            same += [False] * (len(texts) - len(same))
            matching[j, : len(texts)] = 1 + alpha * torch.tensor(same, device=backbone.device).float()
    return features, matching


@torch.inference_mode()
def _frozen_captions(backbone: Backbone, data: Dataset, batch: int = 256) -> Tensor:
    captions = [sample.caption for sample in data.samples]
    return torch.cat([_frozen_texts(backbone, captions[i : i + batch]) for i in range(0, len(captions), batch)])


def _frozen_texts(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    return F.normalize(backbone.encode_text(backbone.tokenize(texts)), dim=-1)
