"""Negative captions: both perspectives, modes, rejected candidates, and those that training and the command make."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcar_core.data import Annotations, CleaningReport, Sample
from dcar_core.data.clean import fold_text
from dcar_core.evaluation import compare
from dcar_core.evaluation.method_runner import MethodRunner
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import TrainConfig
from dcar_core.model.methods.registry import method
from dcar_core.negatives import LETTER_FUNCTIONS, add_negatives, backbone_functions
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.util.errors import DataError
from tests.support.commands import dcar
from tests.support.files import write_json
from tests.support.negatives import CATS, FELINE, made, sample, split


def test_negatives_swap_categories_and_captions(tmp_path: Path) -> None:
    tree = write_json(
        tmp_path / "t.json", {"meta_categories": FELINE, "similar": {"Sphynx": ["maine_coon", "Ragdoll"]}}
    )
    samples, report = made(CATS, tmp_path, taxonomy=tree)
    first, last = samples[0], samples[4]
    assert first.negatives[:2] == ("A Maine Coon with green eyes on a chair.", "A Ragdoll with green eyes on a chair.")
    assert first.negatives[2] == "An older Sphynx that looks up."
    assert first.negatives[3].startswith("A Sphynx with ")
    assert first.negative_categories == ("Maine Coon", "Ragdoll", "Sphynx", "Sphynx")
    assert last.negatives[0] == "Two beagles with blue collars."  # of the dogs, in the caption's number and writing
    assert set(last.negative_categories) == {"Beagle", "Pug"}
    assert report.counts == {
        "pairs for which negatives were made": 6,
        "negatives made: the caption with another category": 10,
        "negatives made: another caption of the category": 2,
        "negatives made: the caption with another attribute": 6,
    }


def test_no_negative_is_an_attribute_of_its_image(tmp_path: Path) -> None:
    samples = [sample("0", "bread, grain, loaf", "food"), sample("1", "bread", "food"), sample("2", "rice", "food")]
    assert "bread" in made(samples, tmp_path)[0][0].negatives
    samples[0] = replace(samples[0], attributes=("Bread",))
    assert made(samples, tmp_path)[0][0].negatives == ("rice",)


def test_category_without_letters_is_harmless(tmp_path: Path) -> None:
    samples, report = made([*CATS, sample("8", "a dash - here", "-")], tmp_path)
    assert samples[-1].negatives == ()
    assert report.names["pairs for which no negative could be made"] == ["8"]


def test_negatives_are_reproducible_and_differ_from_their_caption(tmp_path: Path) -> None:
    words = ("red", "blue", "green", "two", "three", "small", "large", "wooden", "plastic")
    samples = [
        sample(f"{i}", f"{w.title()} {c}, {v}-sided, {i % 7}", c)
        for i, (w, v, c) in enumerate((w, v, c) for w in words for v in words for c in ("oak tree", "elm tree"))
    ]
    samples += [
        sample("0", "A second caption of an OAK_TREE", "oak_tree"),
        sample("9", "Red elm tree, red-sided, 1", "elm tree"),
    ]
    one, other, third = (made(samples, tmp_path, seed=seed)[0] for seed in (0, 0, 1))
    assert one == other
    assert one != third
    own: dict[str, set[str]] = {}
    for s in samples:
        own.setdefault(s.image, set()).add(fold_text(s.caption))
    for s in one:
        texts = [fold_text(text) for text in s.negatives]
        assert len(set(texts)) == len(texts) > 1
        assert not own[s.image] & set(texts)
        assert len(s.negative_categories) == len(texts)
    shuffled = made([samples[i] for i in np.random.default_rng(0).permutation(len(samples))], tmp_path)[0]

    def swapped(found: list[Sample]) -> dict[str, tuple[str, ...]]:
        return {s.image + s.caption: s.negatives[:1] for s in found}

    assert swapped(shuffled) == swapped(one)
    found = made([replace(s, image=f"pictures/{s.image}") for s in samples], tmp_path)[0]
    assert [s.negatives for s in found] == [s.negatives for s in one], "wherever the pictures lie"


def test_half_are_category_swaps_and_names_keep_their_colour(tmp_path: Path) -> None:
    captions = {"red kite": "A red kite over two small houses.", "barn owl": "A barn owl in a tree.",
                "blue jay": "A blue jay on snow.", "crow": "A crow in the rain."}  # fmt: skip
    first = made([sample(name, text, name) for name, text in captions.items()], tmp_path)[0][0]
    assert [of != "red kite" for of in first.negative_categories] == [True, True, False, False]
    assert all("red kite" in text for text, of in zip(first.negatives, first.negative_categories, strict=True)
               if of == "red kite" and text.startswith("A ") and "over" in text)  # fmt: skip


def test_modes_choose_which_pairs_get_negatives(tmp_path: Path) -> None:
    own = [replace(s, negatives=("A dog.",), negative_categories=("dog",)) for s in CATS]
    assert made([*own[:3], *CATS[3:]], tmp_path)[0] == [*own[:3], *CATS[3:]]  # as many have some as have none
    found, _ = made([*own[:2], *CATS[2:]], tmp_path)
    assert found[:2] == own[:2]
    assert all(s.negatives for s in found[2:])
    assert [len(s.negatives) > 0 for s in made([*own[:5], CATS[5]], tmp_path, "missing")[0]] == [True] * 6
    assert all("A dog." not in s.negatives for s in made(own, tmp_path, "all")[0])
    assert made(CATS, tmp_path, "off")[0] == CATS
    tree = write_json(tmp_path / "t.json", {"meta_categories": FELINE})
    assert made(own, tmp_path, taxonomy=tree)[1].counts == {
        "pairs with the negatives of the data, for which the taxonomy is not used": 6
    }
    with pytest.raises(DataError, match="--taxonomy is for generated negatives, which --negatives off turns off"):
        made(CATS, tmp_path, "off", taxonomy=tree)
    with pytest.raises(DataError, match=r"--negatives must be auto, missing, all, off, not 'some'"):
        made(CATS, tmp_path, "some")


def test_negatives_need_categories(tmp_path: Path) -> None:
    bare = [replace(s, category="") for s in CATS]
    found, report = made(bare, tmp_path)
    assert found == bare
    assert report.counts == {"pairs without a category, for which no negatives are made": 6}
    for mode in ("missing", "all"):
        with pytest.raises(
            DataError, match=r"train: negatives need categories, and none of its 6 pairs .* has one; give"
        ):
            made(bare, tmp_path, mode)
    found, report = made([*bare[:1], *CATS[1:]], tmp_path, "missing")
    assert found[0].negatives == ()
    assert report.counts["pairs without a category, for which no negatives are made"] == 1
    with pytest.raises(DataError, match="the split train has no pairs"):
        made([], tmp_path)


def test_captions_that_do_not_name_their_category_are_counted(tmp_path: Path) -> None:
    samples, report = made([*CATS, sample("8", "A red bow.", "Ragdoll")], tmp_path)
    assert report.counts["captions that do not name their category, so that it could not be swapped"] == 1
    assert set(samples[-1].negative_categories) == {"Ragdoll"}


def test_swap_beyond_the_context_is_no_negative(backbone: Backbone, tmp_path: Path) -> None:
    late = sample("9", "a " * 40 + "red Sphynx", "Sphynx")  # the tiny model reads 32 tokens
    samples, report = made([*CATS, late], tmp_path, functions=backbone_functions(backbone))
    assert set(samples[-1].negative_categories) == {"Sphynx"}
    assert all(not text.startswith("a a") for text in samples[-1].negatives)
    assert report.counts["negatives that differ only where the context has ended, left out"] >= 2


def test_no_negative_equals_a_caption_of_its_image(backbone: Backbone, tmp_path: Path) -> None:
    long = "Sphynx " + "a " * 40  # the tiny model reads 32 tokens, so all of these are one to it
    known = [
        sample("1", "A Sphynx.", "Sphynx"),
        sample("1", long + "moon", "Sphynx"),
        *(sample(image, long + thing, "Sphynx") for image, thing in (("2", "sun"), ("3", "sea"))),
        sample("4", "A Sphynx on a chair.", "Sphynx"),
    ]
    done, report = made(known, tmp_path, functions=backbone_functions(backbone))
    assert not any(text.startswith("Sphynx a a") for text in done[0].negatives), "its other caption reads the same"
    assert sum(text.startswith("Sphynx a a") for text in done[-1].negatives) == 1, "one of three that are alike"
    assert report.counts["negatives that differ only where the context has ended, left out"] >= 4


def test_a_test_category_is_never_seen_in_training(tmp_path: Path) -> None:
    reports = {name: CleaningReport() for name in ("train", "test")}
    splits = {"train": split(CATS[:3], tmp_path), "test": split(CATS[3:5], tmp_path, "test")}
    done = add_negatives(splits, reports, LETTER_FUNCTIONS)
    seen = {c for s in done["train"].samples for c in s.negative_categories}
    assert seen == {"Sphynx", "Ragdoll", "Maine Coon"}
    assert {c for s in done["test"].samples for c in s.negative_categories} > {"Beagle", "Pug"}


def test_no_negative_may_still_be_true(tmp_path: Path) -> None:
    both = [*CATS, sample("8", "A Sphynx beside a Ragdoll.", "Sphynx"), sample("8", "Two cats on red.", "Sphynx")]
    found = made(both, tmp_path, count=8)[0]
    assert {"Maine Coon", "Beagle", "Pug"} <= set(found[6].negative_categories)
    assert "Ragdoll" not in found[6].negative_categories, "it is in the picture as well"
    assert "Two cats on red." not in found[6].negatives, "it is of the same picture"
    samples = [
        sample("2", "A red panda in a tree.", "red panda"),
        sample("3", "A British Shorthair.", "Shorthair"),  # the name of another category, which its own is a part of
        sample("4", "A sleeping cat.", "British Shorthair"),
        sample("5", "An old Sphynx.", "Sphynx"),
    ]
    texts = [s.negatives for s in made(samples, tmp_path)[0]]
    assert texts[0]
    assert not [text for text in texts[0] if text.endswith(" panda in a tree.")]
    assert not [text for text in texts[1] if text.startswith("A British")]


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
        found = compare(backbone, data, ["clip"], 1, out, quick, images=tiny_data, negatives=mode)
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
        found = compare(backbone, data, [name], 1, tmp_path / name, quick, images=tiny_data)
        what = f"captions cut to the {32 - (4 if cut else 0)} tokens that fit"
        assert found["cleaning"]["train"].get(what, 0) == cut


def test_data_with_its_own_negatives_keeps_its_runs(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    """The identity of a finished run does not change when no negatives are made."""
    splits, reports = Annotations(tiny_data).load_all(("train", "val", "test"))
    counts = {name: dict(report.counts) for name, report in reports.items()}
    assert add_negatives(splits, reports, backbone_functions(backbone)) == splits
    assert counts == {name: dict(report.counts) for name, report in reports.items()}
    cache, quick = FeatureCache(None, backbone), TrainConfig(epochs=1, batch_size=6)
    other = add_negatives(splits, reports, backbone_functions(backbone), mode="all")
    runs = (MethodRunner(backbone, given, tmp_path, quick, cache) for given in (splits, other))
    before, after = (run.directory(method("dcar"), 0, 1e-3) for run in runs)
    assert before != after


def test_report_of_a_sound_data_set_is_empty(tiny_data: Path) -> None:
    assert set(Annotations(tiny_data).load("train")[1].counts) == {
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
    splits, reports = Annotations(data, tiny_data).load_all(("train", "val", "test"))
    expected = add_negatives(splits, reports, backbone_functions(backbone))
    for name in ("train", "val", "test"):
        written = Annotations(out, tiny_data).load(name)[0].samples
        assert written == expected[name].samples
    done = dcar("data", "negatives", data, "--out", data)
    assert done.returncode == 3
    assert "already holds test.json; give --out an empty or a new directory" in done.stderr
