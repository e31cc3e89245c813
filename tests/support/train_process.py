"""A training run in a process of its own, for tests that kill it or start several: MODEL DATA OUT METHOD [PARTS]."""

import sys
from pathlib import Path

import torch

from dcar_core.data import load_split
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.training.distributed import torchrun_group
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.train import train

torch.set_num_threads(1)
model_path, data, out, name, *rest = sys.argv[1:]
config = TrainConfig(epochs=6, batch_size=5, lr=5e-3, accumulate=int(rest[0]) if rest else 1)
with torchrun_group("cpu") as (group, device):
    model = seeded_model(load_backbone(BackboneSource(model_path), device), method(name), 0)
    training, validation = (load_split(Path(data), split)[0] for split in ("train", "val"))
    cache = FeatureCache(Path(out) / "features", model.backbone)

    def tell(line: dict[str, object]) -> None:
        sys.stdout.write(f"epoch {line['epoch']}\n")
        sys.stdout.flush()

    train(model, training, validation, config, progress=False, run=Path(out), cache=cache, on_epoch=tell, group=group)
    if group.is_leader:
        save_checkpoint(model, Path(out))
