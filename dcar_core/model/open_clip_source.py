"""Models from open_clip: a built-in name, a directory or an `hf-hub:` repository. The
only importer of open_clip.

- A configuration may set only the fields that `_faults` lists, wherever it comes from:
  it can name no code, no file outside its directory, and no setting that makes a
  library fetch or run something else.
- Weights must be present and fit exactly; random weights must be requested. open_clip
  would resize tables of positions: that is left to published weights, which are named
  by a tag or a repository.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import nn

from dcar_core.model.clip_files import describe_settings
from dcar_core.model.config import MODEL_CONFIG, RANDOM, BackboneSource
from dcar_core.model.tokenizer import NORMALIZERS, TextTokenizer, load_tokenizer
from dcar_core.util.errors import DcarError, MissingExtraError, ModelError
from dcar_core.util.hub import HUB, cache_only, fetch
from dcar_core.util.machine import WEIGHTS_FILE, map_weights, read_shapes

_MODEL_FIELDS = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "multimodal_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
}
_PREPROCESS_FIELDS = {
    "size",
    "mode",
    "mean",
    "std",
    "interpolation",
    "resize_mode",
    "fill_color",
}
_TOKENIZER_FIELDS = {"clean", "strip_sep_token", "bpe_path"}
# Of training alone, or identified by content rather than by name.
_WITHOUT_EFFECT = {
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "hf_model_pretrained",
    "hf_model_name",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "output_tokens",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def builtin_models() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Return the configuration and the pretrained tags of every built-in model, by
    name.
    """
    return {
        name: (
            open_clip.get_model_config(name),
            open_clip.list_pretrained_tags_by_model(name),
        )
        for name in open_clip.list_models()
    }


def load_open_clip(
    source: BackboneSource, device: str
) -> tuple[nn.Module, TextTokenizer, int, bytes]:
    """Load a model and its tokenizer; errors as of `backbone.load_backbone`.

    Returns:
        The model in eval mode, its tokenizer, E, and what else decides on vectors:
        `vector_settings`.
    """
    _require_known(source)
    try:
        config = read_config(source)
        tokenizer, identity = load_tokenizer(config, source.directory)
        _fetch_weights(source, config)
        clip = _create(source, config, device).eval()
        _require_positions(source, clip)
    except DcarError:
        raise
    except Exception as error:
        # open_clip, torch, safetensors, timm and the hub client each raise their own
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        if "install transformers" in reason:
            raise MissingExtraError(
                f"the text tower of {source.model}", "hf"
            ) from error
        raise ModelError(
            f"{source.model} with weights {source.pretrained!r} could not be loaded:"
            f" {reason}"
        ) from error
    if device == "cpu":
        map_weights(clip, source.weights_file)
    return (
        clip,
        tokenizer,
        int(config["embed_dim"]),
        vector_settings(clip, config, identity),
    )


def read_config(source: BackboneSource) -> dict[str, Any]:
    """Read and check a model's `model_cfg`."""
    content = {}
    directory = source.directory
    file = directory / MODEL_CONFIG if directory else None
    if (
        source.model.startswith(HUB)
        and (file := fetch(source.model.removeprefix(HUB), MODEL_CONFIG)) is None
    ):
        raise ModelError(
            f"{source.model} has no {MODEL_CONFIG}; name a model in open_clip's form"
        )
    if file is not None:
        content = json.loads(file.read_text(encoding="utf-8"))
    if file is not None:
        config = content["model_cfg"]
    else:
        config = open_clip.get_model_config(source.model)
    for fault in _faults(config, content.get("preprocess_cfg", {}), directory):
        raise ModelError(f"the configuration of {source.model} {fault}")
    return dict(config)


def vector_settings(clip: Any, config: Mapping[str, Any], tokenizer: str) -> bytes:
    """What decides on vectors beside weights and preprocessing, as bytes for the
    content hash.

    Settings that equal open_clip's defaults are left out. tokenizer: its identity.
    """
    usual = {
        part: {field.name: field.default for field in fields(kind)}
        for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg))
    }
    settings = {
        part: {
            key: v
            for key, v in config[part].items()
            if key not in _WITHOUT_EFFECT and v != values[key]
        }
        for part, values in usual.items()
    }
    is_quick = any(type(module).__name__ == "QuickGELU" for module in clip.modules())
    encoder = getattr(getattr(clip, "text", None), "config", None)
    return describe_settings(
        type(clip).__name__,
        is_quick,
        settings,
        tokenizer,
        encoder,
    )


def _require_known(source: BackboneSource) -> None:
    name = source.model
    pretrained = source.pretrained
    directory = source.directory
    if directory is not None and not (directory / MODEL_CONFIG).is_file():
        raise ModelError(
            f"{directory} is not a model directory: it has no {MODEL_CONFIG}"
        )
    if directory is not None or name.startswith(HUB):
        if pretrained and pretrained != RANDOM:
            raise ModelError(
                f"{name} has weights of its own; leave out --pretrained {pretrained}"
            )
        return
    if name not in open_clip.list_models():
        raise ModelError(
            f"there is no model {name!r}, built in or as a directory; `dcar models`"
            " lists the names"
        )
    if not pretrained:
        tags = (
            ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is known"
        )
        raise ModelError(
            f"{name} alone is an architecture with random weights; give --pretrained a"
            f" tag ({tags}) or a .safetensors or .pt file"
        )


def _require_positions(source: BackboneSource, clip: nn.Module) -> None:
    """Refuse local weights whose tables of positions open_clip has resized."""
    if not source.weights_file.is_file():
        return
    loaded = clip.state_dict()
    for name, shape in read_shapes(source.weights_file).items():
        if (
            name.endswith("positional_embedding")
            and name in loaded
            and shape != loaded[name].shape
        ):
            raise ModelError(
                f"the weights of {source.weights_file} do not fit {source.model}:"
                f" {name} is {shape}"
            )


def _fetch_weights(source: BackboneSource, config: Mapping[str, Any]) -> None:
    """Bring the files that open_clip will ask the hub for into its cache."""
    path = source.model.removeprefix(HUB) + "/" if source.model.startswith(HUB) else ""
    if source.pretrained and source.pretrained != RANDOM:
        known = open_clip.get_pretrained_cfg(source.model, source.pretrained)
        path = known.get("hf_hub", "") if known else ""
    repository, _, name = path.rpartition("/")
    if (
        repository
        and fetch(repository, WEIGHTS_FILE, name or "open_clip_pytorch_model.bin")
        is None
    ):
        raise ModelError(
            f"{repository} has no weights in open_clip's form; name another model"
        )
    if (
        encoder := config["text_cfg"].get("hf_model_name")
    ) and source.directory is None:
        fetch(encoder, "config.json")


def _create(
    source: BackboneSource,
    config: Mapping[str, Any],
    device: str,
) -> nn.Module:
    """Create the model from the checked configuration, even if its source has changed
    since.
    """
    is_random = source.pretrained == RANDOM
    directory = source.directory
    towers = {
        name: dict(config[name])
        for name in ("vision_cfg", "text_cfg", "multimodal_cfg")
        if name in config
    }
    if "timm_model_name" in towers["vision_cfg"]:
        towers["vision_cfg"]["timm_model_pretrained"] = False
    if encoder := towers["text_cfg"].get("hf_model_name"):
        towers["text_cfg"]["hf_model_pretrained"] = False
        if directory is not None and (directory / encoder / "config.json").is_file():
            towers["text_cfg"]["hf_model_name"] = str(directory / encoder)
    with cache_only(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*QuickGELU mismatch.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return open_clip.create_model(  # type: ignore[no-any-return]
            f"local-dir:{directory}" if directory else source.model,
            pretrained=None if is_random else source.pretrained or None,
            load_weights=not is_random,
            require_pretrained=not is_random,
            device=device,
            weights_only=True,  # a pickle could run code
            **towers,
        )


def _faults(config: Any, preprocess: Any, directory: Path | None) -> Iterator[str]:
    """Yield what a configuration may not have, as the end of a sentence."""
    text = config["text_cfg"]
    vision = config["vision_cfg"]
    settings = text.get("tokenizer_kwargs") or {}
    for part, values, allowed in (
        ("preprocess_cfg", preprocess, _PREPROCESS_FIELDS),
        ("model_cfg", config, _MODEL_FIELDS),
        ("vision_cfg", vision, {field.name for field in fields(CLIPVisionCfg)}),
        (
            "text_cfg",
            text,
            {field.name for field in fields(CLIPTextCfg)} - {"tokenizer_mode"},
        ),
        (
            "multimodal_cfg",
            config.get("multimodal_cfg", {}),
            {field.name for field in fields(MultimodalCfg)},
        ),
        ("tokenizer_kwargs", settings, _TOKENIZER_FIELDS),
    ):
        if unknown := sorted(values.keys() - allowed):
            yield (
                f"sets {', '.join(unknown)} in {part}, which a model may not set;"
                " remove it"
            )
    if settings.get("clean", "lower") not in NORMALIZERS:
        yield f"sets clean {settings['clean']!r}; known are {list(NORMALIZERS)}"
    for part, key, depth in (
        (text, "hf_tokenizer_name", 1),
        (text, "hf_model_name", 1),
        (vision, "timm_model_name", 0),
    ):
        value = part.get(key)
        if value and not (
            isinstance(value, str)
            and _HUB_NAME.fullmatch(value)
            and value.count("/") <= depth
        ):
            yield f"has {key} {value!r}, which is not the name of a model"
    path = settings.get("bpe_path")
    if path is not None and (directory is None or Path(path).name != path):
        yield f"has bpe_path {path!r}; it must be a file in the model directory"
