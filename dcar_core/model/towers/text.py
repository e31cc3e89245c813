"""Text towers: tokens -> embed -> (token weights) -> run with prompts -> pool -> project.

- `NativeText` covers open_clip's transformer in every variant, `CocaText` its class row, `HfText` encoders of
  transformers, `WholeText` any encoder.
- Towers that attend to padding get it back inside `encode`, so callers may always trim a batch to its longest text.

Letters: B batch, n tokens, k prompt vectors, L context length, W_t width, E joint space.
"""

from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dcar_core.model.text.tokenizer import TextLayout
from dcar_core.model.towers.prompt_rows import PromptRows
from dcar_core.util.errors import ModelError

PROMPT_STD = 0.02  # of CLIP's token embeddings
_ROWS: ContextVar[PromptRows | None] = ContextVar("prompt rows", default=None)


class TextTower:
    """A frozen text encoder.

    module: open_clip's module that it runs. table: its token embeddings.
    width: W_t of its token embeddings and prompts; 0 where it takes neither prompts nor token weights.
    """

    table: Any
    width: int
    prompt_std = PROMPT_STD

    def __init__(self, module: Any, layout: TextLayout, *, reads_padding: bool = False) -> None:
        self.module, self.layout = module, replace(layout, reads_padding=reads_padding)

    def encode(self, tokens: Tensor, prompts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Text features (B, E), not normalized.

        Args:
            tokens: int64 (B, n) with n + k <= L.
            prompts: (depth, k, W_t) for all rows or (depth, B, k, W_t) row by row.
            weights: (B, n), multiplied onto the token embeddings before positions are added.

        Raises:
            ValueError: the text with its prompts exceeds the context.
        """
        x, tokens, rows = self._states(tokens, prompts, weights)
        return self.project(self.pool(x, tokens, rows))

    def encode_rows(self, tokens: Tensor, prompts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Features of the text and of every token (B, 1 + n, E), not normalized; arguments as in `encode`."""
        x, padded, rows = self._states(tokens, prompts, weights)
        own = self.project(self.finish_rows(rows.leave(x)[:, : tokens.shape[1]]))
        return torch.cat([self.project(self.pool(x, padded, rows))[:, None], own], 1)

    def token_features(self, tokens: Tensor) -> Tensor:
        """Contextual features of every token (B, n, E), not normalized, without prompts."""
        return self.encode_rows(tokens)[:, 1:]

    def _states(
        self, tokens: Tensor, prompts: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, PromptRows]:
        rows = PromptRows(prompts, self.layout.start)
        if tokens.shape[1] + rows.count > self.layout.context_length:
            raise ValueError(
                f"{tokens.shape[1] + rows.count} tokens with the prompts, "
                f"but the context holds {self.layout.context_length}"
            )
        length = self.layout.padded_length(rows.count)
        missing = 0 if length is None else length - tokens.shape[1]
        if missing > 0:
            tokens = nn.functional.pad(tokens, (0, missing), value=self.layout.pad_id)
        x = self.embed(tokens)
        if weights is not None:
            x = x * nn.functional.pad(weights, (0, max(missing, 0)), value=1.0).unsqueeze(-1)
        return self.run(rows.enter(x), tokens, rows), tokens, rows

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, n) -> (B, n, W_t): the embedding table's rows, before positions."""
        return self.table(tokens)  # type: ignore[no-any-return]

    def run(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        """All blocks over (B, n + k, W_t); prompts stay among the rows."""
        raise NotImplementedError

    def pool(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        """(B, n + k, W_t) -> (B, W_t)."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """(.., W_t) -> (.., E)."""
        raise NotImplementedError

    def finish_rows(self, x: Tensor) -> Tensor:
        """Apply the norm that `pool` applies to its row: (B, n, W_t) -> (B, n, W_t)."""
        return x


def project_by(weight: Any, x: Tensor) -> Tensor:
    """Apply a projection that open_clip keeps as a module, a matrix or not at all."""
    if weight is None:
        return x
    return weight(x) if isinstance(weight, nn.Module) else x @ weight  # type: ignore[no-any-return]


class NativeText(TextTower):
    """open_clip's transformer: causal or not, read at its end token or its last row (SigLIP, CLIPA).

    Unless it reads padding, start tokens and prompts never see the caption, so a graph has their keys and values.
    """

    def __init__(self, text: Any, layout: TextLayout) -> None:
        self.pool_type = getattr(text, "pool_type", None) or text.text_pool_type
        super().__init__(text, layout, reads_padding=text.attn_mask is None or self.pool_type in ("last", "first"))
        self.eos_id = int(getattr(text, "eos_id", None) or getattr(text, "text_eos_id", None) or 0)
        self.table = text.token_embedding
        self.width = int(self.table.embedding_dim)

    def run(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        length = x.shape[1]
        x = x + self.module.positional_embedding[:length]
        mask = self.module.attn_mask
        mask = None if mask is None else mask[:length, :length]
        x = rows.run(x, [partial(block, attn_mask=mask) for block in self.module.transformer.resblocks])
        return self.module.ln_final(x)  # type: ignore[no-any-return]

    def pool(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        if self.pool_type == "last":
            return x[:, -1]
        if self.pool_type == "first":
            return x[:, 0]
        if self.pool_type == "argmax":
            end = tokens.argmax(-1)
        elif self.pool_type == "eos":
            end = (tokens == self.eos_id).int().argmax(-1)
        else:
            raise ValueError(f"the pooling {self.pool_type!r} gives no single row")
        return rows.leave(x)[torch.arange(x.shape[0], device=x.device), end]

    def project(self, x: Tensor) -> Tensor:
        return project_by(self.module.text_projection, x)


class CocaText(NativeText):
    """A class row behind the padding sees the text through an additive mask that is one row off, as it was trained."""

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
        return rows.run(x, [partial(block, attn_mask=mask) for block in text.transformer.resblocks])

    def pool(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        return self.finish_rows(x[:, -1])

    def finish_rows(self, x: Tensor) -> Tensor:
        return self.module.ln_final(x)  # type: ignore[no-any-return]


class WholeText(TextTower):
    """A text encoder as it is, without prompts and token weights; padded to its context."""

    width = 0

    def __init__(self, clip: Any, layout: TextLayout) -> None:
        super().__init__(clip, layout, reads_padding=True)

    def encode(self, tokens: Tensor, prompts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if prompts is not None or weights is not None:
            raise ValueError("this text tower takes neither prompts nor token weights")
        missing = self.layout.context_length - tokens.shape[1]
        tokens = nn.functional.pad(tokens, (0, max(missing, 0)), value=self.layout.pad_id)
        return self.module.encode_text(tokens, normalize=False)  # type: ignore[no-any-return]


class HfText(TextTower):
    """A text encoder of transformers (XLM-RoBERTa, RoBERTa, mT5, NLLB) inside open_clip's HFTextEncoder.

    Bidirectional with masked padding; read at its first row or as the mean of all rows, prompts included. Deep prompts
    are renewed by hooks before each layer; the rows in use are a context variable, so that several threads and copies
    of the model can run at once.
    """

    def __init__(self, text: Any, layout: TextLayout) -> None:
        super().__init__(text, layout)
        self.pad_id = int(text.config.pad_token_id)
        if layout.pad_id != self.pad_id:
            raise ModelError(
                f"the tokenizer pads with token {layout.pad_id}, but the text tower masks token {self.pad_id}; name "
                f"that pad_token in tokenizer_config.json"
            )
        encoder = text.transformer
        self.table = encoder.get_input_embeddings()
        self.width = int(self.table.weight.shape[1])
        scale = float(getattr(self.table, "embed_scale", 1.0))  # NLLB's table multiplies its rows
        self.prompt_std = scale * float(self.table.weight[:1000].detach().float().std())
        layers = encoder.encoder.layer if hasattr(encoder, "encoder") else getattr(encoder, "layers", None)
        for i, layer in enumerate(encoder.block if layers is None else layers):
            if i > 0:
                layer.register_forward_pre_hook(_renew_before(i), with_kwargs=True)

    def run(self, x: Tensor, tokens: Tensor, rows: PromptRows) -> Tensor:
        token = _ROWS.set(rows)
        try:
            states = self.module.transformer(inputs_embeds=x, attention_mask=self._mask(tokens, rows))
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
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = _ROWS.get()
        if rows is None:
            return args, kwargs
        if args:
            return (rows.renew(args[0], block), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": rows.renew(kwargs["hidden_states"], block)}

    return hook
