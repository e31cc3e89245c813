"""Comparison of several methods with several seeds on one data set.

- Choices are made on validation; each run reads the test split once, at its end.
- With a `grid`, every method gets the same budget: the same learning rates with seed 0,
  judged by validation recall.
- Intervals are those of the paired bootstrap over queries. The scores of a method's
  seeds are averaged by query first. Of test categories that training has not, whole
  categories are resampled.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.data import (
    SPLITS,
    Annotations,
    CleaningReport,
    Dataset,
    describe_reports,
    save_reports,
)
from dcar_core.evaluation.method_runner import MethodRunner, serving_cost
from dcar_core.evaluation.tables import (
    Results,
    best_method,
    plot_recall,
    results_markdown,
    spread,
    summarise,
)
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import UNTOUCHED, LossDirection, ModelConfig, TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import find_method
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.training.prepared_split import (
    FeatureCache,
    FrozenFeatures,
    report_truncation,
)
from dcar_core.training.validation import new_categories
from dcar_core.util.errors import DivergedError
from dcar_core.util.files import write_json
from dcar_core.util.metrics import Comparison, Scores

CLIP = UNTOUCHED.method
# behind the name of a method: the order of its second stage
WITH_RERANK = " with rerank"


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
    grid: Sequence[float] = (),
    features: Path | None = None,
    on_message: Callable[[str], None] = lambda line: None,
) -> Results:
    """Train and test every method with every seed; write results.json, results.md and
    recall.svg to `out`.

    Args:
        negatives, taxonomy: see `negatives.add_negatives`.
        loss: directions of the contrastive loss, for every method alike.
        grid: learning rates to choose each method's from, on validation; without any,
            all use `config.lr`.
        features: directory of frozen features, shared with other runs on this data;
            `out`/features by default.
        on_message: called with what was found in the data, and with one line before
            each training.

    Returns:
        The content of results.json: for each method, the recall of each seed in
            percent, their mean and standard
        deviation, and the intervals of `add_significance`. A method with a second stage
        has a second entry, WITH_RERANK. A method that diverged with any seed is in
        `diverged` with the reason, instead of in `methods`.

    Raises:
        DcarError: a method is unknown or needs other towers, the data cannot be read,
            or every method diverged.
    """
    configs = {
        name: find_method(name).config.with_loss_direction(loss) for name in methods
    }
    for chosen in configs.values():  # before hours of training
        seeded_model(backbone, chosen, 0)  # raises if the towers cannot run it
    splits, reports = Annotations(data, images).load_all(
        SPLITS, "skip" if skip_broken else "require"
    )
    splits = add_negatives(
        splits,
        reports,
        backbone_functions(backbone),
        mode=negatives,
        taxonomy=taxonomy,
    )
    report_truncation(
        splits,
        reports,
        backbone,
        max(chosen.prompt.length for chosen in configs.values()),
    )
    cache = FeatureCache(features or out / "features", backbone)
    _note_copies(splits, reports, cache)
    save_reports(reports, out)
    on_message(describe_reports(splits, reports))
    # report broken images before hours of training
    _ = FrozenFeatures(splits["test"], backbone, cache).pixels
    runner = MethodRunner(backbone, splits, out, config, cache, on_message)
    results: Results = {
        "data": data.resolve().name,
        "pairs": {name: len(split) for name, split in splits.items()},
        "cleaning": {name: dict(report.counts) for name, report in reports.items()},
        "backbone": Path(backbone.source.model).name,
        "training": config.to_dict(),
        "loss": loss,
        "grid": list(grid),
        "test_images": len(splits["test"].images),
        "methods": {},
        "diverged": {},
    }
    scores = dict[str, list[Scores]]()
    group_of = new_categories(splits["train"], splits["test"])
    for name, chosen in configs.items():
        try:
            tested = _run_method(runner, chosen, seeds, grid)
        except DivergedError as error:  # keep the results of the other methods
            on_message(f"{name} is left out: {error}")
            results["diverged"][name] = str(error)
            continue
        for label, own in tested.items():
            # too many for results.json
            runs = (run.pop("scores") for run in own["runs"])
            scored = (
                Scores(np.array(queries), np.array(sums)) for queries, sums in runs
            )
            scores[label] = [
                run if group_of is None else run.grouped(group_of) for run in scored
            ]
        results["methods"] |= tested
    if not results["methods"]:
        raise DivergedError("; ".join(results["diverged"].values()))
    add_significance(results, scores)
    write_json(out / "results.json", results)
    plot = plot_recall(results, out / "recall.svg")
    (out / "results.md").write_text(results_markdown(results, plot), encoding="utf-8")
    return results


def add_significance(results: Results, scores: Mapping[str, Sequence[Scores]]) -> None:
    """Set `recommendation`, a sentence, and each method's `intervals` and `difference`
    to the untouched model, as [value, low, high] in percent.

    scores: those of each seed, by method.
    """
    means = {name: Scores.mean(runs) for name, runs in scores.items()}
    for name, result in results["methods"].items():
        compared = Comparison.of(means[name], means.get(CLIP, means[name]))
        result["intervals"], difference = (
            {measure: list(astuple(estimate)) for measure, estimate in side.items()}
            for side in (compared.model, compared.difference)
        )
        result["difference"] = None if name == CLIP or CLIP not in means else difference
    chosen, results["recommendation"] = _recommend(results, means)
    if reranked := means.get(chosen + WITH_RERANK):
        change = Comparison.of(reranked, means[chosen]).difference["t2i_r1"]
        results["recommendation"] += (
            f"\nWith `rerank`: {change:+} points of text-to-image R@1."
        )


def _recommend(results: Results, means: Mapping[str, Scores]) -> tuple[str, str]:
    """Recommend the cheapest method that is not certainly worse on the test split than
    the best on validation.

    Returns:
        Its name, and the sentence.
    """
    best = best_method(results)
    compared_with = {name: Comparison.of(means[best], means[name]) for name in means}
    chosen = next(
        name
        for name in sorted(means, key=lambda name: _cost(results["methods"][name]))
        if not name.endswith(WITH_RERANK)
        and (name == best or compared_with[name].gain.low <= 0)
    )
    images = f"{compared_with[best].images:,} test images"
    if chosen == best == CLIP:
        return (
            chosen,
            f"Take the untouched model: no method was better on validation ({images}).",
        )
    compared = CLIP if chosen == best and CLIP in compared_with else chosen
    gain = compared_with[compared].gain.points(f"of mean R@1 among {images}")
    if chosen != best:
        if chosen == CLIP:
            name = "the untouched model"
        else:
            name = f"{chosen}, which costs less"
        return chosen, f"Take {name}: {best} is not certainly better, by {gain}."
    if compared == CLIP:
        return chosen, f"Take {best}: it is better than the untouched model, by {gain}."
    return chosen, f"Take {best}: it was the best on validation."


def _cost(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a sort key: the cost of serving, then that of a gallery, then that of
    training.
    """
    serving = result["serving"]
    seconds = float(np.mean([run["seconds"] for run in result["runs"]]))
    return (
        serving["bytes"],
        ("unchanged", "recomputed", "encoded again").index(serving["gallery"]),
        seconds,
    )


def _note_copies(
    splits: Mapping[str, Dataset],
    reports: Mapping[str, CleaningReport],
    cache: FeatureCache,
) -> None:
    """Report images with the same bytes under other names: a leak between splits, and
    in one split a wrong answer.
    """
    hashes = {split: cache.image_hashes(data) for split, data in splits.items()}
    for earlier, later in combinations(splits, 2):
        known = {*hashes[earlier].values()}
        copies = [
            name
            for name, content in hashes[later].items()
            if content in known and name not in hashes[earlier]
        ]
        reports[later].add(
            f"copies of images of {earlier}, so {later} measures nothing new on them",
            names=copies,
        )
    for split, own in hashes.items():
        times = Counter(own.values())
        same = [name for name, content in own.items() if times[content] > 1]
        reports[split].add(
            "images with a copy in the same split, which counts as a wrong answer",
            names=same,
        )


def _run_method(
    runner: MethodRunner,
    config: ModelConfig,
    seeds: int,
    grid: Sequence[float],
) -> dict[str, dict[str, Any]]:
    """Tune, train and test one method. Raise DivergedError if a run diverges.

    Returns:
        Results by the method's name; those of a second stage by the name with
        WITH_RERANK.
    """
    model = seeded_model(runner.backbone, config, 0)
    has_trainables = any(True for _ in model.trainables())
    lr, tuning = (
        runner.tune(config, grid)
        if grid and has_trainables
        else (runner.config.lr, None)
    )
    # zero-shot has no seed
    runs = [
        runner.test(config, seed, lr) for seed in range(seeds if has_trainables else 1)
    ]
    labelled = {config.method: runs}
    if "reranked" in runs[0]:
        labelled[config.method + WITH_RERANK] = [
            run | run.pop("reranked") for run in runs
        ]
    common = {
        "lr": lr if has_trainables else None,
        "tuning": tuning,
        "trainable": runs[0]["trainable"],
        "serving": serving_cost(model),
    }
    return {label: common | _summary(own) for label, own in labelled.items()}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    accuracy = [
        run["hard_negative_accuracy"]
        for run in runs
        if run["hard_negative_accuracy"] is not None
    ]
    return {
        "hard_negative_accuracy": spread(accuracy) if accuracy else None,
        **summarise([run["test"] for run in runs]),
        "runs": runs,
    }
