"""JSON that other programs wrote, as values that can be written again.

JSON can hold half of a surrogate pair, as a model's caption that was cut off often does, and UTF-8 cannot: it becomes
U+FFFD. What is nested too deeply to be read is not valid either.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, make: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """What the text holds. make: from an object's names and values, in order and some perhaps twice.

    Raises:
        ValueError: it is not JSON, not in an encoding of Unicode, or nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    try:
        if not _ESCAPED_SURROGATE.search(text):
            return json.loads(text) if make is dict else json.loads(text, object_pairs_hook=make)

        def mended(pairs: list[tuple[str, Any]]) -> Any:
            return make([(replace_surrogates(name), _mended(value)) for name, value in pairs])

        return _mended(json.loads(text, object_pairs_hook=mended))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def replace_surrogates(text: str) -> str:
    """The text, with U+FFFD for what UTF-8 cannot hold."""
    return _SURROGATE.sub("\ufffd", text)


def _mended(value: Any) -> Any:
    """Texts and lists of them; objects have been through this already."""
    if isinstance(value, str):
        return replace_surrogates(value)
    return [_mended(item) for item in value] if isinstance(value, list) else value
