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
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from dcar_core.data.image_lookup import unicode_forms
from dcar_core.data.records import IMAGE_COLUMNS, Record
from dcar_core.images import has_image_suffix, index_tar
from dcar_core.images.formats import HEIC_SUFFIXES
from dcar_core.util.errors import DataError
from index_jobs.gallery.metadata import METADATA_FILES, GalleryMetadata, read_gallery_records, read_sidecars
from index_jobs.gallery.storage import (
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

logger = logging.getLogger(__name__)

PATH_COLUMNS = (*IMAGE_COLUMNS, "url")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SKIPPED_KINDS = {  # by their suffixes, with what helps
    "HEIC": (HEIC_SUFFIXES, "pip install 'dcar[heic]'"),
    "SVG": ({".svg", ".svgz"}, "convert them to PNG"),
    "RAW": ({".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef"}, "convert them to JPEG"),
    "video": ({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".wmv", ".3gp"}, "extract frames as images"),
    "other image": ({".psd", ".jp2", ".jxl", ".ico"}, "convert them to JPEG or PNG"),
}


class GalleryImage(NamedTuple):
    """An image of a gallery, with columns of its table.

    mtime_ns: changes when the file does: its time of change, or a hash of its store's information; 0 if unknown.
    """

    name: str
    location: str
    offset: int
    size: int
    mtime_ns: int
    fields: Record = {}  # noqa: RUF012  never changed


def list_folder(root: str) -> Iterator[GalleryImage]:
    """Return the images of a folder, and of the tars in it, sorted by name."""
    skipped = Counter[str]()
    files = list(_remote_files(root, skipped) if is_url(root) else _local_files(root, skipped))  # tars included
    metadata = GalleryMetadata.of_folder(root, [file.name for file in files])
    images: list[GalleryImage] = []
    for file in files:
        if file_suffix(file.name) == ".tar":
            images += _tar_images(root, file, metadata, skipped)
        elif has_image_suffix(file.name):
            folders, _, name = file.name.rpartition("/")
            of_path = {"category": folders, "title": name.rpartition(".")[0].replace("_", " ").strip()}
            fields = (metadata.find(file.name) if metadata else {}) or of_path
            images.append(file._replace(fields=fields))
    if metadata and images:
        metadata.report_unused()
    return _sorted_by_name(images, skipped)


def list_tar(location: str) -> Iterator[GalleryImage]:
    """Return the images of one tar, sorted by name."""
    name, skipped = PurePosixPath(location).name, Counter[str]()
    tar = GalleryImage(name, name, WHOLE_FILE, *file_state(location))
    return _sorted_by_name(_tar_images(parent_folder(location), tar, None, skipped), skipped)


def _sorted_by_name(images: Iterable[GalleryImage], skipped: Counter[str]) -> Iterator[GalleryImage]:
    """Report the files that were skipped, and return the images."""
    for kind, count in skipped.most_common():
        noun, verb = ("file", "is") if count == 1 else ("files", "are")
        logger.warning("%d %s %s %s skipped: %s", count, kind, noun, verb, _SKIPPED_KINDS[kind][1])
    return iter(sorted(images, key=lambda image: image.name))


def list_rows(listing: str) -> Iterator[GalleryImage]:
    """Yield the images of a list, in its order."""
    root, column, line, protocols = parent_folder(listing), "", 0, set[str]()
    for line, record in read_gallery_records(listing):
        column = column or next((name for name in PATH_COLUMNS if name in record), "")
        if not column:
            columns = ", ".join(record) or "none"
            raise DataError(f"{listing} has no column {' or '.join(PATH_COLUMNS)} with image paths; it has {columns}")
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
            # Lists of other systems may use another Unicode form of the file's name.
            forms = (form for form in unicode_forms(location) if os.path.exists(join_location(root, form)))  # noqa: PTH110
            location = location if location.isascii() else next(forms, location)
            with suppress(OSError, ValueError):  # reported with the images that cannot be read
                size, version = file_state(join_location(root, location))
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
                state = file_state(f"{directory}/{name}")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                state = 0, 0  # a broken link counts as an unreadable image
            yield GalleryImage(relative, relative, WHOLE_FILE, *state)
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
    suffix = file_suffix(name)
    skipped.update(kind for kind, (suffixes, _) in _SKIPPED_KINDS.items() if suffix in suffixes)
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
        sample = (path.parent / path.name.split(".", 1)[0]).as_posix()  # webdataset's key
        fields = {**sidecars.get(sample, {}), **from_folder}
        images.append(GalleryImage(name, file.name, span.offset, span.size, file.mtime_ns, fields))
    return images


def _row_location(listing: str, line: int, value: str) -> str:
    """Return the location of a row: a URL, absolute, or relative to the list's folder and inside it."""
    if is_url(value) or os.path.isabs(value):  # noqa: PTH117
        return value
    location = os.path.normpath(value.replace("\\", "/")).replace(os.sep, "/")
    if location == ".." or location.startswith("../"):
        raise DataError(f"{listing}, row {line}: {value} is outside of the list's folder; give an absolute path")
    return location
