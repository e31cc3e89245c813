"""A checkpoint is a directory: `trainables.safetensors` (up to a few MB) and a readable
`config.json`.

The fingerprint is a hash over the backbone's content, the configuration and the
trainables. Everything made from a model's vectors (index, cached queries) carries it,
so a retrained model never meets old vectors.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dcar_core.model.clip_files import ClipFiles, read_clip_files
from dcar_core.model.config import MODEL_CONFIG, UNTOUCHED, BackboneSource, ModelConfig
from dcar_core.util.errors import CheckpointError, ModelError, requires_pytorch
from dcar_core.util.files import link_or_copy, parse_json, write_bytes, write_json

if TYPE_CHECKING:  # torch takes seconds, and reading a checkpoint does not need it
    from dcar_core.model.backbone import Backbone
    from dcar_core.model.dcar import DCAR

Trainables = dict[str, NDArray[np.float32]]

CONFIG = "config.json"
WEIGHTS = "trainables.safetensors"
# folder with what runs the model without PyTorch; see `encoder.encoder`
PORTABLE = "portable"
FORMAT = 1


def is_checkpoint(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def compute_fingerprint(
    backbone_hash: str,
    config: ModelConfig,
    trainables: Mapping[str, NDArray[np.float32]],
) -> str:
    """Return 64 hex digits that identify one mapping from images and queries to
    vectors.

    Settings that no vector depends on (the loss, pair weights) are left out.
    """
    reweight = config.reweight
    serving = [
        part.to_dict() for part in (config.prompt, config.adapter, config.rerank)
    ]
    described = [
        FORMAT,
        backbone_hash,
        [*serving, [reweight.query, reweight.low, reweight.high]],
    ]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(trainables):
        digest.update(f"{name} {trainables[name].shape}".encode())
        digest.update(np.ascontiguousarray(trainables[name], np.float32).tobytes())
    return digest.hexdigest()


def save_checkpoint(
    model: "DCAR",
    path: Path,
    *,
    training: dict[str, Any] | None = None,
) -> str:
    """Write trainables and config; return the fingerprint. A model's path is stored
    relative to the checkpoint.

    Changed weights of a backbone are merged into a model directory, `model-<hash>` in
    the checkpoint.
    """
    if model.changes is not None:
        from dcar_core.model.weight_changes import merge

        model = type(model)(
            merge(model.backbone, model.changes, path),
            model.served_config,
            encoders=model.encoders,
        )
    trainables = {
        name: p.detach().cpu().contiguous().numpy() for name, p in model.served()
    }
    return write_checkpoint(
        path,
        _describe(model.backbone, path),
        model.served_config,
        trainables,
        training or {},
    )


def write_checkpoint(
    path: Path,
    backbone: Mapping[str, Any],
    config: ModelConfig,
    trainables: Trainables,
    training: Mapping[str, Any],
) -> str:
    """Write trainables and config; return the fingerprint. backbone: as in
    `config.json`.
    """
    path.mkdir(parents=True, exist_ok=True)
    fingerprint = compute_fingerprint(backbone["sha256"], config, trainables)
    write_bytes(path / WEIGHTS, save(trainables, {"format": "pt"}))
    content = {"format": FORMAT, "fingerprint": fingerprint, "backbone": backbone}
    write_json(
        path / CONFIG, {**content, "model": config.to_dict(), "training": training}
    )
    return fingerprint


def read_config(path: Path) -> dict[str, Any]:
    """Read the checkpoint's config.json, or raise CheckpointError."""
    if not is_checkpoint(path):
        raise CheckpointError(
            f"{path} is not a checkpoint: it needs {CONFIG} and {WEIGHTS}, as `dcar"
            " train` and `dcar zero-shot` write"
        )
    try:
        content = parse_json((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG} is not JSON: {error}") from error
    match content:
        case {
            "format": 1,
            "fingerprint": str(),
            "model": dict(),
            "training": dict(),
            "backbone": {"model": str(), "sha256": str(), "pretrained": str() | None},
        }:
            return dict(content)
    raise CheckpointError(
        f"{path / CONFIG} is not complete, or not of format {FORMAT}; copy it again, or"
        " train again"
    )


def read_trainables(path: Path) -> Trainables:
    """Read the trained parameters, or raise CheckpointError."""
    try:
        return dict(load_file(str(path / WEIGHTS)))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_verified(
    path: Path,
    source: BackboneSource,
    backbone_hash: str,
) -> tuple[ModelConfig, Trainables, str]:
    """Read what was learned on a backbone, with its fingerprint. Raise CheckpointError
    unless all belong together.
    """
    content = read_config(path)
    trainables = read_trainables(path)
    if backbone_hash != content["backbone"]["sha256"]:
        raise CheckpointError(
            f"{path} was trained on another backbone than {source.model} is now, by its"
            " weights, tokenizer or preprocessing; train again on it, or point"
            " config.json to the right one"
        )
    try:
        config = ModelConfig.from_dict(content["model"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / CONFIG} does not fit this release: {error}; train again"
        ) from error
    if content["fingerprint"] != (
        fingerprint := compute_fingerprint(backbone_hash, config, trainables)
    ):
        raise CheckpointError(
            f"{path / WEIGHTS} and {CONFIG} are of different trainings; copy both, or"
            " train again"
        )
    return config, trainables, fingerprint


def load_checkpoint(
    path: Path,
    *,
    device: str = "cpu",
    backbone: "Backbone | None" = None,
) -> "tuple[DCAR, str]":
    """Load a model; return it with its fingerprint. Pass a loaded `backbone` to share
    it.

    Raises:
        CheckpointError: it is broken, or made on another backbone than the one found.
        ModelError: the backbone cannot be loaded.
    """
    import torch

    from dcar_core.model.backbone import load_backbone
    from dcar_core.model.dcar import DCAR
    from dcar_core.model.methods import find_method

    backbone = backbone or load_backbone(backbone_source(path), device)
    config, weights, fingerprint = read_verified(
        path,
        backbone.source,
        backbone.content_hash(),
    )
    try:
        if any(name.startswith("encoders.") for name in weights):
            create = find_method(config.method).encoders
        else:
            create = None
        model = DCAR(backbone, config, encoders=create and create(backbone))
    except (ModelError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if {name: p.shape for name, p in model.served()} != {
        name: value.shape for name, value in weights.items()
    }:
        raise CheckpointError(
            f"{path / WEIGHTS} does not fit its config.json; copy both, or train again"
        )
    model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in weights.items()}, strict=False
    )
    return model.eval(), fingerprint


def backbone_source(path: Path) -> BackboneSource:
    """Return the backbone that a checkpoint brings along or names. Raise ModelError if
    it names a path to nothing.
    """
    if (path / PORTABLE / MODEL_CONFIG).is_file():
        return BackboneSource(str(path / PORTABLE))
    described = read_config(path)["backbone"]
    source = {key: _absolute(described[key], path) for key in ("model", "pretrained")}
    if missing := missing_places(source):
        raise ModelError(
            f"{source[missing[0]]}, the backbone of {path}, does not exist; if it was"
            " moved, name its new place: for an index by `dcar index build --model"
            f" PLACE`, else as backbone.{missing[0]} in {path / CONFIG}"
        )
    return BackboneSource(str(source["model"]), source["pretrained"])


def missing_places(backbone: dict[str, Any]) -> list[str]:
    """Return the keys of a backbone, `model` or `pretrained`, that name a path where
    nothing is.
    """
    paths = {key: Path(backbone[key] or "") for key in ("model", "pretrained")}
    return [
        key for key, path in paths.items() if path.is_absolute() and not path.exists()
    ]


def read_portable_config(path: Path, model: Path | None = None) -> dict[str, Any]:
    """Return the configuration with absolute paths of the backbone, so that a copy
    loads from any directory.

    model: the new directory or file of a backbone that was moved; ModelError if it
    comes from a hub.
    """
    content = read_config(path)
    backbone = content["backbone"]
    backbone |= {key: _absolute(backbone[key], path) for key in ("model", "pretrained")}
    if model is not None:
        local = [
            key
            for key in ("model", "pretrained")
            if backbone[key] and Path(backbone[key]).is_absolute()
        ]
        if not local:
            raise ModelError(
                f"the model {backbone['model']} comes from a hub, so it has no location"
                " to change"
            )
        backbone[local[0] if model.is_dir() else local[-1]] = str(model.absolute())
    return content


def copy_checkpoint(source: Path, target: Path, model: Path | None = None) -> None:
    """Copy a checkpoint with the configuration that `read_portable_config` returns."""
    content = read_portable_config(source, model)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    write_json(target / CONFIG, content)
    if (source / PORTABLE).is_dir():
        (target / PORTABLE).mkdir(exist_ok=True)
        for file in (source / PORTABLE).iterdir():
            link_or_copy(file, target / PORTABLE / file.name)


def require_own_config(path: Path) -> None:
    """Raise CheckpointError if a checkpoint in `path` would replace a `config.json` of
    something else.
    """
    if (path / CONFIG).is_file() and not is_checkpoint(path):
        raise CheckpointError(
            f"{path / CONFIG} is not of a checkpoint and would be replaced; name"
            " another --out"
        )


def save_zero_shot(source: BackboneSource, out: Path, note: str = "") -> str:
    """Write a checkpoint that adds nothing to a model, and return its fingerprint. An
    older one is replaced.

    note: what users of a service with this model should know about it. Raise
    CheckpointError if `out` holds a trained checkpoint, or a `config.json` of something
    else.
    """
    require_own_config(out)
    if is_checkpoint(out) and read_config(out)["model"] != UNTOUCHED.to_dict():
        raise CheckpointError(f"{out} holds a trained checkpoint; name another --out")
    backbone: Backbone | ClipFiles | None = read_clip_files(source)
    if backbone is None:
        with requires_pytorch(f"the model {source.model}"):
            from dcar_core.model.backbone import load_backbone

            backbone = load_backbone(source)
    return write_checkpoint(
        out,
        _describe(backbone, out),
        UNTOUCHED,
        {},
        {"note": note} if note else {},
    )


def _describe(backbone: "Backbone | ClipFiles", path: Path) -> dict[str, str | None]:
    """Return `backbone` of a checkpoint in `path`."""
    model, pretrained = (
        _relative(value, path)
        for value in (backbone.source.model, backbone.source.pretrained)
    )
    return {"model": model, "pretrained": pretrained, "sha256": backbone.content_hash()}


def _relative(value: str | None, base: Path) -> str | None:
    if value and Path(value).exists():
        return Path(os.path.relpath(value, base)).as_posix()
    return value


def _absolute(value: str | None, base: Path) -> str | None:
    if (
        value
        and not Path(value).is_absolute()
        and (value.startswith("../") or (base / value).exists())
    ):
        return str((base / value).resolve())
    return value
