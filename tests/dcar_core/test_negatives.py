"""Negative captions: names and attributes in a caption, similar categories, modes, and
those that training makes.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from dcar_core.data import Annotations, CleaningReport, Dataset, Sample
from dcar_core.data.samples import fold_text
from dcar_core.images import ImageRoot
from dcar_core.model.backbone import Backbone
from dcar_core.negatives import LETTER_FUNCTIONS, add_negatives, backbone_functions
from dcar_core.negatives.complete import TextFunctions, load_taxonomy, rank_categories
from dcar_core.negatives.words import (
    article,
    find_mentions,
    plural,
    replace_name,
    singular,
    swap_attributes,
)
from dcar_core.util.errors import DataError
from tests.support.commands import dcar
from tests.support.files import write_json

FELINE = {"cat": ["Sphynx", "Ragdoll", "Maine Coon"], "dog": ["Beagle", "Pug"]}


def sample(image: str, caption: str, category: str = "", **more: Any) -> Sample:
    return Sample(image, caption, category, **more)


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
    samples: list[Sample],
    tmp_path: Path,
    mode: str = "auto",
    functions: TextFunctions = LETTER_FUNCTIONS,
    **given: Any,
) -> tuple[list[Sample], CleaningReport]:
    report = CleaningReport()
    done = add_negatives(
        {"train": split(samples, tmp_path)},
        {"train": report},
        functions,
        mode=mode,
        **given,
    )
    return done["train"].samples, report


def test_negatives_swap_categories_and_captions(tmp_path: Path) -> None:
    similar = {"Sphynx": ["maine_coon", "Ragdoll"]}
    tree = write_json(
        tmp_path / "t.json", {"meta_categories": FELINE, "similar": similar}
    )
    samples, report = made(CATS, tmp_path, taxonomy=tree)
    first = samples[0]
    last = samples[4]
    assert first.negatives[:2] == (
        "A Maine Coon with green eyes on a chair.",
        "A Ragdoll with green eyes on a chair.",
    )
    assert first.negatives[2] == "An older Sphynx that looks up."
    assert first.negatives[3].startswith("A Sphynx with ")
    assert first.negative_categories == ("Maine Coon", "Ragdoll", "Sphynx", "Sphynx")
    # of the dogs, in the caption's number and writing
    assert last.negatives[0] == "Two beagles with blue collars."
    assert set(last.negative_categories) == {"Beagle", "Pug"}
    assert report.counts == {
        "pairs for which negatives were made": 6,
        "negatives made: the caption with another category": 10,
        "negatives made: another caption of the category": 2,
        "negatives made: the caption with another attribute": 6,
    }


def test_no_negative_is_true_of_its_image(tmp_path: Path) -> None:
    samples = [
        sample("0", "bread, grain, loaf", "food"),
        sample("1", "bread", "food"),
        sample("2", "rice", "food"),
    ]
    assert "bread" in made(samples, tmp_path)[0][0].negatives
    samples[0] = replace(samples[0], attributes=("Bread",))
    assert made(samples, tmp_path)[0][0].negatives == ("rice",)
    both = [
        *CATS,
        sample("8", "A Sphynx beside a Ragdoll.", "Sphynx"),
        sample("8", "Two cats on red.", "Sphynx"),
    ]
    found = made(both, tmp_path, count=8)[0]
    assert {"Maine Coon", "Beagle", "Pug"} <= set(found[6].negative_categories)
    assert "Ragdoll" not in found[6].negative_categories, "it is in the picture as well"
    assert "Two cats on red." not in found[6].negatives, "it is of the same picture"
    samples = [
        sample("2", "A red panda in a tree.", "red panda"),
        sample("5", "An old Sphynx.", "Sphynx"),
    ]
    texts = [s.negatives for s in made(samples, tmp_path)[0]]
    assert texts[0]
    assert not [text for text in texts[0] if text.endswith(" panda in a tree.")]


def test_negatives_are_reproducible_and_differ_from_their_caption(
    tmp_path: Path,
) -> None:
    words = (
        "red",
        "blue",
        "green",
        "two",
        "three",
        "small",
        "large",
        "wooden",
        "plastic",
    )
    samples = [
        sample(f"{i}", f"{w.title()} {c}, {v}-sided, {i % 7}", c)
        for i, (w, v, c) in enumerate(
            (w, v, c) for w in words for v in words for c in ("oak tree", "elm tree")
        )
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
    shuffled = made(
        [samples[i] for i in np.random.default_rng(0).permutation(len(samples))],
        tmp_path,
    )[0]
    swapped, expected = (
        {s.image + s.caption: s.negatives[:1] for s in found}
        for found in (shuffled, one)
    )
    assert swapped == expected, "in any order"
    found = made([replace(s, image=f"pictures/{s.image}") for s in samples], tmp_path)[
        0
    ]
    assert [s.negatives for s in found] == [s.negatives for s in one], (
        "wherever the pictures lie"
    )


def test_modes_choose_which_pairs_get_negatives(tmp_path: Path) -> None:
    own = [
        replace(s, negatives=("A dog.",), negative_categories=("dog",)) for s in CATS
    ]
    # as many have some as have none
    assert made([*own[:3], *CATS[3:]], tmp_path)[0] == [*own[:3], *CATS[3:]]
    found, _ = made([*own[:2], *CATS[2:]], tmp_path)
    assert found[:2] == own[:2]
    assert all(s.negatives for s in found[2:])
    assert [
        len(s.negatives) > 0 for s in made([*own[:5], CATS[5]], tmp_path, "missing")[0]
    ] == [True] * 6
    assert all("A dog." not in s.negatives for s in made(own, tmp_path, "all")[0])
    assert made(CATS, tmp_path, "off")[0] == CATS
    tree = write_json(tmp_path / "t.json", {"meta_categories": FELINE})
    assert made(own, tmp_path, taxonomy=tree)[1].counts == {
        "pairs that keep their negatives, so that the taxonomy is not used": 6
    }
    with pytest.raises(
        DataError, match=r"--negatives must be auto, missing, all, off, not 'some'"
    ):
        made(CATS, tmp_path, "some")


def test_negatives_need_categories(tmp_path: Path) -> None:
    bare = [replace(s, category="") for s in CATS]
    found, report = made(bare, tmp_path)
    assert found == bare
    assert report.counts == {
        "pairs without a category, for which no negatives are made": 6
    }
    with pytest.raises(
        DataError,
        match=(
            r"train: negatives need categories, and none of its 6 pairs .* has one;"
            r" give"
        ),
    ):
        made(bare, tmp_path, "all")
    found, report = made([*bare[:1], *CATS[1:]], tmp_path, "missing")
    assert found[0].negatives == ()
    assert (
        report.counts["pairs without a category, for which no negatives are made"] == 1
    )
    with pytest.raises(DataError, match="the split train has no pairs"):
        made([], tmp_path)
    others = sample("8", "A red bow.", "Ragdoll"), sample("9", "a dash - here", "-")
    samples, report = made([*CATS, *others], tmp_path)
    assert (
        report.counts[
            "captions that do not name their category, so that it could not be swapped"
        ]
        == 2
    )
    assert set(samples[-2].negative_categories) == {"Ragdoll"}
    assert samples[-1].negatives == ()
    assert report.names["pairs for which no negative could be made"] == ["9"]


def test_negatives_that_differ_beyond_the_context_alone_are_left_out(
    backbone: Backbone, tmp_path: Path
) -> None:
    """The tiny model reads 32 tokens."""
    functions = backbone_functions(backbone)
    long = "Sphynx " + "a " * 40
    features = functions.features(["cat", "dog"])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), np.ones(2))
    samples, _ = made(
        [*CATS, sample("9", "a " * 40 + "red Sphynx", "Sphynx")],
        tmp_path,
        functions=functions,
    )
    assert set(samples[-1].negative_categories) == {"Sphynx"}
    assert all(not text.startswith("a a") for text in samples[-1].negatives)
    texts = (
        "A Sphynx.",
        f"{long}moon",
        f"{long}sun",
        f"{long}sea",
        "A Sphynx, asleep.",
    )
    rows = [
        sample(image, text, "Sphynx")
        for image, text in zip("11234", texts, strict=True)
    ]
    done, _ = made(rows, tmp_path, functions=functions)
    assert not any(text.startswith("Sphynx a a") for text in done[0].negatives), (
        "its other caption reads the same"
    )
    assert sum(text.startswith("Sphynx a a") for text in done[-1].negatives) == 1, (
        "one of three that are alike"
    )


def test_a_test_category_is_never_seen_in_training(tmp_path: Path) -> None:
    reports = {name: CleaningReport() for name in ("train", "test")}
    splits = {
        "train": split(CATS[:3], tmp_path),
        "test": split(CATS[3:5], tmp_path, "test"),
    }
    done = add_negatives(splits, reports, LETTER_FUNCTIONS)
    seen = {c for s in done["train"].samples for c in s.negative_categories}
    assert seen == {"Sphynx", "Ragdoll", "Maine Coon"}
    assert {c for s in done["test"].samples for c in s.negative_categories} > {
        "Beagle",
        "Pug",
    }


def bare_data(tiny_data: Path, directory: Path) -> Path:
    """The tiny data set without negatives."""
    directory.mkdir()
    for name in ("train", "val", "test"):
        content = json.loads((tiny_data / f"{name}.json").read_text())
        write_json(
            directory / f"{name}.json",
            {key: entry | {"negative": []} for key, entry in content.items()},
        )
    return directory


@pytest.mark.slow
def test_training_makes_negatives_and_skips_unusable_images(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    data = bare_data(tiny_data, tmp_path / "data")
    photos = shutil.copytree(tiny_data, tmp_path / "photos")
    content = json.loads((data / "train.json").read_text())
    broken = next(iter(content.values()))["file_name"]
    (photos / broken).write_bytes((photos / broken).read_bytes()[:60])
    content["lost_1"] = {
        "file_name": "lost.png",
        "positive": "a lost one",
        "class_name": "square",
    }
    write_json(data / "train.json", content)
    given = (
        "--data",
        data,
        "--images",
        photos,
        "--model",
        tiny_model,
        "--epochs",
        "1",
        "--out",
        tmp_path / "c",
    )
    done = dcar("train", *given, "--skip-broken")
    assert "adapted" in done.stdout, done.stderr
    for said in (
        "missing, left out: lost.png",
        f"broken, left out: {broken} (",
        "11 pairs for which negatives",
    ):
        assert said in done.stderr
    saved = json.loads((tmp_path / "c" / "cleaning.json").read_text())["train"]
    assert saved["names"]["images missing, left out"] == ["lost.png"]
    assert saved["counts"]["negatives made: the caption with another category"] > 11


@pytest.mark.slow
def test_command_writes_what_train_reads(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    backbone: Backbone,
) -> None:
    data = bare_data(tiny_data, tmp_path / "data")
    out = tmp_path / "out"
    done = dcar(
        "data",
        "negatives",
        data,
        "--model",
        tiny_model,
        "--out",
        out,
        "--show",
        "1",
    )
    assert done.returncode == 0, done.stderr
    assert "  - a " in done.stdout
    assert f"train with --data {out} --images" in done.stdout
    expected = add_negatives(
        *Annotations(data, tiny_data).load_all(), backbone_functions(backbone)
    )
    written = Annotations(out, tiny_data).load_all()[0]
    assert {name: part.samples for name, part in written.items()} == {
        n: p.samples for n, p in expected.items()
    }
    done = dcar("data", "negatives", data, "--out", data)
    assert done.returncode == 3
    assert (
        "already holds test.json; give --out an empty or a new directory" in done.stderr
    )


@pytest.mark.parametrize(
    ("caption", "name", "new", "expected"),
    [
        ("A morning_glory in a vase", "Morning glory", "iris", "An iris in a vase"),
        ("a catalogue, cat-like, of a bobcat", "cat", "dog", None),
        ("a cat (old), a cat's bowl", "cat", "ox", "an ox (old), an ox's bowl"),
        ("Two cats and three oxen", "cat", "wolf", "Two wolves and three oxen"),
        ("one bus", "buses", "tram", "one tram"),
        ("A colt's foot in grass", "Colt\u02bcs Foot", "iris", "An iris in grass"),
        ("Two Mercedes\u2011Benz cars", "Mercedes-Benz", "Audi", "Two Audi cars"),
        (
            "This is a photo of Apply_Eye_Makeup.",
            "Apply Eye Makeup",
            "Pole Vault",
            "This is a photo of Pole_Vault.",
        ),
        ("a sphynx sleeps", "Sphynx", "Egyptian Mau", "an egyptian mau sleeps"),
        ("Sphynx sits.", "Sphynx", "german shorthaired", "German shorthaired sits."),
        ("Morning Glory blooms", "morning glory", "tree poppy", "Tree Poppy blooms"),
        ("A MORNING GLORY", "morning glory", "iris", "An IRIS"),
        (
            "An A321 airplane, the A321",
            "A321",
            "737-300",
            "A 737-300 airplane, the 737-300",
        ),
        (
            "the 737-300, not the 737-300ER",
            "737-300",
            "MD-11",
            "the MD-11, not the 737-300ER",
        ),
        ("keycap, *", "keycap, *", "keycap, #", "keycap, #"),
        ("a well-known cat - asleep", "-", "dog", None),
        ("一只白色的猫坐在沙发上", "猫", "狗", "一只白色的狗坐在沙发上"),
        ("一辆白色的BMW停在路边", "BMW", "Audi", "一辆白色的Audi停在路边"),
        ("一辆BMWX5停在路边", "BMW", "Audi", None),
        ("a C++ (old) book", "C++ (old)", "[x]", "a [x] book"),
    ],
)
def test_a_name_is_replaced_as_a_whole_word(
    caption: str,
    name: str,
    new: str,
    expected: str | None,
) -> None:
    places = find_mentions(caption, name)
    assert bool(places) == (expected is not None)
    assert replace_name(caption, places, name, new) == (expected or caption)


def test_article_fits_the_word() -> None:
    for phrase in (
        "a cat",
        "an owl",
        "a unicorn",
        "an uncle",
        "a European hare",
        "an hour",
        "a one-eyed cat",
        "an onion",
        "an MX-5",
        "a BMW",
        "an F-16",
        "a 737",
        "an 8",
        "an 18",
        "a 180",
        "a 2012 Audi",
        "an Airbus",
        "an X5",
        "a U-turn",
        "an HP printer",
        "a FIAT",
        "an X1",
        "an unidentified bird",
        "an unironed shirt",
        "a urinal",
        "a uranium rod",
        "an urn",
        "an urban fox",
        "an \u00e9clair",
        "an \u00d6sterreich badge",
        "a Utah park",
    ):
        said, _, rest = phrase.partition(" ")
        assert article(rest) == said, phrase


def test_plurals_are_replaced_and_words_that_only_look_plural_kept() -> None:
    for one, many in [
        ("cat", "cats"),
        ("box", "boxes"),
        ("cherry", "cherries"),
        ("toy", "toys"),
        ("Camry", "Camrys"),
        ("wolf", "wolves"),
        ("sheep", "sheep"),
        ("glass jar", "glass jars"),
        ("bird of prey", "birds of prey"),
        ("woman", "women"),
        ("cookie", "cookies"),
        ("zombie", "zombies"),
        ("lens", "lenses"),
        ("moustache", "moustaches"),
        ("Mercedes", "Mercedes"),
        ("church", "churches"),
        ("bus", "buses"),
        ("flamingo", "flamingos"),
        ("photo", "photos"),
        ("emu", "emus"),
        ("fireman", "firemen"),
        ("human", "humans"),
        ("Doberman", "Dobermans"),
        ("cyclamen", "cyclamens"),
        ("Porsche Cayman", "Porsche Caymans"),
        ("taco", "tacos"),
        ("cosmos", "cosmos"),
        ("specimen", "specimens"),
        ("rhinoceros", "rhinoceroses"),
        ("mongoose", "mongooses"),
        ("man", "men"),
    ]:
        assert plural(one) == many
        assert singular(many) == one
        assert plural(many) == many
        assert singular(one) == one
    for name in (
        "Barbados",
        "Lagos",
        "thermos",
        "dolmen",
        "ramen",
        "Carmen",
        "Yemen",
        "chaos",
    ):
        assert singular(name) == name


def test_attributes_are_replaced_one_at_a_time_and_never_in_the_name() -> None:
    caption = "An orange car in front of two blue oranges, on the left"
    found = list(swap_attributes(caption, [(26, 29)], Random(0)))
    assert len(found) == len(set(found))
    assert "A red car in front of two blue oranges, on the left" in found
    assert "An orange car behind two blue oranges, on the left" in found
    assert "An orange car in front of two blue oranges, on the right" in found
    assert all(" two " in text for text in found)  # it stands in the span that is kept
    # the same colour
    assert not any(
        " gray " in text for text in swap_attributes("a grey cat", [], Random(0))
    )
    assert list(swap_attributes("one cat left the room", [], Random(0))) == []
    assert {"a Blue car", "a Black car"} < set(
        swap_attributes("a Red car", [], Random(0))
    )


def test_categories_keep_the_order_of_the_data(tmp_path: Path) -> None:
    cats = [
        replace(s, meta_category="cat" if s.category in FELINE["cat"] else "dog")
        for s in CATS
    ]
    samples, report = made(
        [replace(cats[2], meta_category=""), *cats[:2], *cats[3:]], tmp_path
    )
    swapped = {s.image: set(s.negative_categories) - {s.category} for s in samples}
    assert swapped == {
        "1": {"Ragdoll"},
        "6": {"Ragdoll"},
        "2": {"Sphynx"},
        "3": set(),
        "4": {"Pug"},
        "5": {"Beagle"},
    }
    preferred = replace(
        CATS[1],
        negatives=("A pug.", "A Beagle."),
        negative_categories=("pug", "Beagle"),
    )
    ranked = rank_categories([preferred, *CATS], None, LETTER_FUNCTIONS, report)
    # as often as each other, so by name; before all others
    assert ranked["ragdoll"][:2] == ["Beagle", "Pug"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "must look like"),
        ('{"meta_categories": []}', "must look like"),
        ('{"similar": {"cat": "dog"}}', "must look like"),
        (
            '{"meta_categories": {"a": ["Maine_Coon"], "b": ["maine coon"]}}',
            "'maine coon' in both 'a' and 'b'",
        ),
        (
            '{"meta_categories": {"boats": ["canoe"]}}',
            "none of the data's 5 categories, such as 'Beagle'; it has 'ca",
        ),
    ],
)
def test_invalid_taxonomy_is_refused(
    tmp_path: Path,
    content: str,
    message: str,
) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=message):
        made(CATS, tmp_path, taxonomy=tmp_path / "t.json")
    with pytest.raises(DataError, match="cannot be read"):
        load_taxonomy(tmp_path / "gone.json")


def test_categories_are_ranked_by_the_data_then_by_similarity() -> None:
    """Three categories on an arc: the middle one is the nearest of both others."""
    places = {
        "Left": (1.0, 0.0),
        "Middle": (0.6, 0.8),
        "Right": (0.0, 1.0),
        "Far": (-1.0, 0.0),
    }
    samples = [sample(name, f"a {name}", name, meta_category="all") for name in places]

    functions = LETTER_FUNCTIONS._replace(
        features=lambda names: np.array([places[name] for name in names])
    )

    def ranked(*more: Sample) -> dict[str, list[str]]:
        found = rank_categories([*samples, *more], None, functions, CleaningReport())
        return {name: found[name.casefold()] for name in places}

    assert ranked()["Left"] == ["Middle", "Right", "Far"]
    assert ranked()["Right"] == ["Middle", "Far", "Left"]
    own = [("Far", "Right"), ("Right", "Left"), ("Right",)]
    asked = [
        sample(
            "x",
            "x",
            "Left",
            negatives=("?",) * len(names),
            negative_categories=names,
        )
        for names in own
    ]
    assert ranked(*asked)["Left"] == ["Right", "Far", "Middle"]
    # a category is of the meta-category that most of its samples name
    elsewhere = [
        sample("x", "x", "Left", meta_category=group) for group in ("all", "a few")
    ]
    assert ranked(*elsewhere)["Left"] == ["Middle", "Right", "Far"]
