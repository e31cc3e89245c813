"""Plots as SVG text: recall with its spread, differences to the baseline, and curves.

- matplotlib is an optional dependency; the report does without plots where it is missing.
- Text and axes take the page's own colour, so a plot fits light and dark pages.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcar_core.training.validation import mean_r1

COLORS = matplotlib.style.library["tableau-colorblind10"]["axes.prop_cycle"].by_key()["color"]
_LINES = ("-", "--", ":")  # after the tenth method, colours repeat with another line
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "dcar", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def recall_plot(methods: Mapping[str, Any], direction: str, title: str) -> str:
    """Draw R@1, R@5 and R@10 of one direction ("t2i" or "i2t"): mean, standard deviation, and a dot for each seed."""
    with matplotlib.rc_context(_STYLE):
        axes = _axes(title, "percent", 1 + 0.4 * len(methods))
        for row, method in enumerate(methods.values()):
            for k in (1, 5, 10):
                column, color = f"{direction}_r{k}", COLORS[row % len(COLORS)]
                mean = method["mean"][column]
                axes.errorbar(mean, row, xerr=method["std"][column], fmt="o", color=color, capsize=3)
                axes.annotate(str(k), (mean, row), (0, 6), textcoords="offset points", ha="center")
                seeds = [run["test"][column] for run in method["runs"]]
                axes.plot(seeds, [row + 0.25] * len(seeds), ".", color=color, alpha=0.6)
        _name_rows(axes, list(methods))
        return _svg(axes)


def differences_plot(methods: Mapping[str, Any], title: str) -> str:
    """Draw each method's difference in mean R@1 to the baseline, with its 95 % interval; "" without differences."""
    differences = {name: m["difference"]["mean_r1"] for name, m in methods.items() if m["difference"] is not None}
    if not differences:
        return ""
    with matplotlib.rc_context(_STYLE):
        axes = _axes(title, "percentage points", 1 + 0.4 * len(differences))
        axes.axvline(0, color="black")
        for row, (name, (value, low, high)) in enumerate(differences.items()):
            color = COLORS[list(methods).index(name) % len(COLORS)]
            axes.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3)
        _name_rows(axes, list(differences))
        return _svg(axes)


def epochs_plot(methods: Mapping[str, Any], title: str) -> str:
    """Draw validation R@1 (mean of both directions) by epoch, one line a seed; a dot marks the epoch that was kept."""
    curves = [
        (name, [record["epoch"] for record in run["history"]], [mean_r1(record) for record in run["history"]],
         [run["epoch"] - 1])
        for name, method in methods.items() for run in method["runs"] if run["history"]
    ]  # fmt: skip
    return _curves_plot(list(methods), curves, "epoch", title)


def shots_plot(methods: Mapping[str, Any], shots: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Draw mean R@1 by the number of training pairs of each category, one line a method, at equal distances."""
    curves = []
    for name, spreads in shots.items():
        counts = sorted(spreads, key=int)
        if counts:
            curves.append((name, counts, [spreads[count]["mean"] for count in counts], list(range(len(counts)))))
    return _curves_plot(list(methods), curves, "pairs per category", title)


def _curves_plot(
    methods: Sequence[str],
    curves: Sequence[tuple[str, Sequence[int | str], Sequence[float], list[int]]],
    label: str,
    title: str,
) -> str:
    """Draw curves (method, x, percent, rows with a dot) in the colours of their methods; "" without curves."""
    if not curves:
        return ""
    with matplotlib.rc_context(_STYLE):
        axes = _axes(title, label, 4)
        axes.set_ylabel("percent")
        labelled = set[str]()
        for name, x, y, dots in curves:
            repeat, row = divmod(methods.index(name), len(COLORS))
            line = _LINES[repeat % len(_LINES)]
            text = name if name not in labelled else "_"  # a leading underscore is left out of the legend
            axes.plot(x, y, line, color=COLORS[row], marker="o", markevery=dots, label=text)
            labelled.add(name)
        if label == "epoch":
            axes.locator_params(axis="x", integer=True)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return _svg(axes)


def _axes(title: str, label: str, height: float) -> Axes:
    axes = Figure(figsize=(8, height), layout="constrained").subplots()
    axes.set_title(title)
    axes.set_xlabel(label)
    return axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _svg(axes: Axes) -> str:
    buffer, figure = io.StringIO(), cast("Figure", axes.figure)
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")
