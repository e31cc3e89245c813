"""The annotated image that every reader yields, the fields of a row, and the limit of rows that may be bad."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from dcar_core.data.samples import CleaningReport
from dcar_core.util.errors import DataError

MAX_BAD_ROWS = 0.1  # share of a file's rows
SKIPPED_ROWS = "rows that cannot be used, left out"


@dataclass(frozen=True)
class Entry:
    """One annotated image, before cleaning.

    image: its name. path: a longer path, perhaps of another machine, or "".
    split: "" if the file does not state one; a hash of split_key then decides the split, and note says so.
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
    note: str = ""


class BadRowsError(DataError):
    """Too many rows of an annotation file cannot be used, but some can."""


class RowLimit:
    """Counts the rows of a file, skips bad ones, and refuses the file when there are too many."""

    def __init__(self, file: Path, report: CleaningReport) -> None:
        self._file, self._report = file, report
        self._bad, self._good = list[DataError](), 0
        self.skip = self._bad.append

    @contextmanager
    def row(self) -> Iterator[None]:
        """Read one row in the block; a `DataError` skips it."""
        try:
            yield
            self._good += 1
        except DataError as error:
            self.skip(error)

    def finish(self) -> None:
        """Report the skipped rows. Raise BadRowsError for more than MAX_BAD_ROWS of all, DataError for all of them."""
        rows = self._good + len(self._bad)
        if len(self._bad) > MAX_BAD_ROWS * rows:
            counts = f"{len(self._bad):,} of {rows:,} rows cannot be used"
            kind = BadRowsError if self._good else DataError
            raise kind(f"{self._bad[0]} ({counts}; at most {MAX_BAD_ROWS:.0%} may be left out)")
        self._report.add(SKIPPED_ROWS, names=[str(error).removeprefix(f"{self._file}, ") for error in self._bad])


def read_text(file: Path) -> str:
    """Return the text of a file, with or without a byte-order mark. Raise DataError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error


def make_entry(
    row: Mapping[str, Any], where: str, image: str, path: str, captions: Sequence[str], **more: Any
) -> Entry:
    """Make an entry of a row, whose fields have the names of tables or of FDRD. Raise DataError if it lacks a caption.

    captions: fields, of which the first that has any counts; an empty caption is left to the cleaning.
    more: fields of `Entry` that the row does not hold.
    """
    present = [name for name in captions if row.get(name) is not None]
    if not present:
        raise DataError(f"{where}: field {captions[0]!r} is missing; it has {', '.join(map(str, row)) or 'none'}")
    read = (texts_of(row, where, name) for name in present)
    filled = (texts for texts in read if any(text.strip() for text in texts))
    attributes = row.get("attributes")  # galleries use it in many ways
    fields: dict[str, Any] = {
        "captions": next(filled, None) or texts_of(row, where, present[0]) or ("",),
        "category": label_text(row, where, "category", "class_name"),
        "meta_category": label_text(row, where, "meta_category"),
        "negatives": texts_of(row, where, "negatives") or texts_of(row, where, "negative"),
        "negative_categories": texts_of(row, where, "negative_categories") or texts_of(row, where, "negative_class"),
        "attributes": tuple(attributes) if _is_texts(attributes) else (),
    }
    return Entry(image=image, path=path, **fields | more)


def required_text(row: Mapping[str, Any], where: str, name: str) -> str:
    """Return a field that must hold text. Raise DataError if it is missing, empty, or not text."""
    value = row.get(name)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: field {name!r} is missing or empty")
    if not isinstance(value, str):
        raise _wrong(where, name, "text", value)
    return value


def label_text(row: Mapping[str, Any], where: str, *names: str) -> str:
    """Return the first filled field as text, such as the number 0, or "". Raise DataError for anything else."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list | dict | bytes):
            raise _wrong(where, name, "one text", value)
        if value is not None and value == value and str(value).strip():
            return str(value)
    return ""


def texts_of(row: Mapping[str, Any], where: str, name: str) -> tuple[str, ...]:
    """Return the texts of a field with nothing, one text, or a list of texts. Raise DataError for anything else."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    if _is_texts(value):
        return tuple(value)
    raise _wrong(where, name, "text or a list of texts", value)


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _wrong(where: str, name: str, wanted: str, value: object) -> DataError:
    return DataError(f"{where}: field {name!r} must be {wanted}, not {json.dumps(value, default=str)[:60]}")
