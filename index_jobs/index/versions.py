"""Published versions of an index: list, open, publish and roll back, and bring those of
an object store.

- A version is published by putting the missing blobs, then its manifest, then CURRENT.
  A job that is killed at any point leaves CURRENT at a complete version.
- A lock admits one writer at a time on a machine. Writers of a store share no lock: the
  first to replace CURRENT wins, and the others get LockedError, since their versions
  were compared with the one that it replaced, or made of it.
- An index in a store has a mirror: an index directory in the cache with the versions
  that this machine uses. A blob appears there once its hash has been compared, and
  CURRENT once its version is complete.
"""

import datetime
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
from filelock import FileLock

from dcar_core.util.errors import ArtifactError, DcarError, LockedError
from dcar_core.util.files import fsync_path, sha256_of
from dcar_core.util.processes import hold_lock
from index_jobs.engines.protocol import EXACT_UP_TO, load_engine
from index_jobs.index.concepts import pull_concepts
from index_jobs.index.index_version import (
    ImageAccess,
    IndexVersion,
    link_files,
    read_rows,
)
from index_jobs.index.manifest import (
    BLOBS,
    CHANGED,
    CURRENT,
    REMOVED,
    Current,
    FileInfo,
    Manifest,
    manifest_key,
)
from index_jobs.index.stores import (
    GRACE_S,
    Directory,
    Storage,
    copy_blobs,
    index_name,
    index_path,
    location_of,
    store_of,
    swap,
    verify,
)
from index_jobs.row_filter import NO_ROWS
from index_jobs.spec import BuildOptions

logger = logging.getLogger(__name__)

# compared one by one in every search, in addition to the built index
ADDED_ROWS = EXACT_UP_TO
# beyond these, a rebuild is recommended
_MAX_ADDITIONS = 8
_ADDED_SHARE = 0.2
_HIDDEN_SHARE = 0.2
# also beyond this many rows that each search names to an engine
_NAMED_ROWS = EXACT_UP_TO
_LOCK = ".lock"
_PULL_LOCK = ".pull.lock"
_KEPT = 3  # versions on the disk of a replica: those that were in use last


def read_current(index: Path) -> Current | None:
    """Return the content of CURRENT; None if nothing is published. Raise ArtifactError
    if it names no version.
    """
    data = Directory(index).read(CURRENT)
    return None if data is None else Current.parse(data, location_of(index))


def current_version(index: Path) -> int | None:
    """Return the version that CURRENT names, None if nothing is published; errors as of
    `read_current`.
    """
    current = read_current(index)
    return current.version if current else None


def require_index(index: Path) -> Current:
    """Return the content of CURRENT. Raise ArtifactError, which names the command to
    run, if there is none.
    """
    return Current.parse(Directory(index).read(CURRENT), location_of(index))


def open_current(index: Path, access: ImageAccess | None = None) -> IndexVersion:
    """Open the published version. Raise ArtifactError if there is none, or it is
    incomplete.

    access: limits on the images that are read; None for no limit.
    """
    while True:
        current = require_index(index)
        try:
            return open_version(index, current.version, access)
        except ArtifactError:
            # a writer may have published another version and removed this one in the
            # meantime
            if read_current(index) == current:
                raise


def open_version(
    index: Path,
    version: int,
    access: ImageAccess | None = None,
) -> IndexVersion:
    """Open a version by its number; other arguments and errors as of `open_current`."""
    return IndexVersion.open(index, read_manifest(index, version), access)


def version_numbers(index: Path) -> list[int]:
    """Return every version on disk, ascending."""
    return Directory(index).versions()


def read_manifest(index: Path, version: int) -> Manifest:
    """Return a manifest. Raise ArtifactError if it is missing or damaged."""
    data = Directory(index).read(manifest_key(version))
    name = location_of(index)
    if data is None:
        available = ", ".join(map(str, version_numbers(index))) or "none"
        raise ArtifactError(f"{name} has no version {version}; it has {available}")
    return Manifest.parse(data, f"{name}/{manifest_key(version)}")


def list_versions(index: Path) -> list[Manifest]:
    """Return the manifests of every version, ascending. An unreadable one is logged and
    left out.
    """
    manifests = []
    for version in version_numbers(index):
        try:
            manifests.append(read_manifest(index, version))
        except ArtifactError as error:
            logger.warning("%s", error)
    return manifests


def verify_index(index: Path) -> list[Manifest]:
    """Compare every file of every version with its hash, in the store of a mirror.
    Raise ArtifactError for a fault.
    """
    pull_history(index)
    storage = store_of(index) or Directory(index)
    known = set[FileInfo]()
    read_manifest(
        index, Current.parse(storage.read(CURRENT), location_of(index)).version
    )
    manifests = [read_manifest(index, number) for number in version_numbers(index)]
    for manifest in manifests:
        verify(storage, manifest, known)
    return manifests


@contextmanager
def report_os_errors(index: Path) -> Iterator[None]:
    """Raise DcarError, one line for people, in place of an OSError such as a full
    disk.
    """
    try:
        yield
    except OSError as error:
        # of two names, the second was to be written
        path = error.filename2 or error.filename
        reason = f"{error.strerror or error}{f' ({path})' if path else ''}"
        raise DcarError(
            f"the index {index} cannot be written: {reason}; published versions are"
            " unchanged, run the same command again to resume"
        ) from error


def hold_writer_lock(index: Path) -> AbstractContextManager[None]:
    """Admit one writer; the system releases the lock when it dies. Raise LockedError if
    there is another one.
    """
    index.mkdir(parents=True, exist_ok=True)
    message = (
        f"another job is writing to {index} (it holds {index / _LOCK}); wait until it"
        " has ended"
    )
    return hold_lock(index / _LOCK, f"{message}, or give another --out")


def collect_blobs(storage: Storage, index: Path) -> None:
    """Delete the blobs of a storage that no version of an index names, with the
    writer's lock.

    In a store they stay for a day, since a version that is being published may name
    them. Its publisher writes unnamed blobs older than half a day again.
    """
    # before the manifests, which are written first
    entries = storage.entries(BLOBS)
    oldest = time.time() - GRACE_S
    manifests = list_versions(index)
    if len(manifests) < len(version_numbers(index)):
        return  # who knows which blobs an unreadable one names
    named = {info.sha256 for manifest in manifests for info in manifest.files.values()}
    # a killed pull leaves .HASH.tmp
    hashes = {name: name.removeprefix(".").removesuffix(".tmp") for name in entries}
    old = [
        name
        for name, blob in entries.items()
        if hashes[name] not in named and blob.written < oldest
    ]
    storage.delete([f"{BLOBS}/{name}" for name in old])


@contextmanager
def new_version(index: Path) -> Iterator["NewVersion"]:
    """Lock the index for this writer, and yield a version to write, in an empty
    folder.
    """
    with hold_writer_lock(index):
        pull(index, history=True)
        new = NewVersion(index)
        new.clean()
        new.folder.mkdir(parents=True)
        try:
            yield new
        finally:
            new.clean()


class NewVersion:
    """A version that is being written.

    folder: where its files are, by their names; a link to a blob stands for a file of
    another version.
    """

    def __init__(self, index: Path) -> None:
        self.index = index
        self.folder = index / BLOBS / ".new"
        self._base = Directory(index).read(CURRENT)
        self._replaced = _parsed(self._base, index)
        self.number = max([*version_numbers(index), self._replaced or 0]) + 1

    def clean(self) -> None:
        """Remove the folder, and blobs that no version names."""
        shutil.rmtree(self.folder, ignore_errors=True)
        collect_blobs(Directory(self.index), self.index)

    def link(
        self,
        version: IndexVersion,
        prefix: str = "",
        without: tuple[str, ...] = (),
    ) -> None:
        """Take over the files of a published version whose names begin with a prefix,
        and not with others.
        """
        paths = version.manifest.paths(self.index, prefix)
        link_files(
            {
                prefix + name: path
                for name, path in paths.items()
                if not name.startswith(without)
            },
            self.folder,
        )

    def prepare(self, manifest: Manifest) -> IndexVersion:
        """Put the files as blobs, flush and read them back, and return the opened
        version.

        The version, time, files and reasons for a rebuild of the manifest are filled
        in. Raise ArtifactError if the version does not open, or does not read back as
        it was written.
        """
        files = dict[str, FileInfo]()
        known = set[FileInfo]()
        for path in sorted(self.folder.rglob("*")):
            # tantivy may hold its locks for a moment after it has written
            if path.is_dir() or path.suffix == ".lock":
                continue
            is_link = path.is_symlink()
            info = FileInfo(
                path.stat().st_size,
                path.readlink().name if is_link else sha256_of(path),
            )
            files[path.relative_to(self.folder).as_posix()] = info
            if is_link:
                known.add(info)
            else:
                fsync_path(path)
                path.replace(blob := self.index / info.key)
                # it may have been a link to the same inode
                path.unlink(missing_ok=True)
                path.symlink_to(blob.absolute())
        fsync_path(self.index / BLOBS)
        hidden = [
            read_rows(self.folder / name)
            for name in (REMOVED, CHANGED)
            if name in files
        ]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest = replace(
            manifest,
            version=self.number,
            created=now,
            files=files,
            replaced=self._replaced,
            rebuild="; ".join(
                _rebuild_reasons(manifest, len(reduce(np.union1d, hidden, NO_ROWS)))
            ),
        )
        version = IndexVersion.open(self.index, manifest)
        verify(Directory(self.index), manifest, known)
        return version

    def publish(self, manifest: Manifest, *, keep: int = BuildOptions.keep) -> Manifest:
        """Prepare and commit the version."""
        return self.commit(self.prepare(manifest).manifest, keep=keep)

    def commit(self, manifest: Manifest, *, keep: int = BuildOptions.keep) -> Manifest:
        """Make a prepared version the current one, and remove the oldest.

        keep: versions to keep of its own history, builds or changes: the new one and
        the one that it replaces first, then the newest. Changes that are older than
        every build that is kept go with the builds.
        """
        index = self.index
        local = Directory(self.index)
        store = store_of(self.index)
        manifests = {
            known.version: known for known in [*list_versions(index), manifest]
        }
        displaced = _displaced(manifest, version_numbers(index), manifests, keep)
        if store is not None:
            if manifest.replaced in manifests:
                base = manifests[manifest.replaced].files
            else:
                base = {}
            copy_blobs(
                local,
                store,
                manifest.files.values(),
                [info.sha256 for info in base.values()],
            )
        storage = store or local
        key = manifest_key(manifest.version)
        storage.create(key, manifest.to_bytes())
        if store is not None:
            local.write(key, manifest.to_bytes())
        try:
            current = _point(index, self._base, manifest.version)
        except LockedError:
            storage.delete([key])
            raise
        kept = {*manifests} - displaced
        replaced = manifests.get(manifest.replaced or 0, manifest)
        if replaced.spec.engine == manifest.spec.engine:
            # services search it until they have loaded the new one
            kept.add(replaced.version)
        _sync(index, manifest.version, manifests, kept)
        try:
            # nobody has rolled back to one of them meanwhile
            if storage.read(CURRENT) == current:
                for target in (storage, local):
                    target.delete([manifest_key(number) for number in displaced])
                collect_blobs(storage, index)
        except ArtifactError as error:  # left to the next writer
            logger.warning("old versions are kept: %s", error)
        return manifest


def _displaced(
    new: Manifest,
    numbers: Sequence[int],
    manifests: Mapping[int, Manifest],
    keep: int,
) -> set[int]:
    written = {number for number, manifest in manifests.items() if manifest.origin}
    protected = {new.version, new.replaced} if keep > 1 else {new.version}
    ranked = sorted(
        {*numbers, new.version},
        key=lambda number: (number in protected, number),
        reverse=True,
    )
    own = [number for number in ranked if (number in written) == bool(new.origin)]
    oldest = 0 if new.origin else min(own[:keep])
    return {*own[keep:], *(number for number in written - protected if number < oldest)}


def _rebuild_reasons(manifest: Manifest, hidden: int) -> Iterator[str]:
    """Yield why a rebuild is recommended. hidden: rows that are removed, or changed
    since an engine stored them.
    """
    rows = manifest.rows
    added = sum(part.count for part in manifest.additions)
    limit = _HIDDEN_SHARE * manifest.rows
    if len(manifest.additions) >= _MAX_ADDITIONS:
        yield f"every search goes through {len(manifest.additions)} additions"
    if added > max(_ADDED_SHARE * (rows - added), ADDED_ROWS):
        yield f"{added:,} of {rows:,} items are outside the built index"
    if hidden > (limit if manifest.spec.is_local else min(limit, _NAMED_ROWS)):
        yield (
            f"{hidden:,} of {rows:,} rows are removed or changed, which every search"
            " excludes"
        )


def rollback(index: Path, to: int | None = None) -> int:
    """Make an earlier version current and return its number. Raise ArtifactError if it
    is missing or incomplete.

    to: the version; None for the one that the current version replaced, or the newest
    before it if that is gone, or the newest of all if CURRENT is lost or damaged.
    """
    pull(index, history=True)
    if not version_numbers(index):
        raise ArtifactError(f"{location_of(index)} holds no published index")
    with report_os_errors(index), hold_writer_lock(index):
        base = Directory(index).read(CURRENT)
        if to is None:
            current = _parsed(base, index)
            earlier = [
                number
                for number in version_numbers(index)
                if current is None or number < current
            ]
            if not earlier:
                raise ArtifactError(
                    f"{location_of(index)} has no version earlier than {current} to"
                    " roll back to"
                )
            replaced = [
                manifest.replaced
                for manifest in list_versions(index)
                if manifest.version == current
            ]
            to = replaced[0] if replaced and replaced[0] in earlier else earlier[-1]
        read_manifest(index, to)
        pull_version(index, to)
        verify(Directory(index), open_version(index, to).manifest, set())
        _point(index, base, to)
        manifests = {manifest.version: manifest for manifest in list_versions(index)}
        _sync(index, to, manifests, manifests)
    return to


def _parsed(current: bytes | None, index: Path) -> int | None:
    """Return the version that CURRENT names; None if it is missing or damaged."""
    with suppress(ArtifactError):
        return Current.parse(current, location_of(index)).version
    return None


def _point(index: Path, base: bytes | None, version: int) -> bytes:
    """Let CURRENT name a version, first in the store. Raise LockedError if it is not as
    before.
    """
    data = Current(version, sha256_of(index / manifest_key(version))).to_bytes()
    swap(index, CURRENT, base, data)
    return data


def _sync(
    index: Path,
    version: int,
    manifests: Mapping[int, Manifest],
    kept: Iterable[int],
) -> None:
    """Let the engines follow CURRENT, and drop what no kept version names."""
    parts = {
        number: [
            manifests[number].paths(index, prefix)
            for prefix in (
                "",
                *(f"{added.folder}/" for added in manifests[number].additions),
            )
        ]
        for number in kept
    }
    for engine in sorted({manifest.spec.engine for manifest in manifests.values()}):
        load_engine(engine).sync(index_name(index), version, parts)


def published_index(location: str | Path, version: int | None = None) -> Path:
    """Return the directory of an index, as `index_path` does, with its published
    version, or another, on this disk.
    """
    index = index_path(location)
    pull(index) if version is None else pull_version(index, version)
    return index


def pull(index: Path, *, history: bool = False) -> None:
    """Bring the published version to a mirror. Other indexes stay as they are.

    history: bring all manifests as well, as jobs need; there may then be no published
    version yet, or a broken one.
    """
    if (store := store_of(index)) is None:
        return
    mirror = Directory(index)
    with FileLock(index / _PULL_LOCK):
        while True:
            data = store.read(CURRENT)
            if history:
                _pull_history(store, mirror)
            try:
                current = Current.parse(data, store.name)
                _pull_version(store, mirror, current.version, current.sha256)
            except ArtifactError as error:
                # another writer has removed the version meanwhile
                if store.read(CURRENT) != data:
                    continue
                if not history:
                    raise
                if data:
                    logger.warning(
                        "the published version cannot be used: %s",
                        str(error).partition("\n")[0],
                    )
            break
        mirror.follow(CURRENT, data)
    if not history:
        _trim(index)


def pull_version(index: Path, version: int) -> None:
    """Bring a version to a mirror."""
    if (store := store_of(index)) is not None:
        with FileLock(index / _PULL_LOCK):
            _pull_version(store, Directory(index), version)


def pull_history(index: Path) -> int | None:
    """Bring all manifests to a mirror, without other files. Return the published
    version; None without a usable one.
    """
    if (store := store_of(index)) is not None:
        with FileLock(index / _PULL_LOCK):
            _pull_history(store, Directory(index))
    return _parsed((store or Directory(index)).read(CURRENT), index)


def _pull_history(store: Storage, mirror: Directory) -> None:
    manifests = {
        manifest_key(number): store.read(manifest_key(number))
        for number in store.versions()
    }
    mirror.delete(
        [
            key
            for key in map(manifest_key, mirror.versions())
            if manifests.get(key) is None
        ]
    )
    for key, data in manifests.items():
        # None: since the list, its writer has lost a race
        if data is not None and data != mirror.read(key):
            mirror.write(key, data)
    for manifest in list_versions(mirror.path):
        # an engine drops what no version names
        name = f"{manifest.spec.engine.partition('=')[0]}.json"
        places = [
            info
            for file, info in manifest.files.items()
            if file.rpartition("/")[2] == name
        ]
        try:
            copy_blobs(store, mirror, places, [info.sha256 for info in places])
        except ArtifactError as error:
            logger.warning("version %d cannot be used: %s", manifest.version, error)


def _pull_version(
    store: Storage,
    mirror: Directory,
    version: int,
    sha256: str = "",
) -> None:
    """Bring a version, and the taught names. sha256: of its manifest, if it is
    known.
    """
    key = manifest_key(version)
    before = data = mirror.read(key)
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        data = store.read(key)
        if data is None or (sha256 and hashlib.sha256(data).hexdigest() != sha256):
            raise ArtifactError(
                f"{store.name} lacks the manifest of version {version}; roll back to"
                " another one"
            )
    files = Manifest.parse(data, f"{store.name}/{key}").files.values()
    if data != before:
        mirror.write(key, data)
    copy_blobs(store, mirror, files, [info.sha256 for info in files])
    pull_concepts(store, mirror)
    os.utime(mirror.path / key)


def _trim(index: Path) -> None:
    paths = [index / manifest_key(number) for number in version_numbers(index)]
    paths.sort(key=lambda path: path.stat().st_mtime)
    for path in paths[:-_KEPT]:
        path.unlink()
    if paths[:-_KEPT]:
        with suppress(LockedError), hold_writer_lock(index):
            collect_blobs(Directory(index), index)
