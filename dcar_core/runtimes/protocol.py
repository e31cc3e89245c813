"""What a runtime is: the two frozen towers, tensors of whole batches in, features out. And what a adapter gives to it.

A runtime belongs to a backbone and knows no adapter: prompts and token weights are inputs, adapters come after it.

Letters as in `towers`: B batch, n tokens without SOS, p = 1 + k length of the prefix, R = 1 or B, D blocks, H heads,
d width of a head, W_v width, E joint space, S side in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats

# The towers' inputs by name, as exports have them.
TEXT_INPUTS = ("tokens", "weights", "keys", "values")
IMAGE_INPUTS = ("pixels", "prompts")


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What stands before a caption, SOS and the text prompts, as every block's keys and values.

    keys, values: (D, R, H, p, d). prompts: (depth, R, k, W_t) or None, for a runtime that cannot take the former.
    """

    keys: Floats
    values: Floats
    prompts: Floats | None

    @property
    def length(self) -> int:
        return int(self.keys.shape[3])

    @property
    def shape(self) -> tuple[int, ...]:
        """What must be equal in one batch: the length, and for a runtime that takes prompts, how they are shaped."""
        return (self.length,) if self.keys.size or self.prompts is None else self.prompts.shape

    @staticmethod
    def rows(prefixes: Sequence["Prefix"]) -> "Prefix":
        """One prefix for each row of a batch; all of one shape."""
        first = prefixes[0]
        if all(each is first for each in prefixes):
            return first
        stacked = [each.prompts for each in prefixes if each.prompts is not None and not each.keys.size]
        return Prefix(
            np.concatenate([each.keys for each in prefixes], 1),
            np.concatenate([each.values for each in prefixes], 1),
            np.concatenate(stacked, 1) if stacked else None,
        )


class Runtime(Protocol):
    """May be used by several threads; what cannot run twice at once lets them take turns."""

    @property
    def name(self) -> str: ...

    def text(self, tokens: NDArray[np.int64], weights: Floats, prefix: Prefix) -> Floats:
        """tokens (B, n) without SOS, weights (B, n) -> text features (B, E), not normalised."""
        ...

    def image(self, pixels: NDArray[np.uint8], prompts: Floats | None) -> Floats:
        """pixels (B, 3, S, S), prompts (depth, R, k, W_v) -> image features (B, E), not normalised."""
        ...


@runtime_checkable
class ExportRuntime(Runtime, Protocol):
    """One that runs a graph on disk, and needs neither the model nor PyTorch for it."""

    directory: Path
    threads: int
