"""JSONL, CSV and Parquet tables, and webdataset tars, of pictures with captions.

- A row has `image` and `caption` (or `captions`, a list) and may have split, category, meta_category, negatives and
  negative_categories. `file_name`, which comes first, or `path` is read for image, `class_name` for category.
- In a CSV cell, several negatives are a JSON list or stand between bars: "a red van | a blue car".
- In a tar, members that share a key are one sample: 0001.jpg with 0001.txt (a caption a line) or 0001.json (a row), and
  0001.cls (a category).
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dcar_core.data.entries import Entry, caption_texts, label_text, required_text, text_list
from dcar_core.data.report import CleaningReport
from dcar_core.images import ImageRoot, has_image_suffix
from dcar_core.util.errors import DataError
from dcar_core.util.json_text import parse_json

IMAGE_COLUMNS = ("file_name", "image", "path")  # the first that a row fills
_LISTS = ("negatives", "negative", "negative_categories", "negative_class", "captions")
_READ = (*IMAGE_COLUMNS, *_LISTS, "caption", "split", "category", "class_name", "meta_category")


def read_table(file: Path) -> Iterator[Entry]:
    """Read the rows of a .jsonl, .csv or .parquet file.

    Rows of a Parquet file or of a gallery's metadata may lack a caption; cleaning counts them.

    Raises:
        DataError: a row is not an object, or lacks an image or a caption; the message names the file and the row.
    """
    may_lack_caption = file.suffix.lower() == ".parquet" or file.stem == "metadata"
    for where, row in _parquet_rows(file) if file.suffix.lower() == ".parquet" else _rows(file):
        if may_lack_caption and row.get("caption") is None and row.get("captions") is None:
            row = {**row, "caption": ""}
        image = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
        yield _entry(row, where, image=required_text({"image": image}, "image", where))


def _entry(row: Mapping[str, Any], where: str, image: object) -> Entry:
    name = required_text({"image": image}, "image", where).replace("\\", "/").removeprefix("./")
    return Entry(
        image=name,
        path=name if name.startswith("/") or name[1:3] == ":/" else "",
        captions=caption_texts(row, ("caption", "captions"), where),
        split=label_text(row, ("split",), where).strip(),
        category=label_text(row, ("category", "class_name"), where),
        negatives=_either(row, "negatives", "negative", where),
        negative_categories=_either(row, "negative_categories", "negative_class", where),
        meta_category=label_text(row, ("meta_category",), where),
    )


def _either(row: Mapping[str, Any], name: str, other: str, where: str) -> tuple[str, ...]:
    return text_list(row.get(name), where, name) or text_list(row.get(other), where, other)


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from (_csv_rows if file.suffix.lower() == ".csv" else _jsonl_rows)(file, lines)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason}); convert it first") from error
    except csv.Error as error:
        raise DataError(f"{file} is not CSV: {error}") from error


def _jsonl_rows(file: Path, lines: Iterator[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be an object, not a {type(row).__name__}")
        yield where, row


def _parquet_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a Parquet file; only columns that annotations have are read."""
    try:
        with pq.ParquetFile(file) as table:
            columns = [name for name in table.schema_arrow.names if name in _READ]
            if not set(IMAGE_COLUMNS) & set(columns):
                names = ", ".join(table.schema_arrow.names)
                raise DataError(f"{file} has no column {' or '.join(IMAGE_COLUMNS)}; it has {names or 'none'}")
            number = 0
            for batch in table.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _csv_rows(file: Path, lines: Iterator[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(lines, strict=True)  # else a quote that is never closed takes what follows into its cell
    columns = header(reader, file, read=_READ)
    if not set(IMAGE_COLUMNS) & set(columns):
        raise DataError(f"{file} has no column {' or '.join(IMAGE_COLUMNS)}; it has {', '.join(columns) or 'none'}")
    line = reader.line_num
    while (row := _next(reader, file, line)) is not None:
        line = reader.line_num
        where = f"{file}, line {line}"
        if not any(row.values()):  # commas alone, as spreadsheets end a file
            continue
        if None in row:
            raise DataError(f"{where}: more cells than the header has columns; quote a caption that has commas")
        yield where, {name: texts_of_cell(value) if name in _LISTS else value for name, value in row.items()}


def _next(reader: "csv.DictReader[str]", file: Path, line: int) -> "dict[str | Any, Any] | None":
    """The row that begins after a line, None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        hint = "is a quote not closed, not doubled in a text, or followed by a blank?"
        raise DataError(f"{file}, line {line + 1} is not CSV: {error}; {hint}") from error


def header(reader: "csv.DictReader[str]", place: object, read: Sequence[str] | None = None) -> list[str]:
    """The names of a CSV's columns, of which those in `read` matter; None: all.

    Raises:
        DataError: they are one, and hold what other programs write in place of commas; or two have the same name.
    """
    columns = list(reader.fieldnames or ())
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and sign in columns[0]:
            raise DataError(f"{place} has its columns between {name}; save it with commas")
    matter = [name for name in columns if name and (read is None or name in read)]
    twice = next((name for name, count in Counter(matter).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{place} has two columns named {twice!r}; rename one of them")
    return columns


def texts_of_cell(value: str | None) -> list[Any] | None:
    """The texts of a CSV's cell that may hold several: a JSON list, whatever is in it, or texts with bars between."""
    if not value or not value.strip():
        return None
    found = json_list(value)
    return [part.strip() for part in value.split("|") if part.strip()] if found is None else found


def json_list(value: str) -> list[Any] | None:
    """What a cell that is a JSON list holds; None of any other."""
    if not value.lstrip().startswith("["):
        return None
    try:
        found = parse_json(value)
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def read_tar(file: Path, report: CleaningReport) -> Iterator[Entry]:
    """The samples of one webdataset shard. Pictures are named "shard.tar/member".

    Raises:
        DataError: not an uncompressed tar, or a .json member that cannot be used.
    """
    tar = ImageRoot(file)
    samples: dict[str, dict[str, str]] = {}
    for name in tar.shards[file.name][1]:
        folder, _, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[kind.lower()] = name
    for key, members in samples.items():
        where = f"{file}, sample {key!r}"
        pictures = [(kind, name) for kind, name in members.items() if has_image_suffix(f"x.{kind}")]
        # "1.jpg" is the picture where "1.depth.png" or "1.mask.png" lies beside it
        picture = min(pictures, key=lambda each: each[0].count("."))[1] if pictures else None
        if len(pictures) > 1:
            report.add("tar samples with several pictures, of which one was taken", names=[str(picture)])
        if picture is None:
            report.add("tar samples without a picture, left out", names=[f"{file.name}/{key}"])
            continue
        row: dict[str, Any] = {}
        if "json" in members:
            row = _json_member(tar.read(members["json"]), where)
        if "cls" in members and not label_text(row, ("category", "class_name"), where):
            row = {**row, "category": _text_member(tar, members, "cls", where).strip()}
        if "txt" in members:
            text = _text_member(tar, members, "txt", where)
            row = {**row, "caption": [line for line in lines_of(text) if line.strip()]}
        if "caption" not in row and "captions" not in row:
            report.add("tar samples without a caption, left out", names=[f"{file.name}/{key}"])
            continue
        yield _entry(row, where, image=f"{file.name}/{picture}")


def _text_member(tar: ImageRoot, members: Mapping[str, str], kind: str, where: str) -> str:
    try:
        return tar.read(members[kind]).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .{kind} is not UTF-8 ({error.reason}); convert it first") from error


def lines_of(text: str) -> list[str]:
    """Split where a line ends in a file. `str.splitlines` also splits at signs that may stand within a caption."""
    return re.split(r"\r\n|\r|\n", text)


def _json_member(content: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(content)
    except ValueError as error:
        raise DataError(f"{where}: its .json is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: its .json must hold an object, not a {type(row).__name__}")
    return row
