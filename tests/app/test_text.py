"""The form in which texts of queries are encoded and cached."""

import time

import pytest

from app.search.query import normalize
from dcar_core.model.text.cleaning import strip_control_tokens


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("  red \t apple\n", "red apple"),
        ("cafe\u0301", "café"),
        ("a\x00b\x07c", "abc"),
        ("a\u200bb\u202ec", "abc"),
        ("cafe\u200b\u0301", "café"),
        ("a\u00a0b\u3000c", "a b c"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("cat <end_of_text> dog<|startoftext|>", "cat dog"),
        ("<END_OF_TEXT>", ""),
        ("a < b", "a < b"),
        ("\x00\n", ""),
    ],
)
def test_normalized_texts_have_no_invisible_characters_or_control_tokens(given: str, expected: str) -> None:
    assert normalize(given) == expected
    assert normalize(expected) == expected


def test_control_tokens_are_found_in_linear_time() -> None:
    for text in ("<" + " " * 50_000 + "endoftext" + " " * 50_000, "< / " * 25_000, "<" + " " * 100_000 + ">"):
        began = time.perf_counter()
        strip_control_tokens(text)
        assert time.perf_counter() - began < 1
    assert strip_control_tokens("a < / | Start_Of_Text | > b") == "a   b"
