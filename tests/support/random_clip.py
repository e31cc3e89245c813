"""A model directory with a random CLIP, small enough to build in a tenth of a second,
and checkpoints on it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dcar_core.model.backbone import load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import MODEL_CONFIG, BackboneSource, ModelConfig
from dcar_core.model.dcar import DCAR

MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "resize_mode": "squash",
    "size": [32, 32],
}


def write_model(path: Path, **settings: Any) -> Path:
    """Write a random CLIP of 32 px with settings of its configuration, in open_clip's
    form.
    """
    import open_clip  # which takes seconds

    path.mkdir()
    torch.manual_seed(0)
    config = MODEL | settings
    kind = open_clip.CustomTextCLIP if settings.get("custom_text") else open_clip.CLIP
    clip = kind(
        **{
            name: value
            for name, value in json.loads(json.dumps(config)).items()
            if name != "custom_text"
        }
    )
    save_file(
        {k: v.contiguous() for k, v in clip.state_dict().items()},
        str(path / "open_clip_model.safetensors"),
    )
    (path / MODEL_CONFIG).write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS})
    )
    return path


def checkpoint_on(
    model: Path,
    config: ModelConfig,
    path: Path,
    seed: int = 3,
    noise: float = 0.05,
) -> Path:
    """Write a checkpoint whose every trainable differs from its start."""
    torch.manual_seed(seed)
    dcar = DCAR(load_backbone(BackboneSource(str(model))), config)
    with torch.no_grad():
        for _, parameter in dcar.trainables():
            parameter.add_(noise * torch.randn_like(parameter))
    save_checkpoint(dcar, path)
    return path
