"""What is said about pictures: lists, files beside a folder's pictures, members beside a tar's pictures.

`id`, `caption` (or `captions`) and `category` (or `class_name`) have a meaning, as in annotations for training; every
other field is kept as it is, as JSON.
"""

import datetime
import logging
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from dcar_core.data.load import annotation_files, load_splits
from dcar_core.data.samples import SPLITS
from dcar_core.data.tables import lines_of
from dcar_core.images import TarSpan
from dcar_core.util.errors import DataError
from dcar_core.util.json_text import parse_json
from index_jobs.gallery.records import Fields, read_records
from index_jobs.gallery.storage import join_location, parent_folder

logger = logging.getLogger(__name__)

BESIDE = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Metadata:
    """What is said of pictures, by their names; each of them remembers whether a picture asked for it."""

    def __init__(self, path: str, fields: dict[str, Fields]) -> None:
        self.path = path
        self._fields = fields
        self._used: set[str] = set()

    @classmethod
    def read(cls, path: str) -> "Metadata":
        """The rows of a metadata file, by `file_name`.

        Raises:
            DataError: it cannot be used.
        """
        fields: dict[str, Fields] = {}
        rows: dict[str, int] = {}
        for line, record in read_records(path):
            name = record.get("file_name")
            if "file_name" not in record:
                raise DataError(f"{path}, row {line}: no column file_name; it has {', '.join(record) or 'none'}")
            if not isinstance(name, str) or not name.strip():
                raise DataError(f"{path}, row {line}: file_name is empty or no text")
            name = name.replace("\\", "/").removeprefix("./")
            if name in rows:
                raise DataError(f"{path}: rows {rows[name]} and {line} both describe {name}; keep one")
            rows[name] = line
            fields[name] = record
        return cls(path, fields)

    @classmethod
    def annotated(cls, folder: str) -> "Metadata | None":
        """What a folder's annotations for training say (`train.json`, `pairs.csv`, ..), if it has any that can be read.

        Tars are left out, since a tar's pictures find theirs by themselves.
        """
        fields: dict[str, Fields] = {}
        try:
            files = [file for split in SPLITS for file in annotation_files(Path(folder), split)]
            if not files or any(file.suffix == ".tar" for file in files):
                return None
            splits, _ = load_splits(Path(folder), image_policy="present")
        except DataError as error:
            logger.warning("captions and categories are not taken from the annotations in %s: %s", folder, error)
            return None
        for sample in (sample for data in splits.values() for sample in data.samples):
            known = fields.setdefault(sample.image, {"captions": [], "category": sample.category})
            known["captions"].append(sample.caption)
        for known in fields.values():
            if len(known["captions"]) == 1:
                (known["caption"],) = known.pop("captions")
        return cls(", ".join(sorted({str(file) for file in files})), fields)

    @classmethod
    def beside(cls, folder: str, names: Iterable[str]) -> "Metadata | None":
        """The folder's own metadata file, if it has one among the names of its files.

        Raises:
            DataError: it has two, or one that cannot be used.
        """
        here = set(names)
        found = [name for name in BESIDE if name in here]
        if len(found) > 1:
            raise DataError(f"{join_location(folder, found[0])} and {found[1]} are both there; keep one")
        return cls.read(join_location(folder, found[0])) if found else None

    def of(self, *names: str) -> Fields:
        """The row of the first of a picture's names that has one."""
        for name in names:
            if name in self._fields:
                self._used.add(name)
                return self._fields[name]
        return {}

    def report(self) -> None:
        """Tell of rows that no picture belongs to.

        Raises:
            DataError: there are rows, and none has a picture, so that the names must be of another kind.
        """
        unused = [name for name in self._fields if name not in self._used]
        if unused and not self._used:
            raise DataError(
                f"no row of {self.path} names a picture of this gallery ({unused[0]!r} is not here); file_name must be "
                f"the path relative to {parent_folder(self.path)}, or a tar member's name"
            )
        if unused:
            logger.warning("%d rows of %s name no picture here, such as %s", len(unused), self.path, unused[0])


def read_sidecars(tar: str, file: BinaryIO, members: Mapping[str, TarSpan]) -> dict[str, Fields]:
    """webdataset metadata: the .json, .txt and .cls members of a tar, which is open as `file`, by stem."""
    fields: dict[str, Fields] = {}
    for member, span in members.items():
        inner = PurePosixPath(member)
        base, _, extension = inner.name.partition(".")
        if extension.lower() not in {"json", "txt", "cls"} or not base:
            continue
        file.seek(span.offset)
        of_stem = fields.setdefault((inner.parent / base).as_posix(), {})
        of_stem.update(_sidecar(f"{tar}, {member}", extension.lower(), file.read(span.size)))
    return fields


def _sidecar(where: str, extension: str, data: bytes) -> Fields:
    try:
        text = data.decode("utf-8-sig").strip()
        if extension == "txt":
            lines = [line.strip() for line in lines_of(text) if line.strip()]
            return {"captions": lines} if len(lines) > 1 else {"caption": text}
        if extension == "cls":
            return {"category": text}
        value = parse_json(text)
    except ValueError as error:
        raise DataError(f"{where} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: an object is expected, not {type(value).__name__}")
    return value


def split_fields(fields: Fields) -> tuple[str, str, str, Fields]:
    """(id, caption, category, every other field as JSON can hold it); what is missing is "".

    Of a list of captions the first is the caption, and the list stays as `captions`.
    """
    rest = {key: _plain(value) for key, value in fields.items() if key not in {"id", "caption", "category"}}
    caption = fields.get("caption")
    if isinstance(caption, list):
        rest.setdefault("captions", _plain(caption))
    elif not _text(caption):
        caption = fields.get("captions")
    if isinstance(caption, list):
        caption = next(filter(None, map(_text, caption)), "")
    category = _text(fields.get("category")) or _text(fields.get("class_name"))
    return _text(fields.get("id")), _text(caption), category, rest


def _text(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _plain(value: Any) -> Any:
    """JSON's own types. NaN and infinity, which JSON lacks, become null, decimals numbers, dates and times ISO 8601, of
    which the later is the greater text; what is unknown becomes text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
