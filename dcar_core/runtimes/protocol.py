"""The protocol of a runtime: the two frozen towers, whole batches of arrays in, features out.

A runtime belongs to a backbone and knows no encoder: prompts, adapters of blocks and token weights are inputs,
feature adapters come after it.

Letters: B batch, n tokens, k prompt vectors, p rows of a prefix, r width of a block's adapter, R = 1 or B, D blocks, H
heads, d width of a head, W_t and W_v widths, E joint space, S side in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dcar_core.util.arrays import Floats, Pixels, TokenIds

RunGraph = Callable[[tuple[Any, ...]], Floats]


@dataclass(frozen=True, slots=True, eq=False)
class TextPrompts:
    """Start tokens and prompts before a caption, as inputs of a text graph; axis 1 of each is R.

    inputs: keys and values (D, R, H, p, d) of a causal tower's start tokens and prompts; or prompts (depth, R, k, W_t);
        or nothing.
    skipped: start tokens that the inputs stand for; the graph gets captions without them.
    has_weights: False where the tower takes no token weights.
    """

    inputs: tuple[Floats, ...]
    skipped: int
    has_weights: bool

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """Equal for prompts that may share a batch."""
        return tuple((each.shape[0], *each.shape[2:]) for each in self.inputs)

    def graph_inputs(self, tokens: TokenIds, weights: Floats) -> tuple[TokenIds | Floats, ...]:
        """The inputs of a text graph in their order."""
        return (tokens, weights, *self.inputs) if self.has_weights else (tokens,)

    @staticmethod
    def stack(prompts: Sequence["TextPrompts"]) -> "TextPrompts":
        """Join the prompts of each row of a batch; all must have one shape."""
        return replace(prompts[0], inputs=join_inputs([each.inputs for each in prompts]))


def join_inputs(rows: Sequence[tuple[Floats, ...]]) -> tuple[Floats, ...]:
    """Join the inputs of each row of a batch along axis 1, unless all rows have the same."""
    is_shared = all(each is rows[0] for each in rows)
    return rows[0] if is_shared else tuple(np.concatenate(parts, 1) for parts in zip(*rows, strict=True))


class Runtime:
    """Both towers. Several threads may use it at once; a library that cannot run twice at once lets them take turns.

    run_text, run_image: run a tower's graph over its inputs.
    """

    def __init__(self, name: str, run_text: RunGraph, run_image: RunGraph) -> None:
        self.name = name
        self._run_text, self._run_image = run_text, run_image

    def text(self, tokens: TokenIds, weights: Floats, prompts: TextPrompts) -> Floats:
        """tokens (B, n) without the skipped ones, weights (B, n) -> text features (B, E), not normalized."""
        return self._run_text(prompts.graph_inputs(tokens, weights))

    def image(self, pixels: Pixels, inputs: tuple[Floats, ...]) -> Floats:
        """pixels (B, 3, S, S), `image_inputs` of one or of B encoders -> features (B, E), not normalized."""
        return self._run_image((pixels, *inputs))
