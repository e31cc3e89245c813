"""Readers of annotations: FDRD's JSON, tables (JSONL, CSV, Parquet) and webdataset tars
with captions.

docs/reference/data-formats.md has the formats. Every reader yields rows with the
columns of a table; each caption of a row is a `Sample`, before cleaning.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dcar_core.data.records import (
    IMAGE_COLUMNS,
    MAX_LINE,
    OnBadLine,
    is_texts,
    label_text,
    read_records,
    required_text,
    texts_of,
)
from dcar_core.data.samples import CleaningReport, Sample
from dcar_core.images import TarSpan, has_image_suffix, index_tar
from dcar_core.util.errors import DataError
from dcar_core.util.files import parse_json

# the place of each row, for messages, and its fields
Rows = Iterator[tuple[str, Mapping[str, Any]]]

MAX_BAD_ROWS = 0.1  # share of a file's rows
SKIPPED_ROWS = "rows that cannot be used, left out"
SIDECARS = ("json", "cls", "txt")  # of webdataset, in the order in which they are read
_CAPTION_COLUMNS = ("caption", "captions")
# FDRD's fields, and the columns of tables
_FDRD = {
    "positive": "caption",
    "class_name": "class_name",
    "negative": "negatives",
    "negative_class": "negative_categories",
    "meta_category": "meta_category",
    "attributes": "attributes",
}
_PLACEHOLDER = re.compile(r"^<?(YOUR|PATH_TO|MY)\w*PATH\w*>?/?", re.IGNORECASE)
_NUMBER = re.compile(r"[_\-/ ]*\d+$")
_VIDEO = re.compile(r"^v_(\w+)_g\d+_c\d+$")  # UCF101's frames


class BadRowsError(DataError):
    """Too many rows of an annotation file cannot be used, but some can."""


def read_annotations(file: Path, report: CleaningReport) -> list[tuple[str, Sample]]:
    """Return the pairs of a file with the splits that its rows state, or "". Skip and
    report bad rows.

    Raises:
        DataError: the file cannot be parsed, or none of its rows can be used.
        BadRowsError: more than MAX_BAD_ROWS of its rows cannot be used.
    """
    if (read := _READERS.get(file.suffix.lower())) is None:
        raise DataError(
            f"{file}: annotations are read from {', '.join(_READERS)} files"
        )
    faults = list[DataError]()
    good = 0
    pairs = list[tuple[str, Sample]]()
    for where, row in read(file, report, faults.append):
        try:
            pairs += _pairs_of(row, where)
            good += 1
        except DataError as error:
            faults.append(error)
    rows = good + len(faults)
    if len(faults) > MAX_BAD_ROWS * rows:
        counts = f"{len(faults):,} of {rows:,} rows cannot be used"
        kind = BadRowsError if good else DataError
        raise kind(
            f"{faults[0]} ({counts}; at most {MAX_BAD_ROWS:.0%} may be left out)"
        )
    report.add(
        SKIPPED_ROWS, names=[str(error).removeprefix(f"{file}, ") for error in faults]
    )
    return pairs


def _pairs_of(row: Mapping[str, Any], where: str) -> list[tuple[str, Sample]]:
    """Return the split and the pair of each caption; an empty caption is left to the
    cleaning.
    """
    for names in (IMAGE_COLUMNS, _CAPTION_COLUMNS):
        if row.keys().isdisjoint(names):
            raise DataError(
                f"{where}: no field {' or '.join(names)}; it has"
                f" {', '.join(map(str, row)) or 'none'}"
            )
    image = required_text(
        {"image": next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)},
        where,
        "image",
    )
    texts = (texts_of(row, where, name) for name in _CAPTION_COLUMNS)
    captions = next((filled for filled in texts if any(map(str.strip, filled))), ("",))
    negatives, categories = (
        texts_of(row, where, name) for name in ("negatives", "negative_categories")
    )
    if categories and len(categories) != len(negatives):
        raise DataError(
            f"{where}: {len(negatives)} negatives have {len(categories)} categories;"
            " give each its own"
        )
    attributes = row.get("attributes")  # galleries use it in many ways
    sample = Sample(
        image.replace("\\", "/").removeprefix("./"),
        "",
        label_text(row, where, "category", "class_name"),
        label_text(row, where, "meta_category"),
        negatives,
        categories,
        tuple(attributes) if is_texts(attributes) else (),
    )
    split = label_text(row, where, "split").strip()
    return [(split, replace(sample, caption=caption)) for caption in captions]


def _read_fdrd(file: Path, report: CleaningReport, on_fault: OnBadLine) -> Rows:
    """Yield the entries of one file of FDRD's form; a repeated key gives two. Paths are
    of another machine.
    """
    try:
        # an object becomes its names and values
        content = parse_json(file.read_text(encoding="utf-8-sig"), tuple)
    except ValueError as error:
        raise DataError(f"{file} is not JSON in UTF-8: {error}") from error
    if not isinstance(content, tuple):
        raise DataError(
            f"{file} must hold an object, key -> entry, not a {type(content).__name__}"
        )
    for key, value in content:
        where = f"{file}, entry {key!r}"
        if not isinstance(value, tuple):
            on_fault(
                DataError(
                    f"{where}: must be an object; docs/how-to/prepare-data.md shows how"
                    " to convert COCO"
                )
            )
            continue
        entry = dict(value)
        name, file_path = (
            str(entry.get(field) or "").replace("\\", "/")
            for field in ("file_name", "file_path")
        )
        path = PurePosixPath(_PLACEHOLDER.sub("", file_path))
        is_same = not name or path.name in {
            PurePosixPath(name).name,
            PurePosixPath(name).name + path.suffix,
        }
        row = {
            column: entry[field] for field, column in _FDRD.items() if field in entry
        }
        if not entry.get("class_name") and (category := category_of_key(key)):
            row["class_name"] = category
            report.add("categories derived from the key")
        yield where, row | {"image": str(path) if path.name and is_same else name}


def category_of_key(key: str) -> str:
    """Return the category that a key states.

    "great_pyrenees_43" -> "great pyrenees", "707-320_1514522" -> "707-320", "1514522"
    -> "".
    """
    stem = PurePosixPath(key).stem if has_image_suffix(key) else key
    if video := _VIDEO.match(stem):
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", video[1])
    return _NUMBER.sub("", stem).removesuffix("_image").replace("_", " ").strip()


def _read_table(file: Path, report: CleaningReport, on_fault: OnBadLine) -> Rows:
    """Yield the rows of a .jsonl, .csv or .parquet file; those of a gallery's metadata
    may lack a caption.
    """
    unit = "row" if file.suffix.lower() == ".parquet" else "line"
    for number, row in read_records(
        str(file), lambda: file.open("rb"), on_bad_line=on_fault
    ):
        yield (
            f"{file}, {unit} {number}",
            {"caption": ""} | row if file.stem == "metadata" else row,
        )


def _read_tar(file: Path, report: CleaningReport, on_fault: OnBadLine) -> Rows:
    """Yield the samples of one webdataset shard: members that share a key. Images are
    named "shard.tar/member".
    """
    spans = index_tar(file)
    samples: dict[str, dict[str, str]] = {}
    for name in spans:
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        samples.setdefault(f"{folder}/{stem}", {})[extension.lower()] = name
    with file.open("rb") as tar:
        for key, members in samples.items():
            # "1.jpg" is the image of a sample that also has "1.depth.png" or
            # "1.mask.png"
            images = [
                (extension.count("."), name)
                for extension, name in members.items()
                if has_image_suffix(name)
            ]
            if not images:
                report.add(
                    "tar samples without an image, left out",
                    names=[f"{file.name}{key}"],
                )
                continue
            row = {"caption": ""}
            where = f"{file}, sample {key.lstrip('/')!r}"
            try:
                for extension in (
                    extension for extension in SIDECARS if extension in members
                ):
                    if extension != "cls" or not (
                        row.get("category") or row.get("class_name")
                    ):
                        row |= read_sidecar(
                            where,
                            extension,
                            tar,
                            spans[members[extension]],
                        )
            except DataError as error:
                on_fault(error)
                continue
            yield where, row | {"file_name": f"{file.name}/{min(images)[1]}"}


def read_sidecar(
    where: str,
    extension: str,
    tar: BinaryIO,
    span: TarSpan,
) -> dict[str, Any]:
    """Return the fields of an image from a tar member: .json is a row, .cls a category,
    a line of .txt a caption.
    """
    if span.size > MAX_LINE:
        raise DataError(
            f"{where}: its .{extension} has {span.size:,} bytes; at most {MAX_LINE:,}"
            " are read"
        )
    tar.seek(span.offset)
    try:
        text = tar.read(span.size).decode("utf-8-sig").strip()
        if extension == "cls":
            return {"category": text}
        # `str.splitlines` also splits at characters that may occur in a caption
        if extension == "txt":
            captions = [line.strip() for line in re.split(r"[\r\n]+", text)]
            return {"caption": captions if len(captions) > 1 else text}
        row = parse_json(text)
    except ValueError as error:
        raise DataError(f"{where}: its .{extension} cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: its .{extension} must hold an object, not a {type(row).__name__}"
        )
    return row


_READERS: dict[str, Callable[[Path, CleaningReport, OnBadLine], Rows]] = {
    ".json": _read_fdrd,
    ".jsonl": _read_table,
    ".csv": _read_table,
    ".parquet": _read_table,
    ".tar": _read_tar,
}
