"""Reader of .jsonl, .csv and .parquet files, for data sets and galleries: a record maps
columns to values.

docs/reference/data-formats.md has the rules of columns, delimiters and types.

- CSV cells are text. With `infer_types`, a column in which every filled cell is a
  number becomes numbers, likewise true and false, and JSON lists of texts; an empty
  cell is a missing value.
- A line that cannot be read is an error, or is passed to `on_bad_line` and skipped.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TextIO, TypeGuard

from dcar_core.util.errors import DataError
from dcar_core.util.files import parse_json

Record = dict[str, Any]
OpenFile = Callable[[], BinaryIO]
OnBadLine = Callable[[DataError], None]
RECORD_SUFFIXES = frozenset({".jsonl", ".csv", ".parquet"})
IMAGE_COLUMNS = ("file_name", "image", "path")  # the first that a row fills
# whatever they look like
TEXT_COLUMNS = frozenset(
    {"id", "caption", "category", "class_name", "url", *IMAGE_COLUMNS}
)
LIST_COLUMNS = frozenset({"captions", "negatives", "negative_categories"})
MAX_LINE = 16_000_000  # characters
# of a Parquet file, or 20 for each of its bytes; numbered names take a tenth of one
MAX_PACKED_ROWS = 1_000_000
PARQUET_BATCH = 1024  # rows, so that a batch of long texts does not fill the memory
_KNOWN_COLUMNS = TEXT_COLUMNS | LIST_COLUMNS | {"split", "meta_category", "attributes"}
# Numbers as programs write them; "007", "+1" and "1_000" are codes.
_INT = re.compile(r"0|-?[1-9][0-9]{0,18}")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]+)?(e[+-][0-9]{2,3})?")


def _raise(error: DataError) -> None:
    raise error


def read_records(
    name: str,
    open_file: OpenFile,
    *,
    infer_types: bool = False,
    on_bad_line: OnBadLine = _raise,
) -> Iterator[tuple[int, Record]]:
    """Yield (number, record); the number is the line of a text file or the row of a
    parquet file, from 1.

    Args:
        name: the path or URL for messages; its suffix decides the format.
        open_file: opens the file; called twice for a CSV with `infer_types`.
        on_bad_line: receives the error of a line that is skipped; by default it is
            raised.

    Raises:
        DataError: the file cannot be parsed. The message names the line.
    """
    suffix = PurePosixPath(name.partition("?")[0]).suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _read_jsonl(name, open_file, on_bad_line)
        elif suffix == ".csv" and infer_types:
            yield from _read_typed_csv(name, open_file, on_bad_line)
        elif suffix == ".csv":
            for line, row in _read_csv_rows(name, open_file, on_bad_line):
                yield (
                    line,
                    {
                        column: _OF_COLUMN.get(column, str)(cell)
                        for column, cell in row.items()
                    },
                )
        elif suffix == ".parquet":
            yield from _read_parquet(name, open_file)
        else:
            kinds = ", ".join(sorted(RECORD_SUFFIXES))
            raise DataError(
                f"{name} is not a table of one of the kinds {kinds}; save it as such"
            )
    except UnicodeDecodeError as error:
        hint = 'save it as UTF-8 (in Excel: Save As, "CSV UTF-8")'
        raise DataError(f"{name} is not UTF-8 ({error.reason}); {hint}") from error


def _read_jsonl(
    name: str,
    open_file: OpenFile,
    on_bad_line: OnBadLine,
) -> Iterator[tuple[int, Record]]:
    with io.TextIOWrapper(open_file(), encoding="utf-8-sig") as file:
        for line, text in enumerate(_lines(name, file), 1):
            if not text.strip():
                continue
            try:
                record = parse_json(text)
            except ValueError as error:
                on_bad_line(
                    DataError(
                        f"{name}, line {line}: not JSON"
                        f" ({getattr(error, 'msg', error)})"
                    )
                )
                continue
            if isinstance(record, dict):
                yield line, record
            else:
                on_bad_line(
                    DataError(
                        f"{name}, line {line}: must be an object, not a"
                        f" {type(record).__name__}"
                    )
                )


def _lines(name: str, file: TextIO) -> Iterator[str]:
    """Yield the lines of a text file. Raise DataError at one that is too long, before
    the rest of it is read.
    """
    for number in count(1):
        line = file.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise DataError(
                f"{name}, line {number}: longer than {MAX_LINE:,} characters; is it one"
                " row for each line?"
            )
        if not line:
            return
        yield line


def _read_typed_csv(
    name: str,
    open_file: OpenFile,
    on_bad_line: OnBadLine,
) -> Iterator[tuple[int, Record]]:
    """Read the file twice: only the last row decides the type of a column."""
    types = dict.fromkeys(TEXT_COLUMNS, "text") | {"captions": "texts"}
    fixed = frozenset(types)
    for _, row in _read_csv_rows(name, open_file, lambda _: None):
        for column, cell in row.items():
            if cell and column not in fixed:
                known = types.get(column)
                kind = _type_of_cell(cell)
                if known not in (None, kind):  # a column that has cells of two types
                    kind = "float" if {known, kind} == {"int", "float"} else "text"
                types[column] = kind
    for line, row in _read_csv_rows(name, open_file, on_bad_line):
        values = {
            column: _OF_CELL[types[column]](cell)
            for column, cell in row.items()
            if cell
        }
        yield (
            line,
            {column: "" if column in TEXT_COLUMNS else None for column in row} | values,
        )


def _read_csv_rows(
    name: str,
    open_file: OpenFile,
    on_bad_line: OnBadLine,
) -> Iterator[tuple[int, dict[str, str]]]:
    with io.TextIOWrapper(open_file(), encoding="utf-8-sig", newline="") as file:
        line = 0
        try:
            lines = _lines(name, file)
            header = next(lines, "")
            delimiter = next((sign for sign in ",;\t" if sign in header), ",")
            # Strict: otherwise a quote that is never closed takes the following rows
            # into its cell.
            reader = csv.DictReader(
                chain([header], lines),
                restval="",
                strict=True,
                delimiter=delimiter,
                skipinitialspace=True,
            )
            reader.fieldnames = _column_names(name, reader.fieldnames or ())
            line = reader.line_num
            for row in reader:
                line = reader.line_num
                if not any(row.values()):
                    continue
                if None in row:
                    reason = (
                        "more cells than the header has columns; quote a text that has"
                        f" {delimiter!r}"
                    )
                    on_bad_line(DataError(f"{name}, line {line}: {reason}"))
                    continue
                row.pop("", None)
                yield line, {column: cell.rstrip(" ") for column, cell in row.items()}
        except csv.Error as error:
            hint = (
                "is a quote not closed, not doubled inside a text, or followed by a"
                " space?"
            )
            raise DataError(
                f"{name}, line {line + 1} is not CSV: {error}; {hint}"
            ) from error


def _column_names(name: str, header: Sequence[str]) -> list[str]:
    """Return the names without blanks around them; known ones in lower case, unless the
    header has that name too.
    """
    names = [column.strip() for column in header]
    free = _KNOWN_COLUMNS - set(names)
    columns = [low if (low := column.lower()) in free else column for column in names]
    _require_distinct(name, [column for column in columns if column])
    return columns


def _require_distinct(name: str, columns: Sequence[str]) -> None:
    for column in Counter(columns) - Counter(set(columns)):
        raise DataError(f"{name} has two columns named {column!r}; rename one of them")


def _type_of_cell(cell: str) -> str:
    if _INT.fullmatch(cell):
        return "int" if -(2**63) <= int(cell) < 2**63 else "text"
    if _FLOAT.fullmatch(cell) and math.isfinite(float(cell)):
        return "float"
    if cell.casefold() in {"true", "false"}:
        return "bool"
    return "texts" if is_texts(_json_list(cell)) else "text"


def texts_of_cell(cell: str) -> list[Any]:
    """Return the texts of a CSV cell: a JSON list, whatever is in it, or texts with
    bars between them.
    """
    values = _json_list(cell)
    if values is None:
        return [part.strip() for part in cell.split("|") if part.strip()]
    return values


def _json_list(cell: str) -> list[Any] | None:
    try:
        values = parse_json(cell) if cell.lstrip().startswith("[") else None
    except ValueError:
        return None
    return values if isinstance(values, list) else None


_OF_COLUMN: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(LIST_COLUMNS, texts_of_cell),
    "attributes": _json_list,
}
_OF_CELL: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda cell: cell.casefold() == "true",
    "texts": texts_of_cell,
    "text": str,
}


def _read_parquet(name: str, open_file: OpenFile) -> Iterator[tuple[int, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    with open_file() as source:
        try:
            size = source.seek(0, io.SEEK_END)
            with pq.ParquetFile(source) as file:
                _require_distinct(name, file.schema_arrow.names)
                if (rows := file.metadata.num_rows) > (
                    most := max(MAX_PACKED_ROWS, 20 * size)
                ):
                    raise DataError(
                        f"{name} has {rows:,} rows in {size:,} bytes, at most {most:,};"
                        " split it"
                    )
                for batch in file.iter_batches(PARQUET_BATCH):
                    yield from enumerate(batch.to_pylist(), row + 1)
                    row += len(batch)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            # Python has no year 10000
            reason = " ".join(str(error).split())
            raise DataError(
                f"{name} is damaged or no Parquet file, after row {row:,}: {reason}"
            ) from error


def required_text(row: Mapping[str, Any], where: str, name: str) -> str:
    """Return a field that must hold text. Raise DataError if it is missing, empty, or
    not text.
    """
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: field {name!r} is missing or empty")
    if not isinstance(value, str):
        raise _wrong(where, name, "text", value)
    return value


def label_text(row: Mapping[str, Any], where: str, *names: str) -> str:
    """Return the first filled field as text, such as the number 0, or "". Raise
    DataError for anything else.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, list | tuple | dict | bytes):
            raise _wrong(where, name, "one text", value)
        if value is not None and value == value and str(value).strip():
            return str(value)
    return ""


def texts_of(row: Mapping[str, Any], where: str, name: str) -> tuple[str, ...]:
    """Return the texts of a field with nothing, one text, or a list of texts. Raise
    DataError for anything else.
    """
    value = row.get(name)
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    if is_texts(value):
        return tuple(value)
    raise _wrong(where, name, "text or a list of texts", value)


def is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _wrong(where: str, name: str, wanted: str, value: object) -> DataError:
    return DataError(
        f"{where}: field {name!r} must be {wanted}, not"
        f" {json.dumps(value, default=str)[:60]}"
    )
