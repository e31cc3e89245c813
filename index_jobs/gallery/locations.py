"""Reading of a gallery's bytes: files of this machine, or the stores that an extra
reads through fsspec.

- A location is a string: a URL if it names a protocol, otherwise a path. The other
  modules treat both alike.
- The images of a window are requested together, so that a network's latency is paid
  once per window, and again if a request fails for a reason that may pass.
- fsspec is imported at the first URL, so a decoding worker of a local gallery starts
  quickly.
"""

import errno
import hashlib
import io
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dcar_core.util.errors import DataError, ImageError, ImageFault, MissingExtraError

WHOLE_FILE = -1  # the offset of an image that is a file of its own
_MAX_BYTES = 2**30  # of an image file, which is read whole
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "http": "http",
    "https": "http",
}
REMOTE_SCHEMES = frozenset(_EXTRAS)
LOCAL_SCHEMES = frozenset({"file", "local"})
SCHEMES = LOCAL_SCHEMES | REMOTE_SCHEMES
_PAUSES_S = (0.2, 1.0, 3.0)
# not worth a retry
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)


@dataclass(frozen=True)
class ImageLocation:
    """The gallery row of an image, the location of its bytes, and a number that changes
    when they do.

    name: the URL of the image, or its name in a gallery on this machine, which can then
    be moved.
    """

    row: int
    location: str
    offset: int
    size: int
    version: int = 0
    name: str = ""

    @property
    def location_hash(self) -> int:
        """64 bits that the same image of another gallery has as well."""
        value = f"{self.name}\0{self.offset}\0{self.size}\0{self.version}"
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest())


def is_url(location: str) -> bool:
    """Return whether fsspec reads a location."""
    return _URL.match(location) is not None


def join_location(root: str, location: str) -> str:
    """Return a location below a root as a path or URL; an absolute path or a URL stands
    for itself.
    """
    if is_url(location) or not is_url(root):
        return location if is_url(location) else os.path.join(root, location)  # noqa: PTH118  called a million times
    return f"{root if root.endswith('://') else root.rstrip('/') + '/'}{location}"


def parent_folder(location: str) -> str:
    if is_url(location):
        return location.rpartition("/")[0] + "/"
    return str(Path(location).parent)


def file_suffix(location: str) -> str:
    """Return the suffix of a file in lower case."""
    path = location.partition("?")[0] if is_url(location) else location
    return os.path.splitext(path)[1].lower()  # noqa: PTH122


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL in fsspec, and the path in it.

    Raise DataError for other schemes and for chains of several: fsspec would read
    archives in it or ask other hosts.
    """
    import fsspec

    scheme = url.partition(":")[0]
    if scheme not in SCHEMES or "::" in url:
        raise DataError(
            f"{url} cannot be read: the schemes of galleries are"
            f" {', '.join(sorted(SCHEMES))}"
        )
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(f"reading {scheme}:// URLs", _EXTRAS[scheme]) from error
    except ValueError as error:
        raise DataError(f"{url} cannot be read: {error}") from error
    return fs, path


def open_location(location: str) -> BinaryIO:
    """Open a file for reading at any position."""
    if not is_url(location):
        return _open_file(location)
    fs, path = file_system(location)
    file: BinaryIO = fs.open(path, "rb")
    return file


def file_state(location: str) -> tuple[int, int]:
    """Return the size of a file in bytes, and a number that changes when it does; see
    `remote_version`.
    """
    if not is_url(location):
        status = os.stat(location)  # noqa: PTH116  called for millions
        return status.st_size, status.st_mtime_ns
    fs, path = file_system(location)
    info = fs.info(path)
    return int(info.get("size") or 0), remote_version(info)


def _open_file(path: str) -> BinaryIO:
    """Open a regular file: a pipe would block, and a device may have no end."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113  called a million times
            raise OSError(errno.EINVAL, "neither a file nor a link to one", path)
        return open(path, "rb")  # noqa: PTH123
    except ValueError as error:
        # NUL, or a character that the file system's encoding lacks
        raise OSError(f"not a path: {error}") from None


def remote_version(info: Mapping[str, Any]) -> int:
    """Return a number that changes when a remote file does; 0 if its store does not
    say.
    """
    for key in (
        "ETag",
        "etag",
        "md5Hash",
        "LastModified",
        "last_modified",
        "mtime",
        "updated",
        "created",
    ):
        if info.get(key):
            return int.from_bytes(hashlib.sha256(str(info[key]).encode()).digest()[:7])
    return 0


def open_image(
    root: str,
    location: str,
    offset: int,
    size: int,
) -> tuple[BinaryIO, int]:
    """Open an image at its first byte, and return its number of bytes. One at a URL is
    fetched whole, without retries.

    Args:
        location: a file, or the tar that holds the image, below the root, absolute or a
            URL.
        offset, size: the span in the tar, in bytes; offset is WHOLE_FILE for a file of
            its own.

    Raises:
        OSError: the file cannot be read, or the tar ends before the span does.
    """
    (span,) = spans = [ImageLocation(0, location, offset, size)]
    if not is_url(path := join_location(root, location)):
        return _open_span(path, span)
    (data,) = read_images(root, spans, pauses=())
    if isinstance(data, bytes):
        return io.BytesIO(data), len(data)
    raise (
        data if isinstance(data, OSError) else OSError(str(data) or type(data).__name__)
    ) from data


def read_images(
    root: str,
    locations: Sequence[ImageLocation],
    pauses: Sequence[float] = _PAUSES_S,
) -> list[bytes | Exception]:
    """Return the bytes of images, or their errors: an ImageError for a file of more
    than a gibibyte.

    Args:
        pauses: seconds before each retry of a URL.
    """
    results: dict[int, bytes | Exception] = {}
    remote: dict[int, str] = {}
    for i, location in enumerate(locations):
        # as a path, so that a device is refused
        path = join_location(root, location.location).removeprefix("file://")
        if is_url(path) and location.size <= _MAX_BYTES:
            remote[i] = path
        else:
            results[i] = _read_file(path, location)
    for pause in (0.0, *pauses):
        if not remote:
            break
        time.sleep(pause)
        results |= _fetch(remote, locations)
        remote = {
            i: url for i, url in remote.items() if isinstance(results[i], Exception)
        }
        remote = {
            i: url
            for i, url in remote.items()
            if not isinstance(results[i], _PERMANENT)
        }
    return [results[i] for i in range(len(locations))]


def _read_file(path: str, location: ImageLocation) -> bytes | Exception:
    too_large = ImageError(
        f"a file of more than {_MAX_BYTES >> 30} GiB", ImageFault.TOO_LARGE
    )
    if location.size > _MAX_BYTES:
        return too_large
    try:
        file, size = _open_span(path, location)
        with file:
            return file.read(size) if size <= _MAX_BYTES else too_large
    except OSError as error:
        return error


def _open_span(path: str, location: ImageLocation) -> tuple[BinaryIO, int]:
    file = _open_file(path)
    size = os.fstat(file.fileno()).st_size
    if location.offset == WHOLE_FILE:
        return file, size
    if size < location.offset + location.size:
        file.close()
        raise OSError(f"{path} ends inside this image")
    file.seek(location.offset)
    return file, location.size


def _fetch(
    urls: Mapping[int, str], locations: Sequence[ImageLocation]
) -> dict[int, bytes | Exception]:
    """Fetch URLs, all spans of one file system at once."""
    results: dict[int, bytes | Exception] = {}
    groups: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
    for i, url in urls.items():
        try:
            fs, path = file_system(url)
        except Exception as error:
            results[i] = error
        else:
            groups.setdefault(id(fs), (fs, []))[1].append((i, path))
    for fs, members in groups.values():
        spans = [locations[i] for i, _ in members]
        starts = [None if span.offset == WHOLE_FILE else span.offset for span in spans]
        ends = [
            None if span.offset == WHOLE_FILE else span.offset + span.size
            for span in spans
        ]
        try:
            data = fs.cat_ranges(
                [path for _, path in members],
                starts,
                ends,
                on_error="return",
            )
        except Exception as error:  # each store raises errors of its own
            data = [error] * len(members)
        for (i, path), span, value in zip(members, spans, data, strict=True):
            results[i] = (
                value if isinstance(value, Exception) else cut_span(value, span, path)
            )
    return results


def cut_span(data: bytes, span: ImageLocation, path: str) -> bytes | Exception:
    if span.offset == WHOLE_FILE or len(data) == span.size:
        return bytes(data)
    # a server without ranges sends the whole file
    if len(data) >= span.offset + span.size:
        return bytes(data[span.offset : span.offset + span.size])
    return ValueError(f"{path} ends inside this image")
