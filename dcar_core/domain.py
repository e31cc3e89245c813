"""What one checkpoint adds to the backbone that it shares, in the form that runtimes take.

texts -> tokens and weights ----> runtime.text  --> normalise --> text adapter  --> vectors
pixels -------------------------> runtime.image --> normalise --> image adapter --> vectors

Prefix and prompts are computed once. Adapters are small, and are applied here, outside of any exported graph.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dcar_core.errors import RuntimeUnavailableError
from dcar_core.model import DCAR
from dcar_core.runtimes.lengths import batches
from dcar_core.runtimes.protocol import Floats, Prefix, Runtime
from dcar_core.runtimes.towers import TextTower

Pixels = NDArray[np.uint8]


class Domain:
    """One model's prompts, token weights and adapters. Build it when the model does not change any more."""

    @torch.inference_mode()
    def __init__(self, model: DCAR) -> None:
        self.model = model
        self.dim = model.backbone.embed_dim
        prompts = model.prompts
        text, image = (None, None) if prompts is None else (prompts.text_prompts(), prompts.image_prompts())
        self.prefix = _prefix(model, text)
        self.image_prompts = None if image is None else _floats(image.unsqueeze(1))  # (depth, 1, k, W_v)

    @property
    def depth(self) -> int:
        """Blocks of the image tower that get prompts; 0 without any."""
        return 0 if self.image_prompts is None else len(self.image_prompts)

    @torch.inference_mode()
    def tokens(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], Floats]:
        """Tokens (n, L) without SOS, as short as the longest text, and the weights of a query (n, L)."""
        model = self.model
        tokens = model.backbone.tokenize(texts, model.room)
        predicted = self.query_weights(tokens)
        weights = torch.ones(tokens.shape) if predicted is None else predicted
        return tokens[:, 1:].cpu().numpy(), _floats(weights[:, 1:])

    def query_weights(self, tokens: Tensor) -> Tensor | None:
        """Factors (n, L) of a query's tokens; None where all are 1."""
        return self.model.predicted_weights(tokens) if self.model.config.reweight.query == "predicted" else None

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
        return self._finished(features, self.model.adapt_text)

    def finish_image(self, features: Floats) -> Floats:
        """An image tower's features (n, E) to vectors (n, E)."""
        return self._finished(features, self.model.adapt_image)

    @torch.inference_mode()
    def _finished(self, features: Floats, adapt: Callable[[Tensor], Tensor]) -> Floats:
        device = self.model.backbone.device
        return _floats(adapt(F.normalize(torch.from_numpy(features).to(device), dim=-1)))


def _prefix(model: DCAR, prompts: Tensor | None) -> Prefix:
    rows = None if prompts is None else _floats(prompts.unsqueeze(1))
    try:
        keys, values = TextTower(model.backbone).prefix(prompts)
    except RuntimeUnavailableError:  # blocks that only the plain runtime can run, and it takes the prompts
        empty = np.empty((0, 1, 0, 1 + model.room, 0), np.float32)
        return Prefix(empty, empty, rows)
    return Prefix(_floats(keys), _floats(values), rows)


def _floats(values: Tensor) -> Floats:
    return values.float().cpu().contiguous().numpy()
