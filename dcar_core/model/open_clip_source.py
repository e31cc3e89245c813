"""Models from open_clip: a built-in name, a directory or an `hf-hub:` repository. The only importer of open_clip.

- A configuration may set only the fields that `_faults` lists, wherever it comes from: it can name no code, no
  file outside its directory, and no setting that makes a library fetch or run something else.
- Weights must be present and fit exactly; random weights must be requested. open_clip would resize tables of positions:
  that is left to published weights, which are named by a tag or a repository.
- Every failure is one `ModelError` that says what to do.
"""

import difflib
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.utils import to_2tuple
from torch import nn

from dcar_core.model.config import MODEL_CONFIG, RANDOM, BackboneSource
from dcar_core.model.hub import cache_only, fetch
from dcar_core.model.text.cleaning import NORMALIZERS
from dcar_core.model.text.tokenizer import (
    TextTokenizer,
    clip_vocabulary,
    load_byte_pairs,
    load_hub_tokenizer,
    read_vocabulary,
)
from dcar_core.util.errors import DcarError, MissingExtraError, ModelError, is_panic
from dcar_core.util.machine import WEIGHTS_FILE, map_weights, read_shapes

HUB = "hf-hub:"

_MODEL_FIELDS = {
    "embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text", "init_logit_scale",
    "init_logit_bias", "nonscalar_logit_scale",
}  # fmt: skip
_PREPROCESS_FIELDS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
_TOKENIZER_FIELDS = {"clean", "strip_sep_token", "bpe_path"}
# Of the configuration of a text encoder of transformers.
_OF_TRANSFORMERS = (
    "activation_function", "dense_act_fn", "encoder_attention_heads", "feed_forward_proj", "hidden_act", "is_decoder",
    "layer_norm_eps", "layer_norm_epsilon", "max_position_embeddings", "model_type", "num_attention_heads",
    "num_heads", "pad_token_id", "relative_attention_max_distance", "relative_attention_num_buckets",
    "scale_embedding",
)  # fmt: skip
# Of training alone, or identified by content rather than by name.
_WITHOUT_EFFECT = {
    "patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "hf_model_pretrained", "hf_model_name",
    "hf_tokenizer_name", "tokenizer_kwargs", "output_tokens",
}  # fmt: skip
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LARGEST = 1 << 20  # of any number in a configuration; real ones stay below 300,000


def builtin_models() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Return the configuration and the pretrained tags of every built-in model, by name."""
    return {
        name: (open_clip.get_model_config(name), open_clip.list_pretrained_tags_by_model(name))
        for name in open_clip.list_models()
    }


def load_open_clip(source: BackboneSource, device: str) -> tuple[nn.Module, TextTokenizer, int, bytes]:
    """Load a model and its tokenizer; errors as of `backbone.load_backbone`.

    Returns:
        The model in eval mode, its tokenizer, E, and what else decides on vectors: `vector_settings`.
    """
    _require_known(source)
    try:
        config = read_config(source)
        tokenizer, identity = load_tokenizer(config, source.directory)
        _require_positions(source, config)
        _fetch_weights(source, config)
        clip = _create(source, config, device).eval()
        _require_finite(source, clip)
    except DcarError:
        raise
    except BaseException as error:  # open_clip, torch, safetensors, timm and the hub client each raise their own
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise _explained(source, error) from error
    if device == "cpu":
        map_weights(clip, source.weights_file)
    return clip, tokenizer, int(config["embed_dim"]), vector_settings(clip, config, identity)


def read_config(source: BackboneSource) -> dict[str, Any]:
    """Read and check a model's `model_cfg`."""
    content, directory = {}, source.directory
    file = directory / MODEL_CONFIG if directory else None
    if source.model.startswith(HUB) and (file := fetch(source.model.removeprefix(HUB), MODEL_CONFIG)) is None:
        raise ModelError(f"{source.model} has no {MODEL_CONFIG}; name a model in open_clip's form")
    if file is not None:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
            raise ModelError(f"{file} has no model_cfg; copy the file from the model's source")
    config = content["model_cfg"] if content else open_clip.get_model_config(source.model)
    for fault in _faults(config, content.get("preprocess_cfg", {}), directory):
        raise ModelError(f"the configuration of {source.model} {fault}")
    text = config["text_cfg"]
    if directory is not None and (name := text.get("hf_model_name")) and (directory / name / "config.json").is_file():
        text["hf_model_name"] = str(directory / name)
    return dict(config)


def load_tokenizer(config: Mapping[str, Any], directory: Path | None) -> tuple[TextTokenizer, str]:
    """Load the tokenizer of a checked configuration, with its identity for the content hash."""
    text = config["text_cfg"]
    settings = text.get("tokenizer_kwargs") or {}
    limit = int(text.get("context_length", 77))
    if name := text.get("hf_tokenizer_name"):
        normalizer = settings.get("clean", "whitespace")
        strip_end = bool(settings.get("strip_sep_token"))
        tokenizer = load_hub_tokenizer(name, directory, limit, normalizer=normalizer, strip_end=strip_end)
        return tokenizer, tokenizer.identity()
    normalizer, own = settings.get("clean", "lower"), settings.get("bpe_path")
    file = directory / own if own and directory is not None else clip_vocabulary()
    tokenizer = load_byte_pairs(file) if own else TextTokenizer.for_clip()
    identity = f"{hashlib.sha256(read_vocabulary(file).encode()).hexdigest()} {normalizer}"
    return replace(tokenizer, limit=limit, normalizer=normalizer), identity


def vector_settings(clip: Any, config: Mapping[str, Any], tokenizer: str) -> bytes:
    """What decides on vectors beside weights and preprocessing, as bytes for the content hash.

    Args:
        clip: the model. config: its `model_cfg`; settings that equal open_clip's defaults are left out.
        tokenizer: its identity.
    """
    usual = {
        part: {field.name: field.default for field in fields(kind)}
        for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg))
    }
    encoder = getattr(getattr(clip, "text", None), "config", None)
    described = {
        "class": type(clip).__name__,
        "quick_gelu": any(type(module).__name__ == "QuickGELU" for module in clip.modules()),
        "settings": {
            part: {key: v for key, v in config[part].items() if key not in _WITHOUT_EFFECT and v != values[key]}
            for part, values in usual.items()
        },
        "tokenizer": tokenizer,
        "transformers": {name: getattr(encoder, name, None) for name in _OF_TRANSFORMERS},
    }
    return json.dumps(described, sort_keys=True).encode()


def _require_known(source: BackboneSource) -> None:
    name, pretrained, directory = source.model, source.pretrained, source.directory
    is_builtin = directory is None and not name.startswith(HUB)
    if directory is not None and not (directory / MODEL_CONFIG).is_file():
        raise ModelError(f"{directory} is not a model directory: it has no {MODEL_CONFIG}")
    if is_builtin and (Path(name).is_absolute() or name.startswith(".")):
        raise ModelError(f"there is no model directory {name}: restore it, or give its new path")
    if is_builtin and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 3, 0.5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ModelError(f"no model is named {name!r}{hint}; `dcar models` lists them, or give a model's directory")
    if pretrained and pretrained != RANDOM and not is_builtin:
        raise ModelError(f"{name} has weights of its own; leave out --pretrained {pretrained}")
    if pretrained and Path(pretrained).suffix in {".pkl", ".pickle"}:
        raise ModelError(f"{pretrained} is a pickle, which can run code; use .safetensors or a .pt state dict")
    if is_builtin and not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is known"
        raise ModelError(
            f"{name} alone is an architecture with random weights; give --pretrained a tag ({tags}) or a "
            f".safetensors or .pt file"
        )


def _require_positions(source: BackboneSource, config: Mapping[str, Any]) -> None:
    """Require tables of positions of the configured lengths and widths in local weights."""
    file = source.weights_file
    if file.suffix not in {".safetensors", ".pt", ".pth", ".bin"} or not file.is_file():
        return
    text, vision = CLIPTextCfg(**config["text_cfg"]), CLIPVisionCfg(**config["vision_cfg"])
    wanted = {"positional_embedding": (text.context_length + text.embed_cls, text.width)}
    wanted["text.positional_embedding"] = wanted["positional_embedding"]
    if isinstance(vision.layers, int):  # a list: ResNet
        height, width = (side // vision.patch_size for side in to_2tuple(vision.image_size))
        wanted["visual.positional_embedding"] = (1 + height * width, vision.width)
    for name, shape in read_shapes(file).items():
        if shape != wanted.get(name, shape):
            sizes = (" x ".join(map(str, each)) for each in (shape, wanted[name]))
            raise _of_another_architecture(source, " ({} is {}, not {})".format(name, *sizes))


def _of_another_architecture(source: BackboneSource, detail: str = "") -> ModelError:
    return ModelError(
        f"the weights of {source.pretrained or source.model} are of another architecture than {source.model}{detail}; "
        f"name the model that they belong to"
    )


def _fetch_weights(source: BackboneSource, config: Mapping[str, Any]) -> None:
    """Bring the files that open_clip will ask the hub for into its cache."""
    place = source.model.removeprefix(HUB) + "/" if source.model.startswith(HUB) else ""
    if source.pretrained and source.pretrained != RANDOM:
        known = open_clip.get_pretrained_cfg(source.model, source.pretrained)
        place = known.get("hf_hub", "") if known else ""
    repository, _, name = place.rpartition("/")
    if repository and fetch(repository, WEIGHTS_FILE, name or "open_clip_pytorch_model.bin") is None:
        raise ModelError(f"{repository} has no weights in open_clip's form; name another model")
    if (encoder := config["text_cfg"].get("hf_model_name")) and source.directory is None:
        fetch(encoder, "config.json")


def _create(source: BackboneSource, config: Mapping[str, Any], device: str) -> nn.Module:
    """Create the model from the checked configuration, even if its source has changed since."""
    is_random = source.pretrained == RANDOM
    towers = {name: dict(config[name]) for name in ("vision_cfg", "text_cfg", "multimodal_cfg") if name in config}
    if "timm_model_name" in towers["vision_cfg"]:
        towers["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in towers["text_cfg"]:
        towers["text_cfg"]["hf_model_pretrained"] = False
    with cache_only(), _errors_raised_only(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*QuickGELU mismatch.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return open_clip.create_model(  # type: ignore[no-any-return]
            f"local-dir:{source.directory}" if source.directory else source.model,
            pretrained=None if is_random else source.pretrained or None,
            load_weights=not is_random,
            require_pretrained=not is_random,
            device=device,
            weights_only=True,
            **towers,
        )


@contextmanager
def _errors_raised_only() -> Iterator[None]:
    """Drop what open_clip logs as an error: it goes to the root logger, and the exception says the same."""

    def is_no_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logging.getLogger().addFilter(is_no_error)  # records of other loggers do not pass it
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_no_error)


def _require_finite(source: BackboneSource, clip: nn.Module) -> None:
    for name, weight in clip.named_parameters():
        if not weight.detach().sum(dtype=torch.float32).isfinite():  # without a copy of the weight
            place = source.weights_file if source.weights_file.is_file() else source.model
            raise ModelError(f"the weights of {place} are not finite, in {name}; copy them again, or train again")


def _explained(source: BackboneSource, error: BaseException) -> ModelError | MissingExtraError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "install transformers" in reason:
        return MissingExtraError(f"the text tower of {source.model}", "hf")
    if "Error(s) in loading state_dict" in reason or "state_dict" in reason:
        return _of_another_architecture(source)
    return ModelError(f"{source.model} with weights {source.pretrained!r} could not be loaded: {reason}")


def _faults(config: Any, preprocess: Any, directory: Path | None) -> Iterator[str]:
    """Yield what a configuration may not have, as the end of a sentence."""
    if not isinstance(config, dict) or not all(isinstance(config.get(t), dict) for t in ("vision_cfg", "text_cfg")):
        yield "has no vision_cfg and text_cfg; copy it from the model's source"
    text, vision = config["text_cfg"], config["vision_cfg"]
    settings = text.get("tokenizer_kwargs") or {}
    yield from _faults_of("preprocess_cfg", preprocess, dict.fromkeys(_PREPROCESS_FIELDS))
    yield from _faults_of("model_cfg", config, dict.fromkeys(_MODEL_FIELDS))
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg), ("multimodal_cfg", MultimodalCfg)):
        yield from _faults_of(part, config.get(part, {}), {field.name: field.default for field in fields(kind)})
    yield from _faults_of("tokenizer_kwargs", settings, dict.fromkeys(_TOKENIZER_FIELDS))
    if type(width := config.get("embed_dim")) is not int or width < 1:
        yield f"has embed_dim {width!r:.80}; it must be a whole number above 0"
    if settings.get("clean", "lower") not in NORMALIZERS:
        yield f"sets clean {settings['clean']!r}; known are {list(NORMALIZERS)}"
    if text.get("tokenizer_mode"):
        yield "sets tokenizer_mode, which is not supported"
    for part, key, slashes in (
        (text, "hf_tokenizer_name", 1),
        (text, "hf_model_name", 1),
        (vision, "timm_model_name", 0),
    ):
        value = part.get(key)
        if value and not (isinstance(value, str) and _HUB_NAME.fullmatch(value) and value.count("/") <= slashes):
            yield f"has {key} {value!r}, which is not the name of a model"
    path = settings.get("bpe_path")
    if path is not None and (directory is None or Path(path).name != path):
        yield f"has bpe_path {path!r}; it must be a file in the model directory"


def _faults_of(part: str, values: Any, usual: Mapping[str, Any]) -> Iterator[str]:
    """Yield faults of one part. usual: the allowed fields with their defaults."""
    if not isinstance(values, dict):
        yield f"has a {part} that is not an object"
    if unknown := sorted(values.keys() - usual.keys()):
        yield f"sets {', '.join(unknown)} in {part}, which a model may not set; remove it"
    for key, value in values.items():
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
        if not all(-_LARGEST < number < _LARGEST for number in numbers):
            yield f"has {key} {value!r:.80} in {part}, which is too large"
        kind, is_list = type(usual[key]), isinstance(value, list | tuple) and key in {"layers", "image_size"}
        if value is not None and kind in {int, str} and type(value) is not kind and not is_list:
            yield f"has {key} {value!r:.80} in {part}; it must be of the type {kind.__name__}"
