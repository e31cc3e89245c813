"""Queries of several domains in one forward pass over the backbone that they share.

- Prompts are inputs: each row brings its encoder's own, so rows of different encoders stand in one batch. The result
  is that of each encoder by itself (tested).
- Rows go together where their prompts have one shape; others follow in a pass of their own.
- What comes after a tower is applied encoder by encoder.

Letters: B rows, k prompt vectors, W a tower's width, n tokens, E joint space.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dcar_core.encoder import Encoder

Vectors = NDArray[np.float32]


class _Row(Protocol):
    @property
    def encoder(self) -> Encoder: ...


R = TypeVar("R", bound=_Row)


@dataclass(frozen=True, slots=True, eq=False)
class TextRow:
    """A text for one encoder. weights: float32 (n,), a factor a token as `pair_weights` gives; None: as a query."""

    encoder: Encoder
    text: str
    weights: Vectors | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImageRow:
    """A picture for one encoder: uint8 (3, S, S), from its `preprocess`."""

    encoder: Encoder
    pixels: NDArray[np.uint8]


@torch.inference_mode()
def encode_text_rows(rows: Sequence[TextRow]) -> Vectors:
    """float32 (B, E), L2-normalised. All encoders must share one backbone."""
    first = rows[0].encoder
    if all(row.encoder is first and row.weights is None for row in rows):
        return first.encode_text([row.text for row in rows])
    return _in_groups(rows, _text_prompts, _encode_texts)


@torch.inference_mode()
def encode_image_rows(rows: Sequence[ImageRow]) -> Vectors:
    """float32 (B, E), L2-normalised. All encoders must share one backbone."""
    first = rows[0].encoder
    if all(row.encoder is first for row in rows):
        return first.encode_pixels(np.stack([row.pixels for row in rows]))
    return _in_groups(rows, _image_prompts, _encode_images)


def _encode_texts(rows: Sequence[TextRow]) -> Tensor:
    backbone = rows[0].encoder.model.backbone
    tokens = backbone.tokenize([row.text for row in rows], rows[0].encoder.model.room)  # [B, n]
    weights = torch.ones(tokens.shape, device=tokens.device)
    for _, places in _by_encoder(rows):
        model = rows[places[0]].encoder.model
        if (
            model.config.reweight.query == "predicted"
            and (predicted := model.predicted_weights(tokens[places])) is not None
        ):
            weights[places] = predicted
    for place, row in enumerate(rows):
        if row.weights is not None:
            weights[place] = 1
            weights[place, : len(row.weights)] = torch.from_numpy(row.weights).to(weights.device)
    features = F.normalize(backbone.encode_text(tokens, _stacked(rows, _text_prompts), weights), dim=-1)
    for encoder, places in _by_encoder(rows):
        features[places] = encoder.model.adapt_text(features[places])
    return features


def _encode_images(rows: Sequence[ImageRow]) -> Tensor:
    backbone = rows[0].encoder.model.backbone
    pixels = torch.from_numpy(backbone.preprocess.normalize(np.stack([row.pixels for row in rows])))
    features = backbone.encode_image(pixels.to(backbone.device), _stacked(rows, _image_prompts))
    features = F.normalize(features, dim=-1)
    for encoder, places in _by_encoder(rows):
        features[places] = encoder.model.adapt_image(features[places])
    return features


def _text_prompts(encoder: Encoder) -> Tensor | None:
    prompts = encoder.model.prompts
    return None if prompts is None else prompts.text_prompts()


def _image_prompts(encoder: Encoder) -> Tensor | None:
    prompts = encoder.model.prompts
    return None if prompts is None else prompts.image_prompts()


def _stacked(rows: Sequence[R], prompts_of: Callable[[Encoder], Tensor | None]) -> Tensor | None:
    """(depth, B, k, W), row by row; None when no row has prompts."""
    known = {id(encoder): prompts_of(encoder) for encoder, _ in _by_encoder(rows)}
    each = [prompts for row in rows if (prompts := known[id(row.encoder)]) is not None]
    return torch.stack(each, 1) if each else None


def _by_encoder(rows: Sequence[R]) -> list[tuple[Encoder, list[int]]]:
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(id(row.encoder), []).append(place)
    return [(rows[found[0]].encoder, found) for found in places.values()]


def _in_groups(
    rows: Sequence[R], prompts_of: Callable[[Encoder], Tensor | None], encode: Callable[[Sequence[R]], Tensor]
) -> Vectors:
    groups: dict[Hashable, list[int]] = {}
    for encoder, places in _by_encoder(rows):
        prompts = prompts_of(encoder)
        groups.setdefault(None if prompts is None else tuple(prompts.shape), []).extend(places)
    out = np.empty((len(rows), rows[0].encoder.dim), np.float32)
    for places in groups.values():
        out[places] = encode([rows[place] for place in places]).float().cpu().numpy()
    return out
