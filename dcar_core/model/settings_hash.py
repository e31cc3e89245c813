"""Settings beside the weights that decide on vectors, as bytes for the content hash.

- The classic family (open_clip's CLIP with a native ViT, causal text and byte pairs) leaves out the values of OpenAI's
  models, so that its older fingerprints stay.
- Every other family states all settings that differ from open_clip's defaults.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

# sha256 over the pieces and merges of CLIP's own byte pairs.
CLIP_VOCABULARY = "2032b714fb138f45adf7920b7426c2108eb64b409f4a42a20fdaa403fd461e5a"
_OPENAI: dict[str, Any] = {
    "tokenizer": "SimpleTokenizer",
    "vocabulary": CLIP_VOCABULARY,
    "clean": "_clean_lower",
    "reduction": None,
    "pool": "tok",
    "norm_after_pool": False,
    "eps": [1e-5],
    "gelu": [],
}
_OF_TRANSFORMERS = (
    "activation_function", "dense_act_fn", "encoder_attention_heads", "feed_forward_proj", "hidden_act",
    "layer_norm_eps", "layer_norm_epsilon", "max_position_embeddings", "model_type", "num_attention_heads",
    "num_heads", "pad_token_id", "relative_attention_max_distance", "relative_attention_num_buckets",
    "scale_embedding",
)  # fmt: skip


def vector_settings(clip: Any, settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bytes:
    """The settings of a model. settings: of its towers, as far as they differ from open_clip's defaults."""
    if _is_classic(clip, tokenizer):
        return _classic_family(clip, tokenizer)
    return _other_family(clip, settings, tokenizer)


def _is_classic(clip: Any, tokenizer: Mapping[str, Any]) -> bool:
    """Return True for open_clip's CLIP with a native ViT, causal text and byte pairs."""
    text, visual = getattr(clip, "text", clip), clip.visual
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    return (
        type(clip).__name__ in {"CLIP", "CustomTextCLIP"}
        and type(visual).__name__ == "VisionTransformer"
        and visual.attn_pool is None
        and getattr(clip, "logit_bias", None) is None
        and pool == "argmax"
        and getattr(text, "attn_mask", None) is not None
        and tokenizer["tokenizer"] == "SimpleTokenizer"
    )


def _classic_family(clip: Any, tokenizer: Mapping[str, Any]) -> bytes:
    text, modules = getattr(clip, "text", clip), list(clip.modules())
    heads = [int(block.attn.num_heads) for block in [*text.transformer.resblocks, *clip.visual.transformer.resblocks]]
    described = {
        **tokenizer,
        "pool": clip.visual.pool_type,
        "norm_after_pool": clip.visual.final_ln_after_pool,
        "eps": _common_value([module.eps for module in modules if isinstance(module, nn.LayerNorm)]),
        "gelu": _common_value([module.approximate for module in modules if isinstance(module, nn.GELU)], usual="none"),
    }
    unusual = {name: value for name, value in described.items() if value != _OPENAI[name]}
    return f"quick_gelu={_is_quick(clip)} heads={heads}".encode() + (_as_bytes(unusual) if unusual else b"")


def _other_family(clip: Any, settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bytes:
    described: dict[str, Any] = {
        "class": type(clip).__name__,
        "quick_gelu": _is_quick(clip),
        "settings": settings,
        "tokenizer": tokenizer,
    }
    config = getattr(getattr(clip, "text", None), "config", None)
    if config is not None:
        described["transformers"] = {name: getattr(config, name, None) for name in _OF_TRANSFORMERS}
        if getattr(config, "is_decoder", False):  # causal attention
            described["is_decoder"] = True
    return _as_bytes(described)


def _common_value(values: list[Any], usual: Any = None) -> list[Any]:
    """Return the one value of all modules, [] if it is the usual one, or the value of each if they differ."""
    kinds = set(values)
    return values if len(kinds) > 1 else sorted(kinds - {usual})


def _is_quick(clip: Any) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in clip.modules())


def _as_bytes(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode()
