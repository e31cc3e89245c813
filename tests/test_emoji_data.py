"""The data of the emoji example: what training may read, and the record of the bundled checkpoints."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcar_core.data import Annotations
from tests.support.paths import ROOT

EMOJI = ROOT / "examples" / "emoji"
DOMAINS = ("twemoji", "openmoji")


def read(domain: str, split: str) -> list[dict[str, Any]]:
    return list(json.loads((EMOJI / domain / f"{split}.json").read_text(encoding="utf-8")).values())


def captions(domain: str, split: str) -> set[str]:
    positives = [pair["positive"] for pair in read(domain, split)]
    return {text for positive in positives for text in ([positive] if isinstance(positive, str) else positive)}


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("split", "unseen"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_negatives_are_no_captions_of_a_later_split(domain: str, split: str, unseen: str) -> None:
    negatives = {text for pair in read(domain, split) for text in pair["negative"]}
    assert len(negatives) > 500
    assert not negatives & captions(domain, unseen)


def test_a_pytorch_without_muon_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EMOJI))
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    monkeypatch.setattr(sys, "argv", ["train_base.py", "--renders", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"Muon needs PyTorch 2\.9 or newer, not "):
        importlib.import_module("train_base").main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_image_is_in_two_splits(domain: str) -> None:
    splits, _ = Annotations(EMOJI / domain).load_all()
    contents = [{split.read(image) for image in split.images} for split in splits.values()]
    assert sum(map(len, contents)) == len(frozenset().union(*contents)) > 3500


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_bundled_checkpoint_is_the_run_that_the_results_name(domain: str) -> None:
    results = json.loads((EMOJI / "results.json").read_text(encoding="utf-8"))[domain]
    training = json.loads((EMOJI / domain / "checkpoint" / "config.json").read_text(encoding="utf-8"))["training"]
    (run,) = (run for run in results["runs"] if run["method"] == "dcar+" and run["seed"] == results["bundled_seed"])
    assert (training["seed"], training["epoch"]) == (run["seed"], run["epoch"])
    assert training["validation"] == run["val"]
