"""A split through the two encoders as the service will see it: a query knows no image, a picture no text."""

import numpy as np
import torch
from numpy.typing import NDArray

from dcar_core.model.config import QueryWeights
from dcar_core.model.dcar import DCAR
from dcar_core.training.features import Prepared
from dcar_core.util.errors import DivergedError
from dcar_core.util.retrieval_metrics import recall_at_k

Recall = dict[str, float]


def evaluate(model: DCAR, data: Prepared) -> Recall:
    """Recall@1/5/10 both ways over a split, in percent. Queries never see their image."""
    model.eval()
    return recall_at_k(encode_captions(model, data), encode_pictures(model, data), data.image_of)


def mean_r1(recall: Recall) -> float:
    """What validation chooses by: the mean of R@1 both ways."""
    return (recall["t2i_r1"] + recall["i2t_r1"]) / 2


@torch.inference_mode()
def encode_captions(model: DCAR, data: Prepared, batch: int = 128) -> NDArray[np.float32]:
    """(N, E), each caption encoded as a query."""
    starts = range(0, len(data.tokens), batch)
    if model.text_is_frozen and data.captions is not None:
        parts = [model.adapt_text(data.captions[i : i + batch]) for i in starts]
    else:
        parts = [model.encode_query(data.tokens[i : i + batch]) for i in starts]
    return torch.cat(parts).cpu().numpy()


@torch.inference_mode()
def encode_pictures(model: DCAR, data: Prepared, batch: int = 128) -> NDArray[np.float32]:
    """(I, E)"""
    backbone = model.backbone
    if data.pixels is None:
        assert data.images is not None  # `prepare` makes one or the other
        return model.adapt_image(data.images).cpu().numpy()
    parts = []
    for i in range(0, len(data.pixels), batch):
        pixels = backbone.preprocess.normalize(data.pixels[i : i + batch])
        parts.append(model.encode_image(torch.from_numpy(pixels).to(backbone.device)))
    return torch.cat(parts).cpu().numpy()


def choose_query_weights(model: DCAR, data: Prepared) -> tuple[QueryWeights, Recall]:
    """Validation's choice between plain queries and predicted token weights; ties go to plain ones.

    The model's configuration is left at the choice.

    Raises:
        DivergedError: a vector is no number any more: the last step can do that after a loss that was one.
    """
    choices: tuple[QueryWeights, ...] = ("none", "predicted") if model.head is not None else ("none",)
    model.eval()
    pictures = encode_pictures(model, data)
    found: dict[QueryWeights, Recall] = {}
    for query in choices:
        model.config = model.config.with_query_weights(query)
        captions = encode_captions(model, data)
        if not (np.isfinite(captions).all() and np.isfinite(pictures).all()):
            raise DivergedError(f"the vectors of {model.config.method} are no numbers any more; use a lower --lr")
        found[query] = recall_at_k(captions, pictures, data.image_of)
    best = max(choices, key=lambda query: mean_r1(found[query]))
    model.config = model.config.with_query_weights(best)
    return best, found[best]
