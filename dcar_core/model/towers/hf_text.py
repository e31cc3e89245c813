"""Text encoders of transformers (XLM-RoBERTa, RoBERTa, mT5, NLLB) inside open_clip's HFTextEncoder.

Prompts enter as `inputs_embeds`. Deep prompts are renewed by hooks before each layer; the rows in use are a context
variable, so that several threads and copies of the model can run at once.
"""

from contextvars import ContextVar
from typing import Any

from torch import Tensor

from dcar_core.model.text.tokenizer import TextLayout
from dcar_core.model.towers.prompt_rows import PromptRows
from dcar_core.model.towers.text import TextTower
from dcar_core.util.errors import ModelError

_ROWS: ContextVar[PromptRows | None] = ContextVar("prompt rows", default=None)


class HfText(TextTower):
    """Bidirectional with masked padding; read at its first row or as the mean of all rows, prompts included."""

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
