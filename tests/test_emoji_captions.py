"""Captions of the emoji example's training: people's words for skin tones, and typing errors."""

import random
import re
import runpy
from typing import Any

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def captions() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "emoji" / "captions.py"))


def test_a_typing_error_changes_one_long_word_after_its_first_letter(captions: dict[str, Any]) -> None:
    typed = {captions["with_typo"]("a red umbrella", random.Random(seed)) for seed in range(400)}
    assert {"a red umbrlla", "a red umbrlela", "a red umbbrella"} <= typed  # left out, swapped, doubled
    assert len(typed) > 40
    for text in typed:
        assert re.fullmatch("a red u[a-z]+", text)
        assert abs(len(text) - len("a red umbrella")) <= 1
    assert captions["with_typo"]("a red cat", random.Random(0)) == "a red cat"


def test_a_spoken_caption_names_gender_and_skin_tone_as_people_do(captions: dict[str, Any]) -> None:
    emoji = {"base_label": "woman running", "tones": [5], "tags": []}
    spoken = {captions["spoken_caption"](emoji, random.Random(seed)) for seed in range(400)}
    assert {"dark skinned woman running", "lady running with dark skin", "female running black"} <= spoken
    assert all("running" in text for text in spoken)


def test_a_spoken_caption_without_skin_tone_is_the_label(captions: dict[str, Any]) -> None:
    assert captions["spoken_caption"]({"base_label": "flag: Japan", "tones": []}, random.Random(0)) == "flag of Japan"
