"""The table: several methods, several seeds, one data set.

Choices are made on validation; each run reads the test split once, at its end. With `tune` every method gets the same
budget: the same learning rates, tried with seed 0 and judged by validation recall.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.data import SPLITS, ImagePolicy, load_splits, save_reports
from dcar_core.evaluation.report import write_report
from dcar_core.evaluation.runs import Runs
from dcar_core.evaluation.tables import COLUMNS
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import GRID, TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import method
from dcar_core.negatives import add_negatives_with_backbone
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.prepared_split import decode_images, report_truncation
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
    tune: bool = False,
    grid: Sequence[float] = GRID,
    features: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train and test every method with every seed, and write results.json, .csv, .md and report.html to `out`.

    Args:
        negatives, taxonomy: which pairs get negative captions made, and what says which categories are alike; see
            `negatives.complete`.
        tune: choose each method's learning rate from `grid` on validation; else all take `config.lr`.
        features: where frozen features are kept, for other runs on this data; `out`/features by default.
        say: told what is about to run.

    Returns:
        What results.json holds: per method, each seed's recall in percent, their mean and standard deviation. A method
        that diverged with any seed is not among `methods` but among `diverged`, with the reason.

    Raises:
        DcarError: an unknown method, data that cannot be read, or every method diverged.
    """
    configs = {name: method(name) for name in methods}
    if not configs:
        raise DataError("no method was given; try --methods clip,coop,dcar")
    if seeds < 1:
        raise DataError(f"--seeds must be at least 1, not {seeds}")
    pictures: ImagePolicy = "skip" if skip_broken else "require"
    splits, reports = load_splits(data, SPLITS, image_root=images, image_policy=pictures)
    splits = add_negatives_with_backbone(splits, reports, backbone, mode=negatives, taxonomy=taxonomy)
    room = max(chosen.prompt.length for chosen in configs.values())
    report_truncation(splits, reports, backbone, room)
    save_reports(reports, out)
    cache = FeatureCache(features or out / "features", backbone)
    decode_images(
        splits["test"], backbone, cache, progress=progress
    )  # not after hours that one broken picture makes worthless
    runs = Runs(backbone, splits, out, config, cache, progress, say)
    results: dict[str, Any] = {
        "data": data.resolve().name,
        "pairs": {name: len(split) for name, split in splits.items()},
        "cleaning": {name: dict(found.counts) for name, found in reports.items()},
        "backbone": Path(backbone.source.model).name,
        "training": config.to_dict(),
        "grid": list(grid) if tune else None,
        "methods": {},
        "diverged": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in configs.items():
        learns = any(True for _ in seeded_model(backbone, chosen, 0).trainables())
        try:
            lr, tuning = runs.tuned(chosen, tuple(grid)) if tune and learns else (config.lr, None)
            # zero-shot has nothing that varies
            found = [runs.tested(chosen, seed, lr) for seed in range(seeds if learns else 1)]
        except DivergedError as error:  # the other methods' hours are not lost for it
            say(f"{name} is left out: {error}")
            results["diverged"][name] = str(error)
        else:
            accuracy = [run["hard_negative_accuracy"] for run in found if run["hard_negative_accuracy"] is not None]
            results["methods"][name] = {
                "lr": lr if learns else None,
                "tuning": tuning,
                "trainable": found[0]["trainable"],
                "hard_negative_accuracy": _spread(accuracy) if accuracy else None,
                **summary([run["test"] for run in found]),
                "runs": found,
            }
        write_json(out / "results.json", results)  # what is done is kept
    if not results["methods"]:
        raise DivergedError("; ".join(results["diverged"].values()))
    write_report(results, splits["test"], out)
    return results


def summary(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over runs, by measure."""
    spread = {c: _spread([run[c] for run in runs]) for c in COLUMNS}
    return {key: {c: spread[c][key] for c in COLUMNS} for key in ("mean", "std")}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
