"""Where an index is stored: `Storage`, of which a directory is one, and a store of objects (`object_store`) another.

INDEX/CURRENT             the version that is served, and the sha256 of its manifest; see `Current`
INDEX/versions/<n>.json   the manifest of a version, created once; it names files by their hashes
INDEX/blobs/<sha256>      the contents of files, written once, which versions share

- A version is published by putting the blobs that are missing, then its manifest, then CURRENT. A job that is killed at
  any point leaves CURRENT at a complete version.
- In a store, a blob that no version names is collected a day after it was written, since a version that is being
  published may name it. A publisher writes unnamed blobs older than half a day again. A directory has one writer.
"""

import hashlib
import re
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from dcar_core.util.errors import ArtifactError, LockedError
from dcar_core.util.files import atomic_writer, write_bytes
from index_jobs.index.manifest import BLOBS, CURRENT, VERSIONS, Current, FileInfo, Manifest

GRACE_S = 24 * 3600
_BLOCK = 2**20  # bytes of a file that are read at a time


class Stored(NamedTuple):
    """What a storage has under a name. written: Unix seconds; 0 in a directory."""

    size: int
    written: float = 0


class Storage(Protocol):
    """A place of an index, with a name for messages.

    Methods raise ArtifactError for what is missing or damaged, StoreUnavailableError if a store does not respond, and
    LockedError if another publisher was first.
    """

    name: str

    def read(self, key: str) -> bytes | None: ...
    def create(self, key: str, data: bytes) -> None: ...
    def swap(self, before: bytes | None, data: bytes) -> None: ...  # CURRENT
    def put(self, info: FileInfo, parts: Iterable[bytes]) -> None: ...
    def parts(self, info: FileInfo) -> Iterator[bytes]: ...
    def entries(self, folder: str) -> dict[str, Stored]: ...
    def delete(self, keys: Collection[str]) -> None: ...

    def get(self, info: FileInfo) -> Iterator[bytes]:
        """Yield a blob in parts. Raise ArtifactError, at the end, if it differs from its hash."""
        digest = hashlib.sha256()
        for part in self.parts(info):
            digest.update(part)
            yield part
        if digest.hexdigest() != info.sha256:
            where = f"{self.name}/{info.key}"
            raise ArtifactError(f"{where} is corrupted: its checksum differs; roll back, or delete it and build again")

    def removing(self) -> set[int]:
        """Return the versions that CURRENT names as removed, and that are still there."""
        try:
            return self._numbers() & Current.parse(self.read(CURRENT), self.name).removed
        except ArtifactError:
            return set()

    def versions(self) -> list[int]:
        """Return the other versions, ascending."""
        return sorted(self._numbers() - self.removing())

    def _numbers(self) -> set[int]:
        return {int(name[:-5]) for name in self.entries(VERSIONS) if re.fullmatch(r"\d{1,18}\.json", name)}

    def lost_race(self) -> LockedError:
        return LockedError(f"another job has published to {self.name} meanwhile; run the same command again")


class Directory(Storage):
    """An index on this disk. Who writes to it holds a lock."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ArtifactError(f"{self.path / key} cannot be read: {error.strerror}") from error

    def create(self, key: str, data: bytes) -> None:
        if (self.path / key).exists():
            raise self.lost_race()
        self.write(key, data)

    def write(self, key: str, data: bytes) -> None:
        """Write what may be there."""
        (self.path / key).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path / key, data)

    def swap(self, before: bytes | None, data: bytes) -> None:
        if self.read(CURRENT) != before:
            raise self.lost_race()
        self.write(CURRENT, data)

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
            raise ArtifactError(f"{where} cannot be read: {error.strerror}; roll back, or build again") from error

    def entries(self, folder: str) -> dict[str, Stored]:
        path = self.path / folder
        files = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else []
        return {each.name: Stored(each.stat().st_size) for each in files}

    def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            (self.path / key).unlink(missing_ok=True)


def copy_blobs(source: Storage, target: Storage, infos: Iterable[FileInfo], named: Collection[str]) -> None:
    """Put the blobs that a storage lacks.

    Args:
        named: hashes of blobs that stay there; older ones may be collected before a manifest names them.
    """
    stored, safe = target.entries(BLOBS), time.time() - GRACE_S / 2
    for info in dict.fromkeys(infos):
        found = stored.get(info.sha256, Stored(-1))
        if found.size != info.size or (found.written < safe and info.sha256 not in named):
            target.put(info, source.get(info))


def read_files(storage: Storage, manifest: Manifest, known: set[FileInfo]) -> Iterator[int]:
    """Read all files of a version but those that are known to be whole, and yield the length of each part.

    Raise ArtifactError for the first that is missing or differs from its hash. Whole ones are added to `known`.
    """
    for name, info in manifest.files.items():
        try:
            yield from map(len, () if info in known else storage.get(info))
        except ArtifactError as error:
            raise type(error)(f"{name} of version {manifest.version}: {error}") from error
        known.add(info)


def verify(storage: Storage, manifest: Manifest, known: set[FileInfo] | None = None) -> None:
    """Read the files as `read_files` does."""
    for _ in read_files(storage, manifest, set() if known is None else known):
        pass
