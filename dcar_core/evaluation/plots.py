"""Plots as SVG text, without a plotting library: recall with its spread, differences to the baseline, curves.

- Text and axes take the page's own colour, so a plot fits light and dark pages.
- The methods' colours are Okabe and Ito's, chosen for colour-blind readers; after the eighth, lines are dashed.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from dcar_core.training.validation import mean_r1

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
WIDTH = 720
LABEL_WIDTH, ROW_HEIGHT, ROWS_TOP = 150, 30, 40  # of the recall plot
CURVES_LEFT, CURVES_RIGHT, CURVES_TOP, CURVES_BOTTOM = 50, WIDTH - 160, 34, 300


def recall_plot(methods: Mapping[str, Any], direction: str, title: str) -> str:
    """Draw R@1, R@5 and R@10 of one direction ("t2i" or "i2t").

    The large dot is the mean, the bar the standard deviation, and each small dot one seed.
    """
    bottom = ROWS_TOP + ROW_HEIGHT * len(methods)
    recalls = [
        run["test"][f"{direction}_r{k}"] for method in methods.values() for run in method["runs"] for k in (1, 5, 10)
    ]
    low, high = _bounds(recalls)
    parts = [f'<text x="{LABEL_WIDTH}" y="18" class="title">{escape(title)}</text>']
    parts.append(_vertical_grid(low, high, 28, bottom))
    for row, (name, method) in enumerate(methods.items()):
        y = ROWS_TOP + ROW_HEIGHT * (row + 0.5)
        parts.append(f'<text x="{LABEL_WIDTH - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for k in (1, 5, 10):
            parts.append(_recall_mark(name, method, direction, k, y, COLORS[row % len(COLORS)], (low, high)))
    return _svg(bottom + 28, parts, title)


def _recall_mark(
    name: str, method: dict[str, Any], direction: str, k: int, y: float, color: str, bounds: tuple[float, float]
) -> str:
    column = f"{direction}_r{k}"
    mean, std = method["mean"][column], method["std"][column]
    left, right, x = (_recall_x(value, bounds) for value in (mean - std, mean + std, mean))
    parts = [f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{color}" stroke-width="6" stroke-opacity=".35"/>']
    for run in method["runs"]:
        cx = _recall_x(run["test"][column], bounds)
        parts.append(f'<circle cx="{cx:.1f}" cy="{y + 7:.1f}" r="2" fill="{color}" fill-opacity=".6"/>')
    tooltip = escape(f"{name}: R@{k} {mean:.1f} ± {std:.1f}")
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"><title>{tooltip}</title></circle>')
    parts.append(f'<text x="{x:.1f}" y="{y - 8:.1f}" class="small" text-anchor="middle">{k}</text>')
    return "".join(parts)


def differences_plot(methods: Mapping[str, Any], title: str) -> str:
    """Draw each method's difference in mean R@1 to the baseline, with its 95 % interval."""
    differences = {name: m["difference"]["mean_r1"] for name, m in methods.items() if m["difference"] is not None}
    if not differences:
        return ""
    ends = [value for triple in differences.values() for value in triple]
    bounds = np.floor(min(*ends, 0) - 1), np.ceil(max(*ends, 0) + 1)
    bottom = ROWS_TOP + ROW_HEIGHT * len(differences)
    parts = [f'<text x="{LABEL_WIDTH}" y="18" class="title">{escape(title)}</text>']
    parts.append(_vertical_grid(*bounds, 28, bottom))
    zero = _recall_x(0, bounds)
    parts.append(f'<path d="M{zero:.1f} 28V{bottom}" stroke="currentColor"/>')
    for row, (name, (value, low, high)) in enumerate(differences.items()):
        y, color = ROWS_TOP + ROW_HEIGHT * (row + 0.5), COLORS[list(methods).index(name) % len(COLORS)]
        left, right, x = (_recall_x(end, bounds) for end in (low, high, value))
        tooltip = escape(f"{name}: {value:+.1f} ({low:+.1f} to {high:+.1f})")
        parts.append(f'<text x="{LABEL_WIDTH - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"><title>{tooltip}</title></circle>')
    return _svg(bottom + 28, parts, title)


def epochs_plot(methods: Mapping[str, Any], title: str) -> str:
    """Draw validation R@1 (mean of both directions) by epoch, one line a seed; a dot marks the epoch that was kept."""
    curves = []
    for name, method in methods.items():
        for run in method["runs"]:
            label = f"{name}, seed {run['seed']}: epoch {run['epoch']}, {mean_r1(run['val']):.1f}"
            points = [(record["epoch"], mean_r1(record)) for record in run["history"]]
            curves.append(_Curve(name, points, {run["epoch"] - 1: label}))
    last = max(len(curve.points) for curve in curves)
    ticks = {float(epoch): str(epoch) for epoch in range(1, last + 1, max(1, last // 10))}
    return _curves_plot(list(methods), curves, ticks, "epoch", title)


def shots_plot(methods: Mapping[str, Any], shots: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Draw mean R@1 by the number of training pairs of each category, one line a method, at equal distances."""
    curves, ticks = [], dict[float, str]()
    for name, spreads in shots.items():
        counts = sorted(spreads, key=int)
        ticks |= {float(x): count for x, count in enumerate(counts)}
        labels = [f"{name}, {count}: {spreads[count]['mean']:.1f} ± {spreads[count]['std']:.1f}" for count in counts]
        points = [(float(x), spreads[count]["mean"]) for x, count in enumerate(counts)]
        curves.append(_Curve(name, points, dict(enumerate(labels))))
    return _curves_plot(list(methods), curves, ticks, "pairs per category", title)


class _Curve(NamedTuple):
    """Points (x, percent) of a method, and tooltips of the points that get a dot."""

    method: str
    points: Sequence[tuple[float, float]]
    dots: Mapping[int, str]


def _curves_plot(
    methods: Sequence[str], curves: Sequence[_Curve], ticks: Mapping[float, str], x_label: str, title: str
) -> str:
    """Draw curves in the colours of their methods; "" without a point. ticks: labels of the x axis."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    low, high = _bounds([y for curve in curves for _, y in curve.points])
    left, right = min(ticks), max(*ticks, *(x for curve in curves for x, _ in curve.points), min(ticks) + 1)

    def place(x: float, score: float) -> tuple[float, float]:
        across = CURVES_LEFT + (CURVES_RIGHT - CURVES_LEFT) * (x - left) / (right - left)
        return across, CURVES_BOTTOM - (CURVES_BOTTOM - CURVES_TOP) * (score - low) / (high - low)

    parts = [f'<text x="{CURVES_LEFT}" y="18" class="title">{escape(title)}</text>']
    for value in _ticks(low, high):
        _, y = place(left, value)
        parts.append(f'<path d="M{CURVES_LEFT} {y:.1f}H{CURVES_RIGHT}" class="grid"/>')
        parts.append(f'<text x="{CURVES_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" class="small">{value:g}</text>')
    for tick, label in ticks.items():
        x, _ = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{CURVES_BOTTOM + 16}" class="small" text-anchor="middle">{label}</text>')
    legend = dict[str, str]()
    for curve in curves:
        row = methods.index(curve.method)
        color, dash = COLORS[row % len(COLORS)], "" if row < len(COLORS) else ' stroke-dasharray="5 3"'
        points = [place(*point) for point in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>')
        for index, tooltip in curve.dots.items():
            (x, y), tip = points[index], f"<title>{escape(tooltip)}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}">{tip}</circle>')
        legend[curve.method] = f'stroke="{color}" stroke-width="3"{dash}'
    for y, (name, style) in zip(range(CURVES_TOP, 10_000, 18), legend.items(), strict=False):
        parts.append(f'<path d="M{CURVES_RIGHT + 20} {y}h22" {style}/>')
        parts.append(f'<text x="{CURVES_RIGHT + 48}" y="{y + 4}">{escape(name)}</text>')
    middle = (CURVES_LEFT + CURVES_RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{CURVES_BOTTOM + 34}" class="small" text-anchor="middle">{x_label}</text>')
    return _svg(max(CURVES_BOTTOM + 42, CURVES_TOP + 18 * len(legend)), parts, title)


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis in percent: the values' range with a margin."""
    low, high = min(values), max(values)
    margin = max(1.0, 0.05 * (high - low))
    return max(0.0, np.floor(low - margin)), min(100.0, np.ceil(high + margin))


def _recall_x(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return LABEL_WIDTH + (WIDTH - LABEL_WIDTH - 20) * (value - low) / (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Return at most nine round values within the bounds."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if (high - low) / s <= 8)
    return [float(v) for v in np.arange(np.ceil(low / step) * step, high + 1e-9, step)]


def _vertical_grid(low: float, high: float, top: float, bottom: float) -> str:
    lines = []
    for value in _ticks(low, high):
        x = _recall_x(value, (low, high))
        lines.append(f'<path d="M{x:.1f} {top}V{bottom}" class="grid"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="small" text-anchor="middle">{value:g}</text>')
    return "".join(lines)
