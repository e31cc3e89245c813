"""Scan of a gallery: an Arrow table with one row per image.

- A gallery is a folder (searched recursively for images and tars), one tar, or a list (.jsonl, .csv, .parquet), on this
  machine or at any URL that fsspec reads; rows of a list may be URLs.
- Order and ids are stable: a folder is sorted by name, a list keeps its order. An id is given, or a hash of the image's
  relative name, so it survives moving the gallery.
- Several galleries become one table, each but the first with its name before ids and names.
- Faults of the gallery as a whole are errors here, before any image is decoded.
- Two signatures: `vectors` changes when an image may have changed, `content` also when its metadata has. A gallery at
  another URL has other images.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.data.records import RECORD_SUFFIXES
from dcar_core.images import IMAGE_SUFFIXES
from dcar_core.util.errors import DataError, DcarError
from dcar_core.util.files import canonical_json
from index_jobs.checks import MAX_CAPTION_CHARS, MAX_METADATA_BYTES
from index_jobs.gallery import listing
from index_jobs.gallery.listing import GalleryImage
from index_jobs.gallery.metadata import split_fields
from index_jobs.gallery.storage import file_suffix, is_url, join_location, parent_folder

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("category", pa.string()),
        ("location", pa.string()),  # relative to the root with forward slashes, absolute, or a URL
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("metadata", pa.string()),  # JSON
        ("name", pa.string()),  # the location, followed by the tar member
        ("mtime_ns", pa.int64()),  # or another number that changes with the file; 0 if unknown
    ]
)
_ROUTES = ("image", "similar")  # /items/{id}/image is a route of its own
_MAX_ID_LENGTH = 1024
_VECTOR_COLUMNS = ["id", "name", "location", "offset", "size", "mtime_ns"]
_LOCATION = SCHEMA.get_field_index("location")
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_TABLE_ROWS = 65_536
_ID_DIGITS = 20  # of sha256: 80 bits, enough for a billion names


@dataclass(frozen=True)
class Gallery:
    """A scanned gallery, or several as one.

    location: of the gallery, or of several with commas between them. root: the base of relative image locations. roots:
    the folders or URLs that hold the absolute image locations of further galleries.
    """

    location: str
    root: str
    table: pa.Table
    vectors_signature: str
    content_signature: str
    roots: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def filter(self, mask: pa.ChunkedArray) -> "Gallery":
        """Return some of the images as a gallery; mask: bool (n,)."""
        table, root = self.table.filter(mask), self.root if is_url(self.root) else ""
        vectors = _signature(table, _VECTOR_COLUMNS, root)
        return replace(self, table=table, vectors_signature=vectors, content_signature=_signature(table, SCHEMA.names))


def scan(gallery: str | Path | Sequence[str]) -> Gallery:
    """Read names, locations and metadata of a gallery without opening any image.

    Args:
        gallery: a path or URL, or several. NAME=LOCATION puts "NAME/" before ids and names. So does the own name of
            every gallery but the first, so ids of two galleries never collide.

    Raises:
        DataError: a gallery is missing, empty, of an unknown kind, repeats an id, has no column of images, or holds
            a compressed tar; or two have one name.
        MissingExtraError: its URL needs a package that is not installed.
    """
    names, locations, roots, tables = list[str](), list[str](), list[str](), list[pa.Table]()
    for text in [str(gallery)] if isinstance(gallery, str | Path) else map(str, gallery):
        match = None if os.path.exists(text) else _NAMED.fullmatch(text)  # noqa: PTH110
        name, location = (match[1], _absolute(match[2])) if match else ("", _absolute(text))
        if location in locations:
            raise DataError(f"the gallery {location} is given twice")
        name = name or (_own_name(location, tables) if tables else "")
        if name and name in names:
            raise DataError(f"the name {name} is given twice; choose another")
        root, table = _scan_one(location, name)
        names.append(name)
        locations.append(f"{name}={location}" if name else location)
        roots.append(root)
        tables.append(table)
    is_mixed = len({is_url(root) for root in roots}) > 1  # paths and URLs have no common root
    first = 0 if is_mixed else 1
    absolute = [absolute_locations(table, root) for table, root in zip(tables[first:], roots[first:], strict=True)]
    table = pa.concat_tables([*tables[:first], *absolute])
    _require_unique_ids(table)
    _require_addressable_ids(table)
    root = "" if is_mixed else roots[0]
    vectors = _signature(table, _VECTOR_COLUMNS, root if is_url(root) else "")
    return Gallery(", ".join(locations), root, table, vectors, _signature(table, SCHEMA.names), tuple(roots[first:]))


def absolute_locations(table: pa.Table, root: str) -> pa.Table:
    """Return a gallery's table with absolute locations, so that items of several galleries fit in one table."""
    absolute = [[join_location(root, location) for location in chunk.to_pylist()] for chunk in table["location"].chunks]
    return table.set_column(_LOCATION, SCHEMA.field(_LOCATION), pa.chunked_array(absolute, pa.string()))


def _own_name(location: str, earlier: Sequence[pa.Table]) -> str:
    """Return the last part of a location, with a number if an earlier gallery has names below it."""
    stem = re.sub(r"[^\w.-]+", "-", PurePosixPath(location.rstrip("/").partition("?")[0]).stem) or "gallery"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(
        name for name in names
        if not any(pc.any(pc.starts_with(table["name"], f"{name}/")).as_py() for table in earlier)
    )  # fmt: skip


def _scan_one(location: str, name: str) -> tuple[str, pa.Table]:
    """Return the root and the table of one gallery; name: before its ids and names."""
    try:
        root, images = _list_images(location)
        rows = (_row(image, f"{name}/" if name else "") for image in images)
        batches = [pa.RecordBatch.from_pylist(part, SCHEMA) for part in iter(lambda: [*islice(rows, _TABLE_ROWS)], [])]
    except DcarError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_url(location):
            raise
        file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if reason == location:  # all that fsspec says about a file that it cannot open
            reason = "it does not exist, or its store cannot be reached"
        raise DataError(f"the gallery {location} cannot be read: {reason}{file}") from error
    if not batches:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"the gallery {location} is empty: no file or tar member with one of the suffixes {suffixes}")
    return root, pa.Table.from_batches(batches, SCHEMA)


def _absolute(location: str) -> str:
    local = location.removeprefix("file://")
    return location if is_url(local) else os.path.abspath(local)  # noqa: PTH100  keeps the names of symbolic links


def _list_images(location: str) -> tuple[str, Iterable[GalleryImage]]:
    suffix, remote = file_suffix(location), is_url(location)
    if not remote and not Path(location).exists():
        raise DataError(f"the gallery {location} does not exist")
    is_file = remote or Path(location).is_file()
    if is_file and suffix == ".tar":
        return parent_folder(location), listing.list_tar(location)
    if is_file and suffix in RECORD_SUFFIXES:
        return parent_folder(location), listing.list_rows(location)
    if remote or Path(location).is_dir():
        return location, listing.list_folder(location)
    kinds = ", ".join(sorted(RECORD_SUFFIXES))
    raise DataError(f"{location} is not a gallery; give a folder, an uncompressed .tar or a list ({kinds})")


def _row(image: GalleryImage, prefix: str) -> dict[str, Any]:
    name = prefix + image.name
    try:
        digest = hashlib.sha256(name.encode()).hexdigest()
        stated_id, caption, category, metadata = split_fields(image.fields, image.name)
    except UnicodeEncodeError:
        raise DataError(f"the name {image.name!r} is not UTF-8; rename the file") from None
    size = len(canonical_json(metadata))
    if size > MAX_METADATA_BYTES:
        longest = max(metadata, key=lambda field: len(canonical_json(metadata[field])))
        raise DataError(
            f"the metadata of {image.name} take {size / 2**10:.0f} KiB as JSON, at most {MAX_METADATA_BYTES // 2**10}; "
            f"the longest field is {longest!r}"
        )
    for field, text in (("caption", caption), ("category", category)):
        if len(text) > MAX_CAPTION_CHARS:
            raise DataError(f"the {field} of {image.name} has {len(text):,} characters, at most {MAX_CAPTION_CHARS:,}")
    return image._asdict() | {
        "id": prefix + stated_id if stated_id else digest[:_ID_DIGITS],
        "caption": caption,
        "category": category,
        "metadata": canonical_json({"file_name": name} | metadata).decode(),
        "name": name,
    }


def _require_unique_ids(table: pa.Table) -> None:
    ids = table["id"].cast(pa.large_string())  # Arrow counts at most 2 GiB of the other type
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    repeated = [entry["values"].as_py() for entry in counts.filter(pc.greater(counts.field("counts"), 1))]
    names = table.filter(pc.equal(ids, repeated[0]))["name"].to_pylist()
    more = f" ({len(repeated):,} ids are used more than once)" if len(repeated) > 1 else ""
    if names[0] == names[1]:
        raise DataError(f"{names[0]} is listed twice; keep one row, with a list `captions`, or give ids{more}")
    raise DataError(f"{names[0]} and {names[1]} both have the id {repeated[0]!r}; ids must be unique{more}")


def _require_addressable_ids(table: pa.Table) -> None:
    """Refuse ids that cannot be part of a URL of the service."""
    ids = table["id"]
    faults = [
        *((pc.ends_with(ids, f"/{each}"), f"ends in /{each}, which is a route of the service") for each in _ROUTES),
        (pc.match_substring_regex(ids, "[\\x00-\\x1f\\x7f]"), "has a line break or another control character"),
        (pc.is_in(ids, pa.array([".", ".."])), "has a meaning of its own in a URL"),
        (pc.greater(pc.utf8_length(ids), _MAX_ID_LENGTH), f"is longer than {_MAX_ID_LENGTH} characters"),
    ]
    for is_bad, reason in faults:
        if pc.any(is_bad).as_py():
            raise DataError(f"the id {ids.filter(is_bad)[0].as_py()[:80]!r} {reason}; give another")


def _signature(table: pa.Table, columns: list[str], root: str = "") -> str:
    digest = hashlib.sha256(root.encode())
    for batch in table.select(columns).to_batches():
        digest.update(canonical_json(batch.to_pydict()))
    return digest.hexdigest()
