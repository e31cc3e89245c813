"""report.html: one file with its plots and images inside, which opens without a server or a network."""

from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path

from PIL import Image

from dcar_core.data import Dataset
from dcar_core.evaluation.tables import (
    MEASURES_NOTE,
    SIGNIFICANCE_NOTE,
    Results,
    best_method,
    column_means,
    data_rows,
    mean_categories,
    measures_rows,
    recall_rows,
    results_csv,
    results_markdown,
    settings_rows,
    significance_rows,
)
from dcar_core.images import open_image
from dcar_core.images.decoding import jpeg_data_uri
from dcar_core.util.errors import DataError

THUMBNAIL_SIZE = 96
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .best { font-weight: 700; }
svg { width: 100%; height: auto; fill: currentColor; margin: 1rem 0; }
figure { display: inline-flex; gap: .4rem; align-items: center; margin: .3rem 1.2rem .3rem 0; }
figure img { width: 72px; height: 72px; object-fit: contain; background: #fff; border: 1px solid var(--line); }
figcaption { max-width: 16rem; font-size: 13px; } details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def write_report(results: Results, test_data: Dataset, out: Path) -> None:
    """Write results.md, results.csv and report.html to `out`. `test_data` has the example images."""
    (out / "results.md").write_text(results_markdown(results), encoding="utf-8")
    (out / "results.csv").write_text(results_csv(results), encoding="utf-8")
    (out / "report.html").write_text(report_html(results, _thumbnails(test_data)), encoding="utf-8")


def report_html(results: Results, image_url: Callable[[str], str]) -> str:
    """Return the page. image_url: returns a data URL for the name of an image."""
    pairs, settings, plots = results["pairs"], results["training"], _plots(results)
    title = f"Retrieval on {results['data']}"
    tuning = "learning rates tuned on validation with equal budgets" if results["grid"] else "one learning rate"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Backbone {escape(results['backbone'])}; {pairs['train']:,} training pairs, {pairs['val']:,} validation "
        f"pairs, {pairs['test']:,} test pairs. {settings['epochs']} epochs, batches of {settings['batch_size']}, "
        f"{tuning}. Percent, mean ± standard deviation over seeds; bold is the best mean.</p>",
        _recall_table(results),
        *(f"<p>{escape(name)} is left out: {escape(reason)}</p>" for name, reason in results["diverged"].items()),
        plots["recall"],
        f"<h2>Significance</h2><p>{SIGNIFICANCE_NOTE}</p>",
        _plain_table(significance_rows(results)),
        plots["epochs"],
        f"<h2>Other measures</h2><p>{escape(MEASURES_NOTE)}</p>",
        _plain_table(measures_rows(results)),
        plots["shots"],
        "<h2>Settings and cost</h2>",
        _plain_table(settings_rows(results)),
        "<h2>Data</h2>",
        _plain_table(data_rows(results)),
        _confusions(results, image_url),
        _categories(results),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _plots(results: Results) -> dict[str, str]:
    """Return the plots by their place in the page; without matplotlib, a line that says what is missing."""
    try:
        from dcar_core.evaluation import plots
    except ImportError:
        return {"recall": "<p>Without plots: pip install 'dcar[plots]'</p>", "epochs": "", "shots": ""}
    methods = results["methods"]
    difference = f"Difference in mean R@1 to {results['baseline']}, with 95 % intervals"
    epochs = "Validation R@1 by epoch, mean of both directions; dots mark the epochs that were kept"
    return {
        "recall": plots.recall_plot(methods, "t2i", "Text-to-image recall: R@1, R@5, R@10 of each method")
        + plots.recall_plot(methods, "i2t", "Image-to-text recall: R@1, R@5, R@10 of each method")
        + plots.differences_plot(methods, difference),
        "epochs": plots.epochs_plot(methods, epochs),
        "shots": plots.shots_plot(methods, results["shots"], "Mean R@1 by training pairs of each category"),
    }


def _recall_table(results: Results) -> str:
    headings, *rows = recall_rows(results)
    means = [column_means(method) for method in results["methods"].values()]
    best = [max((mean for mean in column if mean is not None), default=None) for column in zip(*means, strict=True)]
    lines = []
    for number, (name, *cells) in enumerate(rows):
        row_means = means[number] if number < len(means) else [None] * len(best)  # diverged methods come last
        is_best = [mean is not None and mean == top for mean, top in zip(row_means, best, strict=True)]
        opening = ['<td class="best">' if mark else "<td>" for mark in is_best]
        marked = [f"{tag}{cell}</td>" for tag, cell in zip(opening, cells, strict=True)]
        lines.append([f"<td>{escape(name)}</td>", *marked])
    return _table(headings, lines)


def _plain_table(cells: list[list[str]]) -> str:
    headings, *rows = cells
    return _table(headings, [[f"<td>{escape(cell)}</td>" for cell in row] for row in rows])


def _confusions(results: Results, image_url: Callable[[str], str]) -> str:
    """Show each method's most confused categories with images; those of the best method are open."""
    best, parts = best_method(results), []
    for name, method in results["methods"].items():
        blocks = []
        for confusion in method["runs"][0]["confusions"]:
            examples = "".join(
                f'<figure><img src="{image_url(example["image"])}" alt="image of the caption"><span>→</span><img src="'
                f'{image_url(example["found"])}" alt="first result"><figcaption>{escape(example["caption"])}'
                f"</figcaption></figure>"
                for example in confusion["examples"]
            )
            blocks.append(
                f"<h4>{escape(confusion['category'])} → {escape(confusion['taken_for'])}: {confusion['count']} of "
                f"{confusion['of']} captions</h4>{examples}"
            )
        if blocks:
            attribute = " open" if name == best else ""
            summary = f"<summary>{escape(name)}, first seed</summary>"
            parts.append(f"<details{attribute}>{summary}{''.join(blocks)}</details>")
    if not parts:
        return ""
    return (
        "<h2>Most confused categories</h2><p>The image of the caption (left) and the first result (right), where "
        f"their categories differ.</p>{''.join(parts)}"
    )


def _categories(results: Results) -> str:
    """Show R@1 by category, as the mean of both directions; the best method's weakest categories come first."""
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
    table = _table(["category", "pairs", *means], rows)
    summary = f"{len(order)} categories, weakest first"
    return f"<h2>R@1 by category</h2><details><summary>{summary}</summary>{table}</details>"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _thumbnails(data: Dataset) -> Callable[[str], str]:
    @cache
    def thumbnail(name: str) -> str:
        try:
            image = open_image(data.read(name))
        except DataError:  # removed since the run; the report is still useful
            image = Image.new("RGB", (8, 8), "gray")
        return jpeg_data_uri(image, THUMBNAIL_SIZE)

    return thumbnail
