"""From a model to its `Adapter`: what of it does not change any more, computed once."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcar_core.model.dcar import DCAR, FeatureAdapter
from dcar_core.runtimes.adapter import Adapter, Bottleneck
from dcar_core.runtimes.graph_modules import TextTower
from dcar_core.runtimes.protocol import Prefix
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import RuntimeUnavailableError

_AT_ONCE = 4096  # tokens of the vocabulary


@torch.inference_mode()
def extract(model: DCAR, fingerprint: str) -> Adapter:
    """The model as it is now; later changes of it are not seen."""
    backbone, prompts = model.backbone, model.prompts
    text, image = (None, None) if prompts is None else (prompts.text_prompts(), prompts.image_prompts())

    def tokenize(texts: Sequence[str]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = backbone.tokenize(texts, model.prompt_tokens).cpu().numpy()
        return found

    return Adapter(
        fingerprint=fingerprint,
        dim=backbone.embed_dim,
        patch_grid=backbone.patch_grid,
        uses_token_weights=model.config.reweight.train != "none",
        preprocess=backbone.preprocess,
        tokenize=tokenize,
        prefix=_prefix(model, text),
        image_prompts=None if image is None else _floats(image.unsqueeze(1)),
        factors=_factors(model) if model.config.reweight.query == "predicted" else None,
        text_bottleneck=_bottleneck(model.text_adapter),
        image_bottleneck=_bottleneck(model.image_adapter),
    )


def _prefix(model: DCAR, prompts: Tensor | None) -> Prefix:
    rows = None if prompts is None else _floats(prompts.unsqueeze(1))
    try:
        keys, values = TextTower(model.backbone).prefix(prompts)
    except RuntimeUnavailableError:  # blocks that only the plain runtime can run, and it takes the prompts
        empty = np.empty((0, 1, 0, 1 + model.prompt_tokens, 0), np.float32)
        return Prefix(empty, empty, rows)
    return Prefix(_floats(keys), _floats(values), rows)


def _factors(model: DCAR) -> Floats | None:
    """The head reads a token's embedding alone, so what it says of each token is a table."""
    if model.head is None:
        return None
    count = model.backbone.text.token_embedding.weight.shape[0]
    parts = []
    for start in range(0, count, _AT_ONCE):
        ids = torch.arange(start, min(start + _AT_ONCE, count), device=model.backbone.device)[None]
        everywhere = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        parts.append(_floats(model.head(model.backbone.token_embeddings(ids), everywhere)[0]))
    return np.concatenate(parts)


def _bottleneck(adapter: FeatureAdapter | None) -> Bottleneck | None:
    if adapter is None:
        return None
    down, up = adapter.down, adapter.up
    return Bottleneck(_floats(down.weight), _floats(down.bias), _floats(up.weight), _floats(up.bias))


def _floats(values: Tensor) -> Floats:
    return values.detach().float().cpu().contiguous().numpy().copy()
