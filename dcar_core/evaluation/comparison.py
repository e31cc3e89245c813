"""Comparison of several methods with several seeds on one data set.

- Choices are made on validation; each run reads the test split once, at its end.
- With `tune`, every method gets the same budget: the same learning rates with seed 0, judged by validation recall.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.data import SPLITS, ImagePolicy, load_splits, save_reports
from dcar_core.evaluation.method_runner import MethodRunner
from dcar_core.evaluation.report import write_report
from dcar_core.evaluation.significance import add_significance, hits_from_json
from dcar_core.evaluation.tables import COLUMNS
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import GRID, LossDirection, ModelConfig, TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import method
from dcar_core.negatives import add_negatives, backbone_views
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.prepared_split import decode_images, report_truncation
from dcar_core.util.bootstrap import Hits
from dcar_core.util.errors import DataError, DivergedError
from dcar_core.util.files import write_json


def compare(
    backbone: Backbone,
    data: Path,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    config: TrainConfig,
    *,
    images: Path | None = None,
    skip_broken: bool = False,
    negatives: str = "auto",
    taxonomy: Path | None = None,
    loss: LossDirection = "both",
    tune: bool = False,
    grid: Sequence[float] = GRID,
    features: Path | None = None,
    progress: bool = True,
    on_message: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train and test every method with every seed; write results.json, .csv, .md and report.html to `out`.

    Args:
        negatives, taxonomy: see `negatives.add_negatives`.
        loss: directions of the contrastive loss, for every method alike.
        tune: choose each method's learning rate from `grid` on validation; otherwise all use `config.lr`.
        features: directory of frozen features, shared with other runs on this data; `out`/features by default.
        on_message: called with one line before each training.

    Returns:
        The content of results.json: for each method, the recall of each seed in percent, their mean and standard
        deviation, and the intervals of `significance.add_significance`. A method that diverged with any seed is in
        `diverged` with the reason, instead of in `methods`.

    Raises:
        DcarError: a method is unknown, the data cannot be read, or every method diverged.
    """
    configs = {name: method(name).with_loss_direction(loss) for name in methods}
    if not configs:
        raise DataError("no method was given; try --methods clip,coop,dcar")
    if seeds < 1:
        raise DataError(f"--seeds must be at least 1, not {seeds}")
    image_policy: ImagePolicy = "skip" if skip_broken else "require"
    splits, reports = load_splits(data, SPLITS, image_root=images, image_policy=image_policy)
    splits = add_negatives(splits, reports, backbone_views(backbone), mode=negatives, taxonomy=taxonomy)
    report_truncation(splits, reports, backbone, max(each.prompt.length for each in configs.values()))
    save_reports(reports, out)
    cache = FeatureCache(features or out / "features", backbone)
    decode_images(splits["test"], backbone, cache, progress=progress)  # report broken images before hours of training
    runner = MethodRunner(backbone, splits, out, config, cache, progress, on_message)
    results: dict[str, Any] = {
        "data": data.resolve().name,
        "pairs": {name: len(split) for name, split in splits.items()},
        "cleaning": {name: dict(report.counts) for name, report in reports.items()},
        "backbone": Path(backbone.source.model).name,
        "training": config.to_dict(),
        "loss": loss,
        "grid": list(grid) if tune else None,
        "methods": {},
        "diverged": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    hits: dict[str, list[Hits]] = {}
    for name, chosen in configs.items():
        try:
            result = _run_method(runner, chosen, seeds, tuple(grid) if tune else None)
        except DivergedError as error:  # keep the results of the other methods
            on_message(f"{name} is left out: {error}")
            results["diverged"][name] = str(error)
        else:
            hits[name] = [hits_from_json(run.pop("hits")) for run in result["runs"]]  # too many for results.json
            results["methods"][name] = result
        write_json(out / "results.json", results)  # after each method, so that an interruption loses nothing
    if not results["methods"]:
        raise DivergedError("; ".join(results["diverged"].values()))
    add_significance(results, hits)
    write_json(out / "results.json", results)
    write_report(results, splits["test"], out)
    return results


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and sample standard deviation over runs, for each measure."""
    spread = {column: _spread([run[column] for run in runs]) for column in COLUMNS}
    return {key: {column: spread[column][key] for column in COLUMNS} for key in ("mean", "std")}


def _run_method(
    runner: MethodRunner, config: ModelConfig, seeds: int, grid: tuple[float, ...] | None
) -> dict[str, Any]:
    """Tune, train and test one method.

    Raises:
        DivergedError: a run diverged.
    """
    has_trainables = any(True for _ in seeded_model(runner.backbone, config, 0).trainables())
    lr, tuning = runner.tune(config, grid) if grid and has_trainables else (runner.config.lr, None)
    runs = [runner.test(config, seed, lr) for seed in range(seeds if has_trainables else 1)]  # zero-shot has no seed
    accuracy = [run["hard_negative_accuracy"] for run in runs if run["hard_negative_accuracy"] is not None]
    return {
        "lr": lr if has_trainables else None,
        "tuning": tuning,
        "trainable": runs[0]["trainable"],
        "hard_negative_accuracy": _spread(accuracy) if accuracy else None,
        **summarise([run["test"] for run in runs]),
        "runs": runs,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
