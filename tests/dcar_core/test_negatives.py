"""Negative captions: the words, the order of categories, what is made for a split, and what is said about it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from dcar_core.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.config import TrainConfig
from dcar_core.data import CleaningReport, Dataset, Sample, load_split, load_splits
from dcar_core.data.clean import normalise
from dcar_core.errors import DataError
from dcar_core.evaluate import compare
from dcar_core.feature_cache import FeatureCache
from dcar_core.images import ImageRoot
from dcar_core.methods import method
from dcar_core.negatives import complete, fill, views
from dcar_core.negatives.lexicon import swaps
from dcar_core.negatives.taxonomy import clusters, letters, load_taxonomy, rank_categories
from dcar_core.negatives.words import article, mentions, plural, replace_name, singular
from dcar_core.runs import Runs

ROOT = Path(__file__).parents[2]
FELINE = {"cat": ["Sphynx", "Ragdoll", "Maine Coon"], "dog": ["Beagle", "Pug"]}


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(BackboneSource(str(tiny_model)))


@pytest.mark.parametrize(
    ("caption", "name", "new", "expected"),
    [
        ("A morning_glory in a vase", "Morning glory", "iris", "An iris in a vase"),
        ("a catalogue, cat-like, of a bobcat", "cat", "dog", None),
        ("the non-cat and the cat2", "cat", "dog", None),
        ("a cat (old), a cat's bowl", "cat", "ox", "an ox (old), an ox's bowl"),
        ("An ox", "ox", "cat", "A cat"),
        ("Two cats and three oxen", "cat", "wolf", "Two wolves and three oxen"),
        ("a pair of birds of paradise", "bird of paradise", "fern", "a pair of ferns"),
        ("one bus", "buses", "tram", "one tram"),
        ("some foxes", "fox", "sheep", "some sheep"),
        ("This is a photo of Apply_Eye_Makeup.", "Apply Eye Makeup", "Pole Vault", "This is a photo of Pole_Vault."),
        ("a morning-glory", "morning glory", "tree poppy", "a tree-poppy"),
        ("a sphynx sleeps", "Sphynx", "Egyptian Mau", "an egyptian mau sleeps"),
        ("Sphynx sits.", "Sphynx", "german shorthaired", "German shorthaired sits."),
        ("Morning Glory blooms", "morning glory", "tree poppy", "Tree Poppy blooms"),
        ("A MORNING GLORY", "morning glory", "iris", "An IRIS"),
        ("An A321 airplane, the A321", "A321", "737-300", "A 737-300 airplane, the 737-300"),
        ("the 737-300, not the 737-300ER", "737-300", "MD-11", "the MD-11, not the 737-300ER"),
        ("keycap, *", "keycap, *", "keycap, #", "keycap, #"),
        ("a well-known cat - asleep", "-", "dog", None),
        ("a C++ (old) book", "C++ (old)", "[x]", "a [x] book"),
    ],
)
def test_a_name_is_replaced_as_a_whole_word(caption: str, name: str, new: str, expected: str | None) -> None:
    places = mentions(caption, name)
    assert bool(places) == (expected is not None)
    assert replace_name(caption, places, name, new) == (expected or caption)


def test_a_part_of_a_longer_category_is_not_the_category() -> None:
    assert mentions("a british shorthair", "shorthair", ("british shorthair",)) == []
    assert len(mentions("a British_Shorthair and a shorthair", "shorthair", ("british shorthair",))) == 1


@pytest.mark.parametrize(
    "phrase",
    ["a cat", "an owl", "a unicorn", "an uncle", "a European hare", "an hour", "a one-eyed cat", "an onion",
     "an MX-5", "a BMW", "an F-16", "a 737", "an 8", "an 18", "a 180", "an 1100", "a 2012 Audi", "an Airbus",
     "an X5", "a U-turn", "an HP printer", "a FIAT", "an SUV", "an LED lamp", "an FBI agent", "a USB stick", "an MRI",
     "an unidentified bird", "an unironed shirt", "a urinal", "a uranium rod", "a Ural owl", "an urn", "an urban fox"],
)  # fmt: skip
def test_a_or_an(phrase: str) -> None:
    said, _, rest = phrase.partition(" ")
    assert article(rest) == said


@pytest.mark.parametrize(
    ("one", "many"),
    [("cat", "cats"), ("box", "boxes"), ("cherry", "cherries"), ("toy", "toys"), ("Camry", "Camrys"),
     ("wolf", "wolves"), ("sheep", "sheep"), ("glass jar", "glass jars"), ("bird of prey", "birds of prey"),
     ("woman", "women"), ("cookie", "cookies"), ("zombie", "zombies"), ("headache", "headaches"), ("lens", "lenses"),
     ("moustache", "moustaches"), ("Mercedes", "Mercedes"), ("church", "churches"), ("bus", "buses")],
)  # fmt: skip
def test_plurals(one: str, many: str) -> None:
    assert (plural(one), singular(many), plural(many), singular(one)) == (many, one, many, one)


def test_attributes_are_replaced_one_at_a_time_and_never_in_the_name() -> None:
    caption = "An orange car in front of two blue oranges, on the left"
    found = list(swaps(caption, [(26, 29)], Random(0)))
    assert len(found) == len(set(found))
    assert "A red car in front of two blue oranges, on the left" in found
    assert "An orange car behind two blue oranges, on the left" in found
    assert "An orange car in front of two blue oranges, on the right" in found
    assert all(" two " in text for text in found)  # it stands in the span that is kept
    assert not any(" gray " in text for text in swaps("a grey cat", [], Random(0)))  # the same colour
    assert list(swaps("one cat left the room", [], Random(0))) == []


def sample(image: str, caption: str, category: str = "", **more: object) -> Sample:
    return Sample(image, caption, category, **more)  # type: ignore[arg-type]


CATS = [
    sample("1", "A Sphynx with green eyes on a chair.", "Sphynx"),
    sample("2", "A Ragdoll in front of a red sofa.", "Ragdoll"),
    sample("3", "A Maine Coon, asleep.", "Maine Coon"),
    sample("4", "A beagle on the grass.", "Beagle"),
    sample("5", "Two pugs with blue collars.", "Pug"),
    sample("6", "An older Sphynx that looks up.", "Sphynx"),
]


def split(samples: list[Sample], tmp_path: Path, name: str = "train") -> Dataset:
    return Dataset(name, samples, ImageRoot(tmp_path))


def made(
    samples: list[Sample], tmp_path: Path, mode: str = "auto", **given: object
) -> tuple[list[Sample], CleaningReport]:
    report = CleaningReport()
    features, cut = views(None)
    done = fill({"train": split(samples, tmp_path)}, {"train": report}, features=features, cut=cut, mode=mode, **given)  # type: ignore[arg-type]
    return done["train"].samples, report


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_both_perspectives(tmp_path: Path) -> None:
    tree = write(tmp_path / "t.json", {"meta_categories": FELINE, "similar": {"Sphynx": ["maine_coon", "Ragdoll"]}})
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


def test_a_category_that_is_no_word_harms_nothing(tmp_path: Path) -> None:
    samples, report = made([*CATS, sample("8", "a dash - here", "-")], tmp_path)
    assert samples[-1].negatives == ()
    assert report.names["pairs for which no negative could be made"] == ["8"]


def test_the_same_seed_gives_the_same_and_none_equals_its_caption(tmp_path: Path) -> None:
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
        own.setdefault(s.image, set()).add(normalise(s.caption))
    for s in one:
        texts = [normalise(text) for text in s.negatives]
        assert len(set(texts)) == len(texts) > 1
        assert not own[s.image] & set(texts)
        assert len(s.negative_categories) == len(texts)
    shuffled = made([samples[i] for i in np.random.default_rng(0).permutation(len(samples))], tmp_path)[0]
    swapped = lambda found: {s.image + s.caption: s.negatives[:1] for s in found}  # noqa: E731
    assert swapped(shuffled) == swapped(one)
    found = made([replace(s, image=f"pictures/{s.image}") for s in samples], tmp_path)[0]
    assert [s.negatives for s in found] == [s.negatives for s in one], "wherever the pictures lie"


def test_modes(tmp_path: Path) -> None:
    own = [replace(s, negatives=("A dog.",), negative_categories=("dog",)) for s in CATS]
    assert made([*own[:3], *CATS[3:]], tmp_path)[0] == [*own[:3], *CATS[3:]]  # as many have some as have none
    found, _ = made([*own[:2], *CATS[2:]], tmp_path)
    assert found[:2] == own[:2]
    assert all(s.negatives for s in found[2:])
    assert [len(s.negatives) > 0 for s in made([*own[:5], CATS[5]], tmp_path, "missing")[0]] == [True] * 6
    assert all("A dog." not in s.negatives for s in made(own, tmp_path, "all")[0])
    assert made(CATS, tmp_path, "off")[0] == CATS
    with pytest.raises(DataError, match=r"--negatives must be auto, missing, all, off, not 'some'"):
        made(CATS, tmp_path, "some")


def test_categories_in_the_order_of_the_data(tmp_path: Path) -> None:
    cats = [replace(s, meta_category="cat" if s.category in FELINE["cat"] else "dog") for s in CATS]
    samples, report = made([replace(cats[2], meta_category=""), *cats[:2], *cats[3:]], tmp_path)
    swapped = {s.image: set(s.negative_categories) - {s.category} for s in samples}
    assert swapped == {"1": {"Ragdoll"}, "6": {"Ragdoll"}, "2": {"Sphynx"}, "3": set(), "4": {"Pug"}, "5": {"Beagle"}}
    assert report.names["categories without a meta-category, swapped for one another"] == ["Maine Coon"]
    assert report.names["categories alone in their meta-category, not swapped for others"] == ["Maine Coon"]
    preferred = replace(CATS[1], negatives=("A pug.", "A Beagle."), negative_categories=("pug", "Beagle"))
    ranked = rank_categories([preferred, *CATS], None, letters, report)
    assert ranked["ragdoll"][:2] == ["Beagle", "Pug"]  # as often as each other, so by name; before all others
    both = [
        replace(CATS[0], meta_category="cat"),
        replace(CATS[5], meta_category="dog"),
        replace(CATS[1], meta_category="cat"),
    ]
    rank_categories(both, None, letters, report)
    assert report.names["categories with several meta-categories, the most frequent taken"] == ["Sphynx"]


def test_clusters_of_names_by_clip(backbone: Backbone, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=8) for _ in range(3)]
    rows = np.stack([g + 0.05 * rng.normal(size=8) for g in groups for _ in range(8)])
    of = clusters(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    assert [len({*of[i : i + 8]}) for i in (0, 8, 16)] == [1, 1, 1]
    assert len(set(of)) == 3
    assert clusters(np.eye(3)[:1]) == [0]
    alone = clusters(np.concatenate([rows[:15], -rows[20:21]]) / np.linalg.norm(rows[0]))
    assert min(alone.count(cluster) for cluster in alone) > 1
    features, _ = views(backbone.source.model)
    found = features(["cat", "dog"])
    assert found.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    reports = {"train": CleaningReport()}
    done = complete({"train": split(CATS, tmp_path)}, reports, backbone)["train"]
    again = complete({"train": split(CATS[::-1], tmp_path)}, reports, backbone)["train"]
    order = {s.image: [c for c in s.negative_categories if c != s.category] for s in done.samples}
    assert order == {s.image: [c for c in s.negative_categories if c != s.category] for s in again.samples}
    assert all(order.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must look like"),
        ("{}", "must look like"),
        ('{"groups": {}}', "must look like"),
        ('{"meta_categories": []}', "'meta_categories' must be an object"),
        ('{"similar": {"cat": "dog"}}', "'similar', 'cat' must be a list"),
        ('{"meta_categories": {"a": ["Maine_Coon"], "b": ["maine coon"]}}', "'maine coon' in both 'a' and 'b'"),
        (
            '{"meta_categories": {"boats": ["canoe"]}}',
            r"none of the data's 5 categories, such as 'Sphynx'; it has 'canoe'",
        ),
    ],
)
def test_a_bad_taxonomy(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=message):
        made(CATS, tmp_path, taxonomy=tmp_path / "t.json")
    with pytest.raises(DataError, match="cannot be read"):
        load_taxonomy(tmp_path / "gone.json")


def test_a_category_missing_from_the_taxonomy(tmp_path: Path) -> None:
    tree = write(tmp_path / "t.json", {"meta_categories": {"cats": ["sphynx", "Ragdoll", "Lykoi"], "dogs": ["Pug"]}})
    samples, report = made(CATS, tmp_path, taxonomy=tree)
    assert report.names["categories missing from the taxonomy, not swapped for others"] == ["Beagle", "Maine Coon"]
    assert report.names["categories alone in their meta-category, not swapped for others"] == ["Pug"]
    assert set(samples[0].negative_categories) == {"Ragdoll", "Lykoi", "Sphynx"}  # the file knows more than the data


def test_one_category_only(tmp_path: Path) -> None:
    samples, report = made([CATS[0], CATS[5], sample("7", "sleeping", "Sphynx")], tmp_path)
    assert report.counts["splits with one category only: no category can be swapped for another"] == 1
    assert all(set(s.negative_categories) == {"Sphynx"} for s in samples)
    samples, report = made([sample("7", "A Sphynx, asleep", "Sphynx")], tmp_path)
    assert samples[0].negatives == ()
    assert report.names["pairs for which no negative could be made"] == ["7"]


def test_without_categories(tmp_path: Path) -> None:
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


def test_captions_that_do_not_name_their_category(tmp_path: Path) -> None:
    samples, report = made([*CATS, sample("8", "A red bow.", "Ragdoll")], tmp_path)
    assert report.counts["captions that do not name their category, so that it could not be swapped"] == 1
    assert set(samples[-1].negative_categories) == {"Ragdoll"}


def test_a_swap_behind_the_end_of_the_context_is_no_negative(backbone: Backbone, tmp_path: Path) -> None:
    late = sample("9", "a " * 40 + "red Sphynx", "Sphynx")  # the tiny model reads 32 tokens
    reports = {"train": CleaningReport()}
    found = complete({"train": split([*CATS, late], tmp_path)}, reports, backbone)["train"].samples[-1]
    assert set(found.negative_categories) == {"Sphynx"}
    assert all(not text.startswith("a a") for text in found.negatives)
    assert reports["train"].counts["negatives that differ only where the context has ended, left out"] >= 2


def test_a_test_category_is_never_seen_in_training(tmp_path: Path) -> None:
    reports = {name: CleaningReport() for name in ("train", "test")}
    features, cut = views(None)
    done = fill(
        {"train": split(CATS[:3], tmp_path), "test": split(CATS[3:5], tmp_path, "test")},
        reports,
        features=features,
        cut=cut,
    )
    seen = {c for s in done["train"].samples for c in s.negative_categories}
    assert seen == {"Sphynx", "Ragdoll", "Maine Coon"}
    assert {c for s in done["test"].samples for c in s.negative_categories} > {"Beagle", "Pug"}


def bare_data(tiny_data: Path, directory: Path) -> Path:
    """The tiny data set without negatives."""
    directory.mkdir()
    for name in ("train", "val", "test"):
        content = json.loads((tiny_data / f"{name}.json").read_text())
        write(directory / f"{name}.json", {key: entry | {"negative": []} for key, entry in content.items()})
    return directory


def dcar(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_training_and_the_table_make_negatives(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, backbone: Backbone
) -> None:
    data = bare_data(tiny_data, tmp_path / "data")
    given = ("--images", tiny_data, "--model", tiny_model, "--epochs", "1")
    done = dcar("train", "--data", data, *given, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
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


def test_captions_beyond_the_context_are_counted(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    data = bare_data(tiny_data, tmp_path / "data")
    content = json.loads((data / "train.json").read_text())
    for number, entry in zip((27, 29), content.values(), strict=False):  # + SOS and EOT, in a context of 32
        entry["positive"] = "a " * number
    write(data / "train.json", content)
    for name, cut in (("clip", 0), ("coop", 2)):
        found = compare(
            backbone,
            data,
            [name],
            1,
            tmp_path / name,
            TrainConfig(epochs=1, batch_size=6),
            images=tiny_data,
            progress=False,
        )
        what = f"captions longer than the {32 - (4 if cut else 0)} tokens that the prompts leave them, cut"
        assert found["cleaning"]["train"].get(what, 0) == cut


def test_data_with_negatives_of_its_own_keeps_its_runs(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    """What a finished run is found by does not change where nothing is made."""
    splits, reports = load_splits(tiny_data, ("train", "val", "test"))
    counts = {name: dict(report.counts) for name, report in reports.items()}
    same = complete(splits, reports, backbone)
    assert same == splits
    assert counts == {name: dict(report.counts) for name, report in reports.items()}
    cache, quick = FeatureCache(None, backbone), TrainConfig(epochs=1, batch_size=6)
    before, after = (
        Runs(backbone, given, tmp_path, quick, cache)._directory(method("dcar"), 0, 1e-3) for given in (splits, same)
    )
    assert before == after
    other = complete(splits, reports, backbone, mode="all")
    assert Runs(backbone, other, tmp_path, quick, cache)._directory(method("dcar"), 0, 1e-3) != before


def test_a_sound_data_set_has_nothing_in_its_report(tiny_data: Path) -> None:
    assert set(load_split(tiny_data, "train")[1].counts) == {
        "absolute paths of another machine, replaced by the image root"
    }


def test_the_command_writes_what_training_reads(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, backbone: Backbone
) -> None:
    data, out = bare_data(tiny_data, tmp_path / "data"), tmp_path / "out"
    done = dcar("data", "negatives", data, "--model", tiny_model, "--out", out, "--show", "1")
    assert done.returncode == 0, done.stderr
    assert "  - a " in done.stdout
    assert f"train with --data {out} --images" in done.stdout
    splits, reports = load_splits(data, ("train", "val", "test"), images=tiny_data)
    expected = complete(splits, reports, backbone)
    for name in ("train", "val", "test"):
        written = load_split(out, name, images=tiny_data)[0].samples
        assert written == expected[name].samples
    done = dcar("data", "negatives", data, "--out", data)
    assert done.returncode == 3
    assert "holds test.json already; give --out an empty or a new directory" in done.stderr
