"""Published versions of an index directory: list and open them, and bring those of an object store.

An index in a store has a mirror: an index directory in the cache, on which jobs and services run. It has the blobs of
the versions that this machine uses. A blob appears once its hash has been compared, and CURRENT once its version is
complete; a killed pull continues. Several processes may share a mirror: one at a time follows the store.
"""

import hashlib
import logging
import os
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from filelock import FileLock

from dcar_core.util.errors import ArtifactError, LockedError
from dcar_core.util.processes import hold_lock
from index_jobs.index.index_version import ImageAccess, IndexVersion
from index_jobs.index.location import index_path, location_of, store_of
from index_jobs.index.manifest import BLOBS, CURRENT, VERSIONS, Current, Manifest, manifest_key
from index_jobs.index.storage import GRACE_S, Directory, Storage, copy_blobs

logger = logging.getLogger(__name__)

_LOCK, _PULL_LOCK = ".lock", ".pull.lock"
_KEPT = 3  # versions on the disk of a replica: those that were in use last


def read_current(index: Path) -> Current | None:
    """Return what CURRENT says, None if nothing is published. Reads one line; fit for polling.

    Raises:
        ArtifactError: CURRENT cannot be read or names no version.
    """
    data = Directory(index).read(CURRENT)
    return None if data is None else Current.parse(data, location_of(index))


def current_version(index: Path) -> int | None:
    """Return the version that CURRENT names, None if nothing is published; errors as of `read_current`."""
    current = read_current(index)
    return current.version if current else None


def current_version_or_none(index: Path) -> int | None:
    """Return the version that CURRENT names, None also if CURRENT is damaged; for callers that repair it."""
    try:
        return current_version(index)
    except ArtifactError as error:
        logger.warning("%s", error)
        return None


def require_index(index: Path) -> Current:
    """Return what CURRENT says. Raise ArtifactError, which names the command to run, if there is none."""
    current, name = read_current(index), location_of(index)
    if current is None and version_numbers(index):
        raise ArtifactError(f"{name} has versions but no CURRENT; `dcar index rollback {name}` restores the newest")
    if current is None:
        raise ArtifactError(
            f"{name} holds no published index; make one with "
            f"`dcar index build --gallery PATH --checkpoint DIR --out {name}`"
        )
    return current


def open_current(index: Path, access: ImageAccess | None = None) -> IndexVersion:
    """Open the published version. access: limits on the images that are read; None for no limit.

    Raises:
        ArtifactError: nothing is published, or the version is incomplete.
    """
    current = require_index(index)
    while True:
        try:
            return open_version(index, current.version, access)
        except ArtifactError:  # a writer may have published another version and removed this one in the meantime
            newest = read_current(index)
            if newest is None or newest == current:
                raise
            current = newest


def open_version(index: Path, version: int, access: ImageAccess | None = None) -> IndexVersion:
    """Open a version by its number; other arguments and errors as of `open_current`."""
    return IndexVersion.open(index, read_manifest(index, version), access)


def version_numbers(index: Path) -> list[int]:
    """Return every version on disk, ascending."""
    return Directory(index).versions()


def read_manifest(index: Path, version: int) -> Manifest:
    """Return a manifest. Raise ArtifactError if it is missing or damaged."""
    data, name = Directory(index).read(manifest_key(version)), location_of(index)
    if data is None:
        available = ", ".join(map(str, version_numbers(index))) or "none"
        raise ArtifactError(f"{name} has no version {version}; it has {available}")
    return Manifest.parse(data, f"{name}/{manifest_key(version)}")


def list_versions(index: Path) -> list[Manifest]:
    """Return the manifests of every version, ascending. An unreadable one is logged and left out."""
    manifests = []
    for version in version_numbers(index):
        try:
            manifests.append(read_manifest(index, version))
        except ArtifactError as error:
            logger.warning("%s", error)
    return manifests


def hold_writer_lock(index: Path) -> AbstractContextManager[None]:
    """Admit one writer; the system releases the lock when it dies. Raise LockedError if there is another one."""
    index.mkdir(parents=True, exist_ok=True)
    message = f"another job is writing to {index} (it holds {index / _LOCK}); wait until it has ended"
    return hold_lock(index / _LOCK, f"{message}, or give another --out")


def collect_blobs(storage: Storage, index: Path) -> None:
    """Delete the blobs of a storage that no version of an index names, with the writer's lock."""
    entries, oldest = storage.entries(BLOBS), time.time() - GRACE_S  # before the manifests, which are written first
    manifests = list_versions(index)
    if len(manifests) < len(version_numbers(index)):
        return  # who knows which blobs an unreadable one names
    named = {info.sha256 for manifest in manifests for info in manifest.files.values()}
    # A killed pull leaves temporary files such as .HASH.tmp.
    unnamed = [
        name
        for name, each in entries.items()
        if name.removeprefix(".").removesuffix(".tmp") not in named and each.written < oldest
    ]
    storage.delete([f"{BLOBS}/{name}" for name in unnamed])


def pull(index: Path, version: int | None = None, *, history: bool = False, files: bool = True) -> int | None:
    """Bring the published version to a mirror, or another one, and return its number. Other indexes stay as they are.

    Args:
        history: bring the manifests of all versions as well, as jobs need, and remove versions that the store lacks.
            There may be no published version yet, or a broken one.
        files: bring more than manifests, and then CURRENT.
    """
    if (store := store_of(index)) is None:
        with suppress(ArtifactError):  # who reads the index says why
            return current_version(index) if version is None else version
        return None
    mirror = Directory(index)
    with FileLock(index / _PULL_LOCK):
        if version is not None:
            _pull_version(store, mirror, version)
            return version
        while True:
            data = store.read(CURRENT)
            if history:
                _pull_history(store, mirror)
            try:
                current = Current.parse(data, store.name)
                if files:
                    _pull_version(store, mirror, current.version, current.sha256)
                break
            except ArtifactError as error:
                if store.read(CURRENT) != data:  # another writer has removed the version meanwhile
                    continue
                if not history:
                    raise
                current = None
                if data:
                    logger.warning("the published version cannot be used: %s", str(error).partition("\n")[0])
                break
        if files and data is None:
            mirror.delete([CURRENT])
        elif files and data != mirror.read(CURRENT):
            mirror.write(CURRENT, data or b"")
    if not history:
        _trim(index)
    return current.version if current else None


def published_index(location: str | Path, version: int | None = None) -> Path:
    """Return the directory of an index, as `index_path` does, with its published version, or another, on this disk."""
    index = index_path(location)
    pull(index, version)
    return index


def repair(index: Path, version: int) -> None:
    """Bring blobs of a version anew that differ from their hashes."""
    store, mirror = store_of(index), Directory(index)
    assert store is not None
    with FileLock(index / _PULL_LOCK):
        for info in Manifest.parse(mirror.read(manifest_key(version)) or b"", manifest_key(version)).files.values():
            try:
                for _ in mirror.get(info):
                    pass
            except ArtifactError as error:
                logger.warning("bringing a file anew: %s", error)
                mirror.put(info, store.get(info))


def _pull_history(store: Storage, mirror: Directory) -> None:
    stored = store.versions()
    manifests = {manifest_key(number): store.read(manifest_key(number)) for number in stored}
    for number in mirror.versions():
        if manifests.get(manifest_key(number)) is None:
            mirror.delete([manifest_key(number)])
    for key, data in manifests.items():
        if data is not None and data != mirror.read(key):  # None: since the list, its writer has lost a race
            mirror.write(key, data)
    for manifest in list_versions(mirror.path):
        name = f"{manifest.spec.engine.partition('=')[0]}.json"  # an engine drops what no version names
        places = [info for file, info in manifest.files.items() if file.rpartition("/")[2] == name]
        try:
            copy_blobs(store, mirror, places, [info.sha256 for info in places])
        except ArtifactError as error:
            logger.warning("version %d cannot be used: %s", manifest.version, error)


def _pull_version(store: Storage, mirror: Directory, version: int, sha256: str = "") -> None:
    """Bring a version. sha256: of its manifest, if it is known."""
    key = manifest_key(version)
    before = data = mirror.read(key)
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        data = store.read(key)
        if data is None or (sha256 and hashlib.sha256(data).hexdigest() != sha256):
            raise ArtifactError(f"{store.name} lacks the manifest of version {version}; roll back to another one")
    files = Manifest.parse(data, f"{store.name}/{key}").files.values()
    if data != before:
        mirror.write(key, data)
    copy_blobs(store, mirror, files, [info.sha256 for info in files])
    os.utime(mirror.path / key)


def _trim(index: Path) -> None:
    """Remove the versions that were not in use lately."""
    paths = sorted((index / VERSIONS).glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in paths[:-_KEPT]:
        path.unlink()
    if paths[:-_KEPT]:
        with suppress(LockedError), hold_writer_lock(index):
            collect_blobs(Directory(index), index)
