"""Scan of a gallery: an Arrow table with one row per image.

- A gallery is a folder (searched recursively for images and tars, without hidden
  files), one tar, or a list (.jsonl, .csv, .parquet), on this machine or at any URL
  that fsspec reads. Rows of a list may be URLs, which stand for their content: looking
  them up would take as long as reading them.
- Order and ids are stable: a folder is sorted by name, a list keeps its order. An id is
  given, or a hash of the image's relative name, so it survives moving the gallery. Of
  several galleries, each but the first has its name before both.
- Two signatures: `vectors` changes when an image may have changed, `content` also when
  its metadata has.
"""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.data.image_lookup import unicode_forms
from dcar_core.data.records import IMAGE_COLUMNS, RECORD_SUFFIXES, Record
from dcar_core.images import formats, has_image_suffix, index_tar
from dcar_core.util.errors import DataError, DcarError
from dcar_core.util.files import canonical_json
from index_jobs.checks import MAX_CAPTION_CHARS, MAX_METADATA_BYTES
from index_jobs.gallery.locations import (
    WHOLE_FILE,
    file_state,
    file_suffix,
    file_system,
    is_url,
    join_location,
    open_location,
    parent_folder,
    remote_version,
)
from index_jobs.gallery.metadata import (
    METADATA_FILES,
    GalleryMetadata,
    images_of_row,
    read_gallery_records,
    read_sidecars,
    split_fields,
)

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("category", pa.string()),
        # relative to the root with forward slashes, absolute, or a URL
        ("location", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("metadata", pa.string()),  # JSON
        ("name", pa.string()),  # the location, followed by the tar member
        # or another number that changes with the file; 0 if unknown
        ("mtime_ns", pa.int64()),
    ]
)
_MAX_ID_LENGTH = 1024
_VECTOR_COLUMNS = ["id", "name", "location", "offset", "size", "mtime_ns"]
_LOCATION = SCHEMA.get_field_index("location")
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_TABLE_ROWS = 65_536
_ID_DIGITS = 20  # of sha256: 80 bits, enough for a billion names
_PATH_COLUMNS = (*IMAGE_COLUMNS, "url")
_CAPTION_COLUMNS = ("title", "name")  # of lists without captions
_NOT_READ = formats.HEIC_SUFFIXES | {  # of images, videos and compressed tars
    ".svg",
    ".svgz",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".dng",
    ".raf",
    ".orf",
    ".rw2",
    ".pef",
    ".mp4",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".m4v",
    ".mpg",
    ".wmv",
    ".3gp",
    ".pdf",
    ".psd",
    ".jp2",
    ".jxl",
    ".ico",
    ".gz",
    ".tgz",
    ".bz2",
    ".xz",
    ".zst",
}


class GalleryImage(NamedTuple):
    """An image of a gallery: columns of its table, and its metadata."""

    name: str
    location: str
    offset: int
    size: int
    mtime_ns: int
    fields: Record = {}  # noqa: RUF012  never changed


@dataclass(frozen=True)
class Gallery:
    """A scanned gallery, or several as one.

    location: of the gallery, or of several with commas between them. root: the base of
    relative image locations. roots: those of several galleries, whose image locations
    are absolute.
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
        table = self.table.filter(mask)
        root = self.root if is_url(self.root) else ""
        vectors = _signature(table, _VECTOR_COLUMNS, root)
        return replace(
            self,
            table=table,
            vectors_signature=vectors,
            content_signature=_signature(table, SCHEMA.names),
        )


def scan(gallery: str | Path | Sequence[str]) -> Gallery:
    """Read names, locations and metadata of a gallery without opening any image.

    Args:
        gallery: a path or URL, or several. NAME=LOCATION puts "NAME/" before ids and
            names. So does the own name of every gallery but the first, so ids of two
            galleries never collide.

    Raises:
        DataError: a gallery is missing, empty, of an unknown kind, repeats an id, has
            no column of images, or holds a compressed tar; or two have one name.
        MissingExtraError: its URL needs a package that is not installed.
    """
    names = list[str]()
    locations = list[str]()
    roots = list[str]()
    tables = list[pa.Table]()
    for text in (
        [str(gallery)] if isinstance(gallery, str | Path) else map(str, gallery)
    ):
        match = None if os.path.exists(text) else _NAMED.fullmatch(text)  # noqa: PTH110
        name, location = (
            (match[1], _absolute(match[2])) if match else ("", _absolute(text))
        )
        if location in locations:
            raise DataError(f"the gallery {location} is given twice")
        if tables and not name:
            name = (
                re.sub(
                    r"[^\w.-]+",
                    "-",
                    PurePosixPath(location.rstrip("/").partition("?")[0]).stem,
                )
                or "gallery"
            )
        if name and name in names:
            raise DataError(
                f"the name {name} is given twice; choose another, as in NAME=LOCATION"
            )
        root, table = _scan_one(location, name)
        names.append(name)
        locations.append(f"{name}={location}" if name else location)
        roots.append(root)
        tables.append(table)
    root, *others = roots
    if others:
        root, tables = (
            "",
            [
                absolute_locations(table, root)
                for table, root in zip(tables, roots, strict=True)
            ],
        )
    table = pa.concat_tables(tables)
    _require_unique_ids(table)
    _require_addressable_ids(table)
    vectors = _signature(table, _VECTOR_COLUMNS, root if is_url(root) else "")
    content = _signature(table, SCHEMA.names)
    return Gallery(
        ", ".join(locations),
        root,
        table,
        vectors,
        content,
        tuple(roots if others else ()),
    )


def absolute_locations(table: pa.Table, root: str) -> pa.Table:
    """Return a gallery's table with absolute locations, so that items of several
    galleries fit in one table.
    """
    absolute = [
        [join_location(root, location) for location in chunk.to_pylist()]
        for chunk in table["location"].chunks
    ]
    return table.set_column(
        _LOCATION,
        SCHEMA.field(_LOCATION),
        pa.chunked_array(absolute, pa.string()),
    )


def _scan_one(location: str, name: str) -> tuple[str, pa.Table]:
    """Return the root and the table of one gallery; name: before its ids and names."""
    replaced = Counter[str]()
    try:
        root, images = _list_images(location)
        rows = (
            _row(_with_caption(image, replaced), f"{name}/" if name else "")
            for image in images
        )
        batches = [
            pa.RecordBatch.from_pylist(part, SCHEMA)
            for part in iter(lambda: [*islice(rows, _TABLE_ROWS)], [])
        ]
    except DcarError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_url(location):
            raise
        reason = str(error) or type(error).__name__
        raise DataError(f"the gallery {location} cannot be read: {reason}") from error
    if not batches:
        suffixes = ", ".join(sorted(formats.IMAGE_SUFFIXES))
        raise DataError(
            f"the gallery {location} is empty: no file or tar member with one of the"
            f" suffixes {suffixes}"
        )
    for column, count in replaced.items():
        logger.info(
            "%s images of %s have no caption; their %s is taken as one",
            f"{count:,}",
            location,
            column,
        )
    return root, pa.Table.from_batches(batches, SCHEMA)


def _absolute(location: str) -> str:
    local = location.removeprefix("file://")
    return location if is_url(local) else os.path.abspath(local)  # noqa: PTH100  keeps the names of symbolic links


def _list_images(location: str) -> tuple[str, Iterable[GalleryImage]]:
    """Return the root of a gallery and its images, with a warning of files that may be
    missed.
    """
    suffix = file_suffix(location)
    remote = is_url(location)
    skipped = Counter[str]()
    if not remote and not Path(location).exists():
        raise DataError(f"the gallery {location} does not exist")
    is_file = remote or Path(location).is_file()
    root = parent_folder(location)
    if is_file and suffix in RECORD_SUFFIXES:
        return root, _list_rows(location)
    if is_file and suffix == ".tar":
        name = PurePosixPath(location).name
        images = _tar_images(
            root,
            GalleryImage(name, name, WHOLE_FILE, *file_state(location)),
            None,
            skipped,
        )
    elif remote or Path(location).is_dir():
        root = location
        images = _folder_images(location, skipped)
    else:
        kinds = ", ".join(sorted(RECORD_SUFFIXES))
        raise DataError(
            f"{location} is not a gallery; give a folder, an uncompressed .tar or a"
            f" list ({kinds})"
        )
    if skipped:
        kinds = ", ".join(
            f"{count} {suffix}" for suffix, count in sorted(skipped.items())
        )
        logger.warning("not read: %s; give JPEG or PNG and plain tars", kinds)
    return root, sorted(images, key=lambda image: image.name)


def _with_caption(image: GalleryImage, replaced: Counter[str]) -> GalleryImage:
    """Give an image whose fields lack a caption its title or name as one, and count
    it.
    """
    if "caption" in image.fields or "captions" in image.fields:
        return image
    column = next((name for name in _CAPTION_COLUMNS if image.fields.get(name)), "")
    if not column:
        return image
    replaced[column] += 1
    return image._replace(fields=image.fields | {"caption": image.fields[column]})


def _row(image: GalleryImage, prefix: str) -> dict[str, Any]:
    name = prefix + image.name
    try:
        digest = hashlib.sha256(name.encode()).hexdigest()
        stated_id, caption, category, metadata = split_fields(image.fields, image.name)
    except UnicodeEncodeError:
        raise DataError(
            f"the name {image.name!r} is not UTF-8; rename the file"
        ) from None
    if (size := len(canonical_json(metadata))) > MAX_METADATA_BYTES:
        limit = MAX_METADATA_BYTES // 2**10
        raise DataError(
            f"the metadata of {image.name} take {size / 2**10:.0f} KiB as JSON, at most"
            f" {limit}"
        )
    if (size := max(len(caption), len(category))) > MAX_CAPTION_CHARS:
        raise DataError(
            f"caption or category of {image.name} has {size:,} characters, at most"
            f" {MAX_CAPTION_CHARS:,}"
        )
    return image._asdict() | {
        "id": prefix + stated_id if stated_id else digest[:_ID_DIGITS],
        "caption": caption,
        "category": category,
        "metadata": canonical_json({"file_name": name} | metadata).decode(),
        "name": name,
    }


def _require_unique_ids(table: pa.Table) -> None:
    # Arrow counts at most 2 GiB of the other type
    ids = table["id"].cast(pa.large_string())
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    names = table.filter(pc.equal(ids, repeated[0]))["name"].to_pylist()
    raise DataError(
        f"{len(repeated):,} ids are used more than once, such as"
        f" {repeated[0].as_py()!r} by {names[0]} and {names[1]}; list an image once,"
        " with a list `captions`, and give each its own id"
    )


def _require_addressable_ids(table: pa.Table) -> None:
    ids = table["id"]
    is_bad = pc.match_substring_regex(
        ids, r"[\x00-\x1f\x7f]|^\.{1,2}$|/(image|similar)$"
    )
    if len(
        bad := ids.filter(
            pc.or_(is_bad, pc.greater(pc.utf8_length(ids), _MAX_ID_LENGTH))
        )
    ):
        raise DataError(
            f"the id {bad[0].as_py()[:80]!r} cannot be part of a URL: it is longer than"
            f" {_MAX_ID_LENGTH} characters, has a control character, is . or .., or"
            " ends in /image or /similar; give another"
        )


def _signature(table: pa.Table, columns: list[str], root: str = "") -> str:
    digest = hashlib.sha256(root.encode())
    for batch in table.select(columns).to_batches():
        digest.update(canonical_json(batch.to_pydict()))
    return digest.hexdigest()


def _folder_images(root: str, skipped: Counter[str]) -> list[GalleryImage]:
    """Return the images of a folder, and of the tars in it."""
    # tars included
    files = list(
        _remote_files(root, skipped) if is_url(root) else _local_files(root, skipped)
    )
    metadata = GalleryMetadata.of_folder(root, [file.name for file in files])
    images: list[GalleryImage] = []
    for file in files:
        if file_suffix(file.name) == ".tar":
            images += _tar_images(root, file, metadata, skipped)
        elif has_image_suffix(file.name):
            folders, _, name = file.name.rpartition("/")
            of_path = {
                "caption": "",
                "category": folders,
                "title": name.rpartition(".")[0].replace("_", " ").strip(),
            }
            fields = (metadata.find(file.name) if metadata else {}) or of_path
            images.append(file._replace(fields=fields))
    if metadata and images:
        metadata.report_unused()
    return images


def _list_rows(listing: str) -> Iterator[GalleryImage]:
    """Yield the images of a list, in its order."""
    root = parent_folder(listing)
    line = 0
    protocols = set[str]()
    for line, name, fields in _read_list(listing):
        location = _row_location(listing, line, name)
        size = version = 0
        path = join_location(root, location)
        if not is_url(path):
            # Lists of other systems may use another Unicode form of the file's name.
            forms = (
                form
                for form in unicode_forms(location)
                if os.path.exists(join_location(root, form))  # noqa: PTH110
            )
            location = location if location.isascii() else next(forms, location)
            # reported with the images that cannot be read
            with suppress(OSError, ValueError):
                size, version = file_state(join_location(root, location))
        elif (protocol := path.partition(":")[0]) not in protocols:
            file_system(path)  # an unknown protocol is an error now, not after hours
            protocols.add(protocol)
        yield GalleryImage(location, location, WHOLE_FILE, size, version, fields)
    if not line:
        raise DataError(f"the list {listing} has no rows")


def _read_list(listing: str) -> Iterator[tuple[int, str, Record]]:
    """Yield the line, the name and the fields of each image of a list."""
    root = parent_folder(listing)
    column = ""
    for line, record in read_gallery_records(listing):
        column = column or next((name for name in _PATH_COLUMNS if name in record), "")
        if not column:
            columns = ", ".join(record) or "none"
            raise DataError(
                f"{listing} has no column {' or '.join(_PATH_COLUMNS)} with image"
                f" paths; it has {columns}"
            )
        value = record.get(column)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{listing}, row {line}: {column} is empty or not a path or URL; write"
                " images to files"
            )
        if "|" in value and not os.path.exists(join_location(root, value)):  # noqa: PTH110
            yield from (
                (line, name, fields) for name, fields in images_of_row(value, record)
            )
        else:
            yield line, value, record | {"file_name": value}


def _local_files(root: str, skipped: Counter[str]) -> Iterator[GalleryImage]:
    def fail(error: OSError) -> None:
        raise error

    for directory, folders, names in os.walk(root, onerror=fail):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        relative_folder = os.path.relpath(directory, root).replace(os.sep, "/")
        for name in names:
            relative = name if relative_folder == "." else f"{relative_folder}/{name}"
            if not _is_read(relative, skipped):
                continue
            state = 0, 0
            # as of a broken link, which is reported with the images that cannot be read
            with suppress(OSError):
                state = file_state(f"{directory}/{name}")
            yield GalleryImage(relative, relative, WHOLE_FILE, *state)


def _remote_files(root: str, skipped: Counter[str]) -> Iterator[GalleryImage]:
    fs, path = file_system(root)
    base = path.rstrip("/")
    files: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    if not files and not fs.exists(path):
        raise DataError(
            f"the gallery {root} does not exist, or its store cannot be reached"
        )
    for full, info in files.items():
        relative = full.removeprefix(base).lstrip("/")
        is_hidden = any(part.startswith(".") for part in relative.split("/"))
        if not is_hidden and _is_read(relative, skipped):
            yield GalleryImage(
                relative,
                relative,
                WHOLE_FILE,
                int(info.get("size") or 0),
                remote_version(info),
            )


def _is_read(name: str, skipped: Counter[str]) -> bool:
    """Return whether a file belongs to a gallery; count those that may be missed."""
    if name.rpartition("/")[2].startswith("."):
        return False
    suffix = file_suffix(name)
    skipped.update({suffix} & (_NOT_READ - formats.IMAGE_SUFFIXES))
    return name in METADATA_FILES or suffix == ".tar" or has_image_suffix(name)


def _tar_images(
    root: str,
    file: GalleryImage,
    metadata: GalleryMetadata | None,
    skipped: Counter[str],
) -> list[GalleryImage]:
    """Return the images of a tar, with the members of the same stem (.json, .txt, .cls)
    as their metadata.
    """
    location = join_location(root, file.name)
    with open_location(location) as tar:
        members = index_tar(location, tar)
        sidecars = read_sidecars(location, tar, members)
    images = []
    for member, span in members.items():
        if not _is_read(member, skipped) or not has_image_suffix(member):
            continue
        path = PurePosixPath(member)
        name = f"{file.name}/{member}"
        from_folder = metadata.find(name, member, path.name) if metadata else {}
        # webdataset's key
        sample = (path.parent / path.name.split(".", 1)[0]).as_posix()
        fields = {**sidecars.get(sample, {}), **from_folder}
        images.append(
            GalleryImage(name, file.name, span.offset, span.size, file.mtime_ns, fields)
        )
    return images


def _row_location(listing: str, line: int, value: str) -> str:
    """Return the location of a row: a URL, absolute, or relative to the list's folder
    and inside it.
    """
    if is_url(value) or os.path.isabs(value):  # noqa: PTH117
        return value
    location = os.path.normpath(value.replace("\\", "/")).replace(os.sep, "/")
    if location == ".." or location.startswith("../"):
        raise DataError(
            f"{listing}, row {line}: {value} is outside of the list's folder; give an"
            " absolute path"
        )
    return location
