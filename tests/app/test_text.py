"""The form in which texts of queries are encoded and cached."""

import pytest

from app.search.query import normalize_text


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
        ("a < b", "a < b"),
        ("\x00\n", ""),
    ],
)
def test_normalized_texts_have_no_invisible_characters(given: str, expected: str) -> None:
    assert normalize_text(given) == expected
    assert normalize_text(expected) == expected
