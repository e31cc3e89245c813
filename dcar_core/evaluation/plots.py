"""Plots as SVG text: recall with its spread, differences to the baseline, and curves.

- matplotlib is an optional dependency; the report does without plots where it is missing.
- Text and axes take the page's own colour, so a plot fits light and dark pages.
"""

import io
from collections.abc import Sequence
from typing import Any, cast

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcar_core.evaluation.tables import Results
from dcar_core.training.validation import mean_r1

COLORS = matplotlib.style.library["tableau-colorblind10"]["axes.prop_cycle"].by_key()["color"]
_LINES = ("-", "--", ":")  # after the tenth method, colours repeat with another line
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dcar", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def draw_plots(results: Results) -> dict[str, str]:
    """Return the plots by the heading of their section; "" where there is nothing to draw."""
    with matplotlib.rc_context(_STYLE):
        return {
            "Recall": _recall_plot(results, "t2i", "Text-to-image") + _recall_plot(results, "i2t", "Image-to-text"),
            "Significance": _differences_plot(results),
            "Other measures": _epochs_plot(results),
            "Few pairs": _shots_plot(results),
        }


def _recall_plot(results: Results, direction: str, name: str) -> str:
    """Draw R@1, R@5 and R@10 of one direction: mean, standard deviation, and a dot for each seed."""
    methods = results["methods"]
    axes = _rows_of(list(methods), f"{name} recall: R@1, R@5, R@10 of each method", "percent")
    for row, method in enumerate(methods.values()):
        for k in (1, 5, 10):
            column, color = f"{direction}_r{k}", COLORS[row % len(COLORS)]
            mean = method["mean"][column]
            axes.errorbar(mean, row, xerr=method["std"][column], fmt="o", color=color, capsize=3)
            axes.annotate(str(k), (mean, row), (0, 6), textcoords="offset points", ha="center")
            seeds = [run["test"][column] for run in method["runs"]]
            axes.plot(seeds, [row + 0.25] * len(seeds), ".", color=color, alpha=0.6)
    return _svg(axes)


def _differences_plot(results: Results) -> str:
    """Draw each method's difference in mean R@1 to the baseline, with its 95 % interval."""
    methods = results["methods"]
    differences = {name: m["difference"]["mean_r1"] for name, m in methods.items() if m["difference"] is not None}
    if not differences:
        return ""
    title = f"Difference in mean R@1 to {results['baseline']}, with 95 % intervals"
    axes = _rows_of(list(differences), title, "percentage points")
    axes.axvline(0, color="black")
    for row, (name, (value, low, high)) in enumerate(differences.items()):
        color = COLORS[list(methods).index(name) % len(COLORS)]
        axes.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3)
    return _svg(axes)


def _epochs_plot(results: Results) -> str:
    """Draw validation R@1 by epoch, one line a seed; a dot marks the epoch that was kept."""
    title = "Validation R@1 by epoch; dots mark the epochs that were kept"
    curves = [
        (name, [record["epoch"] for record in run["history"]], list(map(mean_r1, run["history"])), [run["epoch"] - 1])
        for name, method in results["methods"].items()
        for run in method["runs"]
        if run["history"]
    ]
    return _curves_plot(results, curves, title, "epoch")


def _shots_plot(results: Results) -> str:
    """Draw mean R@1 by the number of training pairs of each category, at equal distances."""
    curves = [
        (name, list(spreads), [spread["mean"] for spread in spreads.values()], list(range(len(spreads))))
        for name, spreads in results["shots"].items()
        if spreads
    ]
    return _curves_plot(results, curves, "Mean R@1 by training pairs of each category", "pairs per category")


def _curves_plot(
    results: Results, curves: Sequence[tuple[str, Sequence[Any], list[float], list[int]]], title: str, label: str
) -> str:
    """Draw curves (method, x, percent, places of dots) in the colours of their methods."""
    if not curves:
        return ""
    axes = _axes(title, label, 4)
    axes.set_ylabel("percent")
    methods, labelled = list(results["methods"]), set[str]()
    for name, x, y, dots in curves:
        repeat, row = divmod(methods.index(name), len(COLORS))
        text = name if name not in labelled else "_"  # a leading underscore is left out of the legend
        axes.plot(x, y, _LINES[repeat % len(_LINES)], color=COLORS[row], marker="o", markevery=dots, label=text)
        labelled.add(name)
    if label == "epoch":
        axes.locator_params(axis="x", integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _svg(axes)


def _rows_of(names: Sequence[str], title: str, label: str) -> Axes:
    axes = _axes(title, label, 1 + 0.4 * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return axes


def _axes(title: str, label: str, height: float) -> Axes:
    axes = Figure(figsize=(8, height), layout="constrained").subplots()
    cast("Figure", axes.figure).suptitle(title)  # over the whole width: beside a legend, axes are narrower than a title
    axes.set_xlabel(label)
    return axes


def _svg(axes: Axes) -> str:
    buffer, figure = io.StringIO(), cast("Figure", axes.figure)
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")
