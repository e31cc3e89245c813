"""Further versions of a published index."""

import shutil
from collections.abc import Callable
from pathlib import Path

from dcar_core.util.files import sha256_of
from index_jobs.index.manifest import CURRENT, Current, Manifest, manifest_key
from index_jobs.index.versions import (
    new_version,
    open_current,
    read_current,
    read_manifest,
)
from index_jobs.jobs.build import RebuildSummary

Build = Callable[..., RebuildSummary]  # the fixture `build`


def file_of(index: Path, name: str, version: int | None = None) -> Path:
    """Return the blob of a file of a version, by default of the current one."""
    current = read_current(index)
    number = version or (current.version if current else 0)
    return read_manifest(index, number).path(index, name)


def point(index: Path, version: int) -> None:
    """Let CURRENT name a version, as it is."""
    (index / CURRENT).write_bytes(
        Current(version, sha256_of(index / manifest_key(version))).to_bytes()
    )


def write_manifest(index: Path, manifest: Manifest) -> None:
    """Write the manifest of a version anew, and let CURRENT name it."""
    (index / manifest_key(manifest.version)).write_bytes(manifest.to_bytes())
    point(index, manifest.version)


def copy_files(index: Path, folder: Path) -> Manifest:
    """Copy the files of the current version into a folder, and return its manifest."""
    current = open_current(index)
    for name, path in current.manifest.paths(index).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    return current.manifest


def publish_copy(index: Path, keep: int = 3, source: Path | None = None) -> int:
    """Publish the current version once more, or that of another index."""
    with new_version(index) as new:
        return new.publish(copy_files(source or index, new.folder), keep=keep).version
