"""A frozen CLIP with two prompted encoders. The only module that imports open_clip.

- Loads a built-in open_clip model (weights by tag or file) or a directory with `open_clip_config.json`.
- Prompts enter the text tower after SOS and the vision tower after the patches; with none, the result is the
  stock encoders' (tested bit for bit).
- A batch of texts is cut to its longest caption: the mask is causal and the result is read at EOT, so the
  padding behind it changes nothing.
- Frozen means `requires_grad_(False)` and `eval()`, not `no_grad`: gradients flow through to the prompts.

Letters: B batch, L context length, n tokens in this batch, k prompt vectors, P patches, W_t and W_v widths, E joint
space.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.text_cleaning import clean_text
from dcar_core.model.tokenizer import TextTokenizer
from dcar_core.util.errors import ModelError
from dcar_core.util.memory import WEIGHTS_FILE, map_weights

RANDOM = "random"
_WORDS = 100_000  # that a tokenizer remembers
_OF_CLIP: dict[str, Any] = {
    "tokenizer": "SimpleTokenizer",
    "vocabulary": "2032b714fb138f45adf7920b7426c2108eb64b409f4a42a20fdaa403fd461e5a",
    "clean": "_clean_lower",
    "reduction": None,
    "pool": "tok",
    "norm_after_pool": False,
    "eps": [1e-5],
    "gelu": [],
}
SUPPORTED = "open_clip's CLIP with a vision transformer, such as ViT-B-32-quickgelu, ViT-B-16 or ViT-L-14"


@dataclass(frozen=True)
class BackboneSource:
    """Where a backbone comes from: an open_clip name or a directory, and for a name its weights.

    pretrained: a tag, a file, or "random", which is fit to measure speed alone.
    """

    model: str
    pretrained: str | None = None


class Backbone(nn.Module):
    """Frozen towers, tokenizer and preprocessing. Build with `load_backbone`."""

    def __init__(self, clip: nn.Module, tokenizer: Any, source: BackboneSource) -> None:
        super().__init__()
        _require_supported(clip)
        self.clip = clip.eval().requires_grad_(False)
        self.source = source
        self._tokenizer = tokenizer
        self.context_length = int(self.text.context_length)
        self.text_width = int(self.text.ln_final.weight.shape[0])
        self.vision_width = int(self.visual.ln_post.weight.shape[0])
        self.embed_dim = int(self.visual.output_dim)
        self.patch_grid = int(self.visual.grid_size[0])  # a side
        self.preprocess = Preprocess.from_open_clip(self.visual.preprocess_cfg)

    @property
    def text(self) -> Any:
        """The text tower: flat in `CLIP`, under `.text` in `CustomTextCLIP`."""
        return getattr(self.clip, "text", self.clip)

    @property
    def visual(self) -> Any:
        return self.clip.visual

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def scale(self) -> Tensor:
        """1 / tau, frozen."""
        scale: Tensor = self.clip.logit_scale  # type: ignore[assignment]
        return scale.exp()

    def train(self, mode: bool = True) -> "Backbone":
        """A frozen model stays in eval mode whatever its owner does."""
        return super().train(False)

    def tokenize(self, texts: Sequence[str], prompt_tokens: int = 0) -> Tensor:
        """Return int64 (B, n): SOS, words, EOT, zeros; at most L - prompt_tokens tokens, so that prompts fit in too."""
        known = getattr(self._tokenizer, "cache", {})  # of every word that it has ever seen
        while len(known) > _WORDS:
            known.popitem()  # the newest; the first two are the control tokens
        tokens: Tensor = self._tokenizer(
            [clean_text(text) for text in texts], context_length=self.context_length - prompt_tokens
        )
        return tokens[:, : int(tokens.argmax(-1).max()) + 1].to(self.device)

    def standalone_tokenizer(self, prompt_tokens: int) -> TextTokenizer | None:
        """What gives the numbers of `tokenize` without PyTorch; None where this tokenizer has no such form."""
        return TextTokenizer.from_open_clip(self._tokenizer, self.context_length - prompt_tokens)

    def exceeds_context(self, texts: Sequence[str], prompt_tokens: int = 0) -> list[bool]:
        """Which texts `tokenize` would cut."""
        limit = self.context_length - prompt_tokens
        tokens: Tensor = self._tokenizer([clean_text(text) for text in texts], context_length=limit + 1)
        return (tokens.argmax(-1) >= limit).tolist()

    def split_words(self, tokens: Tensor) -> list[tuple[str, slice]]:
        """The words of one tokenised text, int64 (n,), as the tokenizer splits it, each with its places in `tokens`."""
        ids, found, start = tokens[1 : int(tokens.argmax())].tolist(), [], 1
        for end, piece in enumerate(ids, start=2):
            if self._tokenizer.decode([piece]).endswith(" ") or end > len(ids):  # a word's end, or the text's
                place = slice(start, end)
                found.append((self._tokenizer.decode(ids[start - 1 : end - 1]).strip(), place))
                start = end
        return found

    def encode_text(self, tokens: Tensor, prompts: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Text features (B, E), not normalised.

        Args:
            tokens: int64 (B, n) with n + k <= L, from `tokenize`.
            prompts: (depth, k, W_t) for all rows or (depth, B, k, W_t) row by row.
            weights: (B, n), multiplied onto the token embeddings before positions are added.
        """
        x, k = self._text_states(tokens, prompts, weights)
        pooled = x[torch.arange(len(x), device=x.device), tokens.argmax(-1) + k]  # [B, W_t]
        return self._project_text(pooled)

    def token_features(self, tokens: Tensor) -> Tensor:
        """Contextual features of every token (B, n, E), not normalised, without prompts."""
        x, _ = self._text_states(tokens, None, None)
        return self._project_text(x)

    def lone_token_features(self, tokens: Tensor) -> Tensor:
        """Features of every token as a text of its own (B, n, E), not normalised, without prompts."""
        found, place = torch.unique(tokens, return_inverse=True)  # [V], [B, n]
        sos, eot = self.tokenize([""])[0]
        alone = torch.stack([sos.expand_as(found), found, eot.expand_as(found)], 1)  # [V, 3]
        return self.encode_text(alone)[place]

    def token_embeddings(self, tokens: Tensor) -> Tensor:
        """The embedding table's rows (B, n, W_t), before positions."""
        return self.text.token_embedding(tokens)  # type: ignore[no-any-return]

    def _text_states(self, tokens: Tensor, prompts: Tensor | None, weights: Tensor | None) -> tuple[Tensor, int]:
        text = self.text
        x = text.token_embedding(tokens)  # [B, n, W_t]
        if weights is not None:
            x = x * weights.unsqueeze(-1)
        k = 0
        if prompts is not None:
            k = prompts.shape[-2]
            x = torch.cat([x[:, :1], _rows(prompts[0], len(x)), x[:, 1:]], 1)  # [B, n + k, W_t]
        length = x.shape[1]
        if length > self.context_length:
            raise ValueError(f"{length} tokens with the prompts, but the context holds {self.context_length}")
        x = x + text.positional_embedding[:length]
        mask = text.attn_mask[:length, :length]
        x = self._run(text.transformer, x, prompts, lambda y, p: torch.cat([y[:, :1], p, y[:, 1 + k :]], 1), mask)
        return text.ln_final(x), k

    def _project_text(self, x: Tensor) -> Tensor:
        projection = self.text.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection  # type: ignore[no-any-return]

    def encode_image(self, pixels: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Image features (B, E), not normalised.

        Args:
            pixels: float32 (B, 3, S, S), normalised as `preprocess.normalize` does.
            prompts: (depth, k, W_v) for all rows or (depth, B, k, W_v) row by row.
        """
        visual = self.visual
        x = visual._embeds(pixels)  # [B, 1 + P, W_v], positions and ln_pre done
        n = x.shape[1]
        if prompts is not None:
            x = torch.cat([x, _rows(visual.ln_pre(prompts[0]), len(x))], 1)  # [B, 1 + P + k, W_v]
        x = self._run(visual.transformer, x, prompts, lambda y, p: torch.cat([y[:, :n], p], 1))
        pooled, _ = visual._pool(x[:, :n])
        return pooled if visual.proj is None else pooled @ visual.proj  # type: ignore[no-any-return]

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Each patch's feature in the joint space (B, P, E), not normalised, without prompts; pixels as above."""
        visual = self.visual
        x = visual.ln_post(visual.transformer(visual._embeds(pixels))[:, 1:])
        return x if visual.proj is None else x @ visual.proj  # type: ignore[no-any-return]

    def _run(
        self,
        transformer: Any,
        x: Tensor,
        prompts: Tensor | None,
        put: Callable[[Tensor, Tensor], Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """The blocks; the first `depth` of them see prompts of their own in the prompts' places."""
        if prompts is None or len(prompts) == 1:
            return transformer(x, attn_mask=mask)  # type: ignore[no-any-return]
        for i, block in enumerate(transformer.resblocks):
            if 0 < i < len(prompts):
                x = put(x, _rows(prompts[i], len(x)))
            x = block(x, attn_mask=mask)
        return x

    def content_hash(self) -> str:
        """sha256 over every weight and whatever else decides on vectors, as 64 hex digits."""
        digest = hashlib.sha256(json.dumps(self.preprocess.to_dict(), sort_keys=True).encode())
        quick = any(isinstance(module, open_clip.transformer.QuickGELU) for module in self.clip.modules())
        digest.update(f"quick_gelu={quick} heads={self._heads()}".encode())
        if unlike := self._unlike_clip():
            digest.update(json.dumps(unlike, sort_keys=True).encode())
        for name, value in sorted(self.clip.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _unlike_clip(self) -> dict[str, Any]:
        """How texts become tokens, and what of the towers is no weight, as far as it is not as in OpenAI's models."""
        tokenizer, modules = self._tokenizer, list(self.clip.modules())
        found = {
            "tokenizer": type(tokenizer).__name__,
            "vocabulary": _vocabulary(tokenizer),
            "clean": getattr(getattr(tokenizer, "clean_fn", None), "__name__", None),
            "reduction": getattr(getattr(tokenizer, "reduction_fn", None), "__name__", None),
            "pool": getattr(self.visual, "pool_type", "tok"),
            "norm_after_pool": getattr(self.visual, "final_ln_after_pool", False),
            "eps": sorted({module.eps for module in modules if isinstance(module, nn.LayerNorm)}),
            "gelu": sorted({module.approximate for module in modules if isinstance(module, nn.GELU)} - {"none"}),
        }
        return {name: value for name, value in found.items() if value != _OF_CLIP[name]}

    def _heads(self) -> list[int]:
        return [
            int(block.attn.num_heads)
            for block in [*self.text.transformer.resblocks, *self.visual.transformer.resblocks]
        ]


def _vocabulary(tokenizer: Any) -> str:
    """sha256 over a tokenizer's pieces and merges, of whichever kind it is."""
    pieces = getattr(tokenizer, "encoder", None) or getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
    merges = getattr(tokenizer, "bpe_ranks", {})
    return hashlib.sha256(json.dumps([sorted(pieces.items()), sorted(merges.items())]).encode()).hexdigest()


def _rows(prompts: Tensor, batch: int) -> Tensor:
    """(k, W) or (B, k, W) -> (B, k, W)."""
    return prompts.expand(batch, -1, -1)


def load_backbone(source: BackboneSource, device: str = "cpu") -> Backbone:
    """Load and freeze a CLIP.

    Raises:
        ModelError: an unknown name, weights that cannot be had or do not fit, an unsupported architecture.
    """
    name, pretrained = source.model, source.pretrained
    directory = Path(name)
    local = directory.is_dir()
    if local and not (directory / MODEL_CONFIG).is_file():
        raise ModelError(f"{directory} is no model directory: it has no {MODEL_CONFIG}")
    known = name in open_clip.list_models() or name.startswith("hf-hub:")
    if not local and not known and (directory.is_absolute() or name.startswith(".")):
        raise ModelError(f"there is no model directory {directory}: bring it back, or name where it is now")
    if not local and not known:
        raise ModelError(
            f"no model is named {name!r}; use an open_clip name ({SUPPORTED}) or a directory with {MODEL_CONFIG}"
        )
    if local and pretrained and pretrained != RANDOM:
        raise ModelError(f"{directory} has weights of its own; leave out --pretrained {pretrained}")
    if pretrained and Path(pretrained).suffix in {".pkl", ".pickle"}:
        raise ModelError(f"{pretrained} is a pickle, which can run code; use .safetensors or a .pt state dict")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*QuickGELU mismatch.*")
            clip, _, _ = open_clip.create_model_and_transforms(
                f"local-dir:{directory}" if local else name,
                pretrained=None if pretrained == RANDOM else pretrained or None,
                device=device,
                weights_only=True,
            )
        if device == "cpu":
            map_weights(clip, directory / WEIGHTS_FILE if local else Path(pretrained or ""))
        tokenizer_settings: dict[str, Any] = {}
        if local:
            config = json.loads((directory / MODEL_CONFIG).read_text(encoding="utf-8"))
            tokenizer_settings = dict(config["model_cfg"]["text_cfg"].get("tokenizer_kwargs", {}))
            if "bpe_path" in tokenizer_settings:
                tokenizer_settings["bpe_path"] = str(directory / tokenizer_settings["bpe_path"])
        tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}" if local else name, **tokenizer_settings)
    except Exception as error:  # open_clip, torch, safetensors and the hub client each raise their own
        raise ModelError(_explain(source, error)) from error
    backbone = Backbone(clip, tokenizer, source)
    if not local and not name.startswith("hf-hub:") and not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is known"
        raise ModelError(
            f"{name} alone is an architecture with random weights; give --pretrained a tag ({tags}) or a "
            f".safetensors or .pt file"
        )
    return backbone


def _explain(source: BackboneSource, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    known_tag = source.pretrained in open_clip.list_pretrained_tags_by_model(source.model)
    if known_tag:
        return (
            f"the weights {source.pretrained!r} of {source.model} could not be fetched ({reason}). Either give a local "
            f"file, --pretrained path/to/weights.safetensors (or a .pt state dict), or use the bundled model, "
            f"--model examples/emoji/base"
        )
    return f"{source.model} with weights {source.pretrained!r} could not be loaded: {reason}"


def _require_supported(clip: nn.Module) -> None:
    """Refuse what the hooks above do not fit."""
    text: Any = clip.text if hasattr(clip, "text") else clip
    visual: Any = getattr(clip, "visual", None)
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    fits = (
        type(clip).__name__ in {"CLIP", "CustomTextCLIP"}
        and isinstance(visual, VisionTransformer)
        and getattr(visual, "attn_pool", None) is None
        and getattr(clip, "logit_bias", None) is None
        and all(
            hasattr(text, a)
            for a in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
        )
        and pool == "argmax"
        and getattr(text, "attn_mask", None) is not None
    )
    if not fits:
        towers = f"{type(clip).__name__} with a {type(visual).__name__} image tower"
        raise ModelError(
            f"{towers} is not supported (SigLIP, CoCa, ResNet and ConvNeXt are not); supported: {SUPPORTED}"
        )
