"""Versions of an index: written aside, verified, given their name, then made current, each step all or nothing.

- One writer at a time, by a lock that the system frees when the writer dies.
- A version is staged in `versions/.tmp-*`; the rename that gives it its number comes after everything is on the disk
  and has been read back. `CURRENT` is replaced after that. Killed anywhere, CURRENT names what it named, or the new
  version whole.
- What is removed is renamed first: a removal that is killed leaves nothing that looks like a version or a shard, and
  the next writer clears what a killed one left.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from dcar_core.util.errors import ArtifactError, DcarError, LockedError
from dcar_core.util.files import atomic_writer, fsync_path, fsync_tree, sha256_of, write_json
from index_jobs.options import RebuildOptions
from index_jobs.store import milvus
from index_jobs.store.artifact import Artifact, current_if_known, open_version, version_numbers
from index_jobs.store.manifest import CURRENT, MANIFEST, VERSIONS, FileInfo, Manifest

LOCK = ".lock"
_STAGING = ".tmp-"
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


@contextlib.contextmanager
def reporting(index: Path) -> Iterator[None]:
    """What the system refuses, such as a full disk, as one line for people.

    Raises:
        DcarError: in an OSError's place.
    """
    try:
        yield
    except OSError as error:
        if _SHORT_WRITE.fullmatch(str(error)):  # how NumPy tells a full disk
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if error.errno is None:  # a library that cannot be loaded, say: trying again would not help
            raise DcarError(f"the index {index} cannot be made: {error}; what was published is unchanged") from error
        written = error.filename2 or error.filename  # of two, the first was read
        place = f" ({written})" if written else ""
        raise DcarError(
            f"the index {index} cannot be written: {error.strerror or error}{place}; what was published before is "
            f"unchanged, and the same command goes on where it stopped"
        ) from error


@contextlib.contextmanager
def writing(index: Path) -> Iterator[Path]:
    """Be the index's one writer; gives an empty staging directory, which is removed at the end if still there.

    Raises:
        LockedError: another writer is at work.
        OSError: the index directory cannot be written.
    """
    with _locked(index):
        versions = index / VERSIONS
        versions.mkdir(exist_ok=True)
        for leftover in versions.glob(f"{_STAGING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = versions / f"{_STAGING}{os.getpid()}"
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def publish(
    index: Path,
    staging: Path,
    manifest: Manifest,
    *,
    keep: int = RebuildOptions.keep,
    shared: Mapping[str, FileInfo] | None = None,
) -> Manifest:
    """`prepare` and `commit`, for what needs no look between them."""
    return commit(index, prepare(index, staging, manifest, shared=shared), keep=keep)


def prepare(
    index: Path, staging: Path, manifest: Manifest, *, shared: Mapping[str, FileInfo] | None = None
) -> Artifact:
    """What lies in `staging` as a version, complete and verified, that only has to be published; within `writing`.

    Args:
        manifest: its version and files are filled in here.
        shared: what is known of files that `share` took over; they are not read again.

    Raises:
        ArtifactError: the staged version does not open, or does not read back as it was written.
        OSError: the disk is full or cannot be written.
    """
    shared = shared or {}
    names = [path.relative_to(staging).as_posix() for path in sorted(staging.rglob("*")) if path.is_file()]
    files = {
        name: shared.get(name) or FileInfo((staging / name).stat().st_size, sha256_of(staging / name)) for name in names
    }
    manifest = replace(manifest, version=next_version(index), files=files, replaced=current_if_known(index))
    write_json(staging / MANIFEST, manifest.to_dict())
    fsync_tree(staging)
    staged = Artifact(staging)
    staged.verify(known=shared)
    return staged


def commit(index: Path, staged: Artifact, *, keep: int = RebuildOptions.keep) -> Manifest:
    """Make a prepared version the current one, and remove the oldest; within the same `writing`.

    Args:
        keep: how many versions to keep, the new one included.

    Raises:
        OSError: the disk is full or cannot be written. CURRENT is then what it was.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    manifest = staged.manifest
    staged.path.rename(index / VERSIONS / str(manifest.version))
    fsync_path(index / VERSIONS)
    _point(index, manifest.version)
    in_milvus = milvus.places(index)
    _prune(index, keep, {manifest.version, manifest.replaced})
    milvus.follow(index, manifest.version, in_milvus)
    return manifest


def share(version: Path, staging: Path, files: Mapping[str, FileInfo]) -> dict[str, FileInfo]:
    """Files of a published version as files of a staged one, without a copy where the file system has hard links.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    for name in files:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(version / name, staging / name)
        except OSError:  # no hard links here, or too many of this file
            shutil.copyfile(version / name, staging / name)
    return dict(files)


def rollback(index: Path, to: int | None = None) -> int:
    """Make an earlier version current: the one named, or the one that the current one replaced. Returns its number.

    Where that is gone, the newest before the current one; where CURRENT is lost or damaged, the newest of all.

    Raises:
        ArtifactError: there is no such version, or it is not whole; CURRENT is then unchanged.
        LockedError: another writer is at work.
        DcarError: CURRENT cannot be written.
    """
    if not index.is_dir():
        raise ArtifactError(f"{index} holds no published index")
    with reporting(index), _locked(index):
        if to is None:
            current, numbers = current_if_known(index), version_numbers(index)
            earlier = [number for number in numbers if current is None or number < current]
            if not numbers:
                raise ArtifactError(f"{index} holds no published index")
            if not earlier:
                raise ArtifactError(f"{index} has no version before {current} to roll back to")
            replaced = _replaced_by(index, current)
            to = replaced if replaced in earlier else earlier[-1]
        open_version(index, to).verify()
        _point(index, to)
        milvus.follow(index, to)
    return to


def _replaced_by(index: Path, current: int | None) -> int | None:
    """The version that the current one took the place of, where that can be told."""
    with contextlib.suppress(ArtifactError):
        return Manifest.read(index / VERSIONS / str(current) / MANIFEST).replaced
    return None


@contextlib.contextmanager
def _locked(index: Path) -> Iterator[None]:
    index.mkdir(parents=True, exist_ok=True)
    lock = FileLock(index / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(
            f"another job is writing to {index} (it holds {index / LOCK}); wait until it has ended, or "
            f"give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _point(index: Path, version: int) -> None:
    with atomic_writer(index / CURRENT) as file:
        file.write(f"{version}\n".encode())


def next_version(index: Path) -> int:
    """The number that a version published now will get."""
    return max([*version_numbers(index), current_if_known(index) or 0]) + 1


def discard(index: Path, path: Path) -> None:
    """Remove a directory of the index, at once for whoever looks; a failure is left to the next writer."""
    aside = index / VERSIONS / f"{_STAGING}{os.getpid()}-{path.name}"
    with contextlib.suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside)


def clear(index: Path, work: Path, wanted: Callable[[Path], bool]) -> None:
    """Remove the folders of `work` that are not wanted, within `writing`; a failure is left to the next writer."""
    for folder in sorted(work.iterdir()) if work.is_dir() else ():
        if folder.is_dir() and not wanted(folder):
            discard(index, folder)


def _prune(index: Path, keep: int, always: set[int | None]) -> None:
    """Keep so many versions: `always` first, then the newest; the newest of all whatever `keep` is."""
    numbers = version_numbers(index)
    ranked = sorted(numbers, key=lambda number: (number in always, number), reverse=True)
    for number in ranked[keep:]:
        discard(index, index / VERSIONS / str(number))
