"""A training run in a process of its own, for tests that kill it: MODEL DATA OUT METHOD [PARTS]."""

import sys
from pathlib import Path
from unittest import mock

import torch

from dcar_core.data import Annotations
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.train import train
from dcar_core.training.train_state import write_csv

torch.set_num_threads(1)
model_path, data, out, name, *rest = sys.argv[1:]
config = TrainConfig(epochs=6, batch_size=5, lr=5e-3, accumulate=int(rest[0]) if rest else 1)
model = seeded_model(load_backbone(BackboneSource(model_path), "cpu"), method(name), 0)
training, validation = (Annotations(Path(data)).load(split)[0] for split in ("train", "val"))
cache = FeatureCache(Path(out) / "features", model.backbone)


def tell(directory: Path, history: list[dict[str, object]]) -> None:
    write_csv(directory, history)
    sys.stdout.write(f"epoch {len(history)}\n")
    sys.stdout.flush()


with mock.patch("dcar_core.training.train.write_csv", tell):
    train(model, training, validation, config, run=Path(out), cache=cache)
save_checkpoint(model, Path(out))
