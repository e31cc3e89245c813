"""Names and attributes in a caption, and which categories are similar."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from dcar_core.data import CleaningReport, Sample
from dcar_core.model.backbone import Backbone
from dcar_core.negatives import backbone_functions
from dcar_core.negatives.lexicon import swap_attributes
from dcar_core.negatives.taxonomy import letter_features, load_taxonomy, rank_categories
from dcar_core.negatives.words import article, find_mentions, fold_name, plural, replace_name, singular
from dcar_core.util.errors import DataError
from tests.support.files import write_json
from tests.support.negatives import CATS, FELINE, made, sample


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
        ("A colt\u2019s foot in grass", "colt's foot", "iris", "An iris in grass"),
        ("A colt's foot in grass", "Colt\u02bcs Foot", "iris", "An iris in grass"),
        ("Two Mercedes\u2011Benz cars", "Mercedes-Benz", "Audi", "Two Audi cars"),
        ("Two Mercedes-Benz cars", "Mercedes\u2013Benz", "Audi", "Two Audi cars"),
        ("a cat\u2011like animal, a non\u2010cat", "cat", "dog", None),
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
        ("一只白色的猫坐在沙发上", "猫", "狗", "一只白色的狗坐在沙发上"),
        ("白いネコがソファに座っている", "ネコ", "犬", "白い犬がソファに座っている"),
        ("แมวสีขาวนั่งบนโซฟา", "แมว", "สุนัข", "สุนัขสีขาวนั่งบนโซฟา"),
        ("ແມວສີຂາວນັ່ງ", "ແມວ", "ໝາ", "ໝາສີຂາວນັ່ງ"),
        ("ខ្ញុំឃើញឆ្មាពណ៌ស", "ឆ្មា", "ឆ្កែ", "ខ្ញុំឃើញឆ្កែពណ៌ស"),
        ("ကြောင်ဖြူလေး", "ကြောင်", "ခွေး", "ခွေးဖြူလေး"),
        ("一辆白色的BMW停在路边", "BMW", "Audi", "一辆白色的Audi停在路边"),
        ("一辆BMWX5停在路边", "BMW", "Audi", None),
        ("穿T恤衫的人", "T恤", "毛衣", "穿毛衣衫的人"),
        ("穿XT恤的人", "T恤", "毛衣", None),
        ("a C++ (old) book", "C++ (old)", "[x]", "a [x] book"),
    ],
)
def test_a_name_is_replaced_as_a_whole_word(caption: str, name: str, new: str, expected: str | None) -> None:
    places = find_mentions(caption, name)
    assert bool(places) == (expected is not None)
    assert replace_name(caption, places, name, new) == (expected or caption)


def test_typographic_signs_are_folded() -> None:
    assert fold_name("Colt\u2019s\u2011Foot") == fold_name("colt's foot") == fold_name("colt\u02bcs\u2013foot")


def test_part_of_a_longer_category_does_not_match() -> None:
    assert find_mentions("a british shorthair", "shorthair", ("british shorthair",)) == []
    assert len(find_mentions("a British_Shorthair and a shorthair", "shorthair", ("british shorthair",))) == 1


@pytest.mark.parametrize(
    "phrase",
    ["a cat", "an owl", "a unicorn", "an uncle", "a European hare", "an hour", "a one-eyed cat", "an onion",
     "an MX-5", "a BMW", "an F-16", "a 737", "an 8", "an 18", "a 180", "an 1100", "a 2012 Audi", "an Airbus",
     "an X5", "a U-turn", "an HP printer", "a FIAT", "an SUV", "an LED lamp", "an FBI agent", "a USB stick", "an MRI",
     "an unidentified bird", "an unironed shirt", "a urinal", "a uranium rod", "a Ural owl", "an urn", "an urban fox",
     "an \u00e9clair", "an \u00d6sterreich badge", "an SOS", "an mp3 player", "a ouija board", "a Utah park",
     "a unanimous vote"],
)  # fmt: skip
def test_article_fits_the_word(phrase: str) -> None:
    said, _, rest = phrase.partition(" ")
    assert article(rest) == said


@pytest.mark.parametrize(
    ("one", "many"),
    [("cat", "cats"), ("box", "boxes"), ("cherry", "cherries"), ("toy", "toys"), ("Camry", "Camrys"),
     ("wolf", "wolves"), ("sheep", "sheep"), ("glass jar", "glass jars"), ("bird of prey", "birds of prey"),
     ("woman", "women"), ("cookie", "cookies"), ("zombie", "zombies"), ("headache", "headaches"), ("lens", "lenses"),
     ("moustache", "moustaches"), ("Mercedes", "Mercedes"), ("church", "churches"), ("bus", "buses"),
     ("flamingo", "flamingos"), ("photo", "photos"), ("emu", "emus"), ("fireman", "firemen"),
     ("policewoman", "policewomen"), ("human", "humans"),
     ("grandchild", "grandchildren"), ("werewolf", "werewolves"), ("dormouse", "dormice"), ("goldfish", "goldfishes"),
     ("Doberman", "Dobermans"), ("cyclamen", "cyclamens"), ("Porsche Cayman", "Porsche Caymans"), ("taco", "tacos"),
     ("gecko", "geckos"), ("armadillo", "armadillos"), ("cosmos", "cosmos"),
     ("specimen", "specimens"), ("rhinoceros", "rhinoceroses"), ("mongoose", "mongooses"), ("man", "men")],
)  # fmt: skip
def test_plurals_are_replaced(one: str, many: str) -> None:
    assert (plural(one), singular(many), plural(many), singular(one)) == (many, one, many, one)


def test_words_that_only_look_plural_are_kept() -> None:
    for name in ("Barbados", "Lagos", "thermos", "dolmen", "ramen", "Carmen", "Yemen", "chaos"):
        assert singular(name) == name


def test_attributes_are_replaced_one_at_a_time_and_never_in_the_name() -> None:
    caption = "An orange car in front of two blue oranges, on the left"
    found = list(swap_attributes(caption, [(26, 29)], Random(0)))
    assert len(found) == len(set(found))
    assert "A red car in front of two blue oranges, on the left" in found
    assert "An orange car behind two blue oranges, on the left" in found
    assert "An orange car in front of two blue oranges, on the right" in found
    assert all(" two " in text for text in found)  # it stands in the span that is kept
    assert not any(" gray " in text for text in swap_attributes("a grey cat", [], Random(0)))  # the same colour
    assert list(swap_attributes("one cat left the room", [], Random(0))) == []
    assert {"a Blue car", "a Black car"} < set(swap_attributes("a Red car", [], Random(0)))


def test_categories_keep_the_order_of_the_data(tmp_path: Path) -> None:
    cats = [replace(s, meta_category="cat" if s.category in FELINE["cat"] else "dog") for s in CATS]
    samples, report = made([replace(cats[2], meta_category=""), *cats[:2], *cats[3:]], tmp_path)
    swapped = {s.image: set(s.negative_categories) - {s.category} for s in samples}
    assert swapped == {"1": {"Ragdoll"}, "6": {"Ragdoll"}, "2": {"Sphynx"}, "3": set(), "4": {"Pug"}, "5": {"Beagle"}}
    assert report.names["categories without a meta-category, swapped for one another"] == ["Maine Coon"]
    assert report.names["single categories of a meta-category, not swapped for others"] == ["Maine Coon"]
    preferred = replace(CATS[1], negatives=("A pug.", "A Beagle."), negative_categories=("pug", "Beagle"))
    ranked = rank_categories([preferred, *CATS], None, letter_features, report)
    assert ranked["ragdoll"][:2] == ["Beagle", "Pug"]  # as often as each other, so by name; before all others
    groups = ((0, "cat"), (5, "dog"), (1, "cat"))
    both = [replace(CATS[place], meta_category=group) for place, group in groups]
    rank_categories(both, None, letter_features, report)
    assert report.names["categories with several meta-categories, the most frequent taken"] == ["Sphynx"]


def test_names_are_ranked_by_clip(backbone: Backbone, tmp_path: Path) -> None:
    functions = backbone_functions(backbone)
    found = functions.features(["cat", "dog"])
    assert found.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    orders = []
    for samples in (CATS, CATS[::-1]):
        done, _ = made(samples, tmp_path, functions=functions)
        orders.append({s.image: [c for c in s.negative_categories if c != s.category] for s in done})
    assert orders[0] == orders[1]
    assert all(orders[0].values())


def test_a_hundred_categories_of_many_are_ranked() -> None:
    samples = [sample(f"{number}", f"{number}", f"category {number}") for number in range(150)]
    ranked = rank_categories(samples, None, letter_features, CleaningReport())
    assert {len(set(names)) for names in ranked.values()} == {100}
    assert all(name not in map(fold_name, names) for name, names in ranked.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must look like"),
        ("{}", "must look like"),
        ('{"groups": {}}', "must look like"),
        ('{"meta_categories": []}', "'meta_categories' must map names to lists"),
        ('{"similar": {"cat": "dog"}}', "'similar' must map names to lists"),
        ('{"meta_categories": {"a": ["Maine_Coon"], "b": ["maine coon"]}}', "'maine coon' in both 'a' and 'b'"),
        (
            '{"meta_categories": {"boats": ["canoe"]}}',
            r"none of the data's 5 categories, such as 'Sphynx'; it has 'canoe'",
        ),
    ],
)
def test_invalid_taxonomy_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=message):
        made(CATS, tmp_path, taxonomy=tmp_path / "t.json")
    with pytest.raises(DataError, match="cannot be read"):
        load_taxonomy(tmp_path / "gone.json")


def test_category_missing_from_the_taxonomy_is_named(tmp_path: Path) -> None:
    tree = write_json(
        tmp_path / "t.json", {"meta_categories": {"cats": ["sphynx", "Ragdoll", "Lykoi"], "dogs": ["Pug"]}}
    )
    samples, report = made(CATS, tmp_path, taxonomy=tree)
    assert report.names["categories missing from the taxonomy, not swapped for others"] == ["Beagle", "Maine Coon"]
    assert report.names["single categories of a meta-category, not swapped for others"] == ["Pug"]
    assert set(samples[0].negative_categories) == {"Ragdoll", "Lykoi", "Sphynx"}  # the file knows more than the data


def test_single_category_has_no_category_to_swap(tmp_path: Path) -> None:
    samples, report = made([CATS[0], CATS[5], sample("7", "sleeping", "Sphynx")], tmp_path)
    assert report.counts["splits with one category only: no category can be swapped for another"] == 1
    assert all(set(s.negative_categories) == {"Sphynx"} for s in samples)
    samples, report = made([sample("7", "A Sphynx, asleep", "Sphynx")], tmp_path)
    assert samples[0].negatives == ()
    assert report.names["pairs for which no negative could be made"] == ["7"]


def test_categories_are_ranked_by_the_data_then_by_similarity() -> None:
    """Three categories on an arc: the middle one is the nearest of both others."""
    places = {"Left": (1.0, 0.0), "Middle": (0.6, 0.8), "Right": (0.0, 1.0), "Far": (-1.0, 0.0)}
    samples = [sample(name, f"a {name}", name, meta_category="all") for name in places]

    def ranked(*more: Sample) -> dict[str, list[str]]:
        found = rank_categories(
            [*samples, *more], None, lambda names: np.array([places[name] for name in names]), CleaningReport()
        )
        return {name: found[name.casefold()] for name in places}

    assert ranked()["Left"] == ["Middle", "Right", "Far"]
    assert ranked()["Right"] == ["Middle", "Far", "Left"]
    own = [("Far", "Right"), ("Right", "Left"), ("Right",)]
    asked = [
        sample(f"{i}", f"{i}", "Left", negatives=("?",) * len(c), negative_categories=c) for i, c in enumerate(own)
    ]
    assert ranked(*asked)["Left"] == ["Right", "Far", "Middle"]
    # a category is of the meta-category that most of its samples name
    elsewhere = [sample("x", "x", "Left", meta_category=group) for group in ("all", "a few")]
    assert ranked(*elsewhere)["Left"] == ["Middle", "Right", "Far"]
