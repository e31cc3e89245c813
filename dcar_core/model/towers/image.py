"""Image towers: pixels -> embed -> run with prompts -> pool -> project.

- Prompts are appended behind the patches and leave before the last norm and the
  pooling; adapters follow each block.
- `NativeImage` is open_clip's transformer, `TimmImage` timm's ViT and Eva, `WholeImage`
  any encoder, unprompted.

Letters: B batch, P patches, k prompt vectors, S side in pixels, W_v width, E joint
space.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.model.towers.text import AdapterMatrices, PromptRows, project_by

# side in pixels of the squares of a relevance map, for an encoder without patches
_SQUARE = 32


class ImageTower:
    """A frozen image encoder.

    width: W_v of its patches and prompts; 0 where it has no rows that prompts could
    join. blocks: D, the number of its transformer blocks; 0 where `width` is.
    patch_grid: patches per side. module: open_clip's module that it runs. entry_norm:
    between embedding and first block; prompts pass it too. pools_class_row: True for
    CLIP's own kind, with plain attention and a feature from the class row alone.

    Each family defines five steps: embed: (B, 3, S, S) -> (B, class rows + P, W_v),
    ready for the first block. run: all blocks over (B, n + k, W_v) -> (B, n, W_v);
    prompts leave. pool: (B, n, W_v) -> (B, W). project: (.., W) -> (.., E).
    project_patches: (B, n, W_v) -> (B, P, E).
    """

    width: int
    blocks: int
    patch_grid: int
    module: Any
    entry_norm: nn.Module = nn.Identity()
    pools_class_row = False
    embed: Callable[[Tensor], Tensor]
    run: Callable[[Tensor, PromptRows], Tensor]
    pool: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    project_patches: Callable[[Tensor], Tensor]

    def encode(
        self,
        pixels: Tensor,
        prompts: Tensor | None = None,
        adapters: AdapterMatrices | None = None,
        rows: bool = False,
    ) -> Tensor:
        """Image features (B, E), or with `rows` those of each patch behind them (B, 1 +
        P, E), not normalized.

        Args:
            pixels: float32 (B, 3, S, S), as of `Preprocess.standardize`.
            prompts: (depth, k, W_v) for all rows or (depth, B, k, W_v) row by row.
            adapters: behind each block; see `PromptRows`.
        """
        x = self.embed(pixels)
        added = PromptRows(prompts, x.shape[1], adapters)
        x = self.run(added.enter(x, self.entry_norm), added)
        features = self.project(self.pool(x))
        if rows:
            return torch.cat([features[:, None], self.project_patches(x)], 1)
        return features

    def blank_rows(self, blank: Tensor, depth: int) -> Tensor:
        """Return the mean patch of a blank image (1, 3, S, S) before each of the first
        blocks: (depth, W_v).
        """
        recorded = _RecordedRows()
        self.run(self.embed(blank), recorded)
        inputs = [
            *recorded.inputs[:depth],
            *recorded.inputs[-1:] * (depth - len(recorded.inputs)),
        ]
        rows = torch.stack([x[0, -(self.patch_grid**2) :].mean(0) for x in inputs])
        if (
            isinstance(self.entry_norm, nn.LayerNorm)
            and self.entry_norm.weight is not None
        ):
            # which the norm undoes
            rows[0] = (rows[0] - self.entry_norm.bias) / self.entry_norm.weight
        return rows


class ClassRowInputs(NamedTuple):
    """What the class row of an image needs in the last D' blocks, while its patches
    stay as they are.

    first: (B, W_v), before these blocks. keys_values: (B, D', 2, H, P, d). patches: (B,
    P, W_v), behind the last block.
    """

    first: Tensor
    keys_values: Tensor
    patches: Tensor


class _RecordedRows(PromptRows):
    """No prompts; keeps what enters each block."""

    def __init__(self) -> None:
        super().__init__(None, 0)
        self.inputs: list[Tensor] = []

    def renew(self, x: Tensor, block: int) -> Tensor:
        self.inputs.append(x)
        return x


class NativeImage(ImageTower):
    """open_clip's VisionTransformer: class row, mean (CLIPA) or attention pooling
    (CoCa).
    """

    def __init__(self, visual: Any) -> None:
        self.module = visual
        self.width = int(visual.conv1.out_channels)
        self.blocks = len(visual.transformer.resblocks)
        self.patch_grid = int(visual.grid_size[0])
        self.entry_norm = visual.ln_pre
        is_plain = all(
            isinstance(block.attn, nn.MultiheadAttention)
            for block in visual.transformer.resblocks
        )
        self.pools_class_row = (
            is_plain and visual.attn_pool is None and visual.pool_type == "tok"
        )

    def embed(self, pixels: Tensor) -> Tensor:
        return self.module._embeds(pixels)  # type: ignore[no-any-return]

    def run(self, x: Tensor, rows: PromptRows) -> Tensor:
        return rows.leave(rows.run(x, self.module.transformer.resblocks))

    def pool(self, x: Tensor) -> Tensor:
        return self.module._pool(x)[0]  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> Tensor:
        return project_by(self.module.proj, x)

    def rows_before(
        self,
        pixels: Tensor,
        block: int,
        adapters: AdapterMatrices | None = None,
    ) -> Tensor:
        """The rows that enter a block: (B, 3, S, S) -> (B, 1 + P, W_v)."""
        return PromptRows(None, 0, adapters).run(
            self.embed(pixels), self.module.transformer.resblocks[:block]
        )

    def class_row_inputs(
        self,
        x: Tensor,
        block: int,
        adapters: AdapterMatrices | None = None,
    ) -> ClassRowInputs:
        """Run the blocks from `block` on over `rows_before` (B, 1 + P, W_v), for
        `class_row_features`.
        """
        first = x[:, 0]
        rows = PromptRows(None, 0, adapters)
        width = self.width
        keys_values = list[Tensor]()
        for i, layer in enumerate(self.module.transformer.resblocks[block:], block):
            attention = layer.attn
            both = F.linear(
                layer.ln_1(x[:, 1:]),
                attention.in_proj_weight[width:],
                attention.in_proj_bias[width:],
            )
            both = both.reshape(*both.shape[:2], 2, attention.num_heads, -1)
            keys_values.append(both.permute(0, 2, 3, 1, 4))  # [B, 2, H, P, d]
            x = rows.adapt(layer(x), i)
        return ClassRowInputs(first, torch.stack(keys_values, 1), x[:, 1:])

    def class_row_features(
        self,
        images: ClassRowInputs,
        prompts: Tensor,
        block: int,
        adapters: AdapterMatrices | None = None,
    ) -> Tensor:
        """Features (B, E), not normalized, of class rows to which `prompts` (B, D',
        W_v) are added before each block.

        They equal those of whole passes in which each block's patches are set to the
        unprompted ones: one row a pair.
        """
        # [B, 1, W_v]
        x = images.first[:, None].float()
        rows = PromptRows(None, 0, adapters)
        for i, layer in enumerate(self.module.transformer.resblocks[block:], block):
            x = x + prompts[:, i - block, None]
            attention = layer.attn
            own = F.linear(
                layer.ln_1(x),
                attention.in_proj_weight,
                attention.in_proj_bias,
            )
            own = own.reshape(len(x), 1, 3, attention.num_heads, -1)
            query, key, value = own.permute(2, 0, 3, 1, 4)  # [B, H, 1, d]
            keys, values = images.keys_values[:, i - block].to(x.dtype).unbind(1)
            keys = torch.cat([key, keys], 2)
            values = torch.cat([value, values], 2)
            read = (
                F.scaled_dot_product_attention(query, keys, values)
                .transpose(1, 2)
                .flatten(2)
            )
            x = x + layer.ls_1(attention.out_proj(read))
            x = rows.adapt(x + layer.ls_2(layer.mlp(layer.ln_2(x))), i)
        return self.project(self.pool(x))

    def project_patches(self, x: Tensor) -> Tensor:
        patches = x[:, 1:]
        if self.module.attn_pool is None:
            return self.project(self.module.ln_post(patches))
        alone = patches.reshape(-1, 1, x.shape[-1])
        return self.project(self.pool(alone)).reshape(*patches.shape[:2], -1)


class TimmImage(ImageTower):
    """timm's VisionTransformer (SigLIP, MobileCLIP-B, ViTamin) and Eva (EVA01, EVA02,
    PE-Core).
    """

    def __init__(self, visual: Any) -> None:
        self.module = visual
        trunk = visual.trunk
        self.width = int(trunk.embed_dim)
        self.blocks = len(trunk.blocks)
        self.patch_grid = int(trunk.patch_embed.grid_size[0])
        self.entry_norm = trunk.norm_pre
        self.has_rope = getattr(trunk, "rope", None) is not None
        self.is_eva = type(trunk).__name__ == "Eva"

    def embed(self, pixels: Tensor) -> Tensor:
        trunk = self.module.trunk
        x = trunk._pos_embed(trunk.patch_embed(pixels))
        return trunk.norm_pre(x[0] if self.is_eva else x)  # type: ignore[no-any-return]

    def run(self, x: Tensor, rows: PromptRows) -> Tensor:
        trunk = self.module.trunk
        blocks = self.module.trunk.blocks
        if self.has_rope:
            rope = _with_prompt_rows(trunk.rope.get_embed(), rows.count)
            blocks = [partial(block, rope=rope) for block in trunk.blocks]
        return trunk.norm(rows.leave(rows.run(x, blocks)))  # type: ignore[no-any-return]

    def pool(self, x: Tensor) -> Tensor:
        return self.module.trunk.forward_head(x, pre_logits=True)  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> Tensor:
        return self.module.head(self.module.trunk.head(x))  # type: ignore[no-any-return]

    def project_patches(self, x: Tensor) -> Tensor:
        trunk = self.module.trunk
        patches = x[:, self.module.trunk.num_prefix_tokens :]
        if trunk.attn_pool is None:
            return self.project(trunk.fc_norm(patches))
        alone = trunk.attn_pool(patches.reshape(-1, 1, x.shape[-1]))
        return self.project(trunk.fc_norm(alone)).reshape(*patches.shape[:2], -1)


def _with_prompt_rows(rope: Tensor, count: int) -> Tensor:
    """Add rows for prompts, which have no position in the image, to the rotary sines
    and cosines (P, 2 d).
    """
    if count == 0:
        return rope
    half = rope.shape[1] // 2
    return torch.cat(
        [rope, torch.cat([rope.new_zeros(count, half), rope.new_ones(count, half)], 1)]
    )


class WholeImage(ImageTower):
    """An image encoder as it is, without prompts: ResNet, ConvNeXt, FastViT, Swin."""

    width = blocks = 0

    def __init__(self, clip: Any, size: int) -> None:
        self.module = clip
        self.patch_grid = max(1, size // _SQUARE)

    def encode(
        self,
        pixels: Tensor,
        prompts: Tensor | None = None,
        adapters: AdapterMatrices | None = None,
        rows: bool = False,
    ) -> Tensor:
        if prompts is not None or adapters is not None or rows:
            raise ValueError(
                "this image tower has neither patches, which prompts could join, nor"
                " blocks for adapters"
            )
        return self.module.encode_image(pixels, normalize=False)  # type: ignore[no-any-return]
