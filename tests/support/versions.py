"""Further versions of a published index."""

import shutil
from collections.abc import Callable
from pathlib import Path

from index_jobs.jobs.summary import RebuildSummary
from index_jobs.store.manifest import Manifest
from index_jobs.store.publish import open_staging, publish_version
from index_jobs.store.versions import open_current

Build = Callable[..., RebuildSummary]  # the fixture `build`


def copy_files(index: Path, staging: Path) -> Manifest:
    """Copy the files of the current version into a staged one, and return its manifest."""
    current = open_current(index)
    for name in current.manifest.files:
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(current.path / name, staging / name)
    return current.manifest


def publish_copy(index: Path, keep: int = 3, source: Path | None = None) -> int:
    """Publish the current version once more, or that of another index."""
    with open_staging(index) as staging:
        return publish_version(index, staging, copy_files(source or index, staging), {}, keep=keep).version
