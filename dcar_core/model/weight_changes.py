"""Learned changes of a backbone's weights.

- A change is a difference, zero at the start, that is added for the time of one call.
  The backbone stays as it is, so other models may use it.
- Merged, it is a model directory, served like any other model: it shares no backbone
  with other domains.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.tokenizer import SETTINGS, TOKENIZER
from dcar_core.util.errors import ModelError
from dcar_core.util.files import write_bytes, write_json
from dcar_core.util.hub import fetch
from dcar_core.util.machine import WEIGHTS_FILE

_IMAGE = "visual."


class WeightChanges(nn.Module):
    """Trainable differences to the weights whose names match a pattern.

    Args:
        names: regular expression of names in open_clip's model.
        matrices: leave out weights that are not matrices.

    Raises:
        ModelError: the towers have no such weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        names: str,
        *,
        matrices: bool = True,
    ) -> None:
        super().__init__()
        self.names = [
            name
            for name, weight in backbone.clip.named_parameters()
            if re.search(names, name) and (weight.ndim == 2 or not matrices)
        ]
        if not self.names:
            raise ModelError(
                f"{backbone.source.model} has none of the weights that this method"
                " changes; use clip-adapter"
            )
        self.high = nn.ParameterDict()
        for name in self.names:
            weight = backbone.clip.get_parameter(name)
            self.high[parameter_key(name)] = nn.Parameter(torch.zeros(weight.shape))

    def difference(self, name: str) -> Tensor:
        """Return the difference to the weight of this name."""
        high: Tensor = self.high[parameter_key(name)]
        return high

    def changed(self, backbone: Backbone, *, image: bool) -> dict[str, Tensor]:
        """Return the changed weights of one tower, by their names in the backbone."""
        names = [name for name in self.names if name.startswith(_IMAGE) == image]
        return {
            f"clip.{name}": backbone.clip.get_parameter(name) + self.difference(name)
            for name in names
        }

    def touches(self, *, image: bool) -> bool:
        """Return whether weights of the image tower, or of the text tower, are
        changed.
        """
        return any(name.startswith(_IMAGE) == image for name in self.names)


@torch.no_grad()
def merge(backbone: Backbone, changes: WeightChanges, parent: Path) -> Backbone:
    """Write the changed weights to a model directory below `parent`, and load it.

    Its name is a hash of its content, since a published version may still use an
    earlier one.
    """
    from dcar_core.model.open_clip_source import read_config

    directory = parent / "model.part"
    config = read_config(backbone.source)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(
        directory / MODEL_CONFIG,
        {"model_cfg": config, "preprocess_cfg": dict(backbone.visual.preprocess_cfg)},
    )
    _copy_text_files(config["text_cfg"], backbone.source.directory, directory)
    changed = {
        **changes.changed(backbone, image=True),
        **changes.changed(backbone, image=False),
    }
    state = backbone.clip.state_dict() | {
        name.removeprefix("clip."): value for name, value in changed.items()
    }
    weights = {name: value.cpu().contiguous().clone() for name, value in state.items()}
    # a service may have mapped the older file
    write_bytes(directory / WEIGHTS_FILE, save(weights, {"format": "pt"}))
    merged = load_backbone(BackboneSource(str(directory)), str(backbone.device))
    final = parent / f"model-{merged.content_hash()[:12]}"
    if final.exists():
        shutil.rmtree(directory)
    else:
        directory.rename(final)
    merged.source = BackboneSource(str(final))
    return merged


def _copy_text_files(
    text: Mapping[str, Any],
    source: Path | None,
    target: Path,
) -> None:
    """Copy the files of the tokenizer and of a text encoder of transformers, from a
    model directory or the hub.
    """
    repositories = {
        TOKENIZER: text.get("hf_tokenizer_name"),
        SETTINGS: text.get("hf_tokenizer_name"),
    }
    if encoder := text.get("hf_model_name"):
        repositories[f"{encoder}/config.json"] = encoder
    if vocabulary := (text.get("tokenizer_kwargs") or {}).get("bpe_path"):
        repositories[vocabulary] = None
    for name, repository in repositories.items():
        file = None
        if source is not None:
            file = source / name
        elif repository:
            file = fetch(repository, Path(name).name)
        if file and file.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)


def parameter_key(name: str) -> str:
    """Return a name that a ParameterDict accepts."""
    return name.replace(".", "/")
