"""Limits of an item's texts and metadata."""

from typing import Any

MAX_METADATA_BYTES = 64 * 2**10  # of one item, as canonical JSON
# of objects and lists, that of the fields included; parsers of responses read about 200
MAX_METADATA_LEVELS = 100
MAX_CAPTION_CHARS = 10_000


def is_too_deep(value: Any, levels: int = MAX_METADATA_LEVELS) -> bool:
    """Return whether a JSON value nests objects and lists in more levels."""
    if not isinstance(value, dict | list | tuple):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return not levels or any(is_too_deep(part, levels - 1) for part in parts)
