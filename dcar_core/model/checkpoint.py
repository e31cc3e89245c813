"""A checkpoint is a directory: `trainables.safetensors` (up to a few MB) and a readable `config.json`.

The fingerprint is a hash over the backbone's content, the configuration and the trainables. Everything made from a
model's vectors (shards, index, cached queries) carries it, so a retrained model never meets old vectors.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dcar_core.model.config import MODEL_CONFIG, ModelConfig
from dcar_core.util.errors import CheckpointError, ModelError
from dcar_core.util.files import link_or_copy, parse_json, write_bytes, write_json

if TYPE_CHECKING:  # torch takes seconds, and reading a checkpoint does not need it
    from dcar_core.model.backbone import Backbone
    from dcar_core.model.dcar import DCAR

Trainables = dict[str, NDArray[np.float32]]

CONFIG, WEIGHTS = "config.json", "trainables.safetensors"
PORTABLE = "portable"  # folder with what runs the model without PyTorch; see `encoder.encoder`
FORMAT = 1
_MULTILINGUAL = re.compile("nllb|SigLIP2|i18n|worldwide|xlm|mt5")  # as their publishers state


def is_checkpoint(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def compute_fingerprint(backbone_hash: str, config: ModelConfig, trainables: Mapping[str, NDArray[np.float32]]) -> str:
    """Return 64 hex digits that identify one mapping from images and queries to vectors.

    Settings that no vector depends on (the loss, pair weights) are left out.
    """
    reweight = config.reweight
    serving = [
        config.prompt.to_dict(), config.adapter.to_dict(), config.rerank.to_dict(),
        [reweight.query, reweight.low, reweight.high],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps([FORMAT, backbone_hash, serving], sort_keys=True).encode())
    for name in sorted(trainables):
        digest.update(f"{name} {trainables[name].shape}".encode())
        digest.update(np.ascontiguousarray(trainables[name], np.float32).tobytes())
    return digest.hexdigest()


def save_checkpoint(model: "DCAR", path: Path, *, training: dict[str, Any] | None = None) -> str:
    """Write trainables and config; return the fingerprint. A model's path is stored relative to the checkpoint.

    Changed weights of a backbone are merged into a model directory, `model-<hash>` in the checkpoint.
    """
    path.mkdir(parents=True, exist_ok=True)
    if model.changes is not None:
        from dcar_core.model.methods.weight_changes import merge

        model = type(model)(merge(model.backbone, model.changes, path), model.config).eval()
    trainables = {name: p.detach().cpu().contiguous().numpy() for name, p in model.served()}
    source, backbone_hash = model.backbone.source, model.backbone.content_hash()
    places = {"model": _relative(source.model, path), "pretrained": _relative(source.pretrained, path)}
    return write_checkpoint(path, {**places, "sha256": backbone_hash}, model.config, trainables, training or {})


def write_checkpoint(
    path: Path, backbone: Mapping[str, Any], config: ModelConfig, trainables: Trainables, training: Mapping[str, Any]
) -> str:
    """Write trainables and config; return the fingerprint. backbone: as in `config.json`."""
    path.mkdir(parents=True, exist_ok=True)
    fingerprint = compute_fingerprint(backbone["sha256"], config, trainables)
    write_bytes(path / WEIGHTS, save(trainables, {"format": "pt"}))
    content = {"format": FORMAT, "fingerprint": fingerprint, "backbone": backbone}
    write_json(path / CONFIG, {**content, "model": config.to_dict(), "training": training})
    return fingerprint


def read_config(path: Path) -> dict[str, Any]:
    """Read the checkpoint's config.json, or raise CheckpointError."""
    if not is_checkpoint(path):
        message = f"{path} is not a checkpoint: it needs {CONFIG} and {WEIGHTS}, as `dcar train --out` writes them"
        if (path / MODEL_CONFIG).is_file():
            message += f"; it is a model: `dcar zero-shot --model {path} --out DIR` makes a checkpoint of it"
        raise CheckpointError(message)
    try:
        content = parse_json((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path / CONFIG} is not format {FORMAT}; train again, or use the version that wrote it")
    kinds = {"model": dict, "backbone": dict, "fingerprint": str, "training": dict}
    of_backbone = {"model": str, "sha256": str, "pretrained": str | None}
    if not (_has({"training": {}, **content}, kinds) and _has(content["backbone"], of_backbone)):
        raise CheckpointError(f"{path / CONFIG} has no valid model, backbone, fingerprint or training; copy it again")
    return content


def read_trainables(path: Path) -> Trainables:
    """Read the trained parameters, or raise CheckpointError."""
    try:
        trainables: Trainables = load_file(str(path / WEIGHTS))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if broken := sorted(name for name, value in trainables.items() if not np.isfinite(value).all()):
        raise CheckpointError(f"{path / WEIGHTS} has values that are not finite, in {', '.join(broken)}; train again")
    return trainables


def load_checkpoint(path: Path, *, device: str = "cpu", backbone: "Backbone | None" = None) -> "tuple[DCAR, str]":
    """Load a model; return it with its fingerprint. Pass a loaded `backbone` to share it.

    Raises:
        CheckpointError: it is broken, or made on another backbone than the one found.
        ModelError: the backbone cannot be loaded.
    """
    import torch

    from dcar_core.model.backbone import BackboneSource, load_backbone
    from dcar_core.model.dcar import DCAR

    content = read_config(path)
    described = content["backbone"]
    if backbone is None:
        places = {key: _absolute(described[key], path) for key in ("model", "pretrained")}
        if missing := missing_places(places):
            raise ModelError(
                f"{places[missing[0]]}, the backbone of {path}, does not exist; if it was moved, name its new place: "
                f"for an index by `dcar index build --model PLACE`, else as backbone.{missing[0]} in {path / CONFIG}"
            )
        backbone = load_backbone(BackboneSource(str(places["model"]), places["pretrained"]), device)
    backbone_hash = backbone.content_hash()
    if backbone_hash != described["sha256"]:
        raise CheckpointError(
            f"{path} was trained on another backbone ({described['sha256'][:12]}) than {backbone.source.model} is "
            f"({backbone_hash[:12]}), by its weights, tokenizer or preprocessing; train again on it, or point "
            f"config.json to the right one"
        )
    weights = read_trainables(path)
    try:
        model = DCAR(backbone, ModelConfig.from_dict(content["model"]))
    except (ModelError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    expected = {name: tuple(p.shape) for name, p in model.served()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if expected != found:
        odd = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise CheckpointError(f"{path / WEIGHTS} does not fit its config.json: {', '.join(odd)}")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    fingerprint = compute_fingerprint(backbone_hash, model.config, weights)
    if content["fingerprint"] != fingerprint:
        raise CheckpointError(f"{path / WEIGHTS} and {CONFIG} are of different trainings; copy both, or train again")
    return model.eval(), fingerprint


def missing_places(backbone: dict[str, Any]) -> list[str]:
    """Return the keys of a backbone, `model` or `pretrained`, that name a path where nothing is."""
    places = [(key, backbone[key]) for key in ("model", "pretrained")]
    return [key for key, place in places if place and Path(place).is_absolute() and not Path(place).exists()]


def read_portable_config(path: Path, model: Path | None = None) -> dict[str, Any]:
    """Return the configuration with absolute paths of the backbone, so that a copy loads from any directory.

    Args:
        model: the new directory or file of a backbone that was moved.

    Raises:
        CheckpointError: see `read_config`.
        ModelError: the backbone comes from a hub.
    """
    content = read_config(path)
    backbone = content["backbone"]
    backbone |= {key: _absolute(backbone[key], path) for key in ("model", "pretrained")}
    if model is not None:
        local = [key for key in ("model", "pretrained") if backbone[key] and Path(backbone[key]).is_absolute()]
        if not local:
            raise ModelError(f"the model {backbone['model']} comes from a hub, so it has no location to change")
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
    """Raise CheckpointError if a checkpoint in `path` would replace a `config.json` of something else."""
    if (path / CONFIG).is_file() and not is_checkpoint(path):
        raise CheckpointError(f"{path / CONFIG} is not of a checkpoint and would be replaced; name another --out")


def languages_of(model: str) -> Literal["English", "many", ""]:
    """Return the languages of the texts that a built-in model learned from; "" for a model of a directory or a hub."""
    if "/" in model or os.sep in model:
        return ""
    return "many" if _MULTILINGUAL.search(model) else "English"


def save_zero_shot(backbone: "Backbone", out: Path, note: str = "") -> str:
    """Write a checkpoint that adds nothing to a model, and return its fingerprint. An older one is replaced.

    Args:
        note: what users of a service with this model should know about it.

    Raises:
        CheckpointError: `out` holds a trained checkpoint, or a `config.json` of something else.
    """
    from dcar_core.model.dcar import DCAR
    from dcar_core.model.methods.registry import method

    require_own_config(out)
    if is_checkpoint(out) and (found := read_config(out)["model"].get("method")) != "clip":
        raise CheckpointError(f"{out} holds a trained checkpoint of {found}; name another --out")
    return save_checkpoint(DCAR(backbone, method("clip")), out, training={"note": note} if note else None)


def _has(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> bool:
    return all(name in values and isinstance(values[name], kind) for name, kind in kinds.items())


def _relative(value: str | None, base: Path) -> str | None:
    return Path(os.path.relpath(value, base)).as_posix() if value and Path(value).exists() else value


def _absolute(value: str | None, base: Path) -> str | None:
    if value and not Path(value).is_absolute() and (value.startswith("../") or (base / value).exists()):
        return str((base / value).resolve())
    return value
