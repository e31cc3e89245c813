"""From a model to its `EncoderState`: everything that is fixed once training ends, computed once."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from dcar_core.model.dcar import DCAR, FeatureAdapter
from dcar_core.runtimes.encoder_state import EncoderState, FeatureAdapterArrays, TextPrompts
from dcar_core.runtimes.graphs import text_graph
from dcar_core.util.arrays import Floats

_CHUNK = 4096  # tokens of the vocabulary


@torch.inference_mode()
def extract(model: DCAR, fingerprint: str, backbone_hash: str) -> EncoderState:
    """Extract the state of a model as it is now. backbone_hash: as `Backbone.content_hash`."""
    backbone, prompts = model.backbone, model.prompts
    text, image = (None, None) if prompts is None else (prompts.text_prompts(), prompts.image_prompts())
    adapters = () if model.block_adapters is None else model.block_adapters.matrices()
    graph = text_graph(backbone, 0 if text is None else len(text))
    image_inputs = tuple(_to_numpy(each.unsqueeze(1)) for each in (image, *adapters) if each is not None)
    image_key = hashlib.sha256(backbone_hash.encode() + b"".join(each.tobytes() for each in image_inputs))
    inputs = tuple(_to_numpy(each) for each in graph.prompt_inputs(text))
    return EncoderState(
        fingerprint=fingerprint,
        image_key=image_key.hexdigest(),
        dim=backbone.embed_dim,
        patch_grid=backbone.patch_grid,
        uses_token_weights=model.config.reweight.train != "none",
        preprocess=backbone.preprocess,
        tokenizer=backbone.text_tokenizer(model.prompt_tokens),
        layout=backbone.layout,
        text_prompts=TextPrompts(inputs, graph.skipped, graph.has_weights),
        image_inputs=image_inputs,
        token_factors=_token_factors(model) if model.config.reweight.query == "predicted" else None,
        text_adapter=_arrays_of(model.text_adapter),
        image_adapter=_arrays_of(model.image_adapter),
    )


def _token_factors(model: DCAR) -> Floats | None:
    """Tabulate the head over the vocabulary: it reads a token's embedding alone."""
    if model.head is None:
        return None
    count = len(model.backbone.text_tower.table.weight)
    parts = []
    for start in range(0, count, _CHUNK):
        ids = torch.arange(start, min(start + _CHUNK, count), device=model.backbone.device)[None]
        everywhere = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        parts.append(_to_numpy(model.head(model.backbone.text_tower.embed(ids), everywhere)[0]))
    return np.concatenate(parts)


def _arrays_of(adapter: FeatureAdapter | None) -> FeatureAdapterArrays | None:
    if adapter is None:
        return None
    down, up = adapter.down, adapter.up
    return FeatureAdapterArrays(_to_numpy(down.weight), _to_numpy(down.bias), _to_numpy(up.weight), _to_numpy(up.bias))


def _to_numpy(values: Tensor) -> Floats:
    return values.detach().float().cpu().contiguous().numpy().copy()
