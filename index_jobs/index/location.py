"""Where an index is: a directory, or a URL of an object store, of which a directory of the cache is the mirror.

Imports nothing heavy, so that command lines and settings are checked at once.
"""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dcar_core.util.errors import DataError, DcarError, MissingExtraError
from dcar_core.util.files import default_cache_directory, write_bytes

if TYPE_CHECKING:
    from index_jobs.index.storage import Storage

_URL_FILE = "store.url"  # in the mirror of an object store
_URL = re.compile(r"(s3a?|gs|az|abfss?):/{1,2}(.+)", re.IGNORECASE)  # pathlib makes one slash of two
_OTHER_URL = re.compile(r"[a-z][a-z0-9+.-]+:(/|$)", re.IGNORECASE)


def index_path(location: str | Path) -> Path:
    """Return the directory of an index: a path as it is, or the mirror of a URL, which is created.

    Raises:
        DataError: the URL names no index.
        MissingExtraError: obstore is not installed.
        DcarError: the cache cannot be written.
    """
    match = _URL.fullmatch(str(location).rstrip("/"))
    if match is None and not _OTHER_URL.match(str(location)):
        return Path(location)
    scheme, key = (match[1].lower(), match[2]) if match else ("", "")
    parts = key.split("/")
    if ":" in parts[0] or re.search("[?#]", key):
        raise DataError("the URL of an index has neither credentials, which come from the environment, nor ? or #")
    if any(part in ("", ".", "..") for part in parts):
        raise DataError(f"{location} is not the URL of an index, such as s3://bucket/index")
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("an index in object storage", "objectstore") from error
    mirror = default_cache_directory() / "indexes" / scheme / key
    try:
        mirror.mkdir(parents=True, exist_ok=True)
        write_bytes(mirror / _URL_FILE, f"{scheme}://{key}\n".encode(), shared=True)
    except OSError as error:
        reason = f"{mirror} cannot be written: {error.strerror}"
        raise DcarError(f"{reason}; name another cache by DCAR_RUNTIME_CACHE") from None
    return mirror


def location_of(index: Path) -> str:
    """Return what messages call an index: its URL, or its path as given."""
    url = index / _URL_FILE
    return url.read_text().strip() if url.is_file() else str(index)


def index_name(index: Path) -> str:
    """Return the name of an index, the same on every machine that publishes it: its URL, or its absolute path."""
    return location_of(index.absolute())


def store_of(index: Path) -> "Storage | None":
    """Return the object store that a directory mirrors; None for any other index."""
    return _open(index) if (index / _URL_FILE).is_file() else None


@cache
def _open(mirror: Path) -> "Storage":
    from index_jobs.index.object_store import ObjectStore

    return ObjectStore(location_of(mirror))
