"""What one checkpoint adds to the backbone that it shares, in the form that runtimes take. Needs no PyTorch.

texts -> tokens and weights ----> runtime.text  --> normalise --> text adapter  --> vectors
pixels -------------------------> runtime.image --> normalise --> image adapter --> vectors

All of it is arrays: `extract` computes them from a model once, `sealed` keeps them for the next start. Adapters are
small, and are applied here, outside of any exported graph.

Letters: V tokens of the vocabulary, H an adapter's bottleneck; others as in `runtimes.protocol`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dcar_core.model.preprocess import Preprocess
from dcar_core.runtimes.length_batches import batches
from dcar_core.runtimes.protocol import Prefix, Runtime
from dcar_core.util.arrays import Floats, Pixels, TokenIds


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """`model.FeatureAdapter` as arrays. down: (H, E), down_bias: (H,), up: (E, H), up_bias: (E,)."""

    down: Floats
    down_bias: Floats
    up: Floats
    up_bias: Floats

    def __call__(self, features: Floats) -> Floats:
        """(n, E) -> (n, E), normalised."""
        inner = np.maximum(features @ self.down.T + self.down_bias, 0)
        return normalised(features + inner @ self.up.T + self.up_bias)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One model's prompts, token weights and adapters, and what else a query needs beside a runtime.

    fingerprint: of the encoder. dim: E. patch_grid: of the image tower, a side.
    uses_token_weights: whether the model was trained with token weights, so that they mean something to it.
    tokenize: texts -> int64 (n, L) with SOS, with room for the prompts.
    image_prompts: (depth, 1, k, W_v). factors: (V,), a query's weight of each token; None where all are 1.
    """

    fingerprint: str
    dim: int
    patch_grid: int
    uses_token_weights: bool
    preprocess: Preprocess
    tokenize: Callable[[Sequence[str]], TokenIds]
    prefix: Prefix
    image_prompts: Floats | None = None
    factors: Floats | None = None
    text_bottleneck: Bottleneck | None = None
    image_bottleneck: Bottleneck | None = None

    @property
    def depth(self) -> int:
        """Blocks of the image tower that get prompts; 0 without any."""
        return 0 if self.image_prompts is None else len(self.image_prompts)

    def tokens(self, texts: Sequence[str]) -> tuple[TokenIds, Floats]:
        """TextTokenizer (n, L) without SOS, as short as the longest text, and the weights of a query (n, L)."""
        tokens = self.tokenize(texts)
        return tokens[:, 1:], self.query_weights(tokens)[:, 1:]

    def query_weights(self, tokens: TokenIds) -> Floats:
        """Factors (n, L) of a query's tokens; 1 for SOS, EOT and padding."""
        if self.factors is None:
            return np.ones(tokens.shape, np.float32)
        place = np.arange(tokens.shape[1])
        real = (place > 0) & (place < tokens.argmax(-1)[:, None])
        return np.where(real, self.factors[tokens], np.float32(1))

    def encode_text(self, runtime: Runtime, texts: Sequence[str], most: int) -> Floats:
        """(n, E), L2-normalised, at most `most` texts in a forward pass."""
        out = np.empty((len(texts), self.dim), np.float32)
        if not len(texts):
            return out
        tokens, weights = self.tokens(texts)
        lengths = tokens.argmax(-1) + 1
        for rows in batches(lengths, most):
            n = int(lengths[rows[-1]])
            out[rows] = runtime.text(tokens[rows, :n], weights[rows, :n], self.prefix)
        return self.finish_text(out)

    def encode_pixels(self, runtime: Runtime, pixels: Pixels) -> Floats:
        """uint8 (n, 3, S, S) -> (n, E), L2-normalised, in one forward pass."""
        return self.finish_image(runtime.image(pixels, self.image_prompts))

    def finish_text(self, features: Floats) -> Floats:
        """A text tower's features (n, E) to vectors (n, E)."""
        return _finished(features, self.text_bottleneck)

    def finish_image(self, features: Floats) -> Floats:
        """An image tower's features (n, E) to vectors (n, E)."""
        return _finished(features, self.image_bottleneck)


def normalised(vectors: Floats) -> Floats:
    """(n, E) at length 1; zeros stay zeros."""
    lengths = np.sqrt(np.einsum("ne,ne->n", vectors, vectors))
    found: Floats = vectors / np.maximum(lengths, np.float32(1e-12))[:, None]
    return found


def _finished(features: Floats, adapter: Bottleneck | None) -> Floats:
    vectors = normalised(features)
    return vectors if adapter is None else adapter(vectors)
