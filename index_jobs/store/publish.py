"""Publication of versions: stage, verify, rename, then replace CURRENT.

- A lock admits one writer at a time; the system releases it when the writer dies.
- A version is staged in `versions/.tmp-*`. Once everything is on disk and has been read back, a rename gives it its
  number. CURRENT is replaced after that. A job killed at any point leaves CURRENT at a complete version.
- A directory is renamed before it is removed, so a killed removal leaves nothing that looks like a version or a shard.
  The next writer removes such leftovers.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np

from dcar_core.util.errors import ArtifactError, DcarError
from dcar_core.util.files import fsync_path, fsync_tree, link_or_copy, sha256_of, write_json
from dcar_core.util.processes import hold_lock
from index_jobs.engines.protocol import load_engine
from index_jobs.row_filter import NO_ROWS
from index_jobs.spec import BuildOptions
from index_jobs.store.artifact import Artifact, read_rows
from index_jobs.store.location import store_of
from index_jobs.store.manifest import CHANGED, MANIFEST, REMOVED, VERSIONS, FileInfo, Manifest, utc_now
from index_jobs.store.names import index_name, location_of
from index_jobs.store.versions import (
    STAGING,
    current_version_or_none,
    list_versions,
    open_version,
    remove_directory,
    version_numbers,
    write_current,
)

logger = logging.getLogger(__name__)

LOCK = ".lock"
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
def open_staging(index: Path) -> Iterator[Path]:
    """Lock the index for this writer and yield an empty staging directory, which is removed at the end.

    Raise LockedError also in place of an ArtifactError, if another machine has published meanwhile.
    """
    with _lock(index):
        if (store := store_of(index)) is not None:
            store.pull(history=True)
        versions = index / VERSIONS
        versions.mkdir(exist_ok=True)
        for leftover in versions.glob(f"{STAGING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = versions / f"{STAGING}{os.getpid()}"
        staging.mkdir()
        try:
            yield staging
        except ArtifactError:  # perhaps of a collection that the winner of a race has dropped
            if store is not None:
                store.require_base()
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def publish_version(
    index: Path, staging: Path, manifest: Manifest, shared: Mapping[str, FileInfo], *, keep: int = BuildOptions.keep
) -> Manifest:
    """Prepare and commit a staged version; within `open_staging`."""
    return commit_version(index, prepare_version(index, staging, manifest, shared), keep=keep)


def prepare_version(index: Path, staging: Path, manifest: Manifest, shared: Mapping[str, FileInfo]) -> Artifact:
    """Complete the staged files with a manifest, flush them to disk, and verify them; within `open_staging`.

    Args:
        manifest: its version, time, files and the reasons for a rebuild are filled in here.
        shared: files linked from a published version, which are not read again.

    Raises:
        ArtifactError: the staged version does not open, or does not read back as it was written.
        OSError: the disk is full or cannot be written.
    """
    # tantivy may hold the locks of its directory for a moment after it has written.
    staged_files = (path for path in sorted(staging.rglob("*")) if path.suffix != ".lock" and path.is_file())
    names = [path.relative_to(staging).as_posix() for path in staged_files]
    files = {
        name: shared.get(name) or FileInfo((staging / name).stat().st_size, sha256_of(staging / name)) for name in names
    }
    hidden = [read_rows(staging / name, manifest.rows) for name in (REMOVED, CHANGED) if name in files]
    manifest = replace(
        manifest, version=next_version(index), created=utc_now(), files=files, replaced=current_version_or_none(index),
        rebuild="; ".join(_rebuild_reasons(manifest, len(reduce(np.union1d, hidden, NO_ROWS)))),
    )  # fmt: skip
    write_json(staging / MANIFEST, manifest.to_dict())
    fsync_tree(staging, skip=shared)
    staged = Artifact.open(staging)
    staged.verify(skip=shared)
    return staged


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


def commit_version(index: Path, staged: Artifact, *, keep: int = BuildOptions.keep) -> Manifest:
    """Make a prepared version the current one, and remove the oldest; within the same `open_staging`.

    Args:
        keep: versions to keep of its own history, builds or changes: the new one and the one that it replaces
            first, then the newest. Changes that are older than every build that is kept go with the builds.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    manifest, store = staged.manifest, store_of(index)
    staged.path.rename(index / VERSIONS / str(manifest.version))
    fsync_path(index / VERSIONS)
    manifests = list_versions(index)
    written = {each.version for each in manifests if each.origin}
    displaced = _displaced(manifest, version_numbers(index), written, keep)
    if store is not None:
        store.push(manifest.version, displaced)  # if that fails, the next writer removes what the store lacks
    write_current(index, manifest.version)
    stores = {each.version: each.spec.engine.partition("?")[0] for each in manifests}
    is_same_store = stores.get(manifest.replaced or 0) == stores[manifest.version]
    last = [number for number in displaced if number == manifest.replaced and is_same_store]
    for number in set(displaced).difference(last):
        remove_directory(index, index / VERSIONS / str(number))
    _sync({each.spec.engine for each in manifests}, index, manifest.version)
    for number in last:  # services search it until they have loaded the new one, so its collections are dropped later
        remove_directory(index, index / VERSIONS / str(number))
    if store is not None:
        store.prune()
    return manifest


def _displaced(new: Manifest, numbers: Sequence[int], written: set[int], keep: int) -> list[int]:
    """Return the versions that a new one displaces; see `commit_version`. written: those with an origin."""
    protected = {new.version, new.replaced} if keep > 1 else {new.version}
    ranked = sorted(numbers, key=lambda number: (number in protected, number), reverse=True)
    own = [number for number in ranked if (number in written) == bool(new.origin)]
    oldest = 0 if new.origin else min(own[:keep])
    return [*own[keep:], *(number for number in written - protected if number < oldest)]


def share_files(version: Path, staging: Path, files: Mapping[str, FileInfo]) -> dict[str, FileInfo]:
    """Put files of a published version into a staged one, as hard links where the file system has them."""
    for name in files:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(version / name, staging / name)
    return dict(files)


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
    if (store := store_of(index)) is not None:
        store.pull(history=True)
    if not version_numbers(index):
        raise ArtifactError(f"{location_of(index)} holds no published index")
    with report_os_errors(index), _lock(index):
        if to is None:
            current = current_version_or_none(index)
            earlier = [number for number in version_numbers(index) if current is None or number < current]
            if not earlier:
                raise ArtifactError(f"{location_of(index)} has no version earlier than {current} to roll back to")
            replaced = [manifest.replaced for manifest in list_versions(index) if manifest.version == current]
            to = replaced[0] if replaced and replaced[0] in earlier else earlier[-1]
        if store is not None and to in version_numbers(index):
            store.pull(to)
            store.repair(to)
        artifact = open_version(index, to)
        if store is None:
            artifact.verify()
        else:  # `repair` has read every file
            store.point(to)
        write_current(index, to)
        _sync({manifest.spec.engine for manifest in list_versions(index)}, index, to)
    return to


def _lock(index: Path) -> AbstractContextManager[None]:
    index.mkdir(parents=True, exist_ok=True)
    return hold_lock(
        index / LOCK,
        f"another job is writing to {index} (it holds {index / LOCK}); wait until it has ended, or give another --out",
    )


def _sync(engines: set[str], index: Path, version: int) -> None:
    """Let engines follow CURRENT. The last writer to do so finds what other machines have published meanwhile."""
    for engine in sorted(engines):
        load_engine(engine).sync(index, index_name(index), version)
    store = store_of(index)
    if store is None or engines == {"faiss"}:
        return
    try:
        newest = store.pull(history=True)
    except ArtifactError as error:
        logger.warning("whether another machine has published meanwhile is unknown: %s", error)
        return
    if newest not in (None, version):
        _sync(engines.union(manifest.spec.engine for manifest in list_versions(index)), index, newest)


def next_version(index: Path) -> int:
    return max([*version_numbers(index), current_version_or_none(index) or 0]) + 1


def clean_work(index: Path, work: Path, keep: Callable[[Path], bool]) -> None:
    """Remove the folders of `work` that `keep` rejects, within `open_staging`; a failure is left to the next writer."""
    for folder in sorted(work.iterdir()) if work.is_dir() else ():
        if folder.is_dir() and not keep(folder):
            remove_directory(index, folder)
