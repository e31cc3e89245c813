"""The image tower as a function of tensors, for runtimes that export or convert it; helpers for both towers.

- The arrays of an encoder are inputs, so one export serves every encoder on a backbone with the same
  `ImageGraph.depth` and `has_adapters`.
- Pixels enter as uint8 and are normalized inside the graph.

Letters: B batch, P patches, k prompt vectors, r width of an adapter, R = 1 or B, D blocks, H heads, d width of a head,
W width, E joint space, S side.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone

Graph = TypeVar("Graph", bound=nn.Module)


class AttentionBlock(nn.Module):
    """A pre-norm transformer block on open_clip's own weights, with attention written out."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = block.ln_1, block.ln_2, block.mlp
        self.ls_1, self.ls_2 = block.ls_1, block.ls_2
        self.attention = block.attn
        self.heads = int(block.attn.num_heads)

    @staticmethod
    def fits(blocks: Any) -> bool:
        """True if every block has PyTorch's own attention with joint weights."""
        attentions = [getattr(block, "attn", None) for block in blocks]
        return all(isinstance(each, nn.MultiheadAttention) and each.in_proj_weight is not None for each in attentions)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, W) -> three of (B, H, n, d)."""
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        parts = F.linear(self.ln_1(x), weight, bias)  # [B, n, 3 W]
        parts = parts.reshape(*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the rows x (B, m, W) by their q, and the MLP -> (B, m, W)."""
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, m, d]
        out = self.attention.out_proj(attended.transpose(1, 2).flatten(2))
        x = x + self.ls_1(out)
        return x + self.ls_2(self.mlp(self.ln_2(x)))  # type: ignore[no-any-return]


class ImageGraph(nn.Module):
    """(pixels, prompts, down, up) -> image features (B, E), not normalized.

    depth: depth of the prompts in an export, 0 for none. has_adapters: True if the blocks in an export have adapters.
    Without an export, any inputs are accepted.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, depth: int, *, has_adapters: bool) -> None:
        super().__init__()
        tower = backbone.image_tower
        self.depth, self.size, self.tower = depth, backbone.preprocess.size, tower
        self.has_adapters = has_adapters
        self.encoder: nn.Module = tower.module  # registered, to be converted with it
        std = torch.tensor(backbone.preprocess.std).reshape(1, 3, 1, 1)
        mean = torch.tensor(backbone.preprocess.mean).reshape(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.to(backbone.device)

    def forward(self, pixels: Tensor, *inputs: Tensor) -> Tensor:
        """
        Args:
            pixels: uint8 (B, 3, S, S).
            inputs: prompts (depth, R, k, W_v), then both matrices (D, R, r, W_v) of adapters, each if there are some.
        """
        prompts = inputs[0] if len(inputs) in (1, 3) else None
        adapters = (inputs[-2], inputs[-1]) if len(inputs) in (2, 3) else None
        return self.tower.encode(self.normalized(pixels), prompts, adapters)

    def example(self) -> tuple[tuple[Tensor, ...], list[list[int]]]:
        """Inputs to trace the graph with, and their shapes with -1 for what may change."""
        pixels = torch.zeros(2, 3, self.size, self.size, dtype=torch.uint8)
        counts = [*([self.depth] if self.depth else []), *([self.tower.blocks] * 2 if self.has_adapters else [])]
        inputs = (torch.zeros(count, 1, 2, self.tower.width) for count in counts)
        shapes = [[-1, 3, self.size, self.size], *([count, -1, -1, self.tower.width] for count in counts)]
        return (pixels, *inputs), shapes

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 -> the type of the weights. In float32 until then: bfloat16 has 8 bits."""
        x = pixels.float() * self.scale + self.shift
        return x.to(next(self.encoder.parameters()).dtype)


def convert_weights(graph: Graph, dtype: torch.dtype) -> Graph:
    """Copy a graph with weights of another type; the constants that normalize pixels stay in float32."""
    copied = copy.deepcopy(graph).to(dtype)
    for name in ("scale", "shift"):
        if hasattr(graph, name):
            setattr(copied, name, getattr(graph, name).clone())
    return copied.eval()


@contextmanager
def tracing() -> Iterator[None]:
    """Within it, a graph can be traced: without gradients, fused attention and the exporter's warnings."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator has no form in an export
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
