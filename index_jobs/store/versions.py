"""Published versions of an index directory: list, open and verify them.

INDEX/CURRENT                        one line, the version that is served; replaced atomically
INDEX/versions/<n>/manifest.json     fingerprint, counts, kind, measurements, checksums of all files
INDEX/versions/<n>/index.faiss       vectors, memory-mapped
INDEX/versions/<n>/<engine>.json      instead of index.faiss: where another engine stores the vectors
INDEX/versions/<n>/items.arrow       ids, captions, metadata and image locations, memory-mapped
INDEX/versions/<n>/lexical/          the words of the items; see `lexical`
INDEX/versions/<n>/added-<m>/        vectors and items added after the build; see `artifact`
INDEX/versions/<n>/removed.npy       rows of items removed after the build
INDEX/versions/<n>/failed.jsonl      images that could not be read, with reasons
INDEX/versions/<n>/duplicates.jsonl  images with the same pixels as an earlier one
INDEX/versions/<n>/checkpoint/       the model that encoded the vectors, perhaps with its portable export
"""

import contextlib
import logging
import os
import shutil
from pathlib import Path

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import write_bytes
from index_jobs.store.artifact import Artifact, ImageAccess
from index_jobs.store.manifest import CURRENT, MANIFEST, VERSIONS, Manifest
from index_jobs.store.names import location_of

logger = logging.getLogger(__name__)

STAGING = ".tmp-"  # the names of what is not a version yet, or no longer
_MAX_DIGITS = 18


def current_version(index: Path) -> int | None:
    """Return the version that CURRENT names, None if nothing is published. Reads one line; fit for polling.

    Raises:
        ArtifactError: CURRENT cannot be read or names no version.
    """
    try:
        text = (index / CURRENT).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{index / CURRENT} cannot be read: {error}") from error
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        raise ArtifactError(f"{index / CURRENT} names no version: {text[:40]!r}; roll back to one of `dcar index list`")
    return int(text)


def current_version_or_none(index: Path) -> int | None:
    """Return the version that CURRENT names, None also if CURRENT is damaged; for callers that repair it."""
    try:
        return current_version(index)
    except ArtifactError as error:
        logger.warning("%s", error)
        return None


def require_index(index: Path) -> int:
    """Return the version that CURRENT names. Raise ArtifactError, which names the command to run, if there is none."""
    version, name = current_version(index), location_of(index)
    if version is None and version_numbers(index):
        raise ArtifactError(f"{name} has versions but no CURRENT; `dcar index rollback {name}` restores the newest")
    if version is None:
        raise ArtifactError(
            f"{name} holds no published index; make one with "
            f"`dcar index build --gallery PATH --checkpoint DIR --out {name}`"
        )
    return version


def open_current(index: Path, access: ImageAccess | None = None) -> Artifact:
    """Open the published version. access: limits on the images that are read; None for no limit.

    Raises:
        ArtifactError: nothing is published, or the version is incomplete.
    """
    version = require_index(index)
    while True:
        try:
            return open_version(index, version, access)
        except ArtifactError:  # a writer may have published another version and removed this one in the meantime
            newest = current_version(index)
            if newest is None or newest == version:
                raise
            version = newest


def open_version(index: Path, version: int, access: ImageAccess | None = None) -> Artifact:
    """Open a version by its number; other arguments and errors as of `open_current`."""
    path = index / VERSIONS / str(version)
    if not path.is_dir():
        available = ", ".join(map(str, version_numbers(index))) or "none"
        raise ArtifactError(f"{location_of(index)} has no version {version}; it has {available}")
    return Artifact.open(path, access)


def version_numbers(index: Path) -> list[int]:
    """Return every version on disk, ascending; unfinished ones have no number yet."""
    folder = index / VERSIONS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def read_manifest(index: Path, version: int) -> Manifest:
    return Manifest.read(index / VERSIONS / str(version) / MANIFEST)


def list_versions(index: Path) -> list[Manifest]:
    """Return the manifests of every version, ascending. An unreadable one is logged and left out."""
    manifests = []
    for version in version_numbers(index):
        try:
            manifests.append(read_manifest(index, version))
        except ArtifactError as error:
            logger.warning("%s", error)
    return manifests


def verify_index(index: Path) -> list[Manifest]:
    """Verify CURRENT and every version, and return the manifests. Raise ArtifactError at the first fault found."""
    open_current(index)
    artifacts = [open_version(index, number) for number in version_numbers(index)]
    for artifact in artifacts:
        artifact.verify()
    return [artifact.manifest for artifact in artifacts]


def write_current(index: Path, version: int) -> None:
    write_bytes(index / CURRENT, f"{version}\n".encode())


def remove_directory(index: Path, path: Path) -> None:
    """Remove a directory of the index, atomically for readers; a failure is left to the next writer."""
    aside = index / VERSIONS / f"{STAGING}{os.getpid()}-{path.name}"
    with contextlib.suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside)
