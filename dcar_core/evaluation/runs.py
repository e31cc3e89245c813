"""The runs behind a table, each in a directory of its own that is kept and never run twice.

    runs/<method>/seed0-lr0.002-1a2b3c4d/    trainables.safetensors, config.json, log.csv, training.json, test.json

The name ends in a digest of everything that the run follows from (weights, method, settings, data), so other settings
are other directories, and a table never mixes them. A run that was killed goes on from its last state.
"""

import json
from collections.abc import Callable, Mapping
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
from dcar_core.training.feature_cache import FeatureCache, digest
from dcar_core.training.prepared_split import prepare_split, split_key
from dcar_core.training.train import train
from dcar_core.training.train_state import delete_state
from dcar_core.training.validation import mean_r1
from dcar_core.util.errors import DivergedError
from dcar_core.util.files import write_json


@dataclass(frozen=True)
class Runs:
    """Trains and tests methods on one data set. `splits` are train, val and test."""

    backbone: Backbone
    splits: Mapping[str, Dataset]
    out: Path
    config: TrainConfig
    cache: FeatureCache
    progress: bool = True
    say: Callable[[str], None] = lambda line: None

    def trained(self, chosen: ModelConfig, seed: int, lr: float) -> dict[str, Any]:
        """Train, unless it was done: the run's record, by validation alone.

        Raises:
            DivergedError: the run diverged. That is recorded too and raised again the next time.
        """
        directory, config = self._directory(chosen, seed, lr), replace(self.config, seed=seed, lr=lr)
        done = directory / "training.json"
        if not done.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            self.say(f"{chosen.method}, seed {seed}, learning rate {lr:g}")
            model = seeded_model(self.backbone, chosen, seed)
            record: dict[str, Any] = {"seed": seed, "lr": lr, "run": str(directory.relative_to(self.out))}
            try:
                found = train(
                    model, self.splits["train"], self.splits["val"], config, progress=self.progress, run=directory,
                    cache=self.cache,
                )  # fmt: skip
            except DivergedError as error:
                record |= {"diverged": str(error)}
            else:
                notes = {**config.to_dict(), "epoch": found.epoch, "validation": found.best}
                mark = save_checkpoint(model, directory, training=notes)
                record |= {
                    "fingerprint": mark,
                    "trainable": sum(p.numel() for _, p in model.trainables() if p.requires_grad),
                    "epoch": found.epoch,
                    "seconds": round(found.seconds, 1),
                    "query": model.config.reweight.query,
                    "val": found.best,
                    "history": found.history,
                }
            write_json(done, record)
            delete_state(directory)
        record = json.loads(done.read_text(encoding="utf-8"))
        if "diverged" in record:
            raise DivergedError(record["diverged"])
        return record

    def tested(self, chosen: ModelConfig, seed: int, lr: float) -> dict[str, Any]:
        """The record with the test split's results, which is read here, once a run.

        Raises:
            DivergedError: the run diverged.
        """
        record, directory = self.trained(chosen, seed, lr), self._directory(chosen, seed, lr)
        done = directory / "test.json"
        if not done.is_file():
            model, _ = load_checkpoint(directory, backbone=self.backbone)
            testing = self.splits["test"]
            prepared = prepare_split(testing, model, for_training=False, progress=self.progress, cache=self.cache)
            write_json(done, analyse(model, testing, prepared))
        test = json.loads(done.read_text(encoding="utf-8"))
        return record | {"test": test.pop("recall"), **test}

    def tuned(self, chosen: ModelConfig, grid: tuple[float, ...]) -> tuple[float, dict[str, float | None]]:
        """The learning rate with the best validation recall at seed 0, and what each one reached; None: it diverged.

        Raises:
            DivergedError: all of them diverged.
        """
        reached: dict[str, float | None] = {}
        for lr in grid:
            try:
                reached[f"{lr:g}"] = mean_r1(self.trained(chosen, 0, lr)["val"])
            except DivergedError:
                reached[f"{lr:g}"] = None
        scores = {lr: score for lr in grid if (score := reached[f"{lr:g}"]) is not None}
        if not scores:
            raise DivergedError(f"{chosen.method} diverged with every learning rate of {', '.join(reached)}")
        return max(scores, key=lambda lr: scores[lr]), reached

    def _directory(self, chosen: ModelConfig, seed: int, lr: float) -> Path:
        config = replace(self.config, seed=seed, lr=lr)
        key = digest(self.cache.backbone_hash, chosen.to_dict(), config.to_dict(), self._data_keys)[:8]
        return self.out / "runs" / chosen.method / f"seed{seed}-lr{lr:g}-{key}"

    @cached_property
    def _data_keys(self) -> list[str]:
        return [split_key(split, self.cache) for split in self.splits.values()]
