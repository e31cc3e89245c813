"""The table: several methods, several seeds, one data set.

Choices are made on validation; each run reads the test split once, at its end.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcar_core.backbone import Backbone
from dcar_core.checkpoint import save_checkpoint
from dcar_core.config import ModelConfig, TrainConfig
from dcar_core.data import load_split
from dcar_core.errors import DataError
from dcar_core.features import prepare
from dcar_core.methods import method
from dcar_core.model import DCAR
from dcar_core.train import evaluate, train

COLUMNS = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10")


def compare(
    backbone: Backbone,
    data: Path,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    config: TrainConfig,
    *,
    images: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train and test every method with every seed; writes `results.json`, `results.md` and checkpoints below `out`.

    Returns:
        What results.json holds: per method, each seed's recall in percent, their mean and standard deviation.

    Raises:
        DcarError: an unknown method, or data that cannot be read.
    """
    configs = {name: method(name) for name in methods}
    if seeds < 1:
        raise DataError(f"--seeds must be at least 1, not {seeds}")
    splits = {name: load_split(data, name, images=images) for name in ("train", "val", "test")}
    training, validation, testing = (splits[name][0] for name in ("train", "val", "test"))
    report = {name: dict(found.counts) for name, (_, found) in splits.items()}
    results: dict[str, Any] = {
        "data": data.name,
        "pairs": {name: len(split) for name, (split, _) in splits.items()},
        "cleaning": report,
        "backbone": Path(backbone.source.model).name,
        "training": config.to_dict(),
        "methods": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in configs.items():
        runs: list[dict[str, Any]] = []
        for seed in range(seeds if chosen.prompt.length else 1):  # zero-shot has nothing that varies
            model = seeded_model(backbone, chosen, seed)
            found = train(model, training, validation, replace(config, seed=seed), progress=progress)
            save_checkpoint(model, out / name / f"seed{seed}", training={"seed": seed, "validation": found.best})
            test = evaluate(model, prepare(testing, model, for_training=False, progress=progress))
            runs.append({"seed": seed, "epoch": found.epoch, "seconds": found.seconds, "val": found.best, "test": test})
        results["methods"][name] = {"runs": runs, **summary([run["test"] for run in runs])}
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")  # what is done is kept
    (out / "results.md").write_text(table(results))
    return results


def seeded_model(backbone: Backbone, config: ModelConfig, seed: int) -> DCAR:
    """A fresh model whose initial trainables follow from the seed."""
    torch.manual_seed(seed)
    return DCAR(backbone, config)


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over runs, by measure."""
    return {
        "mean": {c: float(np.mean([run[c] for run in runs])) for c in COLUMNS},
        "std": {c: float(np.std([run[c] for run in runs], ddof=1)) if len(runs) > 1 else 0.0 for c in COLUMNS},
    }


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, in percent."""
    lines = [
        "| method | text-to-image R@1 | R@5 | R@10 | image-to-text R@1 | R@5 | R@10 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results["methods"].items():
        several = len(found["runs"]) > 1
        cells = [f"{found['mean'][c]:.1f}" + (f" ± {found['std'][c]:.1f}" if several else "") for c in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
