"""Tables and report of known results."""

import csv
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dcar_core.evaluation import compare, summarise
from dcar_core.evaluation.comparison import best_baseline
from dcar_core.evaluation.report import report_html
from dcar_core.evaluation.tables import (
    COLUMNS,
    best_method,
    mean_categories,
    query_weights,
    results_csv,
    results_markdown,
    shots_rows,
)
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import TrainConfig
from tests.support.parts import needs

QUICK = TrainConfig(epochs=2, batch_size=6)


def example_run(seed: int, val: float, test: float, weak: float) -> dict[str, Any]:
    """Return a run's record. weak: R@1 of the category "weak"."""
    return {
        "seed": seed, "lr": 2e-3, "trainable": 5, "query": "none", "epoch": 1, "seconds": 1.0, "history": [],
        "val": dict.fromkeys(COLUMNS, val), "test": {c: test + i for i, c in enumerate(COLUMNS)},
        "hard_negative_accuracy": test, "confusions": [], "measures": {"nDCG@10 text-to-image": test},
        "categories": {
            "known": {"pairs": 3, "t2i_r1": 90.0, "i2t_r1": 80.0},
            "rare": {"pairs": 2, "t2i_r1": 0.0, "i2t_r1": 0.0},
            "weak": {"pairs": 4, "t2i_r1": weak, "i2t_r1": weak + 10},
        },
    }  # fmt: skip


def example_results() -> dict[str, Any]:
    """Return results in which `chosen` is better on validation, `tempting` on the test split."""
    methods = {
        name: {
            "lr": 2e-3, "tuning": None, "trainable": 5, **summarise([run["test"] for run in runs]), "runs": runs,
            "hard_negative_accuracy": {"mean": runs[0]["test"]["t2i_r1"], "std": 0.0}, "difference": None,
            "intervals": {"mean_r1": [50.0, 40.0, 60.0]}, "measures": {"nDCG@10 text-to-image": {"mean": 1, "std": 0}},
            "serving": {"bytes": 20, "backbone": "shared", "gallery": "unchanged"},
        }
        for name, runs in {
            "chosen": [example_run(0, 60, 30, 20), example_run(1, 62, 40, 40)],
            "tempting": [example_run(0, 50, 70, 60), example_run(1, 51, 72, 62)],
        }.items()
    }  # fmt: skip
    return {
        "data": "d", "backbone": "b", "pairs": {"train": 3, "val": 2, "test": 1}, "grid": None, "methods": methods,
        "training": {"epochs": 1, "batch_size": 2}, "diverged": {}, "baseline": None, "loss": "both",
        "cleaning": {"train": {"captions are doubled": 2}},
        "shots": {},
    }  # fmt: skip


def test_the_best_method_is_chosen_on_validation() -> None:
    assert best_method(example_results()) == "chosen"


def test_the_csv_holds_test_results() -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(example_results()))))
    assert [[float(row[c]) for c in COLUMNS] for row in rows] == [[t + i for i in range(6)] for t in (30, 40, 70, 72)]
    assert [float(row["hard_negative_accuracy"]) for row in rows] == [30, 40, 70, 72]


def test_categories_are_means_over_seeds_and_the_weakest_come_first() -> None:
    results = example_results()
    assert mean_categories(results, "chosen")["weak"] == {"pairs": 4, "t2i_r1": 30, "i2t_r1": 40}
    lines = results_markdown(results).partition("## Weakest categories of chosen")[2].split("\n## ")[0].splitlines()
    assert [line for line in lines if line.startswith("| ")][2:] == [  # categories of few pairs are left out
        "| weak | 4 | 30.0 | 40.0 |", "| known | 3 | 90.0 | 80.0 |",
    ]  # fmt: skip
    page = report_html(results, str).partition("<h2>Weakest categories of chosen</h2>")[2]
    assert "<td>weak</td><td>4</td><td>30.0</td><td>40.0</td>" in page


def test_query_weights_are_those_of_the_runs() -> None:
    runs = [{"query": "none"}, {"query": "predicted"}]
    assert query_weights({"runs": runs}) == "predicted in 1 of 2"
    assert query_weights({"runs": runs[1:]}) == "predicted"


def test_the_shots_end_with_all_pairs_and_their_spread() -> None:
    results = example_results()
    results["shots"] = {name: {"1": {"mean": 20.0, "std": 1.5}} for name in results["methods"]}
    del results["methods"]["tempting"]["runs"][1]
    assert shots_rows(results) == [
        ["method", "1", "all"], ["chosen", "20.0 ± 1.5", "36.5 ± 7.1"], ["tempting", "20.0", "71.5"],
    ]  # fmt: skip


def test_the_highest_mean_is_bold() -> None:
    assert report_html(example_results(), str).count('<td class="best">7') == 7  # all of tempting's, from 71.0 on


def test_the_report_without_matplotlib_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "dcar_core.evaluation.plots", raising=False)
    monkeypatch.delattr("dcar_core.evaluation.plots", raising=False)
    page = report_html(example_results(), str)
    assert "pip install 'dcar[plots]'" in page
    assert "<svg" not in page


@needs("plots")
def test_curves_have_a_line_for_each_method() -> None:
    plots = importlib.import_module("dcar_core.evaluation.plots")
    results, names = example_results(), [f"method {number}" for number in range(12)]
    results["methods"] = dict.fromkeys(names, results["methods"]["chosen"])
    results["shots"] = {name: {"1": {"mean": 20.0, "std": 1.5}, "16": {"mean": 30.0, "std": 0.0}} for name in names}
    drawn = plots.draw_plots(results)
    assert all(drawn["Few pairs"].count(f">{text}<") == 1 for text in (*names, "16"))
    assert drawn["Recall"].count("<svg") == 2
    assert drawn["Significance"] == drawn["Other measures"] == "", "without a baseline, and without epochs"


def test_the_report_escapes_names_from_the_data(
    backbone: Backbone, tiny_data: Path, tiny_gallery: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "<b>data"
    folder.mkdir()
    for split in ("train", "val", "test"):
        content = json.loads((tiny_data / f"{split}.json").read_text())
        for i, entry in enumerate(content.values()):
            entry["class_name"] = f"<img src=x>{i % 2}"
            entry["positive"] += " <script>alert(1)</script>"
        (folder / f"{split}.json").write_text(json.dumps(content))
    compare(backbone, folder, ["clip"], 1, tmp_path / "out", QUICK, images=tiny_gallery, progress=False)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;img src=x&gt;0" in text
    for wrong in ("<img src=x", "<script", "<b>data"):
        assert wrong not in text


def test_the_baseline_is_the_best_method_besides_dcar_and_its_parts() -> None:
    results = example_results()
    assert best_baseline(results) == "chosen"
    results["methods"]["dcar+"] = results["methods"].pop("chosen")
    assert best_baseline(results) == "tempting"
    results["methods"]["block-adapters"] = results["methods"]["dcar+"]
    assert best_baseline(results) == "tempting"
    results["methods"]["dual"] = results["methods"].pop("tempting")
    assert best_baseline(results) == "block-adapters"  # nothing but DCAR and its parts
    del results["methods"]["dual"], results["methods"]["block-adapters"]
    assert best_baseline(results) is None
