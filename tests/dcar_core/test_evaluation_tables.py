"""Tables, plot and analysis of known results, the cost of serving, and the last lines of `dcar train`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcar_core.evaluation.method_runner as module
from dcar_core.data import Dataset
from dcar_core.evaluation import summarise
from dcar_core.evaluation.method_runner import analyse, serving_cost
from dcar_core.evaluation.tables import COLUMNS, best_method, mean_categories, plot_recall, results_markdown
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.adapt import Verdict, verdict_of
from dcar_core.training.prepared_split import FeatureCache, prepare_split
from dcar_core.util.arrays import Floats
from dcar_core.util.metrics import Comparison, Scores


def example_run(seed: int, val: float, test: float, weak: float) -> dict[str, Any]:
    """Return a run's record. weak: R@1 of the category "weak"."""
    return {
        "seed": seed, "lr": 2e-3, "trainable": 5, "query": "none", "epoch": 1, "seconds": 1.0,
        "val": dict.fromkeys(COLUMNS, val), "test": {c: test + i for i, c in enumerate(COLUMNS)},
        "hard_negative_accuracy": test,
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
            "intervals": {"mean_r1": [50.0, 40.0, 60.0]},
            "serving": {"bytes": 20, "backbone": "shared", "gallery": "unchanged"},
        }
        for name, runs in {
            "chosen": [example_run(0, 60, 30, 20), example_run(1, 62, 40, 40)],
            "tempting": [example_run(0, 50, 70, 60), example_run(1, 51, 72, 62)],
        }.items()
    }  # fmt: skip
    return {
        "data": "d", "backbone": "b", "pairs": {"train": 3, "val": 2, "test": 1}, "grid": [], "methods": methods,
        "training": {"epochs": 1, "batch_size": 2}, "diverged": {}, "loss": "both", "test_images": 1,
        "cleaning": {"train": {"captions are doubled": 2}},
    }  # fmt: skip


def test_tables_of_results() -> None:
    results = example_results()
    assert best_method(results) == "chosen", "on validation"
    assert mean_categories(results, "chosen")["weak"] == {"pairs": 4, "t2i_r1": 30, "i2t_r1": 40}, "over seeds"
    lines = results_markdown(results, "").partition("## Weakest categories of chosen")[2].split("\n## ")[0].splitlines()
    assert [line for line in lines if line.startswith("| ")][2:] == [  # categories of few pairs are left out
        "| weak | 4 | 30.0 | 40.0 |", "| known | 3 | 90.0 | 80.0 |",
    ]  # fmt: skip


def test_a_plot_without_matplotlib_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'dcar[plots]'" in plot_recall(example_results(), tmp_path / "recall.svg")
    assert not list(tmp_path.iterdir())


def analysed(
    backbone: Backbone, data: Dataset, categories: str, text: Floats, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Analyse the first pairs of a split: one image for each letter of `categories`, with unit vectors of their own."""
    image = np.eye(len(categories), dtype=np.float32)
    samples = [replace(s, category=c) for s, c in zip(data.samples, categories, strict=False)]
    model, data = seeded_model(backbone, find_method("clip").config, 0), replace(data, samples=samples)
    negatives = [image[-1:], image[:0], *([image[:1]] if categories == "aab" else [image[:0]] * 2)]
    monkeypatch.setattr(module, "encode_captions", lambda *_: text)
    monkeypatch.setattr(module, "encode_images", lambda *_: image)
    monkeypatch.setattr(module, "encode_negatives", lambda *_: negatives)
    return analyse(model, data, prepare_split(data, model, for_training=False))


def test_analysis_equals_a_hand_calculation(
    backbone: Backbone, training: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images of one category, and one of another that is the first result for the second caption."""
    text = np.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]], np.float32)
    found = analysed(backbone, training, "aab", text, monkeypatch)
    assert found["test"]["t2i_r1"] == pytest.approx(200 / 3)
    assert found["hard_negative_accuracy"] == 100  # the second pair has no negatives
    assert found["categories"]["a"] == {"pairs": 2, "t2i_r1": 50.0, "i2t_r1": 100.0}
    assert found["categories"]["b"] == {"pairs": 1, "t2i_r1": 100.0, "i2t_r1": 100.0}
    found = analysed(backbone, training, "baac", np.eye(4, dtype=np.float32)[[3, 3, 3, 0]], monkeypatch)
    assert {name: (of["t2i_r1"], of["i2t_r1"]) for name, of in found["categories"].items()} == dict.fromkeys(
        "abc", (0, 0)
    )


@pytest.mark.parametrize("name", ["coop", "dcar"])
def test_hard_negatives_are_encoded_as_queries(name: str, backbone: Backbone, training: Dataset) -> None:
    model = seeded_model(backbone, find_method(name).config, 0)
    model.query_weights = "predicted"
    if model.head is not None:
        torch.nn.init.normal_(model.head.linear.weight)
    prepared = prepare_split(training, model, for_training=False)
    found = analyse(model, training, prepared)["hard_negative_accuracy"]
    hits = []
    for sample in training.samples:
        pixels = backbone.preprocess(training.read(sample.image))[None]
        image = model.encode_image(torch.from_numpy(backbone.preprocess.normalize(pixels))).detach()
        texts = model.encode_query(backbone.tokenize([sample.caption, *sample.negatives], model.prompt_tokens)).detach()
        scores = (texts @ image.T).flatten()
        hits.append(bool(scores[0] > scores[1:].max()))
    assert found == pytest.approx(100 * np.mean(hits))
    others = tuple(f"a thing {n}" for n in range(9))
    many = [replace(s, negatives=others + s.negatives, negative_categories=()) for s in training.samples]
    turned = [replace(s, negatives=s.negatives[::-1]) for s in many]
    accuracies = [analyse(model, replace(training, samples=s), prepared) for s in (many, turned)]
    assert accuracies[0]["hard_negative_accuracy"] == accuracies[1]["hard_negative_accuracy"]
    bare = [replace(sample, negatives=(), negative_categories=()) for sample in training.samples]
    assert analyse(model, replace(training, samples=bare), prepared)["hard_negative_accuracy"] is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", ("shared", "unchanged")),
        ("coop", ("shared", "unchanged")),
        ("clip-adapter", ("shared", "recomputed")),
        ("dcar+", ("shared", "encoded again")),
        ("block-adapters", ("shared", "encoded again")),
        ("lora", ("own", "encoded again")),
    ],
)
def test_the_cost_of_serving(name: str, expected: tuple[str, str], backbone: Backbone) -> None:
    cost = serving_cost(seeded_model(backbone, find_method(name).config, 0))
    assert (cost["backbone"], cost["gallery"]) == expected
    weights = sum(4 * p.numel() for p in backbone.clip.parameters())
    assert (cost["bytes"] == 0) == (name == "clip")
    assert (cost["bytes"] >= weights) == (name == "lora")


def verdict(adapted: range, untouched: range, images: int = 100, method: str = "dcar+") -> Verdict:
    """Return the verdict on models that find these images, and their captions."""
    hits = (np.isin(np.arange(images), found).astype(float) for found in (adapted, untouched))
    scores = [Scores(np.ones((2, images)), np.array([each, each])) for each in hits]
    return Verdict(method, Comparison.of(*scores, resamples=500), TrainConfig(lr=2e-3, epochs=20))


@pytest.mark.parametrize(
    ("adapted", "untouched", "is_worth_it", "answer"),
    [
        (range(75), range(50), True, "Yes: +25.0 points of mean R@1 among 100 validation images (95 % "),
        (range(51), range(1, 51), True, "Uncertain: +1.0 points of mean R@1 among 100 validation images (95 % "),
        (range(50), range(50), False, "No: the untouched model is at least as good"),
        (range(25), range(50), False, "No: the untouched model is at least as good"),
    ],
)
def test_a_gain_was_worth_it_if_it_is_certain(adapted: range, untouched: range, is_worth_it: bool, answer: str) -> None:
    found = verdict(adapted, untouched)
    assert found.is_worth_it == is_worth_it
    text = str(found)
    assert f"Was it worth it? {answer}" in text
    assert "100 validation pairs" in text
    assert "adapted (dcar+)" in text or not is_worth_it
    assert "Caveat" not in text
    tips = "Next: --method clip-adapter, --lr 0.0005, --epochs 40 --patience 0, more training pairs"
    assert (tips in text) == ("Next" in text) == (not is_worth_it)
    for name in ("clip-adapter", "block-adapters"):  # clip-adapter learns no more than these
        assert ("Next: --lr 0.0005" in str(verdict(adapted, untouched, method=name))) == (not is_worth_it)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (60, "With `rerank`: R@1 of 60.0 (50.0 to 70.0) text-to-image, +10.0 (+5.0 to +16.0) "),
        (50, "With `rerank`: no gain on these pairs"),
    ],
)
def test_the_second_stage_has_a_line_of_its_own(found: int, line: str) -> None:
    by_vectors = verdict(range(50), range(0))
    again = str(replace(by_vectors, reranked=verdict(range(found), range(50)).comparison))
    assert line in again
    plain = str(by_vectors).splitlines()
    assert [each for each in again.splitlines() if not each.startswith("With `rerank`")] == plain


def test_new_categories_are_resampled_whole(backbone: Backbone, pairs: tuple[Dataset, Dataset]) -> None:
    new = [replace(sample, category=f"new {row // 3}") for row, sample in enumerate(pairs[1].samples)]
    adapted, untouched = (seeded_model(backbone, find_method(name).config, 0) for name in ("clip-adapter", "clip"))
    for val, categories in ((pairs[1], None), (replace(pairs[1], samples=new), len(new) // 3)):
        splits, cache = {"train": pairs[0], "val": val}, FeatureCache(None, backbone)
        found = verdict_of(adapted, untouched, splits, cache, TrainConfig())
        assert (found.comparison.images, found.comparison.resampled) == (len(new), categories or len(new))
        assert (f"pairs of {categories} categories, resampled whole" in str(found)) == (categories is not None)


def test_few_validation_pairs_get_a_caveat() -> None:
    found = verdict(range(3), range(0), images=3)
    caveat = "Caveat: 3 validation pairs decide little; each is 33.3 points of R@1. Use at least 100."
    assert caveat in str(found)
    many_captions = replace(found, comparison=replace(found.comparison, queries=900))
    assert caveat.replace("pairs", "images") in str(many_captions), "images are resampled, with all their captions"
