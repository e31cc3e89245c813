"""Negatives that training and the table make, and the command that shows them."""

import json
from pathlib import Path

import pytest

from dcar_core.data import load_split, load_splits
from dcar_core.evaluation import compare
from dcar_core.evaluation.method_runner import MethodRunner
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import TrainConfig
from dcar_core.model.methods.registry import method
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.training.feature_cache import FeatureCache
from tests.support.commands import dcar
from tests.support.files import write_json


def bare_data(tiny_data: Path, directory: Path) -> Path:
    """The tiny data set without negatives."""
    directory.mkdir()
    for name in ("train", "val", "test"):
        content = json.loads((tiny_data / f"{name}.json").read_text())
        write_json(directory / f"{name}.json", {key: entry | {"negative": []} for key, entry in content.items()})
    return directory


@pytest.mark.slow
def test_training_and_comparison_make_negatives(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, backbone: Backbone
) -> None:
    data = bare_data(tiny_data, tmp_path / "data")
    given = ("--images", tiny_data, "--model", tiny_model, "--epochs", "1")
    done = dcar("train", "--data", data, *given, "--out", tmp_path / "c")
    assert done.returncode in (0, 3), done.stderr  # 3: one epoch made the model no better
    assert "12 pairs for which negatives were made" in done.stderr
    saved = json.loads((tmp_path / "c" / "cleaning.json").read_text())
    assert saved["train"]["counts"]["negatives made: the caption with another category"] > 12
    quick = TrainConfig(epochs=1, batch_size=6)
    for mode, expected in (("auto", True), ("off", False)):
        out = tmp_path / mode
        found = compare(backbone, data, ["clip"], 1, out, quick, images=tiny_data, progress=False, negatives=mode)
        assert (found["methods"]["clip"]["hard_negative_accuracy"] is not None) == expected
        assert ("pairs for which negatives were made" in found["cleaning"]["test"]) == expected
    assert (tmp_path / "auto" / "cleaning.json").is_file()


@pytest.mark.slow
def test_captions_beyond_the_context_are_counted(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    data = bare_data(tiny_data, tmp_path / "data")
    content = json.loads((data / "train.json").read_text())
    for number, entry in zip((27, 29), content.values(), strict=False):  # + SOS and EOT, in a context of 32
        entry["positive"] = "a " * number
    write_json(data / "train.json", content)
    for name, cut in (("clip", 0), ("coop", 2)):
        quick = TrainConfig(epochs=1, batch_size=6)
        found = compare(backbone, data, [name], 1, tmp_path / name, quick, images=tiny_data, progress=False)
        what = f"captions cut to the {32 - (4 if cut else 0)} tokens that fit"
        assert found["cleaning"]["train"].get(what, 0) == cut


def test_data_with_its_own_negatives_keeps_its_runs(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    """The identity of a finished run does not change when no negatives are made."""
    splits, reports = load_splits(tiny_data, ("train", "val", "test"))
    counts = {name: dict(report.counts) for name, report in reports.items()}
    assert add_negatives(splits, reports, backbone_functions(backbone)) == splits
    assert counts == {name: dict(report.counts) for name, report in reports.items()}
    cache, quick = FeatureCache(None, backbone), TrainConfig(epochs=1, batch_size=6)
    other = add_negatives(splits, reports, backbone_functions(backbone), mode="all")
    runs = (MethodRunner(backbone, given, tmp_path, quick, cache) for given in (splits, other))
    before, after = (run.directory(method("dcar"), 0, 1e-3) for run in runs)
    assert before != after


def test_report_of_a_sound_data_set_is_empty(tiny_data: Path) -> None:
    assert set(load_split(tiny_data, "train")[1].counts) == {
        "absolute paths of another machine, replaced by the image root"
    }


@pytest.mark.slow
def test_the_command_writes_what_training_reads(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, backbone: Backbone
) -> None:
    data, out = bare_data(tiny_data, tmp_path / "data"), tmp_path / "out"
    done = dcar("data", "negatives", data, "--model", tiny_model, "--out", out, "--show", "1")
    assert done.returncode == 0, done.stderr
    assert "  - a " in done.stdout
    assert f"train with --data {out} --images" in done.stdout
    splits, reports = load_splits(data, ("train", "val", "test"), image_root=tiny_data)
    expected = add_negatives(splits, reports, backbone_functions(backbone))
    for name in ("train", "val", "test"):
        written = load_split(out, name, image_root=tiny_data)[0].samples
        assert written == expected[name].samples
    done = dcar("data", "negatives", data, "--out", data)
    assert done.returncode == 3
    assert "already holds test.json; give --out an empty or a new directory" in done.stderr
