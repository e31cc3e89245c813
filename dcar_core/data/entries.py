"""The annotated image that every reader yields, checks of its fields, and the limit of rows that may be bad."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcar_core.data.report import CleaningReport
from dcar_core.util.errors import DataError

MAX_BAD_ROWS = 0.1  # share of a file's rows
SKIPPED_ROWS = "rows that cannot be used, left out"


@dataclass(frozen=True)
class Entry:
    """One annotated image, before cleaning.

    image: its name. path: a longer path, perhaps of another machine, or "".
    split: "" if the file does not state one; a hash of split_key then decides the split.
    notes: repairs of the reader, for the report of the entry's split.
    """

    image: str
    captions: tuple[str, ...]
    path: str = ""
    split: str = ""
    split_key: str = ""
    category: str = ""
    negatives: tuple[str, ...] = ()
    negative_categories: tuple[str, ...] = ()
    meta_category: str = ""
    attributes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class BadRowsError(DataError):
    """Too many rows of an annotation file cannot be used, but some can."""


class RowLimit:
    """Counts the rows of a file, skips bad ones, and refuses the file when there are too many."""

    def __init__(self, file: Path, report: CleaningReport) -> None:
        self._file, self._report = file, report
        self._bad = list[DataError]()
        self._good = 0

    def skip(self, error: DataError) -> None:
        self._bad.append(error)

    @contextmanager
    def row(self) -> Iterator[None]:
        """Read one row in the block; a `DataError` skips it."""
        try:
            yield
        except DataError as error:
            self.skip(error)
        else:
            self._good += 1

    def finish(self) -> None:
        """Report the skipped rows.

        Raises:
            BadRowsError: more than MAX_BAD_ROWS of the rows were skipped.
            DataError: all rows were skipped, so the file may not hold annotations at all.
        """
        rows = self._good + len(self._bad)
        if len(self._bad) > MAX_BAD_ROWS * rows:
            counts = f"{len(self._bad):,} of {rows:,} rows cannot be used"
            kind = BadRowsError if self._good else DataError
            raise kind(f"{self._bad[0]} ({counts}; at most {MAX_BAD_ROWS:.0%} may be left out)")
        names = [str(error).removeprefix(f"{self._file}, ") for error in self._bad]
        self._report.add(SKIPPED_ROWS, names=names)


def read_text(file: Path) -> str:
    """Return the text of a file, with or without a byte-order mark. Raise DataError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error


def required_text(entry: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that must hold text. Raise DataError if it is missing, empty, or not text."""
    value = entry.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} must be text, not {json.dumps(value, default=str)[:60]}")
    if not value or not value.strip():
        raise DataError(f"{where}: field {name!r} is missing or empty")
    return value


def label_text(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    """Return the first filled field as text, such as the number 0, or "". Raise DataError for anything else."""
    for name in names:
        value = entry.get(name)
        if isinstance(value, list | dict | bytes):
            raise DataError(f"{where}: field {name!r} must be one text, not {json.dumps(value, default=str)[:60]}")
        if value is not None and value == value and str(value).strip():
            return str(value)
    return ""


def text_list(value: object, where: str, name: str) -> tuple[str, ...]:
    """Return the texts of a field with nothing, one text, or a list of texts. Raise DataError for anything else."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise DataError(
        f"{where}: field {name!r} must be text or a list of texts, not {json.dumps(value, default=str)[:60]}"
    )


def attribute_texts(value: object) -> tuple[str, ...]:
    """Return the texts of a list of texts. Return () for anything else: galleries use "attributes" in many ways."""
    return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else ()


def caption_texts(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return the captions of the first of these fields that has any; an empty caption is left to the cleaning.

    Raises:
        DataError: no field is present, or it does not hold text.
    """
    present = [name for name in names if entry.get(name) is not None]
    if not present:
        raise DataError(f"{where}: field {names[0]!r} is missing; it has {', '.join(map(str, entry)) or 'none'}")
    read = (text_list(entry[name], where, name) for name in present)
    filled = (texts for texts in read if any(text.strip() for text in texts))
    return next(filled, None) or text_list(entry[present[0]], where, present[0]) or ("",)
