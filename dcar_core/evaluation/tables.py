"""Results as Markdown and CSV tables. All figures are percentages."""

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Any

from dcar_core.training.validation import mean_r1

COLUMNS = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10")
HEADINGS = ("text-to-image R@1", "R@5", "R@10", "image-to-text R@1", "R@5", "R@10")
HARD_NEGATIVES = "above its hard negatives"
MIN_CATEGORY_PAIRS = 3  # R@1 of fewer pairs is noise
WEAKEST_CATEGORIES = 10
SIGNIFICANCE_NOTE = (
    "Paired bootstrap over the test images with their captions, hits averaged over seeds; the baseline is the best one "
    "on validation. It measures the error of the test queries, the spread above that of training."
)

MEASURES_NOTE = (
    "nDCG@10 counts every image that a caption describes, and every caption of an image, as right. R@1 of seen and "
    "unseen categories is that of their test pairs among all test images."
)
SHOTS_NOTE = "Mean R@1 after training on this number of pairs of each category:"

Results = dict[str, Any]


def all_tables(results: Results) -> str:
    """Return every table as Markdown, for a terminal, below a line with their unit."""
    tables = (recall_rows, significance_rows, measures_rows, shots_rows, settings_rows)
    texts = (_markdown(rows) for table in tables if (rows := table(results)))
    return "\n".join([f"Percent; {_spread_of(results)}.", *texts])


def recall_rows(results: Results) -> list[list[str]]:
    """Return recall and hard-negative accuracy of each method: mean ± standard deviation over seeds.

    As in every table here, headings come first. Diverged methods come last.
    """
    rows = [["method", *HEADINGS, HARD_NEGATIVES]]
    for name, method in results["methods"].items():
        stds = [*(method["std"][column] for column in COLUMNS), (method["hard_negative_accuracy"] or {}).get("std")]
        has_spread = len(method["runs"]) > 1
        cells = zip(column_means(method), stds, strict=True)
        rows.append([name, *(_mean_and_std(mean, std, has_spread) for mean, std in cells)])
    return rows + [[name, *["diverged"] * len(COLUMNS), "-"] for name in results["diverged"]]


def column_means(method: dict[str, Any]) -> list[float | None]:
    """Return a method's mean in each column of `recall_rows`; None for hard negatives if the data have none."""
    return [*(method["mean"][column] for column in COLUMNS), (method["hard_negative_accuracy"] or {}).get("mean")]


def results_markdown(results: Results) -> str:
    """Return results.md: recall, settings, the weakest categories and the most frequent confusions."""
    pairs, settings = results["pairs"], results["training"]
    loss = "" if results["loss"] == "both" else f" Only the {results['loss']} contrastive loss is used."
    parts = [
        f"# {results['data']}",
        f"Backbone {results['backbone']}; {pairs['train']:,} training pairs, {pairs['val']:,} validation pairs, "
        f"{pairs['test']:,} test pairs. {settings['epochs']} epochs, batches of {settings['batch_size']}; "
        f"{_spread_of(results)}, percent.{loss}",
        _markdown(recall_rows(results)),
        "## Significance",
        SIGNIFICANCE_NOTE,
        _markdown(significance_rows(results)),
        *(f"{name} is left out: {reason}" for name, reason in results["diverged"].items()),
        "## Other measures",
        MEASURES_NOTE,
        _markdown(measures_rows(results)),
        *([SHOTS_NOTE, _markdown(shots)] if (shots := shots_rows(results)) else []),
        "## Settings and cost",
        _markdown(settings_rows(results)),
        "## Data",
        _markdown(data_rows(results)),
    ]
    best = best_method(results)
    categories = mean_categories(results, best)
    if categories:
        large = {name: c for name, c in categories.items() if c["pairs"] >= MIN_CATEGORY_PAIRS} or categories
        weakest = sorted(large.items(), key=lambda item: (item[1]["t2i_r1"] + item[1]["i2t_r1"], item[0]))
        rows = [["category", "pairs", "text-to-image R@1", "image-to-text R@1"]]
        rows += [
            [name, str(c["pairs"]), f"{c['t2i_r1']:.1f}", f"{c['i2t_r1']:.1f}"]
            for name, c in weakest[:WEAKEST_CATEGORIES]
        ]
        parts += [f"## Weakest categories of {best}", _markdown(rows)]
    confusions = results["methods"][best]["runs"][0]["confusions"]
    if confusions:
        rows = [["category of the caption", "category of the first image", "captions"]]
        rows += [[c["category"], c["taken_for"], f"{c['count']} of {c['of']}"] for c in confusions]
        parts += [f"## Most confused categories of {best}", _markdown(rows)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _spread_of(results: Results) -> str:
    seeds = max(len(method["runs"]) for method in results["methods"].values())
    return f"{seeds} seed{'s' if seeds > 1 else ''}, mean ± standard deviation"


def significance_rows(results: Results) -> list[list[str]]:
    """Return mean R@1 with its interval, and the difference to the best baseline with its p-value."""
    rows = [["method", "mean R@1 (95 % interval)"]]
    baseline = results["baseline"]
    if baseline is not None:
        rows[0] += [f"difference to {baseline} (95 % interval)", "p"]
    for name, method in results["methods"].items():
        value, low, high = method["intervals"]["mean_r1"]
        row, difference = [name, f"{value:.1f} ({low:.1f} to {high:.1f})"], method["difference"]
        if difference is not None:
            value, low, high = difference["mean_r1"]
            row += [f"{value:+.1f} ({low:+.1f} to {high:+.1f})", f"{difference['p']:.4f}"]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return rows


def measures_rows(results: Results) -> list[list[str]]:
    """Return the other measures of each method: mean ± standard deviation over seeds."""
    names = list(next(iter(results["methods"].values()))["measures"])
    rows = [["method", *names]]
    for name, method in results["methods"].items():
        has_spread = len(method["runs"]) > 1
        cells = [method["measures"][measure] for measure in names]
        rows.append([name, *(_mean_and_std(cell["mean"], cell["std"], has_spread) for cell in cells)])
    return rows


def data_rows(results: Results) -> list[list[str]]:
    """Return what was found while the splits were read, with the number of cases."""
    found = [(split, phrase, n) for split, counts in results["cleaning"].items() for phrase, n in counts.items()]
    return [["split", "cases", "finding"], *([split, f"{n:,}", phrase] for split, phrase, n in found)]


def shots_rows(results: Results) -> list[list[str]]:
    """Return mean R@1 after training on few pairs per category, the last column on all; nothing if not measured."""
    counts = list(next(iter(results["shots"].values()), {}))
    if not counts:
        return []
    rows = [["method", *counts, "all"]]
    for name, method in results["methods"].items():
        cells, has_spread = results["shots"][name], len(method["runs"]) > 1
        spreads = [_mean_and_std(cells[count]["mean"], cells[count]["std"], has_spread) for count in counts]
        whole = [mean_r1(run["test"]) for run in method["runs"]]
        deviation = statistics.stdev(whole) if has_spread else 0.0
        rows.append([name, *spreads, _mean_and_std(statistics.mean(whole), deviation, has_spread)])
    return rows


def settings_rows(results: Results) -> list[list[str]]:
    """Return, for each method, its parameters, cost of serving, query weights, seconds, and tuned learning rate."""
    grid = [f"{lr:g}" for lr in results["grid"] or ()]
    rows = [["method", "trainable", "bytes per domain", "backbone", "gallery after training"]]
    rows[0] += ["query weights", "seconds per run", "learning rate"]
    rows[0] += [f"validation R@1 at {lr}" for lr in grid]
    for name, method in results["methods"].items():
        chosen = f"{method['lr']:g}" if method["lr"] is not None else "-"
        seconds = sum(run["seconds"] for run in method["runs"]) / len(method["runs"])
        tuning = method["tuning"]
        scores = [tuning.get(lr) if tuning else None for lr in grid]
        cells = [f"{score:.1f}" if score is not None else "diverged" if tuning else "-" for score in scores]
        cost = method["serving"]
        row = [name, f"{method['trainable']:,}", f"{cost['bytes']:,}", cost["backbone"], cost["gallery"]]
        rows.append([*row, query_weights(method), f"{seconds:.0f}", chosen, *cells])
    return rows


def query_weights(method: dict[str, Any]) -> str:
    """Return the token weights that validation chose for the queries of a method's runs: "predicted" or "none"."""
    runs = method["runs"]
    predicted = sum(run["query"] == "predicted" for run in runs)
    return f"predicted in {predicted} of {len(runs)}" if 0 < predicted < len(runs) else str(runs[0]["query"])


def best_method(results: Results, names: Sequence[str] | None = None) -> str:
    """Return the method (of `names`, or of all) with the best validation recall, as a user would choose it."""
    methods = results["methods"]

    def validation(name: str) -> float:
        runs = methods[name]["runs"]
        return float(sum(run["val"]["t2i_r1"] + run["val"]["i2t_r1"] for run in runs) / len(runs))

    return max(list(methods) if names is None else names, key=validation)


def mean_categories(results: Results, name: str) -> dict[str, dict[str, float]]:
    """Return, for each category, its pairs and R@1 in both directions, as means over a method's seeds."""
    runs = [run["categories"] for run in results["methods"][name]["runs"]]
    return {
        category: {key: sum(run[category][key] for run in runs) / len(runs) for key in ("t2i_r1", "i2t_r1")}
        | {"pairs": first["pairs"]}
        for category, first in runs[0].items()
    }


def results_csv(results: Results) -> str:
    """Return results.csv: one line for each run."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "seed", "lr", "trainable", "query_weights", "epoch", "seconds", *COLUMNS, "hard_negative_accuracy"]
    )
    for name, method in results["methods"].items():
        for run in method["runs"]:
            accuracy = run["hard_negative_accuracy"]
            lr = "" if method["lr"] is None else run["lr"]
            writer.writerow(
                [name, run["seed"], lr, run["trainable"], run["query"], run["epoch"], run["seconds"]]
                + [f"{run['test'][column]:.3f}" for column in COLUMNS]
                + ["" if accuracy is None else f"{accuracy:.3f}"]
            )
    return text.getvalue()


def _mean_and_std(mean: float | None, std: float | None, has_spread: bool) -> str:
    if mean is None:
        return "-"
    return f"{mean:.1f} ± {std:.1f}" if has_spread else f"{mean:.1f}"


def _markdown(rows: list[list[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
