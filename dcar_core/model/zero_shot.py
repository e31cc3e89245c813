"""Checkpoints of an untouched model, to search with before training and to compare with afterwards."""

from pathlib import Path
from typing import TYPE_CHECKING

from dcar_core.model.checkpoint import is_checkpoint, read_config, save_checkpoint
from dcar_core.util.errors import CheckpointError

if TYPE_CHECKING:
    from dcar_core.model.backbone import Backbone

METHOD = "clip"


def save_zero_shot(backbone: "Backbone", out: Path) -> str:
    """Write a checkpoint that adds nothing to a model, and return its fingerprint. An older one is replaced.

    Raises:
        CheckpointError: `out` holds a trained checkpoint.
    """
    from dcar_core.model.dcar import DCAR
    from dcar_core.model.methods import method

    if is_checkpoint(out) and (found := read_config(out)["model"].get("method")) != METHOD:
        raise CheckpointError(f"{out} holds a trained checkpoint of {found}; name another --out")
    return save_checkpoint(DCAR(backbone, method(METHOD)), out)
