"""Stores of an index: a directory, or the URL of an object store with a mirror in the
cache.

INDEX/CURRENT             the version that is served, and the sha256 of its manifest;
                          see `Current`
INDEX/versions/<n>.json   the manifest of a version, created once; it names files by
                          their hashes
INDEX/blobs/<sha256>      the contents of files, written once, which versions share

Imports nothing heavy, so that command lines and settings are checked at once.
"""

import hashlib
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dcar_core.util.errors import (
    ArtifactError,
    DataError,
    DcarError,
    LockedError,
    MissingExtraError,
    StoreUnavailableError,
)
from dcar_core.util.files import atomic_writer, default_cache_directory, write_bytes
from index_jobs.index.manifest import BLOBS, VERSIONS, FileInfo, Manifest

# an unnamed blob of a store may belong to a version that is being published
GRACE_S = 24 * 3600
_BLOCK = 2**20  # bytes of a file that are read at a time
_URL_FILE = "store.url"  # in the mirror of an object store
# pathlib makes one slash of two
_URL = re.compile(r"(s3a?|gs|az|abfss?):/{1,2}(.+)", re.IGNORECASE)
_OTHER_URL = re.compile(r"[a-z][a-z0-9+.-]+:(/|$)", re.IGNORECASE)
PART_BYTES = 8 * 2**20  # of a blob of a store
_MAX_PARTS = 5_000  # of an upload; stores allow 10,000
# parts of a blob that are sent at a time; each may take as long as a silent store is
# waited for
_UPLOADS = 4
CLIENT: Any = {
    "connect_timeout": "5s",
    "read_timeout": "60s",  # of a silent store
    "timeout": "24h",  # of a slow line
    "allow_http": True,  # of an endpoint that is configured so
}
RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}


class Stored(NamedTuple):
    """An entry of a storage. written: Unix seconds; 0 in a directory."""

    size: int
    written: float = 0


class Storage(Protocol):
    """A place of an index, with a name for messages.

    Methods raise ArtifactError for what is missing or damaged, StoreUnavailableError if
    a store does not respond, and LockedError if another publisher was first.
    """

    name: str

    def read(self, key: str) -> bytes | None: ...
    def create(self, key: str, data: bytes) -> None: ...
    def swap(self, key: str, before: bytes | None, data: bytes) -> None: ...
    def put(self, info: FileInfo, parts: Iterable[bytes]) -> None: ...
    def parts(self, info: FileInfo) -> Iterator[bytes]: ...
    def entries(self, folder: str) -> dict[str, Stored]: ...
    def delete(self, keys: Collection[str]) -> None: ...

    def get(self, info: FileInfo) -> Iterator[bytes]:
        """Yield a blob in parts. Raise ArtifactError, at the end, if it differs from
        its hash.
        """
        digest = hashlib.sha256()
        for part in self.parts(info):
            digest.update(part)
            yield part
        if digest.hexdigest() != info.sha256:
            where = f"{self.name}/{info.key}"
            raise ArtifactError(
                f"{where} is corrupted: its checksum differs; roll back, or delete it"
                " and build again"
            )

    def versions(self) -> list[int]:
        """Return the numbers of all versions, ascending."""
        return sorted(
            int(name[:-5])
            for name in self.entries(VERSIONS)
            if re.fullmatch(r"\d{1,18}\.json", name)
        )

    def lost_race(self) -> LockedError:
        return LockedError(
            f"another job has published to {self.name} meanwhile; run the same command"
            " again"
        )


class Directory(Storage):
    """An index on this disk. Who writes to it holds a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArtifactError(
                f"{self.path / key} cannot be read: {error.strerror}"
            ) from error

    def create(self, key: str, data: bytes) -> None:
        if (self.path / key).exists():
            raise self.lost_race()
        self.write(key, data)

    def write(self, key: str, data: bytes) -> None:
        """Write what may be there. Raise FileNotFoundError if the index was dropped."""
        if (folder := (self.path / key).parent) != self.path:
            folder.mkdir(exist_ok=True)
        write_bytes(self.path / key, data)

    def follow(self, key: str, data: bytes | None) -> None:
        """Write or delete a file, unless it is as in the store. data: its content
        there; None if it has none.
        """
        if data is None:
            self.delete([key])
        elif data != self.read(key):
            self.write(key, data)

    def swap(self, key: str, before: bytes | None, data: bytes) -> None:
        if self.read(key) != before:
            raise self.lost_race()
        self.write(key, data)

    def put(self, info: FileInfo, parts: Iterable[bytes]) -> None:
        (self.path / BLOBS).mkdir(exist_ok=True)
        with atomic_writer(self.path / info.key) as file:
            file.writelines(parts)

    def parts(self, info: FileInfo) -> Iterator[bytes]:
        try:
            with (self.path / info.key).open("rb", buffering=0) as file:
                while part := file.read(_BLOCK):
                    yield part
        except OSError as error:
            where = self.path / info.key
            raise ArtifactError(
                f"{where} cannot be read: {error.strerror}; roll back, or build again"
            ) from error

    def entries(self, folder: str) -> dict[str, Stored]:
        path = self.path / folder
        if path.is_dir():
            files = [file for file in path.iterdir() if file.is_file()]
        else:
            files = []
        return {file.name: Stored(file.stat().st_size) for file in files}

    def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            (self.path / key).unlink(missing_ok=True)


class ObjectStore(Storage):
    """An index at a URL, through obstore. Writers share no lock: a file is swapped if
    it is unchanged (If-Match).
    """

    def __init__(self, url: str) -> None:
        from obstore.store import from_url

        self.name = url
        with self._report():
            self.objects: Any = from_url(
                url,
                client_options=CLIENT,
                retry_config=RETRIES,
            )

    def read(self, key: str) -> bytes | None:
        return self._find(key)[0]

    def create(self, key: str, data: bytes) -> None:
        self._write(key, data, "create")

    def swap(self, key: str, before: bytes | None, data: bytes) -> None:
        current, mode = self._find(key)
        if current != before:
            raise self.lost_race()
        self._write(key, data, mode)

    def put(self, info: FileInfo, parts: Iterable[bytes]) -> None:
        size = max(PART_BYTES, info.size // _MAX_PARTS)
        content = parts if info.size > size else b"".join(parts)
        with self._report():
            self.objects.put(
                info.key,
                content,
                chunk_size=size,
                max_concurrency=_UPLOADS,
            )

    def parts(self, info: FileInfo) -> Iterator[bytes]:
        with self._report():
            yield from map(bytes, self.objects.get(info.key).stream(PART_BYTES))

    def entries(self, folder: str) -> dict[str, Stored]:
        with self._report():
            metas = [
                meta for chunk in self.objects.list(f"{folder}/") for meta in chunk
            ]
        return {
            Path(meta["path"]).name: Stored(
                meta["size"], meta["last_modified"].timestamp()
            )
            for meta in metas
        }

    def delete(self, keys: Collection[str]) -> None:
        with self._report():
            self.objects.delete([*keys])

    def _find(self, key: str) -> tuple[bytes | None, Any]:
        """Return an object, and the condition under which `_write` replaces it."""
        with self._report():
            try:
                item = self.objects.get(key)
                state = {name: item.meta.get(name) for name in ("e_tag", "version")}
                return bytes(item.bytes()), {
                    name: value for name, value in state.items() if value
                }
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None, "create"

    def _write(self, key: str, data: bytes, mode: Any) -> None:
        """Write an object on a condition. Raise LockedError if it does not hold."""
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        with self._report():
            try:
                self.objects.put(key, data, mode=mode)
            except BaseError as error:
                # an attempt before may have been written, unheard
                with suppress(BaseError, FileNotFoundError):
                    if bytes(self.objects.get(key).bytes()) == data:
                        return
                if isinstance(error, (AlreadyExistsError, PreconditionError)):
                    raise self.lost_race() from error
                raise

    @contextmanager
    def _report(self) -> Iterator[None]:
        """Raise ArtifactError, one line for people, in place of an error of the
        store.
        """
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{self.name} lacks an object: {_first_line(error)}"
            ) from error
        except BaseError as error:
            raise StoreUnavailableError(
                f"{self.name} is not available: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    """Return the response of a store without the times of its attempts, which vary."""
    line = (
        str(error).partition("\n")[0].rpartition(" - ")[2].partition(": <?xml")[0][:300]
    )
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return f"{line} ({code[1]})" if code else line


def index_path(location: str | Path) -> Path:
    """Return the directory of an index: a path as it is, or the mirror of a URL, which
    is created.

    Raise DataError if the URL names no index, and MissingExtraError without obstore.
    """
    match = _URL.fullmatch(str(location).rstrip("/"))
    if match is None and not _OTHER_URL.match(str(location)):
        return Path(location)
    scheme, key = (match[1].lower(), match[2]) if match else ("", "")
    parts = key.split("/")
    if ":" in parts[0] or re.search("[?#]", key):
        raise DataError(
            "the URL of an index has neither credentials, which come from the"
            " environment, nor ? or #"
        )
    if any(part in ("", ".", "..") for part in parts):
        raise DataError(
            f"{location} is not the URL of an index, such as s3://bucket/index"
        )
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
    """Return the name of an index, the same on every machine that publishes it: its
    URL, or its absolute path.
    """
    return location_of(index.absolute())


def store_of(index: Path) -> ObjectStore | None:
    """Return the object store that a directory mirrors; None for any other index."""
    return _open(index) if (index / _URL_FILE).is_file() else None


def swap(index: Path, key: str, before: bytes | None, data: bytes) -> None:
    """Replace a file of an index, first in its store. Raise LockedError if it is not as
    before.
    """
    store = store_of(index)
    local = Directory(index)
    (store or local).swap(key, before, data)
    if store is not None:
        local.write(key, data)


@cache
def _open(mirror: Path) -> ObjectStore:
    return ObjectStore(location_of(mirror))


def copy_blobs(
    source: Storage,
    target: Storage,
    infos: Iterable[FileInfo],
    named: Collection[str],
) -> None:
    """Put the blobs that a storage lacks, or may collect before a manifest names them.
    named: hashes that stay.
    """
    stored = target.entries(BLOBS)
    safe = time.time() - GRACE_S / 2
    for info in dict.fromkeys(infos):
        blob = stored.get(info.sha256, Stored(-1))
        if blob.size != info.size or (blob.written < safe and info.sha256 not in named):
            target.put(info, source.get(info))


def verify(storage: Storage, manifest: Manifest, known: set[FileInfo]) -> None:
    """Read the files of a version that are not known to be whole. Raise ArtifactError
    for one that is not.
    """
    for name, info in manifest.files.items():
        try:
            for _ in () if info in known else storage.get(info):
                pass
        except ArtifactError as error:
            raise type(error)(
                f"{name} of version {manifest.version}: {error}"
            ) from error
        known.add(info)
