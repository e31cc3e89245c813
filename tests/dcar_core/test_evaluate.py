"""Tables and report, from real runs on a tiny CLIP."""

import base64
import csv
import io
import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcar_core.data import Dataset, load_split
from dcar_core.evaluation import compare, summarise
from dcar_core.evaluation.analysis import analyse
from dcar_core.evaluation.method_runner import MethodRunner
from dcar_core.evaluation.report import report_html
from dcar_core.evaluation.significance import best_baseline
from dcar_core.evaluation.tables import (
    COLUMNS,
    best_method,
    mean_categories,
    query_weights,
    results_csv,
    results_markdown,
)
from dcar_core.model.backbone import Backbone
from dcar_core.model.checkpoint import load_checkpoint
from dcar_core.model.config import PromptConfig, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import method
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.prepared_split import prepare_split
from dcar_core.training.train import TrainResult, train
from dcar_core.training.validation import evaluate
from dcar_core.util.errors import DataError, DcarError, DivergedError

QUICK = TrainConfig(epochs=2, batch_size=6)
Compared = tuple[Path, dict[str, Any]]
METHODS = ["clip", "clip-adapter", "dcar"]


@pytest.fixture(scope="module")
def compared(backbone: Backbone, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    out = tmp_path_factory.mktemp("compared")
    return out, compare(backbone, tiny_data, METHODS, 2, out, QUICK, progress=False)


def test_results_are_written_and_reproduced_by_the_checkpoints(
    compared: Compared, backbone: Backbone, tiny_data: Path
) -> None:
    out, results = compared
    assert json.loads((out / "results.json").read_text()) == results
    assert [len(found["runs"]) for found in results["methods"].values()] == [1, 2, 2]
    for found in results["methods"].values():
        for column in COLUMNS:
            values = [run["test"][column] for run in found["runs"]]
            assert found["mean"][column] == pytest.approx(np.mean(values))
            assert found["std"][column] == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0)
        assert 0 <= found["hard_negative_accuracy"]["mean"] <= 100
    assert results["methods"]["clip"]["trainable"] == 0
    text = (out / "results.md").read_text()
    assert "| dcar |" in text
    assert "± " in text
    with (out / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("clip", "0"), ("clip-adapter", "0"), ("clip-adapter", "1"), ("dcar", "0"), ("dcar", "1"),
    ]  # fmt: skip
    assert [row["lr"] for row in rows if row["method"] == "clip"] == [""], "as in the other tables: it learns nothing"
    # the saved checkpoint reproduces the reported number
    run = results["methods"]["dcar"]["runs"][1]
    model, mark = load_checkpoint(out / run["run"], backbone=backbone)
    test = prepare_split(load_split(tiny_data, "test")[0], model, for_training=False, progress=False)
    assert evaluate(model, test) == run["test"]
    assert mark == run["fingerprint"]


def test_the_table_shows_the_query_weights(compared: Compared) -> None:
    out, results = compared
    assert {run["query"] for run in results["methods"]["clip"]["runs"]} == {"none"}
    runs = [{**run, "query": query} for run in results["methods"]["clip"]["runs"] for query in ("none", "predicted")]
    assert query_weights({"runs": runs}) == "predicted in 1 of 2"
    assert query_weights({"runs": runs[1:]}) == "predicted"
    with (out / "results.csv").open() as lines:
        chosen = [row["query_weights"] for row in csv.DictReader(lines) if row["method"] == "dcar"]
    assert chosen == [run["query"] for run in results["methods"]["dcar"]["runs"]]
    for file in ("results.md", "report.html"):
        assert "query weights" in (out / file).read_text()


def example_run(seed: int, val: float, test: float, weak: float) -> dict[str, Any]:
    """Return a run's record. weak: R@1 of the category "weak"."""
    return {
        "seed": seed, "lr": 2e-3, "trainable": 5, "query": "none", "epoch": 1, "seconds": 1.0, "history": [],
        "val": dict.fromkeys(COLUMNS, val), "test": {c: test + i for i, c in enumerate(COLUMNS)},
        "hard_negative_accuracy": test, "confusions": [],
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
        }
        for name, runs in {
            "chosen": [example_run(0, 60, 30, 20), example_run(1, 62, 40, 40)],
            "tempting": [example_run(0, 50, 70, 60), example_run(1, 51, 72, 62)],
        }.items()
    }  # fmt: skip
    return {
        "data": "d", "backbone": "b", "pairs": {"train": 3, "val": 2, "test": 1}, "grid": None, "methods": methods,
        "training": {"epochs": 1, "batch_size": 2}, "diverged": {}, "baseline": None, "loss": "both",
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
    page = report_html(results, str).partition("<h2>R@1 by category</h2>")[2]
    assert "<td>weak</td><td>4</td><td>35.0</td><td>66.0</td>" in page
    assert page.index("<td>rare</td>") < page.index("<td>weak</td>") < page.index("<td>known</td>")


def test_the_highest_mean_is_bold() -> None:
    assert report_html(example_results(), str).count('<td class="best">7') == 7  # all of tempting's, from 71.0 on


def test_training_and_tuning_read_no_test_split(
    backbone: Backbone, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dcar_core.evaluation.method_runner as module

    seen: list[tuple[str, str]] = []
    whole = train

    def noted(model: DCAR, training: Dataset, validation: Dataset, *given: Any, **more: Any) -> TrainResult:
        seen.append((training.split, validation.split))
        return whole(model, training, validation, *given, **more)

    monkeypatch.setattr(module, "train", noted)
    compare(backbone, tiny_data, ["coop"], 1, tmp_path, QUICK, progress=False, tune=True, grid=(1e-4, 1e-2))
    assert seen == [("train", "val")] * 2
    assert not list(tmp_path.rglob("state.pt"))  # finished runs leave no state


def test_seeds_start_from_different_weights(
    backbone: Backbone, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dcar_core.evaluation.method_runner as module

    starts: list[torch.Tensor] = []
    whole = train

    def noted(model: DCAR, *given: Any, **more: Any) -> TrainResult:
        starts.append(torch.cat([p.detach().flatten() for _, p in model.trainables()]))
        return whole(model, *given, **more)

    monkeypatch.setattr(module, "train", noted)
    compare(backbone, tiny_data, ["dual"], 2, tmp_path, replace(QUICK, epochs=1), progress=False)
    assert len(starts) == 2
    assert not torch.equal(*starts)


def test_options_reach_the_data(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "val", "test"):
        content = json.loads((tiny_data / f"{split}.json").read_text())
        first = next(iter(content.values()))
        long = first | {"positive": "a " * 29}  # 31 tokens: too many for four prompts in a context of 32
        lost = {"file_name": "lost.png", "file_path": "lost.png", "positive": "a lost one", "class_name": "square"}
        content |= {"square_98": long, "square_99": lost}
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(content))

    def run(**given: Any) -> dict[str, Any]:
        out, quick = tmp_path / "out", replace(QUICK, epochs=1)
        return compare(
            backbone, tmp_path / "data", ["clip", "coop"], 1, out, quick, images=tiny_data, progress=False, **given
        )

    with pytest.raises(DataError, match=r"1 of \d+ images are not in .*: lost\.png"):
        run()
    with pytest.raises(DataError, match=r"the taxonomy .*gone\.json cannot be read"):
        run(skip_broken=True, taxonomy=tmp_path / "gone.json")
    cleaning = run(skip_broken=True)["cleaning"]["train"]
    assert cleaning["images missing, left out"] == 1
    assert cleaning["captions cut to the 28 tokens that fit"] == 1


def test_a_seed_gives_the_same_result_in_another_directory(
    compared: Compared, backbone: Backbone, tiny_data: Path, tmp_path: Path
) -> None:
    again = compare(backbone, tiny_data, ["dcar"], 1, tmp_path, QUICK, progress=False)
    first, second = (found["methods"]["dcar"]["runs"][0] for found in (compared[1], again))
    assert first["fingerprint"] == second["fingerprint"]
    assert first["test"] == second["test"]


def test_a_finished_run_is_not_repeated(compared: Compared, backbone: Backbone, tiny_data: Path) -> None:
    out, results = compared
    messages: list[str] = []
    again = compare(backbone, tiny_data, METHODS, 2, out, QUICK, progress=False, on_message=messages.append)
    assert messages == []
    assert again == results
    compare(backbone, tiny_data, [*METHODS, "coop"], 1, out, QUICK, progress=False, on_message=messages.append)
    assert messages == ["coop, seed 0, learning rate 0.002"]  # one method more, one run more
    compare(backbone, tiny_data, ["coop"], 1, out, replace(QUICK, epochs=1), progress=False, on_message=messages.append)
    assert len(messages) == 2  # other settings are another run
    assert len(list((out / "runs" / "coop").iterdir())) == 2


def test_another_configuration_of_a_method_is_another_run(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    splits = {split: load_split(tiny_data, split)[0] for split in ("train", "val", "test")}
    runs = MethodRunner(backbone, splits, tmp_path, QUICK, FeatureCache(None, backbone))
    shorter = replace(method("coop"), prompt=PromptConfig(length=2, image=False))
    assert runs.directory(method("coop"), 0, 1e-3) != runs.directory(shorter, 0, 1e-3)


def test_tuning_has_equal_budgets_and_reads_validation_only(
    backbone: Backbone, tiny_data: Path, tmp_path: Path
) -> None:
    messages: list[str] = []
    grid = (1e-4, 1e-2, 1e30)
    results = compare(
        backbone, tiny_data, ["clip", "coop", "clip-adapter"], 2, tmp_path, QUICK, progress=False, tune=True, grid=grid,
        on_message=messages.append,
    )  # fmt: skip
    assert len(messages) == 1 + 2 * (len(grid) + 1)  # the tuned run of seed 0 is reused
    for name in ("coop", "clip-adapter"):
        found = results["methods"][name]
        scores = {lr: score for lr, score in found["tuning"].items() if score is not None}
        assert set(found["tuning"]) == {"0.0001", "0.01", "1e+30"}
        assert scores[f"{found['lr']:g}"] == max(scores.values())
        # runs with other rates never read the test split
        tested = {path.parent.name for path in (tmp_path / "runs" / name).rglob("test.json")}
        assert tested == {Path(run["run"]).name for run in found["runs"]}
    assert results["methods"]["clip-adapter"]["tuning"]["1e+30"] is None
    assert "diverged" in (tmp_path / "results.md").read_text()
    assert "diverged" in (tmp_path / "report.html").read_text()


def test_a_diverged_method_leaves_the_others_in_the_table(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    wild, messages = replace(QUICK, lr=1e30, epochs=1), list[str]()
    results = compare(
        backbone, tiny_data, ["clip", "clip-adapter"], 1, tmp_path, wild, progress=False, on_message=messages.append
    )
    assert list(results["methods"]) == ["clip"]
    assert "lower --lr" in results["diverged"]["clip-adapter"]
    assert messages[-1].startswith("clip-adapter is left out: ")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "| clip-adapter | diverged |" in (tmp_path / "results.md").read_text()
    assert "clip-adapter is left out: " in (tmp_path / "report.html").read_text()
    with pytest.raises(DivergedError, match="lower --lr"):
        compare(backbone, tiny_data, ["clip-adapter"], 1, tmp_path, wild, progress=False)


def test_a_broken_test_image_is_reported_before_training(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    broken = load_split(data, "test")[0].samples[0].image
    (data / broken).write_bytes(b"hi")
    with pytest.raises(DataError, match=f"test: {broken}: "):
        compare(backbone, data, ["coop"], 1, tmp_path / "out", QUICK, progress=False)
    assert not (tmp_path / "out" / "runs").exists()


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "action", "xlink:href"}]


def test_the_report_is_self_contained(compared: Compared, backbone: Backbone, tiny_data: Path) -> None:
    out = compared[0]
    results = compare(backbone, tiny_data, METHODS, 2, out, QUICK, progress=False)  # no run is repeated
    page = Page()
    text = (out / "report.html").read_text()
    page.feed(text)
    assert page.tags.count("svg") == 4  # recall in both directions, differences, training curves
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.addresses  # the example images
    for address in page.addresses:
        head, _, content = address.partition(",")
        assert head == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) <= 96
    assert "url(" not in text
    for name in results["methods"]:
        assert f">{name}<" in text
    assert text.count('class="best"') >= 7


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


@pytest.fixture
def sample_split(tiny_data: Path) -> Dataset:
    return load_split(tiny_data, "train")[0]


def test_analysis_of_known_vectors(backbone: Backbone, sample_split: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of one category, and one of another that is the first result for the second caption."""
    import dcar_core.evaluation.analysis as module

    one, two, three = (replace(s, category=c) for s, c in zip(sample_split.samples[:3], "aab", strict=True))
    data = replace(sample_split, samples=[one, two, three])
    model = seeded_model(backbone, method("clip"), 0)
    prepared = prepare_split(data, model, for_training=False, progress=False)
    image = np.eye(3, dtype=np.float32)
    text = np.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]], np.float32)
    monkeypatch.setattr(module, "encode_captions", lambda *_: text)
    monkeypatch.setattr(module, "_encode_negatives", lambda *_: [image[2:], image[:0], image[:1]])
    monkeypatch.setattr(module, "encode_images", lambda *_: image)
    found = analyse(model, data, prepared)
    assert found["recall"]["t2i_r1"] == pytest.approx(200 / 3)
    assert found["hard_negative_accuracy"] == 100  # the second pair has no negatives
    assert found["categories"]["a"] == {"pairs": 2, "t2i_r1": 50.0, "i2t_r1": 100.0}
    assert found["categories"]["b"] == {"pairs": 1, "t2i_r1": 100.0, "i2t_r1": 100.0}
    assert found["confusions"] == [
        {"category": "a", "taken_for": "b", "count": 1, "of": 2,
         "examples": [{"caption": two.caption, "image": two.image, "found": three.image}]}
    ]  # fmt: skip


def test_a_caption_at_rank_two_is_no_hit(
    backbone: Backbone, sample_split: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most frequent confusion comes first."""
    import dcar_core.evaluation.analysis as module

    samples = [replace(s, category=c) for s, c in zip(sample_split.samples[:4], "baac", strict=True)]
    data = replace(sample_split, samples=samples)
    model = seeded_model(backbone, method("clip"), 0)
    prepared = prepare_split(data, model, for_training=False, progress=False)
    image = np.eye(4, dtype=np.float32)
    text = image[[3, 3, 3, 0]]  # b, a and a find c; c finds b
    monkeypatch.setattr(module, "encode_captions", lambda *_: text)
    monkeypatch.setattr(module, "encode_images", lambda *_: image)
    monkeypatch.setattr(module, "_encode_negatives", lambda *_: [image[:0]] * 4)
    found = analyse(model, data, prepared)
    assert {name: (of["t2i_r1"], of["i2t_r1"]) for name, of in found["categories"].items()} == dict.fromkeys(
        "abc", (0.0, 0.0)
    )
    pairs = [(c["category"], c["taken_for"], c["count"], c["of"]) for c in found["confusions"]]
    assert pairs == [("a", "c", 2, 2), ("b", "c", 1, 1), ("c", "b", 1, 1)]


@pytest.mark.parametrize("name", ["coop", "dcar"])
def test_hard_negatives_are_encoded_as_queries(name: str, backbone: Backbone, sample_split: Dataset) -> None:
    model = seeded_model(backbone, method(name).with_query_weights("predicted"), 0)
    if model.head is not None:
        torch.nn.init.normal_(model.head.linear.weight)
    prepared = prepare_split(sample_split, model, for_training=False, progress=False)
    found = analyse(model, sample_split, prepared)["hard_negative_accuracy"]
    hits = []
    for sample in sample_split.samples:
        pixels = backbone.preprocess(sample_split.read(sample.image))[None]
        image = model.encode_image(torch.from_numpy(backbone.preprocess.normalize(pixels))).detach()
        texts = model.encode_query(backbone.tokenize([sample.caption, *sample.negatives], model.prompt_tokens)).detach()
        scores = (texts @ image.T).flatten()
        hits.append(bool(scores[0] > scores[1:].max()))
    assert found == pytest.approx(100 * np.mean(hits))
    others = tuple(f"a thing {n}" for n in range(9))
    many = [replace(s, negatives=others + s.negatives, negative_categories=()) for s in sample_split.samples]
    turned = [replace(s, negatives=s.negatives[::-1]) for s in many]
    accuracies = [analyse(model, replace(sample_split, samples=s), prepared) for s in (many, turned)]
    assert accuracies[0]["hard_negative_accuracy"] == accuracies[1]["hard_negative_accuracy"]
    bare = [replace(sample, negatives=(), negative_categories=()) for sample in sample_split.samples]
    assert analyse(model, replace(sample_split, samples=bare), prepared)["hard_negative_accuracy"] is None


def test_wrong_arguments(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DcarError, match="no method is named 'clipp'"):
        compare(backbone, tiny_data, ["clipp"], 1, tmp_path, QUICK)
    with pytest.raises(DataError, match="no method was given"):
        compare(backbone, tiny_data, [], 1, tmp_path, QUICK)
    with pytest.raises(DataError, match="--seeds must be at least 1"):
        compare(backbone, tiny_data, ["clip"], 0, tmp_path, QUICK)


def test_intervals_and_the_difference_to_the_best_baseline(compared: Compared) -> None:
    out, results = compared
    assert results["baseline"] in ("clip", "clip-adapter")
    for name, found in results["methods"].items():
        mean = (found["mean"]["t2i_r1"] + found["mean"]["i2t_r1"]) / 2
        value, low, high = found["intervals"]["mean_r1"]
        assert value == pytest.approx(mean)
        assert low <= value <= high
        assert (found["difference"] is None) == (name == results["baseline"])
        assert "hits" not in found["runs"][0]
    baseline = results["methods"][results["baseline"]]["intervals"]["mean_r1"][0]
    difference = results["methods"]["dcar"]["difference"]
    assert difference["mean_r1"][0] == pytest.approx(results["methods"]["dcar"]["intervals"]["mean_r1"][0] - baseline)
    assert 0 < difference["p"] <= 1
    for file in ("results.md", "report.html"):
        text = (out / file).read_text()
        assert f"difference to {results['baseline']} (95 % interval)" in text
        assert "Paired bootstrap" in text


def test_the_baseline_is_the_best_method_of_others() -> None:
    results = example_results()
    assert best_baseline(results) == "chosen"
    results["methods"]["dcar+"] = results["methods"].pop("chosen")
    assert best_baseline(results) == "tempting"
    results["methods"]["dual"] = results["methods"].pop("tempting")
    assert best_baseline(results) is None


def test_a_test_record_without_hits_is_made_again(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    """Records of earlier versions have none."""
    first = compare(backbone, tiny_data, ["clip"], 1, tmp_path, QUICK, progress=False)
    (record,) = tmp_path.rglob("test.json")
    content = json.loads(record.read_text())
    del content["hits"]
    record.write_text(json.dumps(content))
    assert compare(backbone, tiny_data, ["clip"], 1, tmp_path, QUICK, progress=False) == first


def test_the_loss_direction_makes_other_runs(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    quick = replace(QUICK, epochs=1)
    both = compare(backbone, tiny_data, ["coop"], 1, tmp_path, quick, progress=False)
    one = compare(backbone, tiny_data, ["coop"], 1, tmp_path, quick, progress=False, loss="image-to-text")
    runs = [results["methods"]["coop"]["runs"][0] for results in (both, one)]
    assert runs[0]["run"] != runs[1]["run"]
    assert runs[0]["fingerprint"] != runs[1]["fingerprint"]
    assert "The contrastive loss is image-to-text alone." in (tmp_path / "results.md").read_text()
