"""Every setting of an open_clip configuration changed, one at a time, to values that other configurations have."""

import copy
import json
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from dcar_core.model.open_clip_source import builtin_models

PARTS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
_MOST = 2  # values of a setting that are tried
# Of training alone, or names of what is identified by its content.
WITHOUT_EFFECT = {"patch_dropout", "timm_drop", "timm_drop_path", "output_tokens", "hf_tokenizer_name"}
# They fetch weights, name a folder, or are refused.
_NOT_TRIED = {"timm_model_pretrained", "hf_model_pretrained", "hf_model_name", "tokenizer_mode"}


def changed_settings(config: dict[str, Any], part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of a setting of a tower, and the configuration with another value of it."""
    yield "quick_gelu", config | {"quick_gelu": not config.get("quick_gelu", False)}
    for field in fields(PARTS[part]):
        if field.name not in _NOT_TRIED and _is_read(field.name, config[part]):
            for value in _other_values(part, field.name, config[part].get(field.name, field.default)):
                changed = copy.deepcopy(config)
                changed[part][field.name] = value
                yield field.name, changed


def _is_read(key: str, values: dict[str, Any]) -> bool:
    """Return False for settings of another kind of tower."""
    if "timm_model_name" in values:
        return key.startswith("timm_")
    if "hf_model_name" in values:
        return key.startswith(("hf_", "tokenizer_")) or key == "context_length"
    return not key.startswith(("timm_", "hf_p"))


def _other_values(part: str, key: str, value: Any) -> list[Any]:
    if key == "hf_tokenizer_name":
        return ["another/mirror"] if value else []
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [2 * value or (1 if isinstance(value, int) else 0.1)]
    now, used = json.dumps(value), _used_values(part, key)
    later = [each for each in used if each > now] + [each for each in used if each < now]
    return [json.loads(each) for each in later[:_MOST]]


@cache
def _used_values(part: str, key: str) -> list[str]:
    """Return all values of a setting in built-in configurations, as JSON."""
    default = next(field.default for field in fields(PARTS[part]) if field.name == key)
    return sorted({json.dumps(config[part].get(key, default)) for config, _ in builtin_models().values()})
