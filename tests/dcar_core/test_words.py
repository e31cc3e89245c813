"""Names and attributes in a caption: whole words, articles, plurals."""

from random import Random

import pytest

from dcar_core.negatives.lexicon import swap_attributes
from dcar_core.negatives.words import article, find_mentions, fold_name, plural, replace_name, singular


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
