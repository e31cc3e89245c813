"""Results as tables, in Markdown for results.md and the terminal, and as a plot.

All figures are percentages. In every table, the headings come first.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.training.validation import mean_r1
from dcar_core.util.errors import install_command
from dcar_core.util.metrics import Estimate

COLUMNS = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10")
HEADINGS = (
    "text-to-image R@1",
    "R@5",
    "R@10",
    "image-to-text R@1",
    "R@5",
    "R@10",
    "above swapped captions",
)
MIN_CATEGORY_PAIRS = 3  # R@1 of fewer pairs is noise
WEAKEST_CATEGORIES = 10
_RECALL_NOTE = (
    "R@k is the share of captions whose own image, or of images whose own caption, is"
    " among the first k. Above swapped captions: the share of images whose caption"
    " scores above all of its captions with another category or attribute. With rerank:"
    " the second stage sorts the first ten images of a caption."
)
_BOOTSTRAP_NOTE = (
    "Paired bootstrap over the test images with their captions, or over whole"
    " categories if training has none of them; hits averaged over seeds. It measures"
    " the error of the test queries, the spread above that of training."
)

Results = dict[str, Any]
Rows = list[list[str]]


def all_tables(results: Results) -> str:
    """Return the tables of methods as Markdown, for a terminal, below a line with their
    unit.
    """
    tables = (recall_rows, significance_rows, settings_rows)
    unit = (
        f"Percent among {results['test_images']:,} test images; {_spread_of(results)}."
    )
    return "\n".join([unit, *(markdown(rows) for t in tables if (rows := t(results)))])


def results_markdown(results: Results, plot: str) -> str:
    """Return results.md. plot: Markdown behind the table of recall."""
    pairs = results["pairs"]
    settings = results["training"]
    best = best_method(results)
    if results["grid"]:
        tuning = ", learning rates tuned on validation with equal budgets"
    else:
        tuning = ""
    if results["loss"] == "both":
        loss = ""
    else:
        loss = f" Only the {results['loss']} contrastive loss is used."
    summary = (
        f"Backbone {results['backbone']}; {pairs['train']:,} training pairs,"
        f" {pairs['val']:,} validation pairs, {pairs['test']:,} test pairs among"
        f" {results['test_images']:,} images. {settings['epochs']} epochs, batches of"
        f" {settings['batch_size']}{tuning}; {_spread_of(results)}, percent.{loss}"
    )
    notes = [
        f"{name} is left out: {reason}" for name, reason in results["diverged"].items()
    ]
    notes = [
        summary,
        _RECALL_NOTE,
        *notes,
        *filter(None, [results.get("recommendation")]),
    ]
    cleaned = [
        [split, f"{n:,}", case]
        for split, counts in results["cleaning"].items()
        for case, n in counts.items()
    ]
    sections = [
        ("Recall", notes, recall_rows(results)),
        ("Significance", [_BOOTSTRAP_NOTE], significance_rows(results)),
        ("Settings and cost", [], settings_rows(results)),
        ("Data", [], [["split", "cases", "finding"], *cleaned]),
        (f"Weakest categories of {best}", [], category_rows(results, best)),
    ]
    parts = [f"# {results['data']}"]
    for heading, texts, rows in sections:
        if rows:
            parts += [
                f"## {heading}",
                *texts,
                markdown(rows).rstrip(),
                *([plot] if heading == "Recall" else []),
            ]
    return "\n\n".join(parts) + "\n"


def recall_rows(results: Results) -> Rows:
    """Return recall and hard-negative accuracy of each method. Diverged methods come
    last.
    """
    rows = [["method", *HEADINGS]]
    for name, method in results["methods"].items():
        spreads = [
            {key: method[key][column] for key in ("mean", "std")} for column in COLUMNS
        ]
        rows.append(
            [name, *_cells(method, [*spreads, method["hard_negative_accuracy"]])]
        )
    return rows + [
        [name, *["diverged"] * len(COLUMNS), "-"] for name in results["diverged"]
    ]


def significance_rows(results: Results) -> Rows:
    """Return mean R@1 with its interval, and the difference to the untouched model."""
    rows = [
        ["method", "mean R@1 (95 % interval)", "difference to clip (95 % interval)"]
    ]
    for name, method in results["methods"].items():
        own = Estimate(*method["intervals"]["mean_r1"])
        difference = method["difference"]
        rows.append(
            [
                name,
                f"{own}",
                f"{Estimate(*difference['mean_r1']):+}" if difference else "-",
            ]
        )
    return rows


def settings_rows(results: Results) -> Rows:
    """Return, for each method, its parameters, cost of serving, seconds, and learning
    rate.
    """
    rows = [
        [
            "method",
            "trainable",
            "bytes per domain",
            "backbone",
            "gallery after training",
        ]
    ]
    rows[0] += ["seconds per run", "learning rate"]
    for name, method in results["methods"].items():
        cost = method["serving"]
        rate = "-" if method["lr"] is None else f"{method['lr']:g}"
        seconds = f"{np.mean([run['seconds'] for run in method['runs']]):.0f}"
        own = [
            f"{method['trainable']:,}",
            f"{cost['bytes']:,}",
            cost["backbone"],
            cost["gallery"],
            seconds,
            rate,
        ]
        rows.append([name, *own])
    return rows


def category_rows(results: Results, name: str) -> Rows:
    """Return R@1 by category, the weakest ones of a method; nothing without
    categories.
    """
    categories = mean_categories(results, name)
    large = {
        category: c
        for category, c in categories.items()
        if c["pairs"] >= MIN_CATEGORY_PAIRS
    } or categories
    weakest = sorted(large.items(), key=lambda item: (mean_r1(item[1]), item[0]))[
        :WEAKEST_CATEGORIES
    ]
    rows = [
        [category, str(c["pairs"]), f"{c['t2i_r1']:.1f}", f"{c['i2t_r1']:.1f}"]
        for category, c in weakest
    ]
    if rows:
        return [["category", "pairs", "text-to-image R@1", "image-to-text R@1"], *rows]
    return []


def best_method(results: Results) -> str:
    """Return the method with the best validation recall, as a user would choose it."""
    methods: dict[str, Any] = results["methods"]
    return max(
        methods,
        key=lambda name: np.mean(
            [mean_r1(run["val"]) for run in methods[name]["runs"]]
        ),
    )


def mean_categories(results: Results, name: str) -> dict[str, dict[str, float]]:
    """Return, for each category, its pairs and R@1 in both directions, as means over a
    method's seeds.
    """
    runs = [run["categories"] for run in results["methods"][name]["runs"]]
    return {
        category: (
            {
                key: sum(run[category][key] for run in runs) / len(runs)
                for key in ("t2i_r1", "i2t_r1")
            }
            | {"pairs": first["pairs"]}
        )
        for category, first in runs[0].items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and sample standard deviation."""
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and sample standard deviation over runs, for each measure."""
    spreads = {column: spread([run[column] for run in runs]) for column in COLUMNS}
    return {
        key: {column: spreads[column][key] for column in COLUMNS}
        for key in ("mean", "std")
    }


def _spread_of(results: Results) -> str:
    seeds = max(len(method["runs"]) for method in results["methods"].values())
    return f"{seeds} seed{'s' if seeds > 1 else ''}, mean ± standard deviation"


def _cells(
    method: dict[str, Any], spreads: Iterable[dict[str, float] | None]
) -> list[str]:
    form = "{mean:.1f} ± {std:.1f}" if len(method["runs"]) > 1 else "{mean:.1f}"
    return ["-" if spread is None else form.format(**spread) for spread in spreads]


def markdown(rows: Rows) -> str:
    """Return a table whose first row is its head."""
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return (
        "\n".join(
            f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)
        )
        + "\n"
    )


def plot_recall(results: Results, path: Path) -> str:
    """Draw mean, standard deviation and a dot for each seed; return Markdown with the
    plot, or with what is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return f"Without a plot: {install_command('plots')}"
    methods = results["methods"]
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "dcar",
            "axes.grid": True,
            "grid.alpha": 0.3,
        }
    ):
        figure = Figure(figsize=(11, 1 + 0.4 * len(methods)), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        both[0].set_yticks(range(len(methods)), methods)
        both[0].set_ylim(len(methods) - 0.5, -0.5)
        for axes, direction, title in zip(
            both,
            ("t2i", "i2t"),
            ("Text-to-image", "Image-to-text"),
            strict=True,
        ):
            axes.set_title(f"{title} R@1, R@5, R@10")
            axes.set_xlabel("percent")
            for row, method in enumerate(methods.values()):
                for column in (f"{direction}_r{k}" for k in (1, 5, 10)):
                    mean = method["mean"][column]
                    seeds = [run["test"][column] for run in method["runs"]]
                    axes.errorbar(
                        mean,
                        row,
                        xerr=method["std"][column],
                        fmt="o",
                        color=f"C{row}",
                        capsize=3,
                    )
                    axes.plot(
                        seeds,
                        [row + 0.25] * len(seeds),
                        ".",
                        color=f"C{row}",
                        alpha=0.6,
                    )
        figure.savefig(path, metadata={"Date": None})
    return f"![Recall of each method]({path.name})"
