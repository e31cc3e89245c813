"""Two small plots as SVG text, without a plotting library: recall by method with its spread, and training curves.

Text and axes take the page's own colour; the methods' colours are Okabe and Ito's, which colour-blind people can tell
apart, and a dash pattern tells methods apart beyond the eighth.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dcar_core.training.validation import mean_r1

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
WIDTH, LEFT, ROW = 720, 150, 30


def recall_plot(methods: Mapping[str, Any], direction: str, title: str) -> str:
    """R@1, R@5 and R@10 of one direction ("t2i" or "i2t"): mean, standard deviation as a bar, each seed as a dot."""
    bottom = 40 + ROW * len(methods)
    low, high = _bounds(
        [run["test"][f"{direction}_r{k}"] for m in methods.values() for run in m["runs"] for k in (1, 5, 10)]
    )
    parts = [f'<text x="{LEFT}" y="18" class="title">{escape(title)}</text>', _ticks(low, high, 28, bottom)]
    for row, (name, found) in enumerate(methods.items()):
        y, color = 40 + ROW * row + ROW / 2, COLORS[row % len(COLORS)]
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for k in (1, 5, 10):
            column = f"{direction}_r{k}"
            mean, std = found["mean"][column], found["std"][column]
            a, b, x = (_x(value, low, high) for value in (mean - std, mean + std, mean))
            parts.append(f'<path d="M{a:.1f} {y:.1f}H{b:.1f}" stroke="{color}" stroke-width="6" stroke-opacity=".35"/>')
            for run in found["runs"]:
                dot = f'cx="{_x(run["test"][column], low, high):.1f}" cy="{y + 7:.1f}" r="2"'
                parts.append(f'<circle {dot} fill="{color}" fill-opacity=".6"/>')
            tip = f"{name}: R@{k} {mean:.1f} ± {std:.1f}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"><title>{escape(tip)}</title></circle>'
                f'<text x="{x:.1f}" y="{y - 8:.1f}" class="small" text-anchor="middle">{k}</text>'
            )
    return _svg(bottom + 28, parts, title)


def curves_plot(methods: Mapping[str, Any], title: str) -> str:
    """Validation R@1 (the mean of both ways) by epoch: a thin line for a seed, a dot for the epoch that was kept."""
    drawn = {name: m for name, m in methods.items() if any(run["history"] for run in m["runs"])}
    if not drawn:
        return ""
    top, bottom = 34, 300
    scores = [mean_r1(line) for m in drawn.values() for run in m["runs"] for line in run["history"]]
    low, high = _bounds(scores)
    last = max(len(run["history"]) for m in drawn.values() for run in m["runs"])

    def at(epoch: int, score: float) -> tuple[float, float]:
        x = 50 + (WIDTH - 210) * ((epoch - 1) / max(1, last - 1))
        return x, bottom - (bottom - top) * (score - low) / (high - low)

    parts = [f'<text x="50" y="18" class="title">{escape(title)}</text>']
    for value in _steps(low, high):
        y = at(1, value)[1]
        parts.append(f'<path d="M50 {y:.1f}H{WIDTH - 160}" class="grid"/>')
        parts.append(f'<text x="42" y="{y + 4:.1f}" text-anchor="end" class="small">{value:g}</text>')
    for epoch in range(1, last + 1, max(1, last // 10)):
        x = at(epoch, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="small" text-anchor="middle">{epoch}</text>')
    for row, (name, found) in enumerate(methods.items()):
        if name not in drawn:
            continue
        color, dash = COLORS[row % len(COLORS)], "" if row < len(COLORS) else ' stroke-dasharray="5 3"'
        for run in found["runs"]:
            points = [at(line["epoch"], mean_r1(line)) for line in run["history"]]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>')
            x, y = points[run["epoch"] - 1]
            tip = f"{name}, seed {run['seed']}: epoch {run['epoch']}, {mean_r1(run['val']):.1f}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"><title>{escape(tip)}</title></circle>'
            )
        y = top + 18 * list(drawn).index(name)
        parts.append(f'<path d="M{WIDTH - 140} {y}h22" stroke="{color}" stroke-width="3"{dash}/>')
        parts.append(f'<text x="{WIDTH - 112}" y="{y + 4}">{escape(name)}</text>')
    parts.append(
        f'<text x="{50 + (WIDTH - 210) / 2:.0f}" y="{bottom + 34}" class="small" text-anchor="middle">epoch</text>'
    )
    return _svg(bottom + 42, parts, title)


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(1.0, 0.05 * (high - low))
    return max(0.0, np.floor(low - margin)), min(100.0, np.ceil(high + margin))


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (WIDTH - LEFT - 20) * (value - low) / (high - low)


def _steps(low: float, high: float) -> list[float]:
    step = next(s for s in (1, 2, 5, 10, 20, 50) if (high - low) / s <= 8)
    return [float(v) for v in np.arange(np.ceil(low / step) * step, high + 1e-9, step)]


def _ticks(low: float, high: float, top: float, bottom: float) -> str:
    lines = []
    for value in _steps(low, high):
        x = _x(value, low, high)
        lines.append(f'<path d="M{x:.1f} {top}V{bottom}" class="grid"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="small" text-anchor="middle">{value:g}</text>')
    return "".join(lines)
