"""Encode a split as the service does: queries without their image, images without text. Recall on the result."""

import numpy as np
import torch
from torch import Tensor

from dcar_core.model.config import QueryWeights
from dcar_core.model.dcar import DCAR
from dcar_core.training.prepared_split import PreparedSplit
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DivergedError
from dcar_core.util.retrieval_metrics import recall_at_k

Recall = dict[str, float]
_BATCH = 128


def evaluate(model: DCAR, split: PreparedSplit) -> Recall:
    """Return recall at 1, 5 and 10 in both directions, in percent."""
    model.eval()
    return recall_at_k(encode_captions(model, split), encode_images(model, split), split.image_of)


def mean_r1(recall: Recall) -> float:
    """Return the mean of R@1 in both directions, the measure by which epochs and settings are chosen."""
    return (recall["t2i_r1"] + recall["i2t_r1"]) / 2


@torch.inference_mode()
def encode_captions(model: DCAR, split: PreparedSplit) -> Floats:
    """Encode each caption as a query: (N, E)."""
    return model.adapt_text(_caption_features(model, split)).cpu().numpy()


@torch.inference_mode()
def encode_images(model: DCAR, split: PreparedSplit) -> Floats:
    """Encode each image: (I, E)."""
    return model.adapt_image(_image_features(model, split)).cpu().numpy()


@torch.no_grad()
def tower_features(model: DCAR, split: PreparedSplit) -> tuple[Tensor, Tensor]:
    """Return the features of captions (N, E) and images (I, E) before the adapters, without gradients."""
    return _caption_features(model, split), _image_features(model, split)


def _caption_features(model: DCAR, split: PreparedSplit) -> Tensor:
    if model.text_is_frozen and split.text_features is not None:
        return split.text_features
    starts = range(0, len(split.tokens), _BATCH)
    return torch.cat([model.query_features(split.tokens[i : i + _BATCH]) for i in starts])


def _image_features(model: DCAR, split: PreparedSplit) -> Tensor:
    if split.pixels is None:
        assert split.image_features is not None  # `prepare_split` makes one or the other
        return split.image_features
    starts = range(0, len(split.pixels), _BATCH)
    normalized = (model.backbone.normalized(split.pixels[i : i + _BATCH]) for i in starts)
    return torch.cat([model.image_features(pixels) for pixels in normalized])


def choose_query_weights(model: DCAR, split: PreparedSplit) -> tuple[QueryWeights, Recall]:
    """Choose between plain queries and predicted token weights by validation recall; plain queries win a tie.

    The model's configuration is set to the choice.

    Raises:
        DivergedError: an encoded vector is not finite. The last step can cause this after a finite loss.
    """
    options: tuple[QueryWeights, ...] = ("none", "predicted") if model.head is not None else ("none",)
    model.eval()
    images = encode_images(model, split)
    recalls: dict[QueryWeights, Recall] = {}
    for query in options:
        model.config = model.config.with_query_weights(query)
        captions = encode_captions(model, split)
        if not (np.isfinite(captions).all() and np.isfinite(images).all()):
            raise DivergedError(f"{model.config.method} diverged: its vectors are not finite; use a lower --lr")
        recalls[query] = recall_at_k(captions, images, split.image_of)
    best = max(options, key=lambda query: mean_r1(recalls[query]))
    model.config = model.config.with_query_weights(best)
    return best, recalls[best]
