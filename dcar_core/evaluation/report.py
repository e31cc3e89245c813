"""report.html: one file that opens without a server or a network, its plots and pictures inside it."""

import base64
import io
from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path

from PIL import Image

from dcar_core.data import Dataset
from dcar_core.evaluation.plots import curves_plot, recall_plot
from dcar_core.evaluation.tables import (
    Results,
    best_method,
    csv_runs,
    markdown,
    mean_categories,
    means,
    recall_rows,
    settings_rows,
)
from dcar_core.images import open_image
from dcar_core.util.errors import DataError

THUMBNAIL = 96
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .best { font-weight: 700; }
svg { width: 100%; height: auto; fill: currentColor; font-size: 12px; margin: 1rem 0; }
svg .title { font-size: 14px; font-weight: 600; } svg .small { font-size: 11px; opacity: .75; }
svg .grid { stroke: currentColor; stroke-opacity: .18; }
figure { display: inline-flex; gap: .4rem; align-items: center; margin: .3rem 1.2rem .3rem 0; }
figure img { width: 72px; height: 72px; object-fit: contain; background: #fff; border: 1px solid var(--line); }
figcaption { max-width: 16rem; font-size: 13px; } details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def write_report(results: Results, testing: Dataset, out: Path) -> None:
    """results.md, results.csv and report.html in `out`. `testing` gives the pictures of the examples."""
    (out / "results.md").write_text(markdown(results), encoding="utf-8")
    (out / "results.csv").write_text(csv_runs(results), encoding="utf-8")
    (out / "report.html").write_text(html(results, _thumbnails(testing)), encoding="utf-8")


def html(results: Results, picture: Callable[[str], str]) -> str:
    """The page. `picture` gives an image's data URL by its name."""
    methods, pairs, settings = results["methods"], results["pairs"], results["training"]
    title = f"Retrieval on {results['data']}"
    tuned = "learning rates chosen on validation with the same budget" if results["grid"] else "one learning rate"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Backbone {escape(results['backbone'])}; {pairs['train']:,} pairs to train, {pairs['val']:,} to choose on, "
        f"{pairs['test']:,} to test. {settings['epochs']} epochs of batches of {settings['batch_size']}, {tuned}. "
        f"Percent, mean ± standard deviation over seeds; bold is the best mean.</p>",
        _recall_table(results),
        *(f"<p>{escape(name)} is left out: {escape(reason)}</p>" for name, reason in results["diverged"].items()),
        recall_plot(methods, "t2i", "Text-to-image recall: R@1, R@5, R@10 of each method"),
        recall_plot(methods, "i2t", "Image-to-text recall: R@1, R@5, R@10 of each method"),
        curves_plot(methods, "Validation R@1 by epoch, the mean of both ways; dots are the epochs kept"),
        "<h2>Settings</h2>",
        _settings_table(results),
        _confusions(results, picture),
        _categories(results),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _recall_table(results: Results) -> str:
    heads, *rows = recall_rows(results)
    measured = [means(found) for found in results["methods"].values()]
    best = [max((mean for mean in column if mean is not None), default=None) for column in zip(*measured, strict=True)]
    lines = []
    for number, (name, *cells) in enumerate(rows):  # those that diverged come last, and have no means
        found = measured[number] if number < len(measured) else [None] * len(best)
        marks = [mean is not None and mean == top for mean, top in zip(found, best, strict=True)]
        opened = ['<td class="best">' if mark else "<td>" for mark in marks]
        lines.append([f"<td>{escape(name)}</td>", *(f"{o}{cell}</td>" for o, cell in zip(opened, cells, strict=True))])
    return _table(heads, lines)


def _settings_table(results: Results) -> str:
    heads, *rows = settings_rows(results)
    return _table(heads, [[f"<td>{escape(cell)}</td>" for cell in row] for row in rows])


def _confusions(results: Results, picture: Callable[[str], str]) -> str:
    """For every method the category pairs that it confuses most, with pictures; the best method's are open."""
    best, parts = best_method(results), []
    for name, found in results["methods"].items():
        blocks = []
        for pair in found["runs"][0]["confusions"]:
            examples = "".join(
                f'<figure><img src="{picture(e["image"])}" alt="asked for"><span>→</span><img src="'
                f'{picture(e["found"])}" alt="found first"><figcaption>{escape(e["caption"])}</figcaption></figure>'
                for e in pair["examples"]
            )
            blocks.append(
                f"<h4>{escape(pair['category'])} → {escape(pair['taken_for'])}: {pair['count']} of {pair['of']} "
                f"captions</h4>{examples}"
            )
        if blocks:
            mark = " open" if name == best else ""
            parts.append(f"<details{mark}><summary>{escape(name)}, first seed</summary>{''.join(blocks)}</details>")
    if not parts:
        return ""
    return (
        "<h2>Most confused categories</h2><p>What was asked for (left) and what was found first (right), where the "
        f"two are of different categories.</p>{''.join(parts)}"
    )


def _categories(results: Results) -> str:
    """R@1 of each category by method, the mean of both ways; where the best method is weakest comes first."""
    means = {name: mean_categories(results, name) for name in results["methods"]}
    best = means[best_method(results)]
    if not best:
        return ""
    order = sorted(best, key=lambda c: (best[c]["t2i_r1"] + best[c]["i2t_r1"], c))
    rows = [
        [f"<td>{escape(category)}</td><td>{best[category]['pairs']:.0f}</td>"]
        + [f"<td>{(m[category]['t2i_r1'] + m[category]['i2t_r1']) / 2:.1f}</td>" for m in means.values()]
        for category in order
    ]
    inner = _table(["category", "pairs", *means], rows)
    summary = f"{len(order)} categories, weakest first"
    return f"<h2>R@1 by category</h2><details><summary>{summary}</summary>{inner}</details>"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _thumbnails(data: Dataset) -> Callable[[str], str]:
    @cache
    def thumbnail(name: str) -> str:
        try:
            image = open_image(data.read(name))
        except DataError:  # the picture went away since the run; the report is still of use
            image = Image.new("RGB", (8, 8), "gray")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

    return thumbnail
