"""JSON of other programs, parsed into values that UTF-8 can hold.

JSON can contain half of a surrogate pair, as truncated captions of a model often do. UTF-8 cannot, so it becomes
U+FFFD.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """Return the value of a JSON text.

    Args:
        make_object: builds an object from its names and values, in order; names may repeat.

    Raises:
        ValueError: invalid JSON, an encoding other than Unicode, or nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    try:
        if not _ESCAPED_SURROGATE.search(text):
            return json.loads(text) if make_object is dict else json.loads(text, object_pairs_hook=make_object)

        def make_clean(pairs: list[tuple[str, Any]]) -> Any:
            return make_object([(replace_surrogates(name), _clean(value)) for name, value in pairs])

        return _clean(json.loads(text, object_pairs_hook=make_clean))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def replace_surrogates(text: str) -> str:
    """Return the text with U+FFFD in place of characters that UTF-8 cannot hold."""
    return _SURROGATE.sub("\ufffd", text)


def _clean(value: Any) -> Any:
    """Clean texts and lists of them; objects are clean already."""
    if isinstance(value, str):
        return replace_surrogates(value)
    return [_clean(item) for item in value] if isinstance(value, list) else value
