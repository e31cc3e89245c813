"""Readers of annotations: FDRD's JSON, tables (JSONL, CSV, Parquet) and webdataset tars with captions.

docs/reference/data-formats.md has the formats.

- FDRD's JSON is key -> {"file_name", "file_path", "positive", "negative": [...], "class_name"?}. Older files give
  absolute paths of another machine, names without a suffix and four negatives. Newer files (`inter_*`) give the
  placeholder YOUR_IMAGE_PATH, names with a suffix, class names and no negatives.
- Tar members that share a key are one sample: 0001.jpg with 0001.txt (one caption per line) or 0001.json (a row), and
  0001.cls (a category).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dcar_core.data.entries import Entry, RowLimit, label_text, make_entry, read_text, required_text
from dcar_core.data.records import IMAGE_COLUMNS, LIST_COLUMNS, MAX_LINE, read_records
from dcar_core.data.samples import CleaningReport
from dcar_core.images import TarSpan, has_image_suffix, index_tar
from dcar_core.util.errors import DataError
from dcar_core.util.files import parse_json

SIDECARS = ("json", "cls", "txt")  # of webdataset, in the order in which they are read
_CAPTION_COLUMNS = ("caption", "captions")
_LABEL_COLUMNS = ("category", "class_name", "meta_category")
USED_COLUMNS = (*IMAGE_COLUMNS, *LIST_COLUMNS, *_LABEL_COLUMNS, "caption", "split", "attributes")
_PLACEHOLDER = re.compile(r"^<?(YOUR|PATH_TO|MY)\w*PATH\w*>?", re.IGNORECASE)
_FIELDS = ("positive", "negative", "negative_class", "meta_category", "attributes")
_NUMBER = re.compile(r"[_\-/ ]*\d+$")
_VIDEO = re.compile(r"^v_(\w+)_g\d+_c\d+$")  # UCF101's frames


class _Object(dict[str, Any]):
    """A JSON object that keeps repeated keys in `pairs`."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def read_fdrd(file: Path, report: CleaningReport) -> Iterator[Entry]:
    """Yield the entries of one file; a repeated key gives two. Raise DataError if too many of them are bad."""
    try:
        content = parse_json(read_text(file), _Object)
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, _Object):
        raise DataError(f"{file} must hold an object, key -> entry, not a {type(content).__name__}")
    if isinstance(content.get("images"), list):
        raise DataError(
            f"{file} has the form of COCO or of Karpathy's splits, which is not read; docs/how-to/prepare-data.md "
            f"shows how to write it as pairs.jsonl"
        )
    report.add("keys that occur twice, both entries kept", len(content.pairs) - len(content))
    limit = RowLimit(file, report)
    for key, value in content.pairs:
        with limit.row():
            if not isinstance(value, dict):
                raise DataError(f"{file}, entry {key!r}: must be an object, not a {type(value).__name__}")
            yield _fdrd_entry(f"{file}, entry {key!r}", key, value, report)
    limit.finish()


def _fdrd_entry(where: str, key: str, entry: dict[str, Any], report: CleaningReport) -> Entry:
    path = str(entry.get("file_path") or "").replace("\\", "/")
    if _PLACEHOLDER.match(path):
        report.add("placeholder paths, replaced by the image root")
        path = path.partition("/")[2]
    elif path.startswith("/") or path[1:3] == ":/":
        report.add("absolute paths of another machine, replaced by the image root")
    name = str(entry.get("file_name") or PurePosixPath(required_text(entry, where, "file_path")).name)
    report.add("missing file names, taken from the path", not entry.get("file_name"))
    report.add("file names without a suffix", not has_image_suffix(name))
    category = label_text(entry, where, "class_name")
    if not category and (category := category_of_key(key)):
        report.add("categories derived from the key")
    report.add("entries without a category", not category)
    fields = {field: entry[field] for field in _FIELDS if field in entry}
    return make_entry(fields, where, name, path, ["positive"], category=category)


def category_of_key(key: str) -> str:
    """Return the category that a key states.

    "great_pyrenees_43" -> "great pyrenees", "707-320_1514522" -> "707-320", "1514522" -> "".
    """
    stem = PurePosixPath(key).stem if has_image_suffix(key) else key
    if video := _VIDEO.match(stem):
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", video[1])
    return _NUMBER.sub("", stem).removesuffix("_image").replace("_", " ").strip()


def read_table(file: Path, report: CleaningReport) -> Iterator[Entry]:
    """Yield the rows of a .jsonl, .csv or .parquet file. A bad row is skipped and reported.

    Rows of a Parquet file or of a gallery's metadata may lack a caption; cleaning counts them.

    Raises:
        DataError: the file cannot be parsed, has no column of images or of captions, holds the images themselves, or
            too many bad rows.
    """
    limit, suffix = RowLimit(file, report), file.suffix.lower()
    may_lack_caption = suffix == ".parquet" or file.stem == "metadata"
    needed = (IMAGE_COLUMNS,) if may_lack_caption else (IMAGE_COLUMNS, _CAPTION_COLUMNS)
    records = read_records(str(file), lambda: file.open("rb"), used_columns=USED_COLUMNS, on_bad_line=limit.skip)
    for number, row in records:
        for columns in needed if suffix != ".jsonl" else ():
            if set(columns).isdisjoint(row):
                names = row.keys() if suffix == ".csv" else _parquet_columns(file)  # a row has the used columns only
                has = ", ".join(names) or "none"
                raise DataError(f"{file} has no column {' or '.join(columns)}, which every row needs; it has {has}")
        image = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
        if suffix == ".parquet" and isinstance(image, dict | bytes):
            raise DataError(f"{file} holds the images themselves; write them to files, or into a webdataset tar")
        with limit.row():
            if may_lack_caption and all(row.get(name) is None for name in _CAPTION_COLUMNS):
                row["caption"] = ""
            yield _row_entry(row, f"{file}, {'row' if suffix == '.parquet' else 'line'} {number}", image)
    limit.finish()


def _parquet_columns(file: Path) -> list[str]:
    import pyarrow.parquet as pq

    names: list[str] = pq.read_schema(file).names
    return names


def _row_entry(row: Mapping[str, Any], where: str, image: object) -> Entry:
    name = required_text({"image": image}, where, "image").replace("\\", "/").removeprefix("./")
    path = name if name.startswith("/") or name[1:3] == ":/" else ""
    return make_entry(row, where, name, path, _CAPTION_COLUMNS, split=label_text(row, where, "split").strip())


def read_tar(file: Path, report: CleaningReport) -> Iterator[Entry]:
    """Yield the samples of one webdataset shard, whose images are named "shard.tar/member"."""
    spans = index_tar(file)
    samples: dict[str, dict[str, str]] = {}
    for name in spans:
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[extension.lower()] = name
    limit = RowLimit(file, report)
    for key, members in samples.items():
        images = [(extension, name) for extension, name in members.items() if has_image_suffix(f"x.{extension}")]
        # "1.jpg" is the image of a sample that also has "1.depth.png" or "1.mask.png"
        image = min(images, key=lambda each: each[0].count("."))[1] if images else None
        if len(images) > 1:
            report.add("tar samples with several images, one of which was taken", names=[str(image)])
        if image is None:
            report.add("tar samples without an image, left out", names=[f"{file.name}/{key}"])
            continue
        with limit.row():
            row, where = dict[str, Any](), f"{file}, sample {key!r}"
            with file.open("rb") as tar:
                for extension in (each for each in SIDECARS if each in members):
                    if extension != "cls" or not label_text(row, where, "category", "class_name"):
                        row |= read_sidecar(where, extension, tar, spans[members[extension]])
            if row.keys().isdisjoint(_CAPTION_COLUMNS):
                report.add("tar samples without a caption, left out", names=[f"{file.name}/{key}"])
                continue
            yield _row_entry(row, where, f"{file.name}/{image}")
    limit.finish()


def read_sidecar(where: str, extension: str, tar: BinaryIO, span: TarSpan) -> dict[str, Any]:
    """Return what a tar member says of its image: .json is a row, .cls a category, .txt has a caption on each line."""
    if span.size > MAX_LINE:
        raise DataError(f"{where}: its .{extension} has {span.size:,} bytes; at most {MAX_LINE:,} are read")
    tar.seek(span.offset)
    try:
        text = tar.read(span.size).decode("utf-8-sig").strip()
        if extension == "cls":
            return {"category": text}
        if extension == "txt":
            captions = [line.strip() for line in split_lines(text) if line.strip()]
            return {"caption": captions if len(captions) > 1 else text}
        row = parse_json(text)
    except ValueError as error:
        raise DataError(f"{where}: its .{extension} cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: its .{extension} must hold an object, not a {type(row).__name__}")
    return row


def split_lines(text: str) -> list[str]:
    """Split a text at line ends. `str.splitlines` also splits at characters that may occur in a caption."""
    return re.split(r"\r\n|\r|\n", text)
