"""Readers of tables (JSONL, CSV, Parquet) and of webdataset tars with captions; see docs/reference/data-formats.md.

Tar members that share a key are one sample: 0001.jpg with 0001.txt (one caption per line) or 0001.json (a row), and
0001.cls (a category).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dcar_core.data.entries import Entry, RowLimit, label_text, make_entry, required_text
from dcar_core.data.records import IMAGE_COLUMNS, LIST_COLUMNS, MAX_LINE, read_records
from dcar_core.data.report import CleaningReport
from dcar_core.images import TarSpan, has_image_suffix, index_tar
from dcar_core.util.errors import DataError
from dcar_core.util.files import parse_json

SIDECARS = ("json", "cls", "txt")  # of webdataset, in the order in which they are read
_CAPTION_COLUMNS = ("caption", "captions")
_LABEL_COLUMNS = ("category", "class_name", "meta_category")
USED_COLUMNS = (*IMAGE_COLUMNS, *LIST_COLUMNS, *_LABEL_COLUMNS, "caption", "split", "attributes")


def read_table(file: Path, report: CleaningReport) -> Iterator[Entry]:
    """Yield the rows of a .jsonl, .csv or .parquet file. A bad row is skipped and reported.

    Rows of a Parquet file or of a gallery's metadata may lack a caption; cleaning counts them.

    Raises:
        DataError: the file cannot be parsed, has no column of images or of captions, holds the images themselves, or
            too many bad rows.
    """
    limit, suffix = RowLimit(file, report), file.suffix.lower()
    may_lack_caption = suffix == ".parquet" or file.stem == "metadata"
    records = read_records(str(file), lambda: file.open("rb"), used_columns=USED_COLUMNS, on_bad_line=limit.skip)
    for number, row in records:
        if suffix != ".jsonl":
            for columns in (IMAGE_COLUMNS, *(() if may_lack_caption else (_CAPTION_COLUMNS,))):
                if set(columns).isdisjoint(row):
                    if suffix == ".parquet":  # a row has the columns that are used
                        import pyarrow.parquet as pq

                        row = dict.fromkeys(pq.read_schema(file).names)
                    has = f"it has {', '.join(row) or 'none'}"
                    raise DataError(f"{file} has no column {' or '.join(columns)}, which every row needs; {has}")
        if may_lack_caption and row.get("caption") is None and row.get("captions") is None:
            row["caption"] = ""
        image = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
        if suffix == ".parquet" and isinstance(image, dict | bytes):
            raise DataError(f"{file} holds the images themselves; write them to files, or into a webdataset tar")
        with limit.row():
            yield _make_entry(row, f"{file}, {'row' if suffix == '.parquet' else 'line'} {number}", image)
    limit.finish()


def _make_entry(row: Mapping[str, Any], where: str, image: object) -> Entry:
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
            sidecars = {each: spans[members[each]] for each in SIDECARS if each in members}
            row = _sample_row(file, sidecars, f"{file}, sample {key!r}")
            if "caption" not in row and "captions" not in row:
                report.add("tar samples without a caption, left out", names=[f"{file.name}/{key}"])
                continue
            yield _make_entry(row, f"{file}, sample {key!r}", f"{file.name}/{image}")
    limit.finish()


def _sample_row(file: Path, sidecars: Mapping[str, TarSpan], where: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    with file.open("rb") as tar:
        for extension, span in sidecars.items():
            if extension != "cls" or not label_text(row, where, "category", "class_name"):
                row |= read_sidecar(where, extension, tar, span)
    return row


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
