"""The pictures of a folder, a tar or a list: their names, where their bytes lie, and what is said about them.

- A folder is searched recursively, hidden files left out, and sorted by name; a list keeps its own order.
- Nothing is unpacked: a tar's member is the tar's name, an offset and a size.
- A row of a list is not looked up at its store, which would take as long as reading it: a URL stands for its content.
"""

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dcar_core.data.image_lookup import unicode_forms
from dcar_core.images import IMAGE_SUFFIXES, index_tar
from dcar_core.util.errors import DataError
from index_jobs.gallery.metadata import BESIDE, Metadata, read_sidecars
from index_jobs.gallery.records import PATH_COLUMNS, Fields, read_records
from index_jobs.gallery.storage import (
    WHOLE_FILE,
    file_suffix,
    file_system,
    is_url,
    join_location,
    open_location,
    parent_folder,
    remote_version,
)

logger = logging.getLogger(__name__)

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """`version` changes when the file does: its time of change in ns, or a hash of what its store says; 0 unknown."""

    name: str
    location: str
    offset: int
    size: int
    version: int
    fields: Fields = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _File:
    name: str  # relative, with forward slashes
    size: int
    version: int


def list_folder(root: str) -> Iterator[GalleryImage]:
    """Every picture below a folder, and in the tars below it, by name."""
    files = list(_remote_files(root) if is_url(root) else _local_files(root))
    metadata = Metadata.beside(root, (file.name for file in files))
    if metadata is None and not is_url(root):
        metadata = Metadata.annotated(root)
    pictures: list[GalleryImage] = []
    for file in files:
        suffix = file_suffix(file.name)
        if suffix == ".tar":
            pictures += _members(root, file, metadata)
        elif suffix in IMAGE_SUFFIXES:
            fields = metadata.of(file.name) if metadata else {}
            pictures.append(GalleryImage(file.name, file.name, WHOLE_FILE, file.size, file.version, fields))
    if metadata and pictures:
        metadata.report()
    return _sorted(pictures)


def list_tar(place: str) -> Iterator[GalleryImage]:
    """The pictures of one tar, by name."""
    root = parent_folder(place)
    if is_url(place):
        fs, path = file_system(place)
        info = fs.info(path)
        size, version = int(info.get("size") or 0), remote_version(info)
    else:
        stat = Path(place).stat()
        size, version = stat.st_size, stat.st_mtime_ns
    name = place.partition("::")[0].rpartition("/")[2] if is_url(place) else Path(place).name
    return _sorted(_members(root, _File(name, size, version), None))


def list_rows(place: str) -> Iterator[GalleryImage]:
    """The pictures of a list, in its order.

    Raises:
        DataError: there is no column of pictures, no row, or one that names no picture; names the row.
    """
    root, column, line, protocols = parent_folder(place), "", 0, set[str]()
    for line, record in read_records(place):
        column = column or next((c for c in PATH_COLUMNS if c in record), "")
        if not column:
            have = ", ".join(record) or "none"
            raise DataError(
                f"{place} has no column {' or '.join(PATH_COLUMNS)} with the pictures' paths; it has {have}"
            )
        given = record.get(column)
        if isinstance(given, dict | bytes):
            raise DataError(
                f"{place}, row {line}: {column} holds the picture itself; write the pictures to files, or into a "
                f"webdataset tar, and index that"
            )
        if not isinstance(given, str) or not given.strip():
            raise DataError(f"{place}, row {line}: {column} is empty or no text")
        location = _inside(place, line, given)
        size = version = 0
        full = join_location(root, location)
        if not is_url(full):
            location = _as_written(root, location)
            full = join_location(root, location)
            try:
                stat = os.stat(full)  # noqa: PTH116
                size, version = stat.st_size, stat.st_mtime_ns
            except (OSError, ValueError):
                pass  # reported with the pictures that cannot be read
        elif (protocol := full.partition(":")[0]) not in protocols:
            file_system(full)  # a protocol that cannot be read is an error now, not after hours
            protocols.add(protocol)
        yield GalleryImage(location, location, WHOLE_FILE, size, version, record | {"file_name": given})
    if not line:
        raise DataError(f"the list {place} has no rows")


def _local_files(root: str) -> Iterator[_File]:
    def fail(error: OSError) -> None:
        raise error

    linked = list[str]()
    for directory, folders, names in os.walk(root, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".")]
        linked += [path for path in (f"{directory}/{f}" for f in folders) if os.path.islink(path)]  # noqa: PTH114
        below = os.path.relpath(directory, root).replace(os.sep, "/")
        for name in names:
            relative = name if below == "." else f"{below}/{name}"
            if not _wanted(root, relative):
                continue
            try:
                stat = os.stat(os.path.join(directory, name))  # noqa: PTH116, PTH118  a Path for each of millions is slow
                yield _File(relative, stat.st_size, stat.st_mtime_ns)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                yield _File(relative, 0, 0)  # a link to nothing is a picture that cannot be read
    if linked:
        logger.warning("%d links to folders are not followed, such as %s", len(linked), linked[0])


def _remote_files(root: str) -> Iterator[_File]:
    fs, path = file_system(root)
    base = path.rstrip("/")
    found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    if not found and not fs.exists(path):
        raise DataError(f"the gallery {root} does not exist, or its store cannot be reached")
    for full, info in found.items():
        relative = full.removeprefix(base).lstrip("/")
        if not any(part.startswith(".") for part in relative.split("/")) and _wanted(root, relative):
            yield _File(relative, int(info.get("size") or 0), remote_version(info))


def _wanted(root: str, name: str) -> bool:
    if name.lower().endswith(_COMPRESSED):
        raise DataError(f"{join_location(root, name)} is a compressed tar; decompress it first")
    hidden = name.rpartition("/")[2].startswith(".")
    return not hidden and (name in BESIDE or file_suffix(name) in IMAGE_SUFFIXES or file_suffix(name) == ".tar")


def _members(root: str, file: _File, metadata: Metadata | None) -> list[GalleryImage]:
    """The pictures of a tar, with the members of the same stem (.json, .txt, .cls) as their metadata."""
    place = join_location(root, file.name)
    with open_location(place) as opened:
        members = index_tar(place, opened)
        beside = read_sidecars(place, opened, members)
    pictures = []
    for member, span in members.items():
        inner = PurePosixPath(member)
        if inner.suffix.lower() not in IMAGE_SUFFIXES or inner.name.startswith("."):
            continue
        full = f"{file.name}/{member}"
        joined = metadata.of(full, member, inner.name) if metadata else {}
        fields = {**beside.get(_stem(inner), {}), **joined}
        pictures.append(GalleryImage(full, file.name, span.offset, span.size, file.version, fields))
    return pictures


def _stem(member: PurePosixPath) -> str:
    """webdataset's key: everything before the first dot of the last part."""
    return (member.parent / member.name.split(".", 1)[0]).as_posix()


def _inside(place: str, line: int, given: str) -> str:
    """The path of one row: a URL, absolute, or relative to the list's folder and inside it."""
    if is_url(given) or os.path.isabs(given):  # noqa: PTH117
        return given
    location = os.path.normpath(given.replace("\\", "/")).replace(os.sep, "/")
    if location == ".." or location.startswith("../"):
        raise DataError(f"{place}, row {line}: {given} leads out of the list's folder; give an absolute path instead")
    return location


def _as_written(root: str, location: str) -> str:
    """The path in the Unicode form that the file's name has: lists and archives of other systems differ in it."""
    if location.isascii():
        return location
    there = (form for form in unicode_forms(location) if os.path.exists(join_location(root, form)))  # noqa: PTH110
    return next(there, location)


def _sorted(pictures: Iterable[GalleryImage]) -> Iterator[GalleryImage]:
    return iter(sorted(pictures, key=lambda picture: picture.name))
