"""The rows of a list: one reader for .jsonl, .csv and .parquet; a row is a dict of column to value.

A CSV's cells are texts. A column in which every filled cell is a number becomes numbers, so that filters know ranges;
likewise true and false, and JSON lists of texts. A cell that is empty is no value.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dcar_core.data.tables import IMAGE_COLUMNS, header, json_list, texts_of_cell
from dcar_core.util.errors import DataError
from dcar_core.util.json_text import parse_json
from index_jobs.gallery.storage import file_suffix, open_location

if TYPE_CHECKING:
    import pyarrow as pa

Fields = dict[str, Any]
LIST_SUFFIXES = frozenset({".jsonl", ".csv", ".parquet"})
PATH_COLUMNS = (*IMAGE_COLUMNS, "url")
_TEXTS = frozenset({"id", "caption", "category", "class_name", *PATH_COLUMNS})  # of a CSV, whatever they look like
_LISTS = frozenset({"captions"})  # of a CSV: a JSON list, or texts with bars between them
_SETTLED = _TEXTS | _LISTS
# Numbers as programs write them; "007", "+1" and "1_000" are codes of something.
_INT = re.compile(r"0|-?[1-9][0-9]{0,18}")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]+)?(e[+-][0-9]{2,3})?")


def read_records(path: str) -> Iterator[tuple[int, Fields]]:
    """(row number from 1, fields) of a list; for .jsonl and .csv the number is the line's.

    Raises:
        DataError: the file cannot be parsed; the message names the row.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    return readers[file_suffix(path)](path)


def _text_of(path: str, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_location(path), encoding="utf-8-sig", newline=newline)


def _read_jsonl(path: str) -> Iterator[tuple[int, Fields]]:
    try:
        with _text_of(path) as file:
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    record = parse_json(text)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, row {line}: not JSON ({error.msg} at column {error.colno})") from error
                except ValueError as error:  # a number of thousands of digits, a list in lists in ..
                    raise DataError(f"{path}, row {line} cannot be read: {error}") from error
                if not isinstance(record, dict):
                    raise DataError(f"{path}, row {line}: an object is expected, not {type(record).__name__}")
                yield line, record
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason}") from error


def _read_csv(path: str) -> Iterator[tuple[int, Fields]]:
    """Twice through the file: what a column is, only its last row can tell."""
    kinds = dict.fromkeys(_TEXTS, "text") | dict.fromkeys(_LISTS, "texts")
    for _, record in _csv_rows(path):
        for name, cell in record.items():
            if cell and name not in _SETTLED:
                kinds[name] = _common(kinds.get(name), _kind(cell))
    for line, record in _csv_rows(path):
        try:
            values = {name: _OF_CELL[kinds[name]](cell) for name, cell in record.items() if cell}
        except (KeyError, ValueError):
            raise DataError(f"{path}, row {line} was changed while it was read; run again") from None
        yield line, {name: "" if name in _TEXTS else None for name in record} | values


def _kind(cell: str) -> str:
    if _INT.fullmatch(cell):
        return "int" if -(2**63) <= int(cell) < 2**63 else "text"
    if _FLOAT.fullmatch(cell) and math.isfinite(float(cell)):
        return "float"
    if cell.casefold() in {"true", "false"}:
        return "bool"
    found = json_list(cell)
    return "texts" if found is not None and all(isinstance(text, str) for text in found) else "text"


def _common(one: str | None, other: str) -> str:
    """What makes values of the cells of a column that are of two kinds."""
    if one is None or one == other:
        return other
    return "float" if {one, other} == {"int", "float"} else "text"


_OF_CELL: dict[str, Callable[[str], Any]] = {
    "int": int, "float": float, "bool": lambda cell: cell.casefold() == "true",
    "texts": texts_of_cell, "text": str,
}  # fmt: skip


def _csv_rows(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    with _text_of(path, newline="") as file:
        reader, line = csv.DictReader(file, restval="", strict=True), 0
        try:
            header(reader, path)
            for record in reader:
                line = reader.line_num
                if not any(record.values()):  # commas alone, as spreadsheets end a file
                    continue
                if None in record:
                    raise DataError(f"{path}, row {line}: more values than columns")
                yield line, record
        except csv.Error as error:
            raise DataError(f"{path}, row {line + 1} cannot be read as UTF-8 CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} cannot be read as UTF-8 CSV: {error}") from error


def _read_parquet(path: str) -> Iterator[tuple[int, Fields]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with open_location(path) as source, pq.ParquetFile(source) as file:
            for batch in file.iter_batches():
                for record in _records(path, batch, row):
                    row += 1
                    yield row, record
    except pa.ArrowException as error:
        raise DataError(f"{path} is no parquet file: {error}") from error


def _records(path: str, batch: "pa.RecordBatch", before: int) -> list[Fields]:
    try:
        records: list[Fields] = batch.to_pylist()
    except Exception:  # Python has no year 10000 and no nanoseconds; what else it lacks says the value
        for row in range(len(batch)):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column[row].as_py()
                except Exception as error:
                    raise DataError(f"{path}, row {before + row + 1}: {name} cannot be read: {error}") from error
        raise
    return records
