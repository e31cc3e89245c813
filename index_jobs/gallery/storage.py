"""Where a gallery's bytes lie: files of this machine, or anything that fsspec reaches (s3://, gs://, https://, ..).

- A place is a string: a URL where it names a protocol, else a path. The rest of this room treats both alike.
- The pictures of a window are asked for together, so that a network's delay is paid once a window, not once a picture.
- A network that stumbles is asked again; only what is missing for good becomes a failed picture.
- fsspec is imported at the first URL: a decoding worker of a local gallery starts in a fraction of a second.
"""

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dcar_core.util.errors import DataError, MissingExtraError

WHOLE_FILE = -1  # the offset of a picture that is a file of its own
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_PAUSES_S = (0.2, 1.0, 3.0)
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)  # asking again would not help


@dataclass(frozen=True)
class ImageLocation:
    """One picture: gallery row, where its bytes lie, and a number that changes when they do."""

    row: int
    location: str
    offset: int
    size: int
    version: int = 0

    @property
    def mark(self) -> int:
        """64 bits that stand for all but the row: the same picture of another gallery has them too."""
        value = f"{self.location}\0{self.offset}\0{self.size}\0{self.version}"
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest())


def is_url(place: str) -> bool:
    """Whether a place is fsspec's to read."""
    return _URL.match(place) is not None


def join_location(root: str, location: str) -> str:
    """A location of a gallery as a path or URL: an absolute path or a URL stands for itself."""
    if is_url(location) or not is_url(root):
        return location if is_url(location) else os.path.join(root, location)  # noqa: PTH118  a million times over
    before, path, after = _parts(root)
    return f"{before}{path if path.endswith('://') else path.rstrip('/') + '/'}{location}{after}"


def parent_folder(place: str) -> str:
    """The folder that a file lies in."""
    if not is_url(place):
        return str(Path(place).parent)
    before, path, after = _parts(place)
    return f"{before}{path.rpartition('/')[0] + '/'}{after}"


def file_suffix(place: str) -> str:
    """The file's suffix, in lower case."""
    path = _parts(place)[1].partition("?")[0] if is_url(place) else place
    return os.path.splitext(path)[1].lower()  # noqa: PTH122


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        MissingExtraError: the protocol needs a package that is not installed.
        DataError: there is no such protocol.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition(":")[0]
        if protocol in _EXTRAS:
            raise MissingExtraError(f"reading {protocol}:// URLs", _EXTRAS[protocol]) from error
        raise DataError(f"{url} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{url} cannot be read: {error}") from error
    return fs, path


def open_location(place: str) -> BinaryIO:
    """A file to read from, at any position.

    Raises:
        OSError: it cannot be read.
    """
    if not is_url(place):
        return _open_file(place)
    fs, path = file_system(place)
    file: BinaryIO = fs.open(path, "rb")
    return file


def _open_file(path: str) -> BinaryIO:
    """A pipe would be waited for, and a device may have no end."""

    def regular(path: str, flags: int) -> int:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a directory is refused by what called this
            os.close(descriptor)
            raise OSError(errno.EINVAL, "neither a file nor a link to one", path)
        return descriptor

    return open(path, "rb", opener=regular)


def remote_version(info: Mapping[str, Any]) -> int:
    """A number that changes when a remote file does, as far as its store tells; 0 where it tells nothing."""
    for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created"):
        if info.get(key):
            return int.from_bytes(hashlib.sha256(str(info[key]).encode()).digest()[:7])
    return 0


def read_image(root: str, location: str, offset: int, size: int) -> bytes:
    """The bytes of one picture, asked for once.

    Args:
        root: the gallery's root; an absolute location or a URL stands for itself.
        location: a file, or the tar that the picture lies in.
        offset, size: the span in the tar, in bytes; offset is WHOLE_FILE for a file of its own.

    Raises:
        OSError: the file cannot be read, or the tar ends before the span does.
    """
    (data,) = read_images(root, [ImageLocation(0, location, offset, size)], pauses=())
    if isinstance(data, bytes):
        return data
    raise data if isinstance(data, OSError) else OSError(str(data) or type(data).__name__) from data


def read_images(
    root: str, places: Sequence[ImageLocation], pauses: Sequence[float] = _PAUSES_S
) -> list[bytes | Exception]:
    """The bytes of several pictures, or why there are none. `pauses` in seconds, before a URL is asked for again."""
    found: list[bytes | Exception] = [b""] * len(places)
    remote: dict[int, str] = {}
    for i, place in enumerate(places):
        path = join_location(root, place.location)
        if is_url(path):
            remote[i] = path
            continue
        try:
            found[i] = _read(path, place)
        except OSError as error:
            found[i] = error
        except ValueError as error:  # a NUL in it, or what the file system's encoding lacks
            found[i] = OSError(f"no path: {error}")
    for pause in (0.0, *pauses):
        if not remote:
            break
        time.sleep(pause)
        for i, data in _fetch(remote, places).items():
            found[i] = data
        remote = {i: url for i, url in remote.items() if isinstance(found[i], Exception)}
        remote = {i: url for i, url in remote.items() if not isinstance(found[i], _GONE)}
    return found


def _read(path: str, place: ImageLocation) -> bytes:
    with _open_file(path) as file:
        if place.offset == WHOLE_FILE:
            return file.read()
        file.seek(place.offset)
        data = file.read(place.size)
    if len(data) != place.size:
        raise OSError(f"{path} ends inside this picture")
    return data


def _fetch(urls: Mapping[int, str], places: Sequence[ImageLocation]) -> dict[int, bytes | Exception]:
    """URLs by file system, the spans of each at once."""
    found: dict[int, bytes | Exception] = {}
    groups: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
    for i, url in urls.items():
        try:
            fs, path = file_system(url)
        except Exception as error:
            found[i] = error
        else:
            groups.setdefault(id(fs), (fs, []))[1].append((i, path))
    for fs, wanted in groups.values():
        spans = [places[i] for i, _ in wanted]
        starts = [None if p.offset == WHOLE_FILE else p.offset for p in spans]
        ends = [None if p.offset == WHOLE_FILE else p.offset + p.size for p in spans]
        try:
            data = fs.cat_ranges([path for _, path in wanted], starts, ends, on_error="return")
        except Exception as error:  # what a store raises is its own
            data = [error] * len(wanted)
        for (i, path), place, value in zip(wanted, spans, data, strict=True):
            found[i] = value if isinstance(value, Exception) else _span(value, place, path)
    return found


def _span(data: bytes, place: ImageLocation, path: str) -> bytes | Exception:
    if place.offset == WHOLE_FILE or len(data) == place.size:
        return bytes(data)
    if len(data) >= place.offset + place.size:  # a server that knows no ranges sends the whole file
        return bytes(data[place.offset : place.offset + place.size])
    return ValueError(f"{path} ends inside this picture")


def _parts(url: str) -> tuple[str, str, str]:
    """What comes before the path that a name is joined to, the path, and what comes after: zip://[a/b]::s3://x.zip."""
    links = url.split("::")
    at = next((i for i, link in enumerate(links) if "://" in link), 0)
    return "".join(f"{link}::" for link in links[:at]), links[at], "".join(f"::{link}" for link in links[at + 1 :])
