"""Queries of several encoders in one forward pass over the backbone that they share.

- Prompts and the blocks' adapters are inputs: each row brings its own encoder's, and gets the vector that this encoder
  gives alone.
- Rows share a pass where these inputs have one shape and one runtime runs them; others follow in a pass of their own.
- Feature adapters behind the towers are applied encoder by encoder. Shapes: B rows, n tokens, E joint space.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dcar_core.runtimes.encoder_state import join_inputs, normalize
from dcar_core.serving.encoder import Encoder
from dcar_core.util.arrays import Floats, Pixels


@dataclass(frozen=True, slots=True, eq=False)
class TextRow:
    """A text for one encoder. weights: float32 (n,), a factor a token as `PairWeights` gives; None: as a query."""

    encoder: Encoder
    text: str
    weights: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ImageRow:
    """An image for one encoder: uint8 (3, S, S), from its `preprocess`."""

    encoder: Encoder
    pixels: Pixels


R = TypeVar("R", TextRow, ImageRow)


def encode_text_rows(rows: Sequence[TextRow]) -> Floats:
    """Encode texts -> float32 (B, E), L2-normalized. All encoders must share one backbone."""
    return _in_groups(rows, lambda encoder: encoder.state.text_prompts.shape, _encode_texts)


def encode_image_rows(rows: Sequence[ImageRow]) -> Floats:
    """Encode images -> float32 (B, E), L2-normalized. All encoders must share one backbone."""
    return _in_groups(rows, lambda encoder: tuple(x.shape for x in encoder.state.image_inputs), _encode_images)


def _encode_texts(rows: Sequence[TextRow]) -> Floats:
    state = rows[0].encoder.state
    tokens = state.tokens([row.text for row in rows])  # [B, n]; prompts of one shape leave the same room
    weights = np.ones(tokens.shape, np.float32)
    for encoder, places in _by_encoder(rows):
        weights[places] = encoder.state.query_weights(tokens[places])
    for place, row in enumerate(rows):
        if row.weights is not None:
            weights[place] = 1
            weights[place, : len(row.weights)] = row.weights
    prompts = [row.encoder.state.text_prompts for row in rows]
    out = state.encode_tokens(rows[0].encoder.runtime, tokens, weights, prompts, len(rows))
    for encoder, places in _by_encoder(rows):
        out[places] = encoder.state.finish_text(out[places])
    return out


def _encode_images(rows: Sequence[ImageRow]) -> Floats:
    inputs = [row.encoder.state.image_inputs for row in rows]
    out = rows[0].encoder.runtime.image(np.stack([row.pixels for row in rows]), join_inputs(inputs))
    for encoder, places in _by_encoder(rows):
        out[places] = encoder.state.adapt_images(normalize(out[places]))
    return out


def _by_encoder(rows: Sequence[R]) -> list[tuple[Encoder, list[int]]]:
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(id(row.encoder), []).append(place)
    return [(rows[group[0]].encoder, group) for group in places.values()]


def _in_groups(
    rows: Sequence[R], shape_of: Callable[[Encoder], Hashable], encode: Callable[[Sequence[R]], Floats]
) -> Floats:
    groups: dict[Hashable, list[int]] = {}
    for encoder, places in _by_encoder(rows):
        groups.setdefault((id(encoder.runtime), shape_of(encoder)), []).extend(places)
    out = np.empty((len(rows), rows[0].encoder.dim), np.float32)
    for places in groups.values():
        out[places] = encode([rows[place] for place in places])
    return out
