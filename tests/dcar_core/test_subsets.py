"""Measures of parts of the data: few shots, unseen categories, and other data sets."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcar_core.data import Annotations, Dataset
from dcar_core.evaluation import compare
from dcar_core.evaluation.method_runner import MethodRunner
from dcar_core.evaluation.subsets import hold_out_categories, recall_by_familiarity, take_shots
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import ModelConfig
from dcar_core.negatives import add_negatives, backbone_functions
from dcar_core.negatives.words import fold_name
from dcar_core.util.errors import DataError
from tests.support.comparisons import QUICK, trainings


def test_shots_unseen_categories_and_other_data_are_measured(
    backbone: Backbone, tiny_data: Path, tiny_gallery: Path, tmp_path: Path
) -> None:
    """One evaluation with every extra: curves over pairs, categories left out, and forgetting."""
    other = Path(shutil.copytree(tiny_data, tmp_path / "other"))
    quick, messages = replace(QUICK, epochs=1), list[str]()
    results = compare(
        backbone, tiny_data, ["clip", "coop"], 1, tmp_path / "out", quick, shots=[1, 2],
        unseen_categories=0.5, also=[other], on_message=messages.append,
    )  # fmt: skip
    assert "also other: " in messages[0]  # what was found in the data
    assert (
        len(trainings(messages)) == 4
    )  # coop on all pairs, on one and on two of each category; clip has nothing to train
    assert results["unseen_categories"] == 2
    run = results["methods"]["clip"]["runs"][0]
    assert set(run["measures"]) == {
        "nDCG@10 text-to-image", "nDCG@10 image-to-text", "other text-to-image R@1", "other image-to-text R@1",
        "seen categories R@1", "unseen categories R@1",
    }  # fmt: skip
    assert run["measures"]["other text-to-image R@1"] == run["test"]["t2i_r1"]  # a copy of the same data
    whole = (run["test"]["t2i_r1"] + run["test"]["i2t_r1"]) / 2
    assert results["shots"]["clip"] == {count: {"mean": whole, "std": 0.0} for count in ("1", "2")}
    assert set(results["shots"]["coop"]) == {"1", "2"}
    text = (tmp_path / "out" / "results.md").read_text()
    assert "unseen categories R@1" in text
    assert results["pairs"]["also other"] == len(Annotations(other).load("test")[0])
    assert "| also other | " in text
    assert "| method | 1 | 2 | all |" in text
    with pytest.raises(DataError, match="two data sets of --also have the same name"):
        compare(backbone, tiny_data, ["clip"], 1, tmp_path, quick, also=[other, other])
    with pytest.raises(DataError, match=r"--unseen-categories 0\.01 leaves 0 of 4 categories out"):
        compare(backbone, tiny_data, ["clip"], 1, tmp_path, quick, unseen_categories=0.01)


def test_negatives_of_few_pairs_are_made_of_these_pairs_alone(
    backbone: Backbone, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caption that was left out must not come back as the negative of another image."""
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    file = data / "train.json"
    entries = json.loads(file.read_text())
    for number, entry in enumerate(entries.values()):
        entry["positive"] += f" no{number}"
    file.write_text(json.dumps(entries))
    trained = list[Dataset]()

    def run(runner: MethodRunner, method: ModelConfig, seed: int, lr: float) -> dict[str, Any]:
        trained.append(runner.splits["train"])
        return real_test(runner, method, seed, lr)

    real_test = MethodRunner.test
    monkeypatch.setattr(MethodRunner, "test", run)
    quick = replace(QUICK, epochs=1)
    compare(backbone, data, ["dcar"], 1, tmp_path, quick, negatives="all", shots=[2])
    captions, negatives = ([{s.caption for s in data.samples} for data in trained],
                           [{n for s in data.samples for n in s.negatives} for data in trained])  # fmt: skip
    left_out = captions[0] - captions[1]
    assert left_out & negatives[0]  # of all pairs
    assert captions[1] & negatives[1]
    assert not left_out & negatives[1]


def test_a_category_is_held_out_in_every_spelling_and_in_the_taxonomy(
    backbone: Backbone, tiny_data: Path, tmp_path: Path
) -> None:
    splits, reports = Annotations(tiny_data).load_all()
    shouted = [replace(sample, category=sample.category.upper()) for sample in splits["train"].samples]
    splits["train"] = replace(splits["train"], samples=shouted)
    kept, held_out = hold_out_categories(splits, 0.5)
    assert len(held_out) == 2
    assert not {fold_name(sample.category) for sample in kept["train"].samples} & held_out
    gone = [sample for sample in splits["val"].samples if fold_name(sample.category) in held_out]
    with pytest.raises(DataError, match=r"--unseen-categories 0\.5 leaves no val pairs; lower it, or add val pairs"):
        hold_out_categories({**splits, "val": replace(splits["val"], samples=gone)}, 0.5)
    names = sorted({sample.category for sample in splits["test"].samples})
    taxonomy = tmp_path / "taxonomy.json"
    taxonomy.write_text(json.dumps({"meta_categories": {"all": names}}))
    made = add_negatives(
        kept, reports, backbone_functions(backbone), mode="all", taxonomy=taxonomy, held_out=held_out
    )  # fmt: skip
    named = {s: {fold_name(c) for x in made[s].samples for c in x.negative_categories} for s in ("train", "test")}
    assert named["train"]
    assert not named["train"] & held_out
    assert named["test"] & held_out


def test_a_category_is_seen_only_if_training_pairs_have_it() -> None:
    recall = {"pairs": 1.0, "t2i_r1": 100.0, "i2t_r1": 50.0}
    none = recall | {"pairs": 3.0, "t2i_r1": 0.0, "i2t_r1": 0.0}
    measures = recall_by_familiarity({"Fox": recall, "owl": none, "hen": recall, "": recall}, {"fox"})
    assert measures == {"seen categories R@1": 75.0, "unseen categories R@1": 75 / 4}


def test_fewer_shots_are_a_part_of_more(tiny_data: Path) -> None:
    sample_split = Annotations(tiny_data).load("train")[0]
    few, more = (take_shots(sample_split, count, seed=1).samples for count in (1, 2))
    assert len(few) == len({sample.category for sample in sample_split.samples})
    assert {s.image for s in few} < {s.image for s in more}
    upper = (replace(s, category=s.category.upper() if row % 2 else s.category) for row, s in enumerate(more))
    assert (
        take_shots(replace(sample_split, samples=list(upper)), 1, seed=1).images
        == take_shots(replace(sample_split, samples=more), 1, seed=1).images
    )
    bare = replace(sample_split, samples=[replace(sample, category="") for sample in sample_split.samples])
    with pytest.raises(DataError, match="--shots counts pairs of a category, but no training pair has one"):
        take_shots(bare, 1, seed=0)
