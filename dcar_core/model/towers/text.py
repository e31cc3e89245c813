"""Text towers: tokens -> embed -> (token weights) -> run with prompts -> pool ->
project; and the rows of prompts.

- `NativeText` covers open_clip's transformer in every variant, `CocaText` its class
  row, `HfText` encoders of transformers.
- Towers that attend to padding get it back inside `encode`, so callers may always trim
  a batch to its longest text.

Letters: B batch, n tokens, k prompt vectors, L context length, W_t width, E joint
space.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core.model.tokenizer import TextLayout
from dcar_core.util.errors import ModelError

PROMPT_STD = 0.02  # of CLIP's token embeddings
AdapterMatrices = tuple[Tensor, Tensor]


class PromptRows:
    """Additions to a tower's sequence: prompts before its blocks, adapters behind them.

    Prompts are the rows [start, start + k); the first `depth` blocks see prompts of
    their own.

    prompts: (depth, k, W) for all rows of a batch or (depth, B, k, W) row by row; None
    without prompts. adapters: the lower and the upper matrices of a bottleneck behind
    each block, each (D, r, W) or (D, B, r, W).
    """

    def __init__(
        self,
        prompts: Tensor | None,
        start: int,
        adapters: AdapterMatrices | None = None,
    ) -> None:
        self.prompts = prompts
        self.start = start
        self.adapters = adapters
        self.count = 0 if prompts is None else prompts.shape[-2]

    def enter(
        self, x: Tensor, prepare: Callable[[Tensor], Tensor] = lambda prompts: prompts
    ) -> Tensor:
        """(B, n, W) -> (B, n + k, W). prepare: applied to the prompts, such as the norm
        before the first block.
        """
        if self.prompts is None:
            return x
        prompts = prepare(self.prompts[0]).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, : self.start], prompts, x[:, self.start :]], 1)

    def run(self, x: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
        """Run the blocks over (B, n + k, W), with fresh prompts before each of the
        first `depth`.
        """
        for i, block in enumerate(blocks):
            x = self.adapt(block(self.renew(x, i)), i)
        return x

    def adapt(self, x: Tensor, block: int) -> Tensor:
        """Apply the adapter behind this block, a residual bottleneck on normalized
        rows.
        """
        if self.adapters is None:
            return x
        # [r, W] or [B, r, W]
        down = self.adapters[0][block]
        up = self.adapters[1][block]
        width = int(x.shape[-1])  # a constant in exports
        return x + F.relu(F.layer_norm(x, (width,)) @ down.transpose(-2, -1)) @ up

    def renew(self, x: Tensor, block: int) -> Tensor:
        """Replace the prompts' rows before this block, if it has prompts of its own."""
        if self.prompts is None or not 0 < block < self.prompts.shape[0]:
            return x
        after = x[:, self.start + self.count :]
        return torch.cat(
            [x[:, : self.start], self.prompts[block].expand(x.shape[0], -1, -1), after],
            1,
        )

    def leave(self, x: Tensor) -> Tensor:
        """(B, n + k, W) -> (B, n, W)."""
        if self.prompts is None:
            return x
        return torch.cat([x[:, : self.start], x[:, self.start + self.count :]], 1)

    def widen(self, values: Tensor, fill: int) -> Tensor:
        """(B, n) -> (B, n + k): ids or a mask, with `fill` in the prompts' places."""
        if self.prompts is None:
            return values
        rows = values.new_full((values.shape[0], self.count), fill)
        return torch.cat([values[:, : self.start], rows, values[:, self.start :]], 1)


_ROWS: ContextVar[PromptRows | None] = ContextVar("prompt rows", default=None)


class TextTower:
    """A frozen text encoder.

    module: open_clip's module that it runs. table: its token embeddings.
    width: W_t of its token embeddings and prompts.

    Each family defines three steps:
    run: all blocks over (B, n + k, W_t), of tokens (B, n); prompts stay among the rows.
    pool: (B, n + k, W_t) -> (B, W_t). project: (.., W_t) -> (.., E).
    """

    table: Any
    width: int
    prompt_std = PROMPT_STD
    run: Callable[[Tensor, Tensor, PromptRows], Tensor]
    pool: Callable[[Tensor, Tensor, PromptRows], Tensor]
    project: Callable[[Tensor], Tensor]

    def __init__(
        self,
        module: Any,
        layout: TextLayout,
        *,
        reads_padding: bool = False,
    ) -> None:
        self.module = module
        self.layout = replace(layout, reads_padding=reads_padding)

    def encode(
        self,
        tokens: Tensor,
        prompts: Tensor | None = None,
        weights: Tensor | None = None,
        rows: bool = False,
    ) -> Tensor:
        """Text features (B, E), or with `rows` those of every token behind them (B, 1 +
        n, E), not normalized.

        Args:
            tokens: int64 (B, n) with n + k <= L.
            prompts: (depth, k, W_t) for all rows or (depth, B, k, W_t) row by row.
            weights: (B, n), multiplied onto the token embeddings before positions are
                added.

        Raises:
            ValueError: the text with its prompts exceeds the context.
        """
        added = PromptRows(prompts, self.layout.start)
        count = tokens.shape[1]
        if count + added.count > self.layout.context_length:
            raise ValueError(
                "more tokens with the prompts than the context holds"
                f" ({self.layout.context_length})"
            )
        missing = max(0, (self.layout.padded_length(added.count) or 0) - count)
        if missing > 0:
            tokens = F.pad(tokens, (0, missing), value=self.layout.pad_id)
        x = self.embed(tokens)
        if weights is not None:
            x = x * F.pad(weights, (0, missing), value=1.0).unsqueeze(-1)
        x = self.run(added.enter(x), tokens, added)
        features = self.project(self.pool(x, tokens, added))
        if not rows:
            return features
        return torch.cat(
            [
                features[:, None],
                self.project(self.finish_rows(added.leave(x)[:, :count])),
            ],
            1,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, n) -> (B, n, W_t): the embedding table's rows, before positions."""
        return self.table(tokens)  # type: ignore[no-any-return]

    def finish_rows(self, x: Tensor) -> Tensor:
        """Apply the norm that `pool` applies to its row: (B, n, W_t) -> (B, n, W_t)."""
        return x


def project_by(weight: Any, x: Tensor) -> Tensor:
    """Apply a projection that open_clip keeps as a module, a matrix or not at all."""
    if weight is None:
        return x
    return weight(x) if isinstance(weight, nn.Module) else x @ weight  # type: ignore[no-any-return]


class NativeText(TextTower):
    """open_clip's transformer: causal or not, read at its end token or its last row
    (SigLIP, CLIPA).

    Unless it reads padding, start tokens and prompts never see the caption, so a graph
    has their keys and values.
    """

    def __init__(self, text: Any, layout: TextLayout) -> None:
        self.pool_type = getattr(text, "pool_type", None) or text.text_pool_type
        super().__init__(
            text,
            layout,
            reads_padding=text.attn_mask is None or self.pool_type == "last",
        )
        self.eos_id = int(
            getattr(text, "eos_id", None) or getattr(text, "text_eos_id", None) or 0
        )
        self.table = text.token_embedding
        self.width = int(self.table.embedding_dim)

    def run(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        length = x.shape[1]
        x = x + self.module.positional_embedding[:length]
        mask = self.module.attn_mask
        mask = None if mask is None else mask[:length, :length]
        x = rows.run(
            x,
            [
                partial(block, attn_mask=mask)
                for block in self.module.transformer.resblocks
            ],
        )
        return self.module.ln_final(x)  # type: ignore[no-any-return]

    def pool(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        if self.pool_type == "last":
            return x[:, -1]
        end = (
            (tokens == self.eos_id).int() if self.pool_type == "eos" else tokens
        ).argmax(-1)
        return rows.leave(x)[torch.arange(x.shape[0], device=x.device), end]

    def project(self, x: Tensor) -> Tensor:
        return project_by(self.module.text_projection, x)


class CocaText(NativeText):
    """A class row behind the padding sees the text through an additive mask that is one
    row off, as it was trained.
    """

    def __init__(self, text: Any, layout: TextLayout) -> None:
        super().__init__(text, layout)
        self.layout = replace(layout, reads_padding=True)

    def run(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        text = self.module
        x = torch.cat([x, text.cls_emb.expand(x.shape[0], 1, -1)], 1)
        length = x.shape[1]
        ids = rows.widen(tokens, text.pad_id + 1)  # prompts are no padding
        mask = text._build_additive_mask(ids, length, x.dtype)
        if text.attn_mask is not None:
            mask = text.attn_mask[:length, :length].unsqueeze(0) + mask
        x = x + text.positional_embedding[:length]
        return rows.run(
            x, [partial(block, attn_mask=mask) for block in text.transformer.resblocks]
        )

    def pool(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        return self.finish_rows(x[:, -1])

    def finish_rows(self, x: Tensor) -> Tensor:
        return self.module.ln_final(x)  # type: ignore[no-any-return]


class HfText(TextTower):
    """A text encoder of transformers (XLM-RoBERTa, RoBERTa, mT5, NLLB) inside
    open_clip's HFTextEncoder.

    Bidirectional with masked padding; read at its first row or as the mean of all rows,
    prompts included. Deep prompts are renewed by hooks before each layer; the rows in
    use are a context variable, so that several threads and copies of the model can run
    at once.
    """

    def __init__(self, text: Any, layout: TextLayout) -> None:
        super().__init__(text, layout)
        self.pad_id = int(text.config.pad_token_id)
        if layout.pad_id != self.pad_id:
            raise ModelError(
                f"the tokenizer pads with token {layout.pad_id}, but the text tower"
                f" masks token {self.pad_id}; name that pad_token in"
                " tokenizer_config.json"
            )
        encoder = text.transformer
        self.table = encoder.get_input_embeddings()
        self.width = int(self.table.weight.shape[1])
        # NLLB's table multiplies its rows
        scale = float(getattr(self.table, "embed_scale", 1.0))
        self.prompt_std = scale * float(self.table.weight[:1000].detach().float().std())
        if hasattr(encoder, "encoder"):
            layers = encoder.encoder.layer
        else:
            layers = getattr(encoder, "layers", None)
        for i, layer in enumerate(encoder.block if layers is None else layers):
            if i > 0:
                layer.register_forward_pre_hook(_renew_before(i), with_kwargs=True)

    def run(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        token = _ROWS.set(rows)
        try:
            states = self.module.transformer(
                inputs_embeds=x, attention_mask=self._mask(tokens, rows)
            )
            return states.last_hidden_state  # type: ignore[no-any-return]
        finally:
            _ROWS.reset(token)

    def pool(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        states = BaseModelOutput(last_hidden_state=x)
        return self.module.pooler(states, self._mask(tokens, rows))  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> Tensor:
        return self.module.proj(x)  # type: ignore[no-any-return]

    def _mask(self, tokens: Tensor, rows: PromptRows) -> Tensor:
        return rows.widen((tokens != self.pad_id).long(), 1)


def _renew_before(block: int) -> Any:
    def hook(
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = _ROWS.get()
        if rows is None:
            return args, kwargs
        if args:
            return (rows.renew(args[0], block), *args[1:]), kwargs
        return args, kwargs | {
            "hidden_states": rows.renew(kwargs["hidden_states"], block)
        }

    return hook
