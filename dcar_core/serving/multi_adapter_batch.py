"""Queries of several adapters in one forward pass over the backbone that they share.

- Prompts are inputs: each row brings its encoder's own, so rows of different encoders stand in one batch. The result
  is that of each encoder by itself (tested).
- Rows go together where their prompts have one shape and one runtime runs them; others follow in a pass of their own.
- What comes after a tower is applied encoder by encoder.

Letters: B rows, k prompt vectors, W a tower's width, n tokens, E joint space.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dcar_core.runtimes.length_batches import batches
from dcar_core.runtimes.protocol import Prefix
from dcar_core.serving.encoder import Encoder

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


def encode_text_rows(rows: Sequence[TextRow]) -> Vectors:
    """float32 (B, E), L2-normalised. All encoders must share one backbone."""
    first = rows[0].encoder
    if all(row.encoder is first and row.weights is None for row in rows):
        return first.encode_text([row.text for row in rows])
    return _in_groups(rows, lambda encoder: encoder.adapter.prefix.shape, _encode_texts)


def encode_image_rows(rows: Sequence[ImageRow]) -> Vectors:
    """float32 (B, E), L2-normalised. All encoders must share one backbone."""
    first = rows[0].encoder
    if all(row.encoder is first for row in rows):
        return first.encode_pixels(np.stack([row.pixels for row in rows]))
    return _in_groups(rows, _image_shape, _encode_images)


def _encode_texts(rows: Sequence[TextRow]) -> Vectors:
    tokens = rows[0].encoder.adapter.tokenize([row.text for row in rows])  # [B, n]; all have the same room
    weights = np.ones(tokens.shape, np.float32)
    for encoder, places in _by_encoder(rows):
        weights[places] = encoder.adapter.query_weights(tokens[places])
    for place, row in enumerate(rows):
        if row.weights is not None:
            weights[place] = 1
            weights[place, : len(row.weights)] = row.weights
    given, factors = tokens[:, 1:], weights[:, 1:]
    lengths = given.argmax(-1) + 1
    out = np.empty((len(rows), rows[0].encoder.dim), np.float32)
    for part in batches(lengths, len(rows)):
        n = int(lengths[part[-1]])
        prefix = Prefix.rows([rows[place].encoder.adapter.prefix for place in part])
        out[part] = rows[0].encoder.runtime.text(given[part, :n], factors[part, :n], prefix)
    for encoder, places in _by_encoder(rows):
        out[places] = encoder.adapter.finish_text(out[places])
    return out


def _encode_images(rows: Sequence[ImageRow]) -> Vectors:
    each = [prompts for row in rows if (prompts := row.encoder.adapter.image_prompts) is not None]
    pixels = np.stack([row.pixels for row in rows])
    out = rows[0].encoder.runtime.image(pixels, np.concatenate(each, 1) if each else None)
    for encoder, places in _by_encoder(rows):
        out[places] = encoder.adapter.finish_image(out[places])
    return out


def _image_shape(encoder: Encoder) -> Hashable:
    prompts = encoder.adapter.image_prompts
    return None if prompts is None else prompts.shape


def _by_encoder(rows: Sequence[R]) -> list[tuple[Encoder, list[int]]]:
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(id(row.encoder), []).append(place)
    return [(rows[found[0]].encoder, found) for found in places.values()]


def _in_groups(
    rows: Sequence[R], shape_of: Callable[[Encoder], Hashable], encode: Callable[[Sequence[R]], Vectors]
) -> Vectors:
    groups: dict[Hashable, list[int]] = {}
    for encoder, places in _by_encoder(rows):
        groups.setdefault((id(encoder.runtime), shape_of(encoder)), []).extend(places)
    out = np.empty((len(rows), rows[0].encoder.dim), np.float32)
    for places in groups.values():
        out[places] = encode([rows[place] for place in places])
    return out
