"""From a gallery on disk to an Arrow table with one row a picture.

- A gallery is a folder (searched recursively for pictures and tars), one tar, or a list (.jsonl, .csv, .parquet).
- Nothing is unpacked: a tar's member is a row with the tar's name, an offset and a size.
- Order and ids are stable: a folder is sorted by name, a list keeps its own order; an id is given, or a hash of the
  picture's relative name, so that it survives moving the gallery.
- What is wrong with the gallery as a whole is an error here, before any picture is decoded.
- Two signatures: `vectors` changes when a picture may have changed, `content` also when its metadata has.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.errors import DataError
from dcar_core.images import IMAGE_SUFFIXES, index_tar
from index_jobs.files import WHOLE_FILE, canonical
from index_jobs.metadata import LIST_SUFFIXES, PATH_COLUMNS, Fields, Metadata, read_records, sidecars, split_fields

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("category", pa.string()),
        ("location", pa.string()),  # relative to the root with forward slashes, or absolute
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("metadata", pa.string()),  # JSON
        ("name", pa.string()),  # the location, and behind it the member of a tar
        ("mtime_ns", pa.int64()),
    ]
)
_PICTURE_COLUMNS = ["id", "name", "location", "offset", "size", "mtime_ns"]
_TABLE_ROWS = 65_536
_ID_DIGITS = 20  # of sha256: 80 bits, so that a billion names do not collide


@dataclass(frozen=True)
class Gallery:
    """A scanned gallery. `root` is what relative locations start from, `source` is the path as it was given."""

    source: Path
    root: Path
    table: pa.Table
    vectors_signature: str
    content_signature: str

    def __len__(self) -> int:
        return int(self.table.num_rows)


@dataclass(frozen=True)
class _Picture:
    name: str
    location: str
    offset: int
    size: int
    mtime_ns: int
    fields: Fields = field(default_factory=dict)


def scan(path: Path) -> Gallery:
    """Read a gallery's names, places and metadata; no picture is opened.

    Raises:
        DataError: the gallery is missing, empty, of an unknown kind, holds an id twice, has a list without a picture
            column or a compressed tar. The message says what to do.
    """
    source = Path(os.path.abspath(path))  # noqa: PTH100  symbolic links keep the name that the user knows
    try:
        if source.is_dir():
            root, pictures = source, _folder(source)
        elif source.suffix.lower() == ".tar":
            root, pictures = source.parent, _sorted(_tar(source, source.name, None))
        elif source.suffix.lower() in LIST_SUFFIXES and source.is_file():
            root, pictures = source.parent, _list(source)
        elif not source.exists():
            raise DataError(f"the gallery {path} does not exist")
        else:
            kinds = ", ".join(sorted(LIST_SUFFIXES))
            raise DataError(f"{path} is no gallery: give a folder, an uncompressed .tar or a list ({kinds})")
        table = _table(pictures)
    except OSError as error:
        raise DataError(f"the gallery {path} cannot be read: {error.strerror or error} ({error.filename})") from error
    if not table.num_rows:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"the gallery {path} is empty: no file or tar member with one of the suffixes {suffixes}")
    _require_unique_ids(table)
    vectors = _signature(table, _PICTURE_COLUMNS)
    return Gallery(source, root, table, vectors, _signature(table, SCHEMA.names))


def _folder(root: Path) -> Iterator[_Picture]:
    names = list(_walk(root))
    metadata = Metadata.beside(root)
    pictures: list[_Picture] = []
    for name in names:
        path = root / name
        if path.suffix.lower() == ".tar":
            pictures += _tar(path, name, metadata)
        else:
            stat = path.stat() if path.exists() else None  # a dangling link is a picture that cannot be read
            size, mtime = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
            fields = metadata.of(name) if metadata else {}
            pictures.append(_Picture(name, name, WHOLE_FILE, size, mtime, fields))
    if metadata and pictures:
        metadata.report()
    return _sorted(pictures)


def _walk(root: Path) -> Iterator[str]:
    """Pictures and tars below, relative with forward slashes; hidden files and directories are left out."""

    def fail(error: OSError) -> None:
        raise error

    wanted = IMAGE_SUFFIXES | {".tar"}
    for directory, folders, files in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122  a Path for each of a million files is slow
            if file.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
                path = Path(directory, file)
                raise DataError(
                    f"{path} is a compressed tar, whose members cannot be read in place; decompress it first"
                )
            if suffix in wanted and not file.startswith("."):
                yield Path(directory, file).relative_to(root).as_posix()


def _tar(path: Path, name: str, metadata: Metadata | None) -> list[_Picture]:
    """The pictures of a tar, with the members of the same stem (.json, .txt, .cls) as their metadata."""
    stat = path.stat()
    members = index_tar(path)
    beside = sidecars(path, members)
    pictures = []
    for member, span in members.items():
        inner = PurePosixPath(member)
        if inner.suffix.lower() not in IMAGE_SUFFIXES or inner.name.startswith("."):
            continue
        full = f"{name}/{member}"
        joined = metadata.of(full, member, inner.name) if metadata else {}
        fields = {**beside.get(_stem(inner), {}), **joined}
        pictures.append(_Picture(full, name, span.offset, span.size, stat.st_mtime_ns, fields))
    return pictures


def _stem(member: PurePosixPath) -> str:
    """webdataset's key: everything before the first dot of the last part."""
    return (member.parent / member.name.split(".", 1)[0]).as_posix()


def _list(path: Path) -> Iterator[_Picture]:
    root, column, line = path.parent, "", 0
    for line, record in read_records(path):
        column = column or next((c for c in PATH_COLUMNS if c in record), "")
        if not column:
            have = ", ".join(record) or "none"
            raise DataError(f"{path} has no column {' or '.join(PATH_COLUMNS)} with the pictures' paths; it has {have}")
        given = record.get(column)
        if not isinstance(given, str) or not given.strip():
            raise DataError(f"{path}, row {line}: {column} is empty or no text")
        location = _inside(path, line, given)
        try:
            stat = (root / location).stat()
            size, mtime = stat.st_size, stat.st_mtime_ns
        except (OSError, ValueError):
            size, mtime = 0, 0  # reported with the pictures that cannot be read
        yield _Picture(location, location, WHOLE_FILE, size, mtime, record | {"file_name": given})
    if not line:
        raise DataError(f"the list {path} has no rows")


def _inside(path: Path, line: int, given: str) -> str:
    """The path of one row: absolute, or relative to the list's folder and inside it."""
    if "://" in given:
        raise DataError(f"{path}, row {line}: {given} is a URL; download the pictures and give local paths")
    if os.path.isabs(given):  # noqa: PTH117
        return given
    location = os.path.normpath(given).replace(os.sep, "/")
    if location == ".." or location.startswith("../"):
        raise DataError(f"{path}, row {line}: {given} leads out of the list's folder; give an absolute path instead")
    return location


def _sorted(pictures: Iterable[_Picture]) -> Iterator[_Picture]:
    return iter(sorted(pictures, key=lambda picture: picture.name))


def _table(pictures: Iterable[_Picture]) -> pa.Table:
    batches, rows = [], []
    for picture in pictures:
        rows.append(_row(picture))
        if len(rows) == _TABLE_ROWS:
            batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
            rows = []
    batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


def _row(picture: _Picture) -> dict[str, Any]:
    try:
        digest = hashlib.sha256(picture.name.encode()).hexdigest()
    except UnicodeEncodeError:
        raise DataError(f"the name {picture.name!r} is not UTF-8; rename the file") from None
    given, caption, category, metadata = split_fields(picture.fields)
    return {
        "id": given or digest[:_ID_DIGITS],
        "caption": caption,
        "category": category,
        "location": picture.location,
        "offset": picture.offset,
        "size": picture.size,
        "metadata": canonical({"file_name": picture.name} | metadata).decode(),
        "name": picture.name,
        "mtime_ns": picture.mtime_ns,
    }


def _require_unique_ids(table: pa.Table) -> None:
    ids = table["id"]
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    repeated = [entry["values"].as_py() for entry in counts.filter(pc.greater(counts.field("counts"), 1))]
    names = table.filter(pc.equal(ids, repeated[0]))["name"].to_pylist()
    more = f" ({len(repeated):,} ids are used more than once)" if len(repeated) > 1 else ""
    raise DataError(f"{names[0]} and {names[1]} both have the id {repeated[0]!r}; ids must be unique{more}")


def _signature(table: pa.Table, columns: list[str]) -> str:
    digest = hashlib.sha256()
    for batch in table.select(columns).to_batches():
        digest.update(canonical(batch.to_pydict()))
    return digest.hexdigest()
