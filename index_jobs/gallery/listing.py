"""Listing of a gallery: the images of a folder, a tar or a list, with their locations and metadata.

- A folder is searched recursively, without hidden files, and sorted by name; a list keeps its own order.
- Nothing is unpacked: a tar member is the tar's name, an offset and a size.
- Rows of a list are not looked up at their store, which would take as long as reading them: a URL stands for its
  content.
- Files of image kinds that are not read are counted and reported, never skipped in silence.
"""

import errno
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from dcar_core.data.image_lookup import unicode_forms
from dcar_core.data.records import IMAGE_COLUMNS, Record
from dcar_core.images import has_image_suffix, index_tar
from dcar_core.images.formats import HEIC_SUFFIXES
from dcar_core.util.errors import DataError
from index_jobs.gallery.metadata import METADATA_FILES, GalleryMetadata, read_gallery_records, read_sidecars
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

PATH_COLUMNS = (*IMAGE_COLUMNS, "url")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SKIPPED_KINDS = {
    **dict.fromkeys(HEIC_SUFFIXES, "HEIC"),
    **dict.fromkeys((".svg", ".svgz"), "SVG"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef"), "RAW"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".wmv", ".3gp"), "video"),
    **dict.fromkeys((".psd", ".jp2", ".jxl", ".ico"), "other image"),
}
_HINTS = {
    "HEIC": "pip install 'dcar[heic]'",
    "SVG": "convert them to PNG",
    "RAW": "convert them to JPEG",
    "video": "extract frames as images",
    "other image": "convert them to JPEG or PNG",
}


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """An image of a gallery.

    version: changes when the file does: its time of change in ns, or a hash of its store's information; 0 if unknown.
    """

    name: str
    location: str
    offset: int
    size: int
    version: int
    fields: Record = field(default_factory=dict)


def list_folder(root: str) -> Iterator[GalleryImage]:
    """Return the images of a folder, and of the tars in it, sorted by name."""
    skipped = Counter[str]()
    files = list(_remote_files(root, skipped) if is_url(root) else _local_files(root, skipped))  # tars included
    metadata = GalleryMetadata.of_folder(root, (file.name for file in files))
    if metadata is None and not is_url(root):
        metadata = GalleryMetadata.from_annotations(root)
    images: list[GalleryImage] = []
    for file in files:
        if file_suffix(file.name) == ".tar":
            images += _tar_images(root, file, metadata, skipped)
        elif has_image_suffix(file.name):
            found = metadata.find(file.name) if metadata else {}
            images.append(replace(file, fields=found) if found else _with_fields_of_name(file))
    if metadata and images:
        metadata.report_unused()
    _report_skipped(skipped)
    return _sorted_by_name(images)


def _report_skipped(skipped: Counter[str]) -> None:
    for kind, count in skipped.most_common():
        noun, verb = ("file", "is") if count == 1 else ("files", "are")
        logger.warning("%d %s %s %s skipped: %s", count, kind, noun, verb, _HINTS[kind])


def _with_fields_of_name(image: GalleryImage) -> GalleryImage:
    """Describe an image without metadata by its path: the folders are its category, the file name is its title."""
    folders, _, name = image.name.rpartition("/")
    return replace(image, fields={"category": folders, "title": name.rpartition(".")[0].replace("_", " ").strip()})


def list_tar(location: str) -> Iterator[GalleryImage]:
    """Return the images of one tar, sorted by name."""
    root = parent_folder(location)
    if is_url(location):
        fs, path = file_system(location)
        info = fs.info(path)
        size, version = int(info.get("size") or 0), remote_version(info)
    else:
        stat = Path(location).stat()
        size, version = stat.st_size, stat.st_mtime_ns
    name = location.rpartition("/")[2] if is_url(location) else Path(location).name
    skipped = Counter[str]()
    images = _tar_images(root, GalleryImage(name, name, WHOLE_FILE, size, version), None, skipped)
    _report_skipped(skipped)
    return _sorted_by_name(images)


def list_rows(listing: str) -> Iterator[GalleryImage]:
    """Yield the images of a list, in its order."""
    root, column, line, protocols = parent_folder(listing), "", 0, set[str]()
    for line, record in read_gallery_records(listing):
        column = column or next((name for name in PATH_COLUMNS if name in record), "")
        if not column:
            columns = ", ".join(record) or "none"
            raise DataError(
                f"{listing} has no column {' or '.join(PATH_COLUMNS)} with the images' paths; it has {columns}"
            )
        value = record.get(column)
        if isinstance(value, dict | bytes):
            raise DataError(
                f"{listing}, row {line}: {column} holds the image itself; write the images to files or into a "
                f"webdataset tar, and index that"
            )
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{listing}, row {line}: {column} is empty or not text")
        location = _row_location(listing, line, value)
        size = version = 0
        path = join_location(root, location)
        if not is_url(path):
            location = _existing_form(root, location)
            try:
                stat = os.stat(join_location(root, location))  # noqa: PTH116
                size, version = stat.st_size, stat.st_mtime_ns
            except (OSError, ValueError):
                pass  # reported with the images that cannot be read
        elif (protocol := path.partition(":")[0]) not in protocols:
            file_system(path)  # an unknown protocol is an error now, not after hours
            protocols.add(protocol)
        yield GalleryImage(location, location, WHOLE_FILE, size, version, record | {"file_name": value})
    if not line:
        raise DataError(f"the list {listing} has no rows")


def _local_files(root: str, skipped: Counter[str]) -> Iterator[GalleryImage]:
    def fail(error: OSError) -> None:
        raise error

    linked_folders = list[str]()
    for directory, folders, names in os.walk(root, onerror=fail):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        paths = (f"{directory}/{folder}" for folder in folders)
        linked_folders += [path for path in paths if os.path.islink(path)]  # noqa: PTH114
        relative_folder = os.path.relpath(directory, root).replace(os.sep, "/")
        for name in names:
            relative = name if relative_folder == "." else f"{relative_folder}/{name}"
            if not _is_read(root, relative, skipped):
                continue
            try:
                stat = os.stat(os.path.join(directory, name))  # noqa: PTH116, PTH118  called for millions
                yield GalleryImage(relative, relative, WHOLE_FILE, stat.st_size, stat.st_mtime_ns)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                yield GalleryImage(relative, relative, WHOLE_FILE, 0, 0)  # a broken link counts as an unreadable image
    if linked_folders:
        logger.warning("%d links to folders are not followed, such as %s", len(linked_folders), linked_folders[0])


def _remote_files(root: str, skipped: Counter[str]) -> Iterator[GalleryImage]:
    fs, path = file_system(root)
    base = path.rstrip("/")
    files: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    if not files and not fs.exists(path):
        raise DataError(f"the gallery {root} does not exist, or its store cannot be reached")
    for full, info in files.items():
        relative = full.removeprefix(base).lstrip("/")
        is_hidden = any(part.startswith(".") for part in relative.split("/"))
        if not is_hidden and _is_read(root, relative, skipped):
            yield GalleryImage(relative, relative, WHOLE_FILE, int(info.get("size") or 0), remote_version(info))


def _is_read(root: str, name: str, skipped: Counter[str]) -> bool:
    """Return whether a file belongs to the gallery; see `_is_image`."""
    if name.lower().endswith(_COMPRESSED_TARS):
        raise DataError(f"{join_location(root, name)} is a compressed tar; decompress it first")
    if name.rpartition("/")[2].startswith("."):
        return False
    return name in METADATA_FILES or file_suffix(name) == ".tar" or _is_image(name, skipped)


def _is_image(name: str, skipped: Counter[str]) -> bool:
    """Return whether a file is an image; count files of image kinds that are not read."""
    if has_image_suffix(name):
        return True
    if kind := _SKIPPED_KINDS.get(file_suffix(name)):
        skipped[kind] += 1
    return False


def _tar_images(
    root: str, file: GalleryImage, metadata: GalleryMetadata | None, skipped: Counter[str]
) -> list[GalleryImage]:
    """Return the images of a tar, with the members of the same stem (.json, .txt, .cls) as their metadata."""
    location = join_location(root, file.name)
    with open_location(location) as tar:
        members = index_tar(location, tar)
        sidecars = read_sidecars(location, tar, members)
    images = []
    for member, span in members.items():
        path = PurePosixPath(member)
        if path.name.startswith(".") or not _is_image(member, skipped):
            continue
        name = f"{file.name}/{member}"
        from_folder = metadata.find(name, member, path.name) if metadata else {}
        fields = {**sidecars.get(_sample_key(path), {}), **from_folder}
        images.append(GalleryImage(name, file.name, span.offset, span.size, file.version, fields))
    return images


def _sample_key(member: PurePosixPath) -> str:
    """Return webdataset's key: everything before the first dot of the last part."""
    return (member.parent / member.name.split(".", 1)[0]).as_posix()


def _row_location(listing: str, line: int, value: str) -> str:
    """Return the location of a row: a URL, absolute, or relative to the list's folder and inside it."""
    if is_url(value) or os.path.isabs(value):  # noqa: PTH117
        return value
    location = os.path.normpath(value.replace("\\", "/")).replace(os.sep, "/")
    if location == ".." or location.startswith("../"):
        raise DataError(
            f"{listing}, row {line}: {value} is outside of the list's folder; give an absolute path instead"
        )
    return location


def _existing_form(root: str, location: str) -> str:
    """Return the location in the Unicode form of the file's name: lists of other systems may use another one."""
    if location.isascii():
        return location
    forms = (form for form in unicode_forms(location) if os.path.exists(join_location(root, form)))  # noqa: PTH110
    return next(forms, location)


def _sorted_by_name(images: Iterable[GalleryImage]) -> Iterator[GalleryImage]:
    return iter(sorted(images, key=lambda image: image.name))
