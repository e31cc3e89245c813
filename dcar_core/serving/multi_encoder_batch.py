"""Queries of several encoders in one forward pass over the backbone that they share.

- Prompts and the blocks' adapters are inputs: each row brings its own encoder's, and gets the vector that this encoder
  gives alone.
- Rows share a pass where these inputs have one shape and one runtime runs them; others follow in a pass of their own.
- Feature adapters behind the towers are applied encoder by encoder. Shapes: B rows, n tokens, E joint space.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dcar_core.runtimes.encoder_state import join_inputs, normalize
from dcar_core.serving.encoder import Encoder
from dcar_core.util.arrays import Floats, Pixels


@dataclass(frozen=True, slots=True, eq=False)
class TextRow:
    """A text for one encoder."""

    encoder: Encoder
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class ImageRow:
    """An image for one encoder: uint8 (3, S, S), from its `preprocess`."""

    encoder: Encoder
    pixels: Pixels


def encode_text_rows(rows: Sequence[TextRow]) -> Floats:
    """Encode texts -> float32 (B, E), L2-normalized. All encoders must share one backbone."""
    encoders = [row.encoder for row in rows]
    out = np.empty((len(rows), encoders[0].dim), np.float32)
    for places in _grouped(encoders, lambda encoder: (id(encoder.runtime), encoder.state.text_prompts.shape)):
        out[places] = _text_features([rows[place] for place in places])
    for places in _grouped(encoders, id):
        out[places] = encoders[places[0]].state.finish_text(out[places])
    return out


def encode_image_rows(rows: Sequence[ImageRow]) -> Floats:
    """Encode images -> float32 (B, E), L2-normalized. All encoders must share one backbone."""
    encoders = [row.encoder for row in rows]
    out = np.empty((len(rows), encoders[0].dim), np.float32)
    shapes = {id(encoder): tuple(each.shape for each in encoder.state.image_inputs) for encoder in encoders}
    for places in _grouped(encoders, lambda encoder: (id(encoder.runtime), shapes[id(encoder)])):
        inputs = join_inputs([encoders[place].state.image_inputs for place in places])
        out[places] = encoders[places[0]].runtime.image(np.stack([rows[place].pixels for place in places]), inputs)
    for places in _grouped(encoders, id):
        out[places] = encoders[places[0]].state.adapt_images(normalize(out[places]))
    return out


def _text_features(rows: Sequence[TextRow]) -> Floats:
    encoders = [row.encoder for row in rows]
    state = encoders[0].state
    tokens = state.tokens([row.text for row in rows])  # [B, n]; prompts of one shape leave the same room
    weights = np.empty(tokens.shape, np.float32)
    for places in _grouped(encoders, id):
        weights[places] = encoders[places[0]].state.query_weights(tokens[places])
    prompts = [encoder.state.text_prompts for encoder in encoders]
    return state.encode_tokens(encoders[0].runtime, tokens, weights, prompts, len(rows))


def _grouped(encoders: Sequence[Encoder], key: Callable[[Encoder], Hashable]) -> Iterable[list[int]]:
    """Return the places of the encoders that have the same key."""
    places: dict[Hashable, list[int]] = {}
    for place, encoder in enumerate(encoders):
        places.setdefault(key(encoder), []).append(place)
    return places.values()
