"""What every reader yields, and how fields are checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcar_core.util.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One annotated picture as a file gives it, before cleaning.

    image: its name; path: a longer path, perhaps of another machine, or "". split: "" when the file does not say.
    cut_by: what decides the split then.
    notes: what its reader repaired, for the report of the split that it belongs to.
    """

    image: str
    captions: tuple[str, ...]
    path: str = ""
    split: str = ""
    cut_by: str = ""
    category: str = ""
    negatives: tuple[str, ...] = ()
    negative_categories: tuple[str, ...] = ()
    meta_category: str = ""
    notes: tuple[str, ...] = ()


def read_text(file: Path) -> str:
    """The file's text, with or without a byte-order mark.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error


def required_text(entry: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be there and hold text."""
    value = entry.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} must be text, not {json.dumps(value)[:60]}")
    if not value or not value.strip():
        raise DataError(f"{where}: field {name!r} is missing or empty")
    return value


def label_text(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of these fields that holds something, as text: a category may be a number, 0 too.

    Raises:
        DataError: it is a list or an object.
    """
    for name in names:
        value = entry.get(name)
        if isinstance(value, list | dict):
            raise DataError(f"{where}: field {name!r} must be one text, not {json.dumps(value)[:60]}")
        if value is not None and value == value and str(value).strip():
            return str(value)
    return ""


def text_list(value: object, where: str, name: str) -> tuple[str, ...]:
    """Nothing, a text, or a list of texts."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise DataError(f"{where}: field {name!r} must be text or a list of texts, not {json.dumps(value)[:60]}")


def caption_texts(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The caption or captions, under the first of these names that has any; an empty one is for the cleaning to count.

    Raises:
        DataError: none of the names is there, or it holds no text.
    """
    first: tuple[str, ...] | None = None
    for name in names:
        if entry.get(name) is not None:
            texts = text_list(entry[name], where, name)
            if any(text.strip() for text in texts):
                return texts
            first = (texts or ("",)) if first is None else first
    if first is not None:
        return first
    raise DataError(f"{where}: field {names[0]!r} is missing; it has {', '.join(map(str, entry)) or 'none'}")
