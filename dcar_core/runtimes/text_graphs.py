"""The text tower as a function of tensors, for runtimes that export or convert it.

- `PrefixTextGraph`: under a causal mask start tokens and prompts never see the caption, so their keys and values in
  every block are computed once for an encoder and enter as an input. One graph serves prompts of any number and depth,
  and rows of several encoders share a batch. Only the end token's row runs through the last block.
- `PromptTextGraph`: every other tower; prompts enter as rows, so the depth of prompts belongs to an export.

Letters: B batch, n tokens, p rows of a prefix, k prompt vectors, R = 1 or B, D blocks, H heads, d width of a head, L
context length, W_t width, E joint space.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone
from dcar_core.model.towers.text import CausalText, project_by
from dcar_core.runtimes.graph_modules import AttentionBlock


class TextGraph(nn.Module):
    """A text tower's forward pass. skipped: start tokens that its inputs stand for."""

    skipped = 0
    has_weights = True

    def prompt_inputs(self, prompts: Tensor | None) -> tuple[Tensor, ...]:
        """Prompts (depth, k, W_t) -> the inputs behind tokens and weights; their axis 1 is R."""
        raise NotImplementedError

    def example(self) -> tuple[tuple[Tensor, ...], list[list[int]]]:
        """Inputs to trace the graph with, and their shapes with -1 for what may change."""
        raise NotImplementedError


class PrefixTextGraph(TextGraph):
    """(tokens, weights, keys, values) -> text features (B, E), not normalized."""

    mask: Tensor  # causal, (L, L)

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        tower = backbone.text_tower
        assert isinstance(tower, CausalText)
        text = tower.module
        self.start_ids = backbone.layout.start_ids
        self.skipped = len(self.start_ids)
        self.end_id = backbone.layout.end_id
        self.embedding, self.ln_final = text.token_embedding, text.ln_final
        self.blocks: Any = nn.ModuleList(AttentionBlock(block) for block in text.transformer.resblocks)
        self.projection = text.text_projection
        self.positions = text.positional_embedding
        self.register_buffer("mask", text.attn_mask.clone(), persistent=False)

    @staticmethod
    def fits(backbone: Backbone) -> bool:
        tower = backbone.text_tower
        return (
            isinstance(tower, CausalText)
            and tower.layout.start > 0
            and AttentionBlock.fits(tower.module.transformer.resblocks)
        )

    @torch.inference_mode()
    def prompt_inputs(self, prompts: Tensor | None) -> tuple[Tensor, ...]:
        """Prompts (depth, k, W_t) -> keys and values, each (D, 1, H, p, d)."""
        start = self.embedding.weight[list(self.start_ids)][None]  # [1, start, W_t]
        x = start if prompts is None else torch.cat([start, prompts[:1].to(start)], 1)
        length = x.shape[1]
        x = x + self.positions[:length]
        mask = self.mask[:length, :length]
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            if prompts is not None and 0 < i < len(prompts):
                x = torch.cat([x[:, : self.skipped], prompts[i : i + 1].to(start)], 1)
            q, k, v = block.qkv(x)
            keys.append(k)
            values.append(v)
            x = block.finish(x, q, k, v, mask)
        return torch.stack(keys), torch.stack(values)

    def forward(self, tokens: Tensor, weights: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """
        Args:
            tokens: int64 (B, n) without start tokens.
            weights: (B, n) factors of the token embeddings.
            keys, values: (D, R, H, p, d) from `prompt_inputs`.
        """
        batch, n = tokens.shape
        p = keys.shape[3]
        last = ((tokens == self.end_id).long().cumsum(-1) == 0).long().sum(-1)  # the first end token
        x = self.embedding(tokens) * weights.unsqueeze(-1) + self.positions[p : p + n]  # [B, n, W_t]
        mask = self.mask[p : p + n, : p + n]
        rows = torch.arange(batch, device=tokens.device)
        for i, block in enumerate(self.blocks):
            q, k, v = block.qkv(x)
            k = torch.cat([keys[i].expand(batch, -1, -1, -1), k], 2)  # [B, H, p + n, d]
            v = torch.cat([values[i].expand(batch, -1, -1, -1), v], 2)
            if i == len(self.blocks) - 1:
                x, q, mask = x[rows, last].unsqueeze(1), q[rows, :, last].unsqueeze(2), mask[last][:, None, None]
            x = block.finish(x, q, k, v, mask)
        return project_by(self.projection, self.ln_final(x[:, 0]))

    def example(self) -> tuple[tuple[Tensor, ...], list[list[int]]]:
        keys, values = self.prompt_inputs(None)
        d, _, heads, _, width = keys.shape
        tokens = torch.tensor([[1, 2, 3, 4, self.end_id]]).repeat(2, 1)
        shapes = [[-1, -1], [-1, -1], [d, -1, heads, -1, width], [d, -1, heads, -1, width]]
        return (tokens, torch.ones(tokens.shape), keys.repeat(1, 1, 1, 3, 1), values.repeat(1, 1, 1, 3, 1)), shapes


class PromptTextGraph(TextGraph):
    """(tokens, weights, prompts) -> text features (B, E), not normalized; of tokens alone for a tower without prompts.

    depth: depth of the prompts in an export, 0 for none. Without an export, any prompts are accepted.
    """

    def __init__(self, backbone: Backbone, depth: int) -> None:
        super().__init__()
        self.tower, self.depth = backbone.text_tower, depth
        self.encoder: nn.Module = self.tower.module  # registered, to be converted with it
        self.has_weights = self.tower.width > 0

    def prompt_inputs(self, prompts: Tensor | None) -> tuple[Tensor, ...]:
        return () if prompts is None else (prompts.unsqueeze(1),)

    def forward(self, tokens: Tensor, weights: Tensor | None = None, prompts: Tensor | None = None) -> Tensor:
        """
        Args:
            tokens: int64 (B, n); of the context without the prompts where the tower reads its padding.
            weights: (B, n) factors of the token embeddings.
            prompts: (depth, R, k, W_t).
        """
        return self.tower.encode(tokens, prompts, weights)

    def example(self) -> tuple[tuple[Tensor, ...], list[list[int]]]:
        layout, k = self.tower.layout, 2 if self.depth else 0
        length = layout.padded_length(k) or layout.start + 6
        ids = [*layout.start_ids, 5, 6, 7, layout.end_id]
        tokens = torch.tensor([ids + [layout.pad_id] * (length - len(ids))]).repeat(2, 1)
        if not self.has_weights:
            return (tokens,), [[-1, length]]
        if not self.depth:
            return (tokens, torch.ones(tokens.shape)), [[-1, -1], [-1, -1]]
        prompts = torch.zeros(self.depth, 1, k, self.tower.width)
        return (tokens, torch.ones(tokens.shape), prompts), [[-1, -1], [-1, -1], [self.depth, -1, -1, self.tower.width]]


def text_graph(backbone: Backbone, depth: int) -> TextGraph:
    """The text graph that fits a backbone, in eval mode. depth: of the text prompts, 0 for none."""
    graph = PrefixTextGraph(backbone) if PrefixTextGraph.fits(backbone) else PromptTextGraph(backbone, depth)
    return graph.eval()
