"""Captions of the emoji example's training: people's words for skin tones, and typing errors."""

import random
import runpy
from typing import Any

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def captions() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "emoji" / "captions.py"))


@pytest.mark.parametrize("seed", range(40))
def test_a_typing_error_changes_one_long_word_after_its_first_letter(seed: int, captions: dict[str, Any]) -> None:
    typed = captions["with_typo"]("a red umbrella", random.Random(seed))
    first, second, third = typed.split(" ")
    assert (first, second, third[0]) == ("a", "red", "u")
    assert abs(len(third) - len("umbrella")) <= 1


def test_typing_errors_are_of_several_kinds(captions: dict[str, Any]) -> None:
    typed = {captions["with_typo"]("umbrella", random.Random(seed)) for seed in range(400)}
    assert {"umbrlla", "umbrlela", "umbbrella"} <= typed  # left out, swapped, doubled
    assert len(typed) > 40


def test_short_words_have_no_typing_error(captions: dict[str, Any]) -> None:
    assert captions["with_typo"]("a red cat", random.Random(0)) == "a red cat"


def test_a_spoken_caption_names_gender_and_skin_tone_as_people_do(captions: dict[str, Any]) -> None:
    emoji = {"base_label": "woman running", "tones": [5], "tags": []}
    spoken = {captions["spoken_caption"](emoji, random.Random(seed)) for seed in range(400)}
    assert {"dark skinned woman running", "lady running with dark skin", "female running black"} <= spoken
    assert all("running" in text for text in spoken)


def test_a_spoken_caption_without_skin_tone_is_the_label(captions: dict[str, Any]) -> None:
    assert captions["spoken_caption"]({"base_label": "flag: Japan", "tones": []}, random.Random(0)) == "flag of Japan"
