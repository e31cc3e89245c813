"""Training and test runs of methods, each kept in a directory of its own and never repeated.

    runs/<method>/seed0-lr0.002-1a2b3c4d/    trainables.safetensors, config.json, log.csv, training.json, test.json

- The directory name ends in a digest of everything that determines the run: weights, method, settings, data. A table
  therefore never mixes runs with different settings.
- A killed run resumes from its last state.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dcar_core.data import Dataset
from dcar_core.evaluation.analysis import analyse
from dcar_core.model.backbone import Backbone
from dcar_core.model.checkpoint import load_checkpoint, save_checkpoint
from dcar_core.model.config import ModelConfig, TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import find_method
from dcar_core.training.objective import resolve_amp
from dcar_core.training.prepared_split import FeatureCache, prepare_split, split_key
from dcar_core.training.train import delete_state, train
from dcar_core.training.validation import mean_r1
from dcar_core.util.errors import DivergedError
from dcar_core.util.files import hash_json, write_json


@dataclass(frozen=True)
class MethodRunner:
    """Trains and tests methods on one data set.

    splits: train, val and test. on_message: called with one line before each training.
    """

    backbone: Backbone
    splits: Mapping[str, Dataset]
    out: Path
    config: TrainConfig
    cache: FeatureCache
    on_message: Callable[[str], None] = lambda line: None

    def train(self, method: ModelConfig, seed: int, lr: float) -> dict[str, Any]:
        """Return the record of a training run, training first if there is none. Only validation is read.

        Raises:
            DivergedError: the run diverged, now or when it was recorded.
        """
        directory, config = self.directory(method, seed, lr), replace(self.config, seed=seed, lr=lr)
        record_file = directory / "training.json"
        if not record_file.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            self.on_message(f"{method.method}, seed {seed}, learning rate {lr:g}")
            model = seeded_model(self.backbone, method, seed)
            data = self.splits["train"], self.splits["val"]
            record: dict[str, Any] = {"seed": seed, "lr": lr, "run": str(directory.relative_to(self.out))}
            try:
                result = train(model, *data, config, run=directory, cache=self.cache)
            except DivergedError as error:
                record |= {"diverged": str(error)}
            else:
                notes = {**config.to_dict(), "epoch": result.epoch, "validation": result.best}
                record |= {
                    "fingerprint": save_checkpoint(model, directory, training=notes),
                    "trainable": sum(p.numel() for _, p in model.trainables() if p.requires_grad),
                    "epoch": result.epoch,
                    "seconds": round(result.seconds, 1),
                    "query": model.config.reweight.query,
                    "val": result.best,
                }
            write_json(record_file, record)
            delete_state(directory)
        record = json.loads(record_file.read_text(encoding="utf-8"))
        if "diverged" in record:
            raise DivergedError(record["diverged"])
        return record

    def test(self, method: ModelConfig, seed: int, lr: float) -> dict[str, Any]:
        """Return the record of a run with its results on the test split, read once. Raise DivergedError as `train`."""
        record, directory = self.train(method, seed, lr), self.directory(method, seed, lr)
        results_file, data = directory / "test.json", self.splits["test"]
        if not results_file.is_file():
            is_merged = find_method(method.method).changes is not None  # another backbone, with other features
            shared = None if is_merged else self.backbone
            model, _ = load_checkpoint(directory, device=str(self.backbone.device), backbone=shared)
            cache = FeatureCache(None, model.backbone) if is_merged else self.cache
            write_json(results_file, analyse(model, data, prepare_split(data, model, for_training=False, cache=cache)))
        return {**record, **json.loads(results_file.read_text(encoding="utf-8"))}

    def tune(self, method: ModelConfig, grid: Sequence[float]) -> tuple[float, dict[str, float | None]]:
        """Return the learning rate with the best validation recall at seed 0.

        Returns:
            The rate, and the validation R@1 of every rate; None where it diverged.

        Raises:
            DivergedError: every rate diverged.
        """
        scores: dict[float, float] = {}
        for lr in grid:
            with suppress(DivergedError):
                scores[lr] = mean_r1(self.train(method, 0, lr)["val"])
        if not scores:
            rates = ", ".join(f"{lr:g}" for lr in grid)
            raise DivergedError(f"{method.method} diverged with every learning rate of {rates}")
        return max(scores, key=lambda lr: scores[lr]), {f"{lr:g}": scores.get(lr) for lr in grid}

    def directory(self, method: ModelConfig, seed: int, lr: float) -> Path:
        amp = resolve_amp(self.config.amp, self.backbone.device)  # runs on a CPU differ from runs on a GPU
        config = replace(self.config, seed=seed, lr=lr, amp=amp)
        key = hash_json([self.cache.backbone_hash, method.to_dict(), config.to_dict(), self._split_keys])[:8]
        return self.out / "runs" / method.method / f"seed{seed}-lr{lr:g}-{key}"

    @cached_property
    def _split_keys(self) -> list[str]:
        return [split_key(split, self.cache) for split in self.splits.values()]
