"""CLIP's own family, read without PyTorch and open_clip: configuration, tokenizer and
weights.

- A model belongs to it if its configuration sets sizes and little else, and its weights
  have the names and shapes of open_clip's `CLIP` on two transformers. Any other is left
  to `backbone`, which loads both to the same content hash.
- Weights are mapped from their file: memory holds the pages that are read.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.model.config import MODEL_CONFIG, BackboneSource
from dcar_core.model.preprocess import Preprocess
from dcar_core.model.tokenizer import (
    NORMALIZERS,
    TextLayout,
    TextTokenizer,
    load_tokenizer,
)
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import HubUnavailableError, ModelError
from dcar_core.util.hub import HUB, fetch
from dcar_core.util.machine import WEIGHTS_FILE, is_installed

Tensors = dict[str, NDArray[Any]]

# What a configuration may set of a tower, and open_clip's defaults.
_TOWERS: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "image_size": 224,
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "mlp_ratio": 4.0,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "mlp_ratio": 4.0,
    },
}
_MODEL = {"embed_dim", "quick_gelu", "init_logit_scale", *_TOWERS}
_PREPROCESS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "mode": "RGB",
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
# Repositories of recommended models, by their names and tags, with open_clip's
# configuration beside the weights.
_REPOSITORIES = {
    ("ViT-B-32", "laion2b_s34b_b79k"): "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ("ViT-B-32-quickgelu", "openai"): "timm/vit_base_patch32_clip_224.openai",
    ("ViT-L-14", "datacomp_xl_s13b_b90k"): "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
}
_TYPES = {"F32": np.float32, "F16": np.float16}
# Of the configuration of a text encoder of transformers: what decides on vectors.
OF_TRANSFORMERS = (
    "activation_function",
    "dense_act_fn",
    "encoder_attention_heads",
    "feed_forward_proj",
    "hidden_act",
    "is_decoder",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_heads",
    "pad_token_id",
    "relative_attention_max_distance",
    "relative_attention_num_buckets",
    "scale_embedding",
)


@dataclass(frozen=True, eq=False)
class ClipFiles:
    """A model of the family.

    vision, text: sizes by their names in the configuration. quick_gelu: the activation
    of both towers. weights: by open_clip's names. files: of a model directory with the
    same content.
    """

    source: BackboneSource
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    quick_gelu: bool
    preprocess: Preprocess
    tokenizer: TextTokenizer
    weights: Tensors
    settings: bytes
    files: tuple[Path, ...]

    @property
    def layout(self) -> TextLayout:
        return self.tokenizer.layout

    @property
    def embed_dim(self) -> int:
        """E"""
        return int(self.weights["text_projection"].shape[1])

    @property
    def scale(self) -> float:
        """1 / tau"""
        return float(np.exp(self.weights["logit_scale"], dtype=np.float32).squeeze())

    @property
    def patch_grid(self) -> int:
        """Patches per side."""
        return int(self.preprocess.size // self.vision["patch_size"])

    def text_tokenizer(self, prompt_tokens: int) -> TextTokenizer:
        """As `Backbone.text_tokenizer`."""
        return replace(self.tokenizer, limit=self.layout.context_length - prompt_tokens)

    def embeddings(self, start: int, stop: int) -> Floats:
        """Embeddings of tokens [start, stop): (n, W_t)."""
        return np.asarray(
            self.weights["token_embedding.weight"][start:stop], np.float32
        )

    def content_hash(self) -> str:
        """As `Backbone.content_hash`, which holds every weight in float32."""
        return content_hash(self.preprocess, self.settings, self.weights.items())


def content_hash(
    preprocess: Preprocess,
    settings: bytes,
    weights: Iterable[tuple[str, NDArray[Any]]],
) -> str:
    """Return sha256 over every weight and whatever else decides on vectors, as 64 hex
    digits.
    """
    digest = hashlib.sha256(json.dumps(asdict(preprocess), sort_keys=True).encode())
    digest.update(settings)
    for name, value in sorted(weights, key=lambda row: row[0]):
        values = np.ascontiguousarray(
            value, np.float32 if value.dtype == np.float16 else None
        )
        digest.update(f"{name} torch.{values.dtype} {value.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()


def describe_settings(
    kind: str,
    quick_gelu: bool,
    settings: Mapping[str, Any],
    tokenizer: str,
    transformers: Any = None,
) -> bytes:
    """Return what decides on vectors beside weights and preprocessing, as bytes for the
    content hash.

    Args:
        kind: the class of the model.
        settings: of each tower, without open_clip's defaults.
        tokenizer: its identity.
        transformers: the configuration of a text encoder of that library.
    """
    described = {
        "class": kind,
        "quick_gelu": quick_gelu,
        "settings": settings,
        "tokenizer": tokenizer,
        "transformers": {
            name: getattr(transformers, name, None) for name in OF_TRANSFORMERS
        },
    }
    return json.dumps(described, sort_keys=True).encode()


def read_clip_files(source: BackboneSource) -> ClipFiles | None:
    """Read a model of the family from a directory or the hub; None for any other model.

    Raises:
        ModelError: its files cannot be fetched or read.
    """
    repository = _REPOSITORIES.get((source.model, source.pretrained or ""))
    has_own_weights = source.directory is not None or source.model.startswith(HUB)
    if source.model.startswith(HUB):
        repository = source.model.removeprefix(HUB)
    if has_own_weights is bool(source.pretrained) or not (
        source.directory or repository
    ):
        return None
    try:
        return _read(source, source.directory, repository or "")
    except HubUnavailableError:
        if has_own_weights or not is_installed("open_clip"):
            raise
        # open_clip has the configuration, and perhaps the weights are cached
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source.model} cannot be read: {error}") from error


def _read(
    source: BackboneSource,
    directory: Path | None,
    repository: str,
) -> ClipFiles | None:
    def find(name: str) -> Path | None:
        file = directory / name if directory is not None else fetch(repository, name)
        return file if file is not None and file.is_file() else None

    if (config_file := find(MODEL_CONFIG)) is None:
        return None
    content = json.loads(config_file.read_text(encoding="utf-8"))
    model = content["model_cfg"]
    preprocess = content.get("preprocess_cfg", {})
    vision, text = ({**defaults, **model[part]} for part, defaults in _TOWERS.items())
    settings = text.pop("tokenizer_kwargs", None) or {}
    if not (
        model.keys() <= _MODEL
        and preprocess.keys() <= {*_PREPROCESS, "size"}
        and _has_plain_sizes(vision, text)
    ):
        return None
    vocabulary = settings.get("bpe_path")
    is_own = vocabulary is None or (
        directory is not None and Path(vocabulary).name == vocabulary
    )
    if not (
        is_own
        and settings.keys() <= {"clean", "bpe_path"}
        and settings.get("clean", "lower") in NORMALIZERS
    ):
        return None
    if (weights_file := find(WEIGHTS_FILE)) is None:
        return None
    weights = map_tensors(weights_file)
    if vision["layers"] + text["layers"] < len(weights):
        shapes = _shapes(model["embed_dim"], vision, text)
    else:
        shapes = {}
    if {name: value.shape for name, value in weights.items()} != shapes:
        return None
    tokenizer, identity = load_tokenizer(model, directory)
    chosen = {
        part: {
            name: value for name, value in sizes.items() if value != _TOWERS[part][name]
        }
        for part, sizes in (("vision_cfg", vision), ("text_cfg", text))
    }
    own = {name: value for name, value in preprocess.items() if value is not None}
    quick_gelu = bool(model.get("quick_gelu"))
    return ClipFiles(
        source,
        vision,
        text,
        quick_gelu,
        Preprocess.from_open_clip(_PREPROCESS | own | {"size": vision["image_size"]}),
        tokenizer,
        weights,
        describe_settings("CLIP", quick_gelu, chosen, identity),
        (
            config_file,
            weights_file,
            *([directory / vocabulary] if directory and vocabulary else []),
        ),
    )


def _has_plain_sizes(vision: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Return whether the settings of both towers are sizes, which the shapes of the
    weights confirm.
    """
    for part, sizes in (("vision_cfg", vision), ("text_cfg", text)):
        kinds = {
            name: int | float if name == "mlp_ratio" else int for name in _TOWERS[part]
        }
        if sizes.keys() != kinds.keys() or not all(
            isinstance(sizes[name], kinds[name]) for name in kinds
        ):
            return False
        if min(sizes.values()) <= 0:
            return False
    return vision["width"] % vision["head_width"] == 0 == text["width"] % text["heads"]  # type: ignore[no-any-return]


def _shapes(
    width: int,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by its name. width: E."""
    v = vision["width"]
    t = text["width"]
    patch = vision["patch_size"]
    norms = {"ln_final": t, "visual.ln_pre": v, "visual.ln_post": v}
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "token_embedding.weight": (text["vocab_size"], t),
        "text_projection": (t, width),
        "positional_embedding": (text["context_length"], t),
        "visual.class_embedding": (v,),
        "visual.proj": (v, width),
        "visual.conv1.weight": (v, 3, patch, patch),
        "visual.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, v),
    }
    for prefix, part, w in (("", text, t), ("visual.", vision, v)):
        inner = int(w * part["mlp_ratio"])
        for i in range(part["layers"]):
            name = f"{prefix}transformer.resblocks.{i}"
            shapes |= {
                f"{name}.attn.in_proj_weight": (3 * w, w),
                f"{name}.attn.in_proj_bias": (3 * w,),
            }
            for layer, out, into in (
                ("attn.out_proj", w, w),
                ("mlp.c_fc", inner, w),
                ("mlp.c_proj", w, inner),
            ):
                shapes |= {
                    f"{name}.{layer}.weight": (out, into),
                    f"{name}.{layer}.bias": (out,),
                }
            norms |= {f"{name}.ln_1": w, f"{name}.ln_2": w}
    return shapes | {
        f"{name}.{part}": (w,)
        for name, w in norms.items()
        for part in ("weight", "bias")
    }


def map_tensors(file: Path) -> Tensors:
    """Map the tensors of a safetensors file, which is not read yet. Raise ValueError or
    KeyError if it is broken.
    """
    # OpenVINO takes writable memory; nothing writes
    content = np.memmap(file, np.uint8, "c")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = Tensors()
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        tensors[name] = (
            np.asarray(content[first:last])
            .view(_TYPES[entry["dtype"]])
            .reshape(entry["shape"])
        )
    return tensors
