"""Both towers as functions of tensors for PyTorch and OpenVINO, the arrays they take,
and PyTorch as a runtime.

The arrays of an encoder are inputs: one export serves every encoder on a backbone, and
their rows may share a batch.

Letters: B batch, n tokens, p rows of a prefix, k prompt vectors, r width of an adapter,
R = 1 or B, D blocks, H heads, d width of a head, L context length, W, W_t and W_v
widths, E joint space, S side in pixels.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.encoder.state import (
    EncoderState,
    FeatureAdapterArrays,
    Runtime,
    build_state,
)
from dcar_core.model.backbone import Backbone
from dcar_core.model.dcar import DCAR, FeatureAdapter
from dcar_core.model.towers.text import NativeText, project_by
from dcar_core.util.arrays import Floats

# inputs to trace a graph with; shapes, -1 for what may change
Example = tuple[tuple[Tensor, ...], list[list[int]]]


class AttentionBlock(nn.Module):
    """A pre-norm transformer block on open_clip's own weights, with attention written
    out.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ln_1 = block.ln_1
        self.ln_2 = block.ln_2
        self.mlp = block.mlp
        self.ls_1 = block.ls_1
        self.ls_2 = block.ls_2
        self.attention = block.attn
        self.heads = int(block.attn.num_heads)

    @staticmethod
    def fits(block: Any) -> bool:
        """True if a block has PyTorch's own attention with joint weights."""
        attention = getattr(block, "attn", None)
        return (
            isinstance(attention, nn.MultiheadAttention)
            and attention.in_proj_weight is not None
        )

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, W) -> three of (B, H, n, d)."""
        weight = self.attention.in_proj_weight
        bias = self.attention.in_proj_bias
        parts = F.linear(self.ln_1(x), weight, bias)  # [B, n, 3 W]
        parts = parts.reshape(*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def finish(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention of the rows x (B, m, W) by their q, and the MLP -> (B, m, W)."""
        # [B, H, m, d]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.ls_1(self.attention.out_proj(attended.transpose(1, 2).flatten(2)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))  # type: ignore[no-any-return]


class ImageGraph(nn.Module):
    """(pixels, prompts, down, up) -> image features (B, E), not normalized. Pixels are
    normalized inside.

    depth, has_adapters: of the prompts and blocks in an export; without one, any inputs
    are accepted.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, depth: int, *, has_adapters: bool) -> None:
        super().__init__()
        tower = backbone.image_tower
        self.depth = depth
        self.has_adapters = has_adapters
        self.size = backbone.preprocess.size
        self.tower = tower
        self.encoder: nn.Module = tower.module  # registered, to be converted with it
        mean, std = (
            torch.tensor(v).reshape(1, 3, 1, 1)
            for v in (backbone.preprocess.mean, backbone.preprocess.std)
        )
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.to(backbone.device)

    def forward(self, pixels: Tensor, *inputs: Tensor) -> Tensor:
        """pixels: uint8 (B, 3, S, S). inputs: prompts (depth, R, k, W_v), then two (D,
        R, r, W_v), as far as used.
        """
        prompts = inputs[0] if len(inputs) in (1, 3) else None
        adapters = (inputs[-2], inputs[-1]) if len(inputs) in (2, 3) else None
        # in float32 until here: float16 has 11 bits
        x = pixels.float() * self.scale + self.shift
        return self.tower.encode(
            x.to(next(self.encoder.parameters()).dtype),
            prompts,
            adapters,
        )

    def example(self) -> Example:
        counts = [
            *([self.depth] if self.depth else []),
            *([self.tower.blocks] * 2 if self.has_adapters else []),
        ]
        pixels = torch.zeros(2, 3, self.size, self.size, dtype=torch.uint8)
        inputs = (torch.zeros(count, 1, 2, self.tower.width) for count in counts)
        shapes = [
            [-1, 3, self.size, self.size],
            *([count, -1, -1, self.tower.width] for count in counts),
        ]
        return (pixels, *inputs), shapes


class PrefixTextGraph(nn.Module):
    """(tokens, weights, keys, values) -> text features (B, E), not normalized.

    Under a causal mask start tokens and prompts never see the caption, so their keys
    and values in every block are computed once for an encoder. Only the end token's row
    runs through the last block. skipped: its start tokens.
    """

    mask: Tensor  # causal, (L, L)
    depth = 0  # one export serves prompts of every depth

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        text = backbone.text_tower.module
        self.start_ids = backbone.layout.start_ids
        self.end_id = backbone.layout.end_id
        self.skipped = len(self.start_ids)
        self.embedding = text.token_embedding
        self.ln_final = text.ln_final
        self.blocks: Any = nn.ModuleList(
            AttentionBlock(block) for block in text.transformer.resblocks
        )
        self.projection = text.text_projection
        self.positions = text.positional_embedding
        self.register_buffer("mask", text.attn_mask.clone(), persistent=False)

    @staticmethod
    def fits(backbone: Backbone) -> bool:
        tower = backbone.text_tower
        layout = backbone.layout
        has_prefix = (
            isinstance(tower, NativeText)
            and not layout.reads_padding
            and layout.start > 0
        )
        return has_prefix and all(
            map(AttentionBlock.fits, tower.module.transformer.resblocks)
        )

    @torch.inference_mode()
    def prompt_inputs(self, prompts: Tensor | None) -> tuple[Tensor, ...]:
        """Prompts (depth, k, W_t) -> keys and values, each (D, 1, H, p, d)."""
        start = self.embedding.weight[list(self.start_ids)][None]  # [1, start, W_t]
        x = start if prompts is None else torch.cat([start, prompts[:1].to(start)], 1)
        length = x.shape[1]
        x = x + self.positions[:length]
        keys = []
        values = []
        for i, block in enumerate(self.blocks):
            if prompts is not None and 0 < i < len(prompts):
                x = torch.cat([x[:, : self.skipped], prompts[i : i + 1].to(start)], 1)
            q, k, v = block.qkv(x)
            keys.append(k)
            values.append(v)
            x = block.finish(x, q, k, v, self.mask[:length, :length])
        return torch.stack(keys), torch.stack(values)

    def forward(
        self,
        tokens: Tensor,
        weights: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """tokens, weights of their embeddings: (B, n) without start tokens. keys,
        values: (D, R, H, p, d).
        """
        batch, n = tokens.shape
        p = keys.shape[3]
        # the first end token
        last = ((tokens == self.end_id).long().cumsum(-1) == 0).long().sum(-1)
        # [B, n, W_t]
        x = self.embedding(tokens) * weights.unsqueeze(-1) + self.positions[p : p + n]
        mask = self.mask[p : p + n, : p + n]
        rows = torch.arange(batch, device=tokens.device)
        for i, block in enumerate(self.blocks):
            q, k, v = block.qkv(x)
            k = torch.cat([keys[i].expand(batch, -1, -1, -1), k], 2)  # [B, H, p + n, d]
            v = torch.cat([values[i].expand(batch, -1, -1, -1), v], 2)
            if i == len(self.blocks) - 1:
                x = x[rows, last].unsqueeze(1)
                q = q[rows, :, last].unsqueeze(2)
                mask = mask[last][:, None, None]
            x = block.finish(x, q, k, v, mask)
        return project_by(self.projection, self.ln_final(x[:, 0]))

    def example(self) -> Example:
        keys, values = self.prompt_inputs(None)
        d, _, heads, _, width = keys.shape
        tokens = torch.tensor([[1, 2, 3, 4, self.end_id]]).repeat(2, 1)
        shapes = [
            [-1, -1],
            [-1, -1],
            [d, -1, heads, -1, width],
            [d, -1, heads, -1, width],
        ]
        return (
            tokens,
            torch.ones(tokens.shape),
            keys.repeat(1, 1, 1, 3, 1),
            values.repeat(1, 1, 1, 3, 1),
        ), shapes


class PromptTextGraph(nn.Module):
    """(tokens, weights, prompts) -> text features (B, E), not normalized: every other
    tower.

    depth: of the prompts in an export; without one, any prompts are accepted.
    """

    skipped = 0

    def __init__(self, backbone: Backbone, depth: int) -> None:
        super().__init__()
        self.tower = backbone.text_tower
        self.depth = depth
        # registered, to be converted with it
        self.encoder: nn.Module = self.tower.module

    def prompt_inputs(self, prompts: Tensor | None) -> tuple[Tensor, ...]:
        """Prompts (depth, k, W_t) -> (depth, 1, k, W_t), or nothing."""
        return () if prompts is None else (prompts.unsqueeze(1),)

    def forward(
        self,
        tokens: Tensor,
        weights: Tensor,
        prompts: Tensor | None = None,
    ) -> Tensor:
        """tokens, weights of their embeddings: (B, n). prompts: (depth, R, k, W_t)."""
        return self.tower.encode(tokens, prompts, weights)

    def example(self) -> Example:
        layout = self.tower.layout
        k = 2 if self.depth else 0
        length = layout.padded_length(k) or layout.start + 6
        ids = [*layout.start_ids, 5, 6, 7, layout.end_id]
        tokens = torch.tensor([ids + [layout.pad_id] * (length - len(ids))]).repeat(
            2, 1
        )
        inputs = (tokens, torch.ones(tokens.shape))
        shapes = [[-1, -1], [-1, -1]]
        if not self.depth:
            return inputs, shapes
        width = self.tower.width
        return (*inputs, torch.zeros(self.depth, 1, k, width)), [
            *shapes,
            [self.depth, -1, -1, width],
        ]


TextGraph = PrefixTextGraph | PromptTextGraph


def graphs_of(model: DCAR) -> tuple[TextGraph, ImageGraph]:
    """Return the graphs of a model's towers, in eval mode."""
    backbone, (text_depth, image_depth) = model.backbone, model.config.prompt.depths
    text: TextGraph = PromptTextGraph(backbone, text_depth)
    if PrefixTextGraph.fits(backbone):
        text = PrefixTextGraph(backbone)
    return (
        text.eval(),
        ImageGraph(
            backbone,
            image_depth,
            has_adapters=model.block_adapters is not None,
        ).eval(),
    )


@contextmanager
def tracing() -> Iterator[None]:
    """Within it, a graph can be traced: without gradients, fused attention and the
    exporter's warnings.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    # its operator has no form in an export
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


class TorchRuntime(Runtime):
    """Both graphs in PyTorch: as they are, or in half precision and compiled.

    One compilation serves every batch and length, except those of size 1. CUDA graphs
    are not used: each shape would need one, and only the thread that recorded a graph
    can run it.
    """

    def __init__(self, model: DCAR, *, is_half: bool = False) -> None:
        text, image = graphs_of(model)
        device = image.scale.device
        dtype = torch.float16 if is_half else torch.float32
        if is_half:
            scale = image.scale
            shift = image.shift
            text = copy.deepcopy(text).half()
            image = copy.deepcopy(image).half()
            image.scale = scale
            image.shift = shift
            text.compile(dynamic=True)
            image.compile(dynamic=True)
        runs = (partial(_run, graph, device, dtype) for graph in (text, image))
        super().__init__("cuda" if is_half else "torch", *runs)


@torch.inference_mode()
def _run(
    graph: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    inputs: tuple[Any, ...],
) -> Floats:
    """inputs: token ids or pixels, then whatever takes the type of the weights."""
    first, *rest = (
        torch.from_numpy(values).to(device, non_blocking=True) for values in inputs
    )
    features: Floats = (
        graph(first, *(values.to(dtype) for values in rest)).float().cpu().numpy()
    )
    return features


@torch.inference_mode()
def extract_state(model: DCAR, fingerprint: str, backbone_hash: str) -> EncoderState:
    """Extract the state of a model as it is now. backbone_hash: as
    `Backbone.content_hash`.
    """
    (graph, _), backbone = graphs_of(model), model.backbone
    trainables = {name: _to_numpy(parameter) for name, parameter in model.served()}

    def text_inputs(prompts: Floats | None) -> tuple[Floats, ...]:
        if prompts is None:
            values = None
        else:
            values = torch.from_numpy(prompts).to(backbone.device)
        return tuple(map(_to_numpy, graph.prompt_inputs(values)))

    hashes = fingerprint, backbone_hash
    return build_state(
        backbone,
        model.served_config,
        trainables,
        hashes,
        text_inputs,
        graph.skipped,
    )


def adapter_arrays(adapter: FeatureAdapter | None) -> FeatureAdapterArrays | None:
    if adapter is None:
        return None
    return FeatureAdapterArrays(*map(_to_numpy, adapter.parameters()))


def _to_numpy(values: Tensor) -> Floats:
    return values.detach().float().cpu().contiguous().numpy().copy()
