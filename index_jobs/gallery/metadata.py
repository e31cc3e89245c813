"""Metadata of images: from lists, from files next to a folder's images, and from tar members.

`id`, `caption` (or `captions`) and `category` (or `class_name`) have a meaning, as in annotations for training; every
other field is stored as JSON.
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
from dcar_core.data.load import MISSING_IMAGES, Annotations, NoPairsError, annotation_files
from dcar_core.data.readers import SIDECARS, SKIPPED_ROWS, USED_COLUMNS, BadRowsError, read_sidecar
from dcar_core.data.records import IMAGE_COLUMNS, RECORD_SUFFIXES, Record, read_records
from dcar_core.data.samples import SPLITS
from dcar_core.images import TarSpan
from dcar_core.util.errors import DataError, shorten
from index_jobs.checks import MAX_METADATA_LEVELS, is_too_deep
from index_jobs.gallery.storage import is_url, join_location, open_location, parent_folder

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NOT_TAKEN = "captions and categories are not taken from the annotations in %s: %s"
_TRAINING_COLUMNS = {*USED_COLUMNS, "id"}  # annotations may number captions, so their ids are not those of items


def read_gallery_records(location: str) -> Iterator[tuple[int, Record]]:
    """Yield (number, record) of a list at a path or URL, with typed CSV columns; see `read_records`."""
    return read_records(location, lambda: open_location(location), infer_types=True)


class GalleryMetadata:
    """Records by image name, which remember whether an image has used them."""

    def __init__(self, path: str, records: dict[str, Record]) -> None:
        self.path = path
        self._records = records
        self._used: set[str] = set()

    @classmethod
    def read(cls, path: str) -> "GalleryMetadata":
        """Read a metadata file, by `file_name`."""
        records: dict[str, tuple[int, Record]] = {}
        for line, record in read_gallery_records(path):
            name = record.get("file_name")
            if "file_name" not in record:
                raise DataError(f"{path}, row {line}: no column file_name; it has {', '.join(record) or 'none'}")
            if not isinstance(name, str) or not name.strip():
                raise DataError(f"{path}, row {line}: file_name is empty or not text")
            first, _ = records.setdefault(_plain_name(name), (line, record))
            if first != line:
                raise DataError(f"{path}: rows {first} and {line} both describe {_plain_name(name)}; keep one")
        if not records:
            raise DataError(f"{path} has no rows; fill or remove it")
        return cls(path, {name: record for name, (_, record) in records.items()})

    @classmethod
    def from_annotations(cls, folder: str, names: Collection[str]) -> "GalleryMetadata | None":
        """Read a folder's annotations for training (`train.json`, `pairs.csv`, ...), or else its only other table.

        Tars are left out: their images have metadata of their own.

        Raises:
            DataError: too many rows cannot be used, or a table named `pairs` is not what the name says. A file of
                another name may not be annotations at all, which is a warning.
        """
        records: dict[str, Record] = {}
        files: list[Path] = []
        try:
            files = [file for split in SPLITS for file in annotation_files(Path(folder), split)]
            if not files:
                return cls.from_other_table(folder, names)
            if any(file.suffix == ".tar" for file in files):
                return None
            annotations = Annotations(Path(folder))
            loaded = {}
            for split in annotations.splits():
                try:
                    loaded[split] = annotations.load(split, "present")
                except NoPairsError as error:  # the images of a split may be elsewhere
                    logger.warning(_NOT_TAKEN, folder, error)
        except DataError as error:
            if any(file.stem == "pairs" for file in files) or isinstance(error, BadRowsError):
                raise
            logger.warning(_NOT_TAKEN, folder, error)
            return None
        if not loaded:
            return None
        reports = [report for _, report in loaded.values()]
        for phrase, finding in ((SKIPPED_ROWS, "rows"), (MISSING_IMAGES, "missing images")):
            names = {name: None for report in reports for name in report.names.get(phrase, ())}
            if names:
                logger.warning(
                    "%d %s of the annotations in %s are left out: %s", len(names), finding, folder, shorten([*names])
                )
        for sample in (sample for data, _ in loaded.values() for sample in data.samples):
            record = records.setdefault(sample.image, {"captions": [], "category": sample.category})
            record["captions"].append(sample.caption)
        for record in records.values():
            if len(record["captions"]) == 1:
                (record["caption"],) = record.pop("captions")
        paths = sorted({str(file) for file in files})
        for path in (path for path in paths if Path(path).suffix.lower() in RECORD_SUFFIXES):
            _add_other_columns(path, records, Annotations(Path(folder)))
        return cls(", ".join(paths), records)

    @classmethod
    def from_other_table(cls, folder: str, names: Collection[str]) -> "GalleryMetadata | None":
        """Read the folder's only table, whatever it is called, if its `file_name` names an image; one line says so.

        Tables that are not read are a warning; those of one image ("1.jpg.json") are left out.
        """
        tables = (path for path in Path(folder).iterdir() if path.suffix.lower() in {*RECORD_SUFFIXES, ".json"})
        others = sorted(path.name for path in tables if path.name.count(".") == 1)
        if len(others) == 1 and not others[0].endswith(".json"):
            with suppress(DataError):
                metadata = cls.read(join_location(folder, others[0]))
                if not metadata._records.keys().isdisjoint(names):
                    logger.warning("%s describes the images, as it is the only table here", metadata.path)
                    return metadata
        if others:
            suffix = PurePosixPath(others[0]).suffix
            forms = f"metadata{suffix} (column file_name) or pairs{suffix} (columns image and caption)"
            name = "pairs.json (in the FDRD format)" if suffix == ".json" else forms
            logger.warning("%s is not read: call it %s", others[0], name)
        return None

    @classmethod
    def of_folder(cls, folder: str, names: Collection[str]) -> "GalleryMetadata | None":
        """Read a folder's metadata file, if there is one among the names of its files, or else its annotations."""
        files = [name for name in METADATA_FILES if name in names]
        if len(files) > 1:
            raise DataError(f"{join_location(folder, files[0])} and {files[1]} both exist; keep one")
        if not files:
            return None if is_url(folder) else cls.from_annotations(folder, names)
        metadata = cls.read(join_location(folder, files[0]))
        has_captions = any(record.get("caption") or record.get("captions") for record in metadata._records.values())
        if not is_url(folder) and not has_captions:
            with suppress(DataError):
                found = {file for split in SPLITS for file in annotation_files(Path(folder), split)}
                for name in sorted(file.name for file in found if file.suffix != ".tar"):
                    logger.warning(
                        "the captions of %s are not read; add them to %s, which describes the images", name, files[0]
                    )
        return metadata

    def find(self, *names: str) -> Record:
        """Return the record of the first of an image's names that has one, in any Unicode form."""
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
                f"no row of {self.path} names an image of this gallery ({unused[0]!r} is not here); file_name must be "
                f"the path relative to {parent_folder(self.path)}, or a tar member's name"
            )
        if unused:
            logger.warning("%d rows of %s name no image here, such as %s", len(unused), self.path, unused[0])


def _plain_name(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _add_other_columns(table: str, records: Mapping[str, Record], annotations: Annotations) -> None:
    """Add the columns of an annotation table that training does not use; an image's first row counts.

    records: by the names of the image files, which the table may write otherwise.
    """
    try:
        for _, row in read_records(table, lambda: open_location(table), infer_types=True, on_bad_line=lambda _: None):
            name = next((row[column] for column in IMAGE_COLUMNS if row.get(column)), "")
            name = _plain_name(str(name))
            record = records.get(name) or records.get(annotations.finder.find(name) or "", {})
            for column in row.keys() - _TRAINING_COLUMNS:
                record.setdefault(column, row[column])
    except DataError as error:
        logger.warning("other columns than those of training are not taken: %s", error)


def read_sidecars(tar: str, file: BinaryIO, members: Mapping[str, TarSpan]) -> dict[str, Record]:
    """Return webdataset metadata by stem: the .json, .txt and .cls members of a tar, which is open as `file`."""
    records: dict[str, Record] = {}
    for member, span in members.items():
        path = PurePosixPath(member)
        base, _, extension = path.name.partition(".")
        if extension.lower() not in SIDECARS or not base:
            continue
        record = records.setdefault((path.parent / base).as_posix(), {})
        record.update(read_sidecar(f"{tar}, {member}", extension.lower(), file, span))
    return records


def read_changes(location: str) -> Iterator[tuple[str, Record]]:
    """Yield the ids of a table and the fields to merge into each item; None removes one.

    An empty cell of a CSV or Parquet table changes nothing. The image of an item stays, so its file name does as well.

    Raises:
        DataError: the table cannot be read, a row has no id, or two have the same.
    """
    has_nulls, seen = PurePosixPath(location).suffix.lower() == ".jsonl", dict[str, int]()
    for number, record in read_gallery_records(location):
        given = {name: value for name, value in record.items() if has_nulls or value not in (None, "")}
        item_id, caption, category, fields = split_fields(given, f"{location}, row {number}")
        if not item_id:
            columns = ", ".join(record) or "none"
            raise DataError(f"{location}, row {number}: no id; the table needs a column id, and it has {columns}")
        if (first := seen.setdefault(item_id, number)) != number:
            raise DataError(f"{location}: rows {first} and {number} both have the id {item_id!r}; keep one")
        texts = {"caption": caption, "category": category}
        fields |= {name: text or None for name, text in texts.items() if text or name in given}
        yield item_id, {name: value for name, value in fields.items() if name != "file_name"}


def split_fields(fields: Record, where: str) -> tuple[str, str, str, Record]:
    """Return (id, caption, category, all other fields as JSON values); missing texts are "".

    Of a list of captions, the first is the caption, and the list stays as `captions`. Raise DataError, which names
    `where`, if they are nested too deeply.
    """
    if is_too_deep(fields):
        raise DataError(f"the metadata of {where} have more than {MAX_METADATA_LEVELS} nested levels; flatten them")
    others = {key: _to_json(value) for key, value in fields.items() if key not in {"id", "caption", "category"}}
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
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _to_json(value: Any) -> Any:
    """Return the value with JSON types.

    NaN and infinity become null, decimals numbers, and dates and times ISO 8601, whose order as text is that in time.
    Other types become text.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, list | tuple) else str(value)
