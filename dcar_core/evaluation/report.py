"""report.html: one file with its plots and images inside, which opens without a server or a network."""

import math
from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path

from PIL import Image

from dcar_core.data import Dataset
from dcar_core.evaluation.tables import Results, Rows, best_method, results_csv, results_markdown, sections
from dcar_core.images.decoding import jpeg_data_uri
from dcar_core.util.errors import DataError
from dcar_core.util.html import html_page

THUMBNAIL_SIZE = 96


def write_report(results: Results, test_data: Dataset, out: Path) -> None:
    """Write results.md, results.csv and report.html to `out`. `test_data` has the example images."""

    @cache
    def thumbnail(name: str) -> str:
        try:
            return jpeg_data_uri(test_data.read(name), THUMBNAIL_SIZE)
        except DataError:  # removed since the run; the report is still useful
            return jpeg_data_uri(Image.new("RGB", (8, 8), "gray"), THUMBNAIL_SIZE)

    (out / "results.md").write_text(results_markdown(results), encoding="utf-8")
    (out / "results.csv").write_text(results_csv(results), encoding="utf-8")
    (out / "report.html").write_text(report_html(results, thumbnail), encoding="utf-8")


def report_html(results: Results, image_url: Callable[[str], str]) -> str:
    """Return the page: each section with its plots, and examples. image_url: a data URL for the name of an image."""
    plots, parts = _plots(results), list[str]()
    for heading, notes, rows in sections(results):
        parts += [f"<h2>{escape(heading)}</h2>", *(f"<p>{escape(note)}</p>" for note in notes)]
        parts += [_table(rows, marks_best=heading == "Recall"), plots.get(heading, "")]
    parts.append(_confusions(results, image_url))
    return html_page(f"Retrieval on {results['data']}", "".join(parts))


def _plots(results: Results) -> dict[str, str]:
    """Return the plots by their section; without matplotlib, a line that says what is missing."""
    try:
        from dcar_core.evaluation.plots import draw_plots
    except ImportError:
        return {"Recall": "<p>Without plots: pip install 'dcar[plots]'</p>"}
    return draw_plots(results)


def _confusions(results: Results, image_url: Callable[[str], str]) -> str:
    """Show each method's most confused categories with images; those of the best method are open."""
    best, parts = best_method(results), list[str]()
    for name, method in results["methods"].items():
        blocks = ""
        for confusion in method["runs"][0]["confusions"]:
            blocks += (
                f"<h4>{escape(confusion['category'])} → {escape(confusion['taken_for'])}: {confusion['count']} of "
                f"{confusion['of']} captions</h4>"
            )
            for example in confusion["examples"]:
                blocks += (
                    f'<figure><img src="{image_url(example["image"])}" alt="image of the caption"><span>→</span>'
                    f'<img src="{image_url(example["found"])}" alt="first result">'
                    f"<figcaption>{escape(example['caption'])}</figcaption></figure>"
                )
        if blocks:
            opened = " open" if name == best else ""
            parts.append(f"<details{opened}><summary>{escape(name)}, first seed</summary>{blocks}</details>")
    note = "The image of the caption (left) and the first result (right), where their categories differ."
    return f"<h2>Examples of confusions</h2><p>{note}</p>{''.join(parts)}" if parts else ""


def _table(rows: Rows, *, marks_best: bool) -> str:
    """Return an HTML table. marks_best: the highest mean of each column is bold."""
    headings, *body = rows
    tops = [max(map(_mean, column)) if marks_best else math.inf for column in zip(*body, strict=True)]
    html = f"<tr>{''.join(f'<th>{escape(heading)}</th>' for heading in headings)}</tr>"
    for row in body:
        tags = [' class="best"' if 0 <= _mean(cell) == top else "" for cell, top in zip(row, tops, strict=True)]
        html += f"<tr>{''.join(f'<td{tag}>{escape(cell)}</td>' for tag, cell in zip(tags, row, strict=True))}</tr>"
    return f'<div class="wide"><table>{html}</table></div>'


def _mean(cell: str) -> float:
    """Return the mean that a cell begins with; -1 if it is something else."""
    first = cell.partition(" ")[0]
    return float(first) if first.replace(".", "").isdecimal() else -1.0
