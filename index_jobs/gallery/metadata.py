"""Metadata of images: from lists, from files next to a folder's images, and from tar
members.

`id`, `caption` (or `captions`) and `category` (or `class_name`) have a meaning, as in
annotations for training; every other field is stored as JSON.
"""

import datetime
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dcar_core.data.image_lookup import unicode_forms
from dcar_core.data.load import Annotations, NoPairsError, annotation_files
from dcar_core.data.readers import SIDECARS, read_sidecar
from dcar_core.data.records import RECORD_SUFFIXES, Record, read_records
from dcar_core.data.samples import SPLITS
from dcar_core.images import TarSpan
from dcar_core.util.errors import DataError
from index_jobs.checks import MAX_METADATA_LEVELS, is_too_deep
from index_jobs.gallery.locations import (
    is_url,
    join_location,
    open_location,
    parent_folder,
)

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_gallery_records(location: str) -> Iterator[tuple[int, Record]]:
    """Yield (number, record) of a list at a path or URL, with typed CSV columns."""
    return read_records(location, lambda: open_location(location), infer_types=True)


def images_of_row(names: str, record: Record) -> Iterator[tuple[str, Record]]:
    """Yield the name and the fields of each image of a row, as in `a.png|b.png`; the id
    of the second ends in -2.
    """
    parts = [part.strip() for part in names.split("|") if part.strip()]
    for number, name in enumerate(parts, 1):
        item_id = record.get("id")
        yield (
            name,
            record
            | {"file_name": name}
            | ({"id": f"{item_id}-{number}"} if item_id and number > 1 else {}),
        )


class GalleryMetadata:
    """Records by image name, which remember whether an image has used them."""

    def __init__(self, path: str, records: dict[str, Record]) -> None:
        self.path = path
        self._records = records
        self._used: set[str] = set()

    @classmethod
    def read(cls, path: str, names: Collection[str]) -> "GalleryMetadata":
        """Read a metadata file, by `file_name`. names: of the folder's files."""
        records: dict[str, tuple[int, Record]] = {}
        for line, record in read_gallery_records(path):
            name = record.get("file_name")
            if not isinstance(name, str) or not name.strip():
                raise DataError(
                    f"{path}, row {line}: no file_name; the columns are"
                    f" {', '.join(record) or 'none'}"
                )
            for image, fields in (
                [(name, record)] if name in names else images_of_row(name, record)
            ):
                first, _ = records.setdefault(
                    image.replace("\\", "/").removeprefix("./"), (line, fields)
                )
                if first != line:
                    raise DataError(
                        f"{path}: rows {first} and {line} both describe {image};"
                        " keep one"
                    )
        if not records:
            raise DataError(f"{path} has no rows; fill or remove it")
        return cls(path, {name: record for name, (_, record) in records.items()})

    @classmethod
    def from_annotations(cls, folder: str) -> "GalleryMetadata | None":
        """Read captions and categories of a folder's annotations for training
        (`train.json`, `pairs.csv`, ...).

        Tars are left out: their images have metadata of their own. What is called like
        a split may not be annotations, so faults are warnings there; those of a table
        named `pairs` are errors.
        """
        records = dict[str, Record]()
        files = list[Path]()
        try:
            files = [
                file
                for split in SPLITS
                for file in annotation_files(Path(folder), split)
            ]
            if not files or any(file.suffix == ".tar" for file in files):
                return None
            annotations = Annotations(Path(folder))
            for split in annotations.splits():
                with suppress(NoPairsError):  # the images of a split may be elsewhere
                    for sample in annotations.load(split, "present")[0].samples:
                        record = records.setdefault(
                            sample.image, {"captions": [], "category": sample.category}
                        )
                        record["captions"].append(sample.caption)
        except DataError as error:
            if any(file.stem == "pairs" for file in files):
                raise
            logger.warning(
                "captions and categories are not taken from the annotations in %s: %s",
                folder,
                error,
            )
            return None
        for record in records.values():
            if len(record["captions"]) == 1:
                (record["caption"],) = record.pop("captions")
        if records:
            return cls(", ".join(sorted({str(file) for file in files})), records)
        return None

    @classmethod
    def of_folder(cls, folder: str, names: Collection[str]) -> "GalleryMetadata | None":
        """Read a folder's metadata file, if there is one among the names of its files,
        or else its annotations.
        """
        files = [name for name in METADATA_FILES if name in names]
        if len(files) > 1:
            raise DataError(
                f"{join_location(folder, files[0])} and {files[1]} both exist; keep one"
            )
        if files:
            return cls.read(join_location(folder, files[0]), names)
        if is_url(folder):
            return None
        metadata = cls.from_annotations(folder)
        tables = sorted(
            path.name
            for path in Path(folder).iterdir()
            if path.suffix.lower() in RECORD_SUFFIXES
        )
        if metadata is None and tables:
            logger.warning(
                "%s is not read as metadata; call it metadata%s",
                tables[0],
                PurePosixPath(tables[0]).suffix,
            )
        return metadata

    def find(self, *names: str) -> Record:
        """Return the record of the first of an image's names that has one, in any
        Unicode form.
        """
        for form in (form for name in names for form in unicode_forms(name)):
            if form in self._records:
                self._used.add(form)
                return self._records[form]
        return {}

    def report_unused(self) -> None:
        """Warn about records without an image. Raise DataError if no record has one."""
        unused = [name for name in self._records if name not in self._used]
        if unused and not self._used:
            raise DataError(
                f"no row of {self.path} names an image of this gallery ({unused[0]!r}"
                " is not here); file_name must be the path relative to"
                f" {parent_folder(self.path)}, or a tar member's name"
            )
        if unused:
            logger.warning(
                "%d rows of %s name no image here, such as %s",
                len(unused),
                self.path,
                unused[0],
            )


def read_sidecars(
    tar: str,
    file: BinaryIO,
    members: Mapping[str, TarSpan],
) -> dict[str, Record]:
    """Return webdataset metadata by stem: the .json, .txt and .cls members of a tar,
    which is open as `file`.
    """
    records: dict[str, Record] = {}
    for member, span in members.items():
        path = PurePosixPath(member)
        base, _, extension = path.name.partition(".")
        if extension.lower() not in SIDECARS or not base:
            continue
        record = records.setdefault((path.parent / base).as_posix(), {})
        record.update(read_sidecar(f"{tar}, {member}", extension.lower(), file, span))
    return records


def read_changes(location: str, by: str = "id") -> Iterator[tuple[str, Record]]:
    """Yield the ids of a table, or values of another column, and the fields to merge;
    None removes one.

    An empty cell of a CSV or Parquet table changes nothing, nor does a file name. Raise
    DataError for a row without an id, and if two rows have the same.
    """
    has_nulls = PurePosixPath(location).suffix.lower() == ".jsonl"
    seen = dict[str, int]()
    for number, record in read_gallery_records(location):
        filled = {
            name: value
            for name, value in record.items()
            if has_nulls or value not in (None, "")
        }
        item_id, caption, category, fields = split_fields(
            filled, f"{location}, row {number}"
        )
        key = item_id if by == "id" else _to_text(fields.pop(by, None))
        if not key:
            columns = ", ".join(record) or "none"
            raise DataError(
                f"{location}, row {number}: no {by}; the table needs a column {by}, and"
                f" it has {columns}"
            )
        if (first := seen.setdefault(key, number)) != number:
            raise DataError(
                f"{location}: rows {first} and {number} both have the {by} {key!r};"
                " keep one"
            )
        texts = {"caption": caption, "category": category}
        fields |= {
            name: text or None for name, text in texts.items() if text or name in filled
        }
        yield (
            key,
            {name: value for name, value in fields.items() if name != "file_name"},
        )


def split_fields(fields: Record, where: str) -> tuple[str, str, str, Record]:
    """Return (id, caption, category, all other fields as JSON values); missing texts
    are "".

    Of a list of captions, the first is the caption, and the list stays as `captions`.
    Raise DataError, which names `where`, if they are nested too deeply.
    """
    if is_too_deep(fields):
        raise DataError(
            f"the metadata of {where} have more than {MAX_METADATA_LEVELS} nested"
            " levels; flatten them"
        )
    others = {
        key: _to_json(value)
        for key, value in fields.items()
        if key not in {"id", "caption", "category"}
    }
    caption = fields.get("caption")
    if isinstance(caption, list):
        others.setdefault("captions", _to_json(caption))
    elif not _to_text(caption):
        caption = fields.get("captions")
    if isinstance(caption, list):
        caption = next(filter(None, map(_to_text, caption)), "")
    category = _to_text(fields.get("category")) or _to_text(fields.get("class_name"))
    return _to_text(fields.get("id")), _to_text(caption), category, others


def _to_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _to_json(value: Any) -> Any:
    """Return the value with JSON types.

    NaN and infinity become null, decimals numbers, and dates and times ISO 8601, whose
    order as text is that in time. Other types become text.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return str(value)
