"""Publication of versions: write files, put them as blobs, read them back, then let CURRENT name their manifest.

- A lock admits one writer at a time on a machine. Writers of a store share no lock: the first to replace CURRENT wins,
  and the others get LockedError, since their versions were compared with the one that it replaced, or made of it.
- CURRENT names versions as removed before their manifests are deleted, so no rollback can choose them meanwhile.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np

from dcar_core.util.errors import ArtifactError, DcarError, LockedError
from dcar_core.util.files import fsync_path, sha256_of
from index_jobs.engines.protocol import load_engine
from index_jobs.index.index_version import IndexVersion, link_files, read_rows
from index_jobs.index.location import index_name, location_of, store_of
from index_jobs.index.manifest import (
    BLOBS,
    CHANGED,
    CURRENT,
    REMOVED,
    Current,
    FileInfo,
    Manifest,
    manifest_key,
    utc_now,
)
from index_jobs.index.storage import Directory, copy_blobs, verify
from index_jobs.index.versions import (
    collect_blobs,
    current_version_or_none,
    hold_writer_lock,
    list_versions,
    open_current,
    open_version,
    pull,
    read_manifest,
    repair,
    require_index,
    version_numbers,
)
from index_jobs.row_filter import NO_ROWS
from index_jobs.spec import BuildOptions

logger = logging.getLogger(__name__)

ADDED_ROWS = 20_000  # compared one by one in every search, in addition to the built index
_MAX_ADDITIONS, _ADDED_SHARE, _HIDDEN_SHARE = 8, 0.2, 0.2  # beyond these, a rebuild is recommended
_NAMED_ROWS = 20_000  # also beyond this many rows that each search names to an engine
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


@contextlib.contextmanager
def report_os_errors(index: Path) -> Iterator[None]:
    """Raise DcarError, one line for people, in place of an OSError such as a full disk."""
    try:
        yield
    except OSError as error:
        if _SHORT_WRITE.fullmatch(str(error)):  # NumPy's report of a full disk
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if error.errno is None:  # for example a library that cannot be loaded; a retry would not help
            raise DcarError(f"the index {index} cannot be made: {error}; published versions are unchanged") from error
        path = error.filename2 or error.filename  # of two names, the second was to be written
        written = f" ({path})" if path else ""
        raise DcarError(
            f"the index {index} cannot be written: {error.strerror or error}{written}; published versions are "
            f"unchanged, run the same command again to resume"
        ) from error


@contextlib.contextmanager
def new_version(index: Path) -> Iterator["NewVersion"]:
    """Lock the index for this writer, and yield a version to write, in an empty folder.

    Raise LockedError also in place of an ArtifactError, if another machine has published meanwhile.
    """
    with hold_writer_lock(index):
        pull(index, history=True)
        new = NewVersion(index)
        new.clean()
        new.folder.mkdir(parents=True)
        try:
            yield new
        except ArtifactError:  # perhaps of a collection that the winner of a race has dropped
            if (store := store_of(index)) is not None and store.read(CURRENT) != new.base:
                raise store.lost_race() from None
            raise
        finally:
            new.clean()


class NewVersion:
    """A version that is being written.

    folder: where its files are written, by their names. A link to a blob stands for a file of another version. index:
    the directory. number: of the version.
    """

    def __init__(self, index: Path) -> None:
        self.index, self.folder, self.base = index, index / BLOBS / ".new", Directory(index).read(CURRENT)
        self._replaced = current_version_or_none(index)
        self.number = max([*version_numbers(index), self._replaced or 0]) + 1

    def clean(self) -> None:
        """Remove the folder, and blobs that no version names."""
        shutil.rmtree(self.folder, ignore_errors=True)
        collect_blobs(Directory(self.index), self.index)

    def link(self, version: IndexVersion, prefix: str = "", without: tuple[str, ...] = ()) -> None:
        """Take over the files of a published version whose names begin with a prefix, and not with others."""
        names = {each for each in version.manifest.files if each.startswith(prefix) and not each.startswith(without)}
        link_files({name: version.manifest.path(self.index, name) for name in names}, self.folder)

    def prepare(self, manifest: Manifest) -> IndexVersion:
        """Put the files as blobs, flush and read them back, and return the opened version.

        Args:
            manifest: its version, time, files and the reasons for a rebuild are filled in here.

        Raises:
            ArtifactError: the version does not open, or does not read back as it was written.
            OSError: the disk is full or cannot be written.
        """
        files, known = dict[str, FileInfo](), set[FileInfo]()
        for path in sorted(self.folder.rglob("*")):
            if path.is_dir() or path.suffix == ".lock":  # tantivy may hold its locks for a moment after it has written
                continue
            is_link = path.is_symlink()
            info = FileInfo(path.stat().st_size, path.readlink().name if is_link else sha256_of(path))
            files[path.relative_to(self.folder).as_posix()] = info
            if is_link:
                known.add(info)
            else:
                fsync_path(path)
                path.replace(blob := self.index / info.key)
                path.unlink(missing_ok=True)  # it may have been a link to the same inode
                path.symlink_to(blob.absolute())
        fsync_path(self.index / BLOBS)
        hidden = [read_rows(self.folder / name, manifest.rows) for name in (REMOVED, CHANGED) if name in files]
        manifest = replace(
            manifest, version=self.number, created=utc_now(), files=files, replaced=self._replaced,
            rebuild="; ".join(_rebuild_reasons(manifest, len(reduce(np.union1d, hidden, NO_ROWS)))),
        )  # fmt: skip
        version = IndexVersion.open(self.index, manifest)
        verify(Directory(self.index), manifest, known)
        return version

    def publish(self, manifest: Manifest, *, keep: int = BuildOptions.keep) -> Manifest:
        """Prepare and commit the version."""
        return self.commit(self.prepare(manifest).manifest, keep=keep)

    def commit(self, manifest: Manifest, *, keep: int = BuildOptions.keep) -> Manifest:
        """Make a prepared version the current one, and remove the oldest.

        Args:
            keep: versions to keep of its own history, builds or changes: the new one and the one that it replaces
                first, then the newest. Changes that are older than every build that is kept go with the builds.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        index, local, store = self.index, Directory(self.index), store_of(self.index)
        manifests = {each.version: each for each in [*list_versions(index), manifest]}
        displaced = _displaced(manifest, version_numbers(index), manifests, keep)
        if store is not None:
            base = manifests[manifest.replaced].files if manifest.replaced in manifests else {}
            copy_blobs(local, store, manifest.files.values(), [info.sha256 for info in base.values()])
        storage, key = store or local, manifest_key(manifest.version)
        storage.create(key, manifest.to_bytes())
        if store is not None:
            local.write(key, manifest.to_bytes())
        removed = storage.removing() | displaced
        try:
            _point(index, self.base, manifest.version, removed)
        except LockedError:
            storage.delete([key])
            raise
        stores = {number: each.spec.engine.partition("?")[0] for number, each in manifests.items()}
        if stores.get(manifest.replaced or 0) == stores[manifest.version]:
            displaced.discard(manifest.replaced or 0)  # services search it until they have loaded the new one
        kept = [each for number, each in manifests.items() if number not in displaced]
        _sync({each.spec.engine for each in manifests.values()}, index, manifest.version, kept)
        keys = [manifest_key(number) for number in removed]
        local.delete(keys)
        try:
            storage.delete(keys)
            collect_blobs(storage, index)
        except ArtifactError as error:  # left to the next writer
            logger.warning("old versions are kept: %s", error)
        return manifest


def _displaced(new: Manifest, numbers: Sequence[int], manifests: Mapping[int, Manifest], keep: int) -> set[int]:
    """Return the versions that a new one displaces; see `NewVersion.commit`."""
    written = {number for number, each in manifests.items() if each.origin}
    protected = {new.version, new.replaced} if keep > 1 else {new.version}
    ranked = sorted({*numbers, new.version}, key=lambda number: (number in protected, number), reverse=True)
    own = [number for number in ranked if (number in written) == bool(new.origin)]
    oldest = 0 if new.origin else min(own[:keep])
    return {*own[keep:], *(number for number in written - protected if number < oldest)}


def _rebuild_reasons(manifest: Manifest, hidden: int) -> Iterator[str]:
    """Yield why a rebuild is recommended. hidden: rows that are removed, or changed since an engine stored them."""
    rows, added, limit = manifest.rows, sum(each.count for each in manifest.additions), _HIDDEN_SHARE * manifest.rows
    if len(manifest.additions) >= _MAX_ADDITIONS:
        yield f"every search goes through {len(manifest.additions)} additions"
    if added > max(_ADDED_SHARE * (rows - added), ADDED_ROWS):
        yield f"{added:,} of {rows:,} items are outside the built index"
    if manifest.spec.is_local and hidden > limit:
        yield f"{hidden:,} of {rows:,} rows are removed, and skipped in every search"
    if not manifest.spec.is_local and hidden > min(limit, _NAMED_ROWS):
        yield f"{hidden:,} of {rows:,} rows are removed or changed, and named in every search"


def rollback(index: Path, to: int | None = None) -> int:
    """Make an earlier version current and return its number.

    Args:
        to: the version; None for the one that the current version replaced, or the newest before it if that is gone, or
            the newest of all if CURRENT is lost or damaged.

    Raises:
        ArtifactError: the version does not exist or is incomplete; CURRENT is then unchanged.
        LockedError: another writer is at work.
        DcarError: CURRENT cannot be written.
    """
    pull(index, history=True)
    if not version_numbers(index):
        raise ArtifactError(f"{location_of(index)} holds no published index")
    with report_os_errors(index), hold_writer_lock(index):
        local, store = Directory(index), store_of(index)
        if to is None:
            current = current_version_or_none(index)
            earlier = [number for number in version_numbers(index) if current is None or number < current]
            if not earlier:
                raise ArtifactError(f"{location_of(index)} has no version earlier than {current} to roll back to")
            replaced = [manifest.replaced for manifest in list_versions(index) if manifest.version == current]
            to = replaced[0] if replaced and replaced[0] in earlier else earlier[-1]
        manifest = read_manifest(index, to)
        if store is not None:
            pull(index, to)
            repair(index, to)
        open_version(index, to)
        verify(local, manifest)
        _point(index, local.read(CURRENT), to, (store or local).removing())
        manifests = list_versions(index)
        _sync({each.spec.engine for each in manifests}, index, to, manifests)
    return to


def _point(index: Path, base: bytes | None, version: int, removed: Set[int]) -> None:
    """Let CURRENT name a version, first in the store. Raise LockedError if it is not as before."""
    data = Current(version, sha256_of(index / manifest_key(version)), removed).to_bytes()
    if (store := store_of(index)) is not None:
        store.swap(base, data)
        Directory(index).write(CURRENT, data)
    else:
        Directory(index).swap(base, data)


def verify_index(index: Path) -> list[Manifest]:
    """Compare every file of every version with its hash, in the store of a mirror, and return the manifests.

    Raise ArtifactError at the first fault found.
    """
    store, published, known = store_of(index), pull(index, history=True, files=False), set[FileInfo]()
    if store is None:
        require_index(index)
    elif published is None:
        Current.parse(store.read(CURRENT), store.name)  # raises
    manifests = [read_manifest(index, number) for number in version_numbers(index)]
    for manifest in manifests:
        verify(store or Directory(index), manifest, known)
    if store is None:
        open_current(index)
    return manifests


def _sync(engines: set[str], index: Path, version: int, manifests: Sequence[Manifest]) -> None:
    """Let engines follow CURRENT. The last writer to do so finds what other machines have published meanwhile."""
    parts = {
        each.version: [each.paths(index), *(each.paths(index, f"{added.folder}/") for added in each.additions)]
        for each in manifests
    }
    for engine in sorted(engines):
        load_engine(engine).sync(index_name(index), version, parts)
    if store_of(index) is None or engines == {"faiss"}:
        return
    try:
        newest = pull(index, history=True)
    except ArtifactError as error:
        logger.warning("whether another machine has published meanwhile is unknown: %s", error)
        return
    if newest not in (None, version):
        manifests = list_versions(index)
        _sync(engines | {each.spec.engine for each in manifests}, index, newest, manifests)
