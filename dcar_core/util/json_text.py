"""JSON of other programs, parsed into values that UTF-8 can hold.

JSON can contain half of a surrogate pair, as truncated captions of a model often do. UTF-8 cannot, so it becomes
U+FFFD.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
# Half of a pair, and what may look like one: an escaped backslash, and a whole pair.
_HALF = re.compile(r"\\\\|\\u(?i:d[89ab][0-9a-f]{2})\\u(?i:d[c-f][0-9a-f]{2})|(?P<half>\\u(?i:d[89a-f][0-9a-f]{2}))")


def parse_json(text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
        make_object: builds an object from its names and values, in order; names may repeat. The default is a dict.

    Raises:
        ValueError: invalid JSON, an encoding other than Unicode, or nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    try:
        whole = _HALF.sub(lambda found: r"\ufffd" if found["half"] else found[0], text)
        return json.loads(whole, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def replace_surrogates(text: str) -> str:
    """Return the text with U+FFFD in place of characters that UTF-8 cannot hold."""
    return _SURROGATE.sub("\ufffd", text)
