"""The two frozen encoders once more, as plain functions of tensors, for runtimes that export or convert them.

They compute what `Backbone.encode_text` and `encode_image` do, with less work:

- **The prefix once.** Under the causal mask SOS and the text prompts never see the caption, so their keys and values in
  every block are computed once a adapter (`TextTower.prefix`) and enter as an input. That covers prompts of any
  number and depth with one graph, and lets rows of several adapters share a batch.
- **The last block for one row.** What is read is EOT's or CLS's row alone, so the last block computes keys and values
  of all rows, but query and MLP of that one.
- **uint8 in.** Pixels are normalised inside the graph, so no float copy of them is made outside.

Everything that differs from adapter to adapter is an input: one export serves every adapter on a backbone.

Letters: B batch, n tokens without SOS, p = 1 + k length of the prefix, R rows of the prefix (1 for all, or B), H heads,
d width of a head, D blocks, P patches, W widths, E joint space, S side in pixels.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone
from dcar_core.util.errors import RuntimeUnavailableError

Tower = TypeVar("Tower", bound=nn.Module)


class Block(nn.Module):
    """A pre-norm transformer block on open_clip's own weights, with attention in the open."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = getattr(block, "attn", None)
        if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
            raise RuntimeUnavailableError(
                f"the blocks of this backbone ({type(block).__name__} with {type(attention).__name__}) have an "
                f"attention of their own; only the runtime `torch` runs them"
            )
        self.ln_1, self.ln_2, self.mlp = block.ln_1, block.ln_2, block.mlp
        self.ls_1, self.ls_2 = block.ls_1, block.ls_2
        self.attention = attention
        self.heads = int(attention.num_heads)

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


def _blocks(tower: Any) -> Any:
    return nn.ModuleList(Block(block) for block in tower.transformer.resblocks)


class TextTower(nn.Module):
    """(tokens, weights, prefix) -> text features (B, E), not normalised."""

    mask: Tensor  # causal, (L, L)

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        text = backbone.text
        self.sos = int(backbone.tokenize([""])[0, 0])
        self.embedding, self.ln_final = text.token_embedding, text.ln_final
        self.blocks = _blocks(text)
        projection = text.text_projection
        self.bias = projection.bias if isinstance(projection, nn.Linear) else None
        weight = projection.weight if isinstance(projection, nn.Linear) else projection
        self.projection = weight if isinstance(projection, nn.Linear) or weight is None else nn.Parameter(weight.T)
        self.positions = text.positional_embedding
        self.register_buffer("mask", text.attn_mask.clone(), persistent=False)

    @torch.inference_mode()
    def prefix(self, prompts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Prompts (depth, k, W_t) -> keys and values, each (D, 1, H, p, d)."""
        start = self.embedding.weight[self.sos][None, None]  # [1, 1, W_t]
        x = start if prompts is None else torch.cat([start, prompts[:1].to(start)], 1)
        length = x.shape[1]
        x = x + self.positions[:length]
        mask = self.mask[:length, :length]
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            if prompts is not None and 0 < i < len(prompts):
                x = torch.cat([x[:, :1], prompts[i : i + 1].to(start)], 1)
            q, k, v = block.qkv(x)
            keys.append(k)
            values.append(v)
            x = block.finish(x, q, k, v, mask)
        return torch.stack(keys), torch.stack(values)

    def forward(self, tokens: Tensor, weights: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """
        Args:
            tokens: int64 (B, n) without SOS; EOT is the largest number in a row.
            weights: (B, n) factors of the token embeddings.
            keys, values: (D, R, H, p, d) from `prefix`.
        """
        batch, n = tokens.shape
        p = keys.shape[3]
        last = tokens.argmax(-1)
        x = self.embedding(tokens) * weights.unsqueeze(-1) + self.positions[p : p + n]  # [B, n, W_t]
        mask = self.mask[p : p + n, : p + n]
        rows = torch.arange(batch, device=tokens.device)
        for i, block in enumerate(self.blocks):
            q, k, v = block.qkv(x)
            k = torch.cat([keys[i].expand(batch, -1, -1, -1), k], 2)  # [B, H, p + n, d]
            v = torch.cat([values[i].expand(batch, -1, -1, -1), v], 2)
            if i == len(self.blocks) - 1:  # EOT's row alone is read
                x, q, mask = x[rows, last].unsqueeze(1), q[rows, :, last].unsqueeze(2), mask[last][:, None, None]
            x = block.finish(x, q, k, v, mask)
        pooled = self.ln_final(x[:, 0])
        return pooled if self.projection is None else F.linear(pooled, self.projection, self.bias)


class ImageTower(nn.Module):
    """(pixels, prompts) -> image features (B, E), not normalised.

    depth: of the prompts that an export is made for, 0 for none; eager, any will do.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, depth: int) -> None:
        super().__init__()
        self.depth, self.size = depth, backbone.preprocess.size
        visual, pre = backbone.visual, backbone.preprocess
        self.visual: Any = visual
        self.blocks = _blocks(visual)
        self.one_row = visual.pool_type == "tok"
        std = torch.tensor(pre.std).reshape(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -torch.tensor(pre.mean).reshape(1, 3, 1, 1) / std, persistent=False)
        self.to(backbone.device)

    def forward(self, pixels: Tensor, prompts: Tensor | None = None) -> Tensor:
        """
        Args:
            pixels: uint8 (B, 3, S, S).
            prompts: (depth, R, k, W_v).
        """
        visual = self.visual
        x = pixels.float() * self.scale + self.shift
        x = visual._embeds(x.to(visual.conv1.weight.dtype))  # [B, 1 + P, W_v], positions and ln_pre done
        n = x.shape[1]
        if prompts is not None:
            x = torch.cat([x, visual.ln_pre(prompts[0]).expand(x.shape[0], -1, -1)], 1)
        for i, block in enumerate(self.blocks):
            if prompts is not None and 0 < i < prompts.shape[0]:  # constant in a traced graph
                x = torch.cat([x[:, :n], prompts[i].expand(x.shape[0], -1, -1)], 1)
            q, k, v = block.qkv(x)
            if self.one_row and i == len(self.blocks) - 1:  # CLS's row alone is read
                x, q = x[:, :1], q[:, :, :1]
            x = block.finish(x, q, k, v, None)
        pooled = visual.ln_post(x[:, 0]) if self.one_row else visual._pool(x[:, :n])[0]
        return pooled if visual.proj is None else pooled @ visual.proj  # type: ignore[no-any-return]


def example_inputs(tower: TextTower | ImageTower) -> tuple[tuple[Tensor, ...], list[list[int]]]:
    """Inputs to trace a tower with, and their shapes with -1 for what may change."""
    if isinstance(tower, TextTower):
        keys, values = tower.prefix(None)
        d, _, heads, _, width = keys.shape
        tokens = torch.arange(1, 6).repeat(2, 1)  # [2, 5]
        shapes = [[-1, -1], [-1, -1], [d, -1, heads, -1, width], [d, -1, heads, -1, width]]
        return (tokens, torch.ones(tokens.shape), keys.repeat(1, 1, 1, 3, 1), values.repeat(1, 1, 1, 3, 1)), shapes
    pixels = torch.zeros(2, 3, tower.size, tower.size, dtype=torch.uint8)
    pixel_shape = [-1, 3, tower.size, tower.size]
    if tower.depth == 0:
        return (pixels,), [pixel_shape]
    width = tower.visual.ln_pre.weight.shape[0]
    return (pixels, torch.zeros(tower.depth, 1, 2, width)), [pixel_shape, [tower.depth, -1, -1, width]]


def converted(tower: Tower, dtype: torch.dtype) -> Tower:
    """A copy with weights of another type. Pixels are still normalised in float32: bfloat16 has 8 bits."""
    copied = copy.deepcopy(tower).to(dtype)
    for name in ("scale", "shift"):
        if hasattr(tower, name):
            setattr(copied, name, getattr(tower, name).clone())
    return copied.eval()
