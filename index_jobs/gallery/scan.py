"""From a gallery to an Arrow table with one row a picture.

- A gallery is a folder (searched recursively for pictures and tars), one tar, or a list (.jsonl, .csv, .parquet), on
  this machine or at any URL that fsspec reads; a list's rows may be URLs themselves.
- Order and ids are stable: a folder is sorted by name, a list keeps its own order; an id is given, or a hash of the
  picture's relative name, so that it survives moving the gallery.
- What is wrong with the gallery as a whole is an error here, before any picture is decoded.
- Two signatures: `vectors` changes when a picture may have changed, `content` also when its metadata has.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.images import IMAGE_SUFFIXES
from dcar_core.util.errors import DataError, DcarError
from dcar_core.util.files import canonical_json
from index_jobs.gallery import listing
from index_jobs.gallery.listing import GalleryImage
from index_jobs.gallery.metadata import split_fields
from index_jobs.gallery.records import LIST_SUFFIXES
from index_jobs.gallery.storage import file_suffix, is_url, parent_folder

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("category", pa.string()),
        ("location", pa.string()),  # relative to the root with forward slashes, absolute, or a URL
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("metadata", pa.string()),  # JSON
        ("name", pa.string()),  # the location, and behind it the member of a tar
        ("mtime_ns", pa.int64()),  # or what else tells one version of the file from another; 0 unknown
    ]
)
_ADDRESSES = ("image", "similar")  # /items/{id}/image is an item's picture, not the item {id}/image
_LONGEST_ID = 1024
_PICTURE_COLUMNS = ["id", "name", "location", "offset", "size", "mtime_ns"]
_TABLE_ROWS = 65_536
_ID_DIGITS = 20  # of sha256: 80 bits, so that a billion names do not collide


@dataclass(frozen=True)
class Gallery:
    """A scanned gallery. `root` is what relative locations start from, `source` is the place as it was given."""

    source: str
    root: str
    table: pa.Table
    vectors_signature: str
    content_signature: str

    def __len__(self) -> int:
        return int(self.table.num_rows)


def scan(place: str | Path) -> Gallery:
    """Read a gallery's names, places and metadata; no picture is opened.

    Raises:
        DataError: the gallery is missing, empty, of an unknown kind, holds an id twice, has a list without a picture
            column or a compressed tar. The message says what to do.
        MissingExtraError: its URL needs a package that is not installed.
    """
    source = _source(str(place))
    try:
        root, pictures = _pictures(source, str(place))
        table = _table(pictures)
    except DcarError:
        raise
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise DataError(f"the gallery {place} cannot be read: {error.strerror or error}{file}") from error
    except Exception as error:
        if not is_url(source):
            raise
        raise DataError(f"the gallery {place} cannot be read: {error or type(error).__name__}") from error
    if not table.num_rows:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"the gallery {place} is empty: no file or tar member with one of the suffixes {suffixes}")
    _require_unique_ids(table)
    _require_addressable_ids(table)
    vectors = _signature(table, _PICTURE_COLUMNS)
    return Gallery(source, root, table, vectors, _signature(table, SCHEMA.names))


def _source(place: str) -> str:
    if not is_url(place):
        return os.path.abspath(place)  # noqa: PTH100  symbolic links keep the name that the user knows
    return os.path.abspath(place.removeprefix("file://")) if place.startswith("file://") else place  # noqa: PTH100


def _pictures(source: str, given: str) -> tuple[str, Iterable[GalleryImage]]:
    suffix, remote = file_suffix(source), is_url(source)
    if not remote and Path(source).is_dir():
        return source, listing.list_folder(source)
    if remote or Path(source).is_file():
        if suffix == ".tar":
            return parent_folder(source), listing.list_tar(source)
        if suffix in LIST_SUFFIXES:
            return parent_folder(source), listing.list_rows(source)
    if remote:
        return source, listing.list_folder(source)
    if not Path(source).exists():
        raise DataError(f"the gallery {given} does not exist")
    kinds = ", ".join(sorted(LIST_SUFFIXES))
    raise DataError(f"{given} is no gallery: give a folder, an uncompressed .tar or a list ({kinds})")


def _table(pictures: Iterable[GalleryImage]) -> pa.Table:
    batches, rows = [], []
    for picture in pictures:
        rows.append(_row(picture))
        if len(rows) == _TABLE_ROWS:
            batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
            rows = []
    batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


def _row(picture: GalleryImage) -> dict[str, Any]:
    try:
        digest = hashlib.sha256(picture.name.encode()).hexdigest()
    except UnicodeEncodeError:
        raise DataError(f"the name {picture.name!r} is not UTF-8; rename the file") from None
    try:
        given, caption, category, metadata = split_fields(picture.fields)
    except RecursionError:
        raise DataError(f"the metadata of {picture.name} are nested too deeply; flatten them") from None
    return {
        "id": given or digest[:_ID_DIGITS],
        "caption": caption,
        "category": category,
        "location": picture.location,
        "offset": picture.offset,
        "size": picture.size,
        "metadata": canonical_json({"file_name": picture.name} | metadata).decode(),
        "name": picture.name,
        "mtime_ns": picture.version,
    }


def _require_unique_ids(table: pa.Table) -> None:
    ids = table["id"].cast(pa.large_string())  # of the others Arrow counts no more than 2 GiB
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    repeated = [entry["values"].as_py() for entry in counts.filter(pc.greater(counts.field("counts"), 1))]
    names = table.filter(pc.equal(ids, repeated[0]))["name"].to_pylist()
    more = f" ({len(repeated):,} ids are used more than once)" if len(repeated) > 1 else ""
    if names[0] == names[1]:
        raise DataError(
            f"{names[0]} is listed twice; keep one row, with its captions as a list under `captions`, or give ids{more}"
        )
    raise DataError(f"{names[0]} and {names[1]} both have the id {repeated[0]!r}; ids must be unique{more}")


def _require_addressable_ids(table: pa.Table) -> None:
    """Refuse ids that the service could not be asked for."""
    ids = table["id"]
    for word in _ADDRESSES:
        _require_none(ids, pc.ends_with(ids, "/" + word), f"ends in /{word}, as addresses of items' parts do")
    _require_none(
        ids, pc.match_substring_regex(ids, "[\\x00-\\x1f\\x7f]"), "has a line break or another control character"
    )
    _require_none(ids, pc.is_in(ids, pa.array([".", ".."])), "means another place in an address")
    _require_none(ids, pc.greater(pc.utf8_length(ids), _LONGEST_ID), f"is longer than {_LONGEST_ID} characters")


def _require_none(ids: pa.ChunkedArray, bad: pa.ChunkedArray, why: str) -> None:
    if pc.any(bad).as_py():
        raise DataError(f"the id {ids.filter(bad)[0].as_py()[:80]!r} {why}; give another")


def _signature(table: pa.Table, columns: list[str]) -> str:
    digest = hashlib.sha256()
    for batch in table.select(columns).to_batches():
        digest.update(canonical_json(batch.to_pydict()))
    return digest.hexdigest()
