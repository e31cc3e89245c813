"""Similar categories from the data, a file, or CLIP."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcar_core.data import CleaningReport, Sample
from dcar_core.model.backbone import Backbone
from dcar_core.negatives import backbone_functions
from dcar_core.negatives.taxonomy import letter_features, load_taxonomy, rank_categories
from dcar_core.negatives.words import fold_name
from dcar_core.util.errors import DataError
from tests.support.files import write_json
from tests.support.negatives import CATS, FELINE, made, sample


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
