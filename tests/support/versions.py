"""Further versions of a published index."""

import shutil
from collections.abc import Callable
from pathlib import Path

from index_jobs.jobs.summary import RebuildSummary
from index_jobs.store.publish import open_staging, publish_version
from index_jobs.store.versions import open_current

Build = Callable[..., RebuildSummary]  # the fixture `build`


def publish_copy(index: Path, keep: int = 3) -> int:
    """Publish the current version once more."""
    current = open_current(index)
    with open_staging(index) as staging:
        for name in current.manifest.files:
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(current.path / name, staging / name)
        return publish_version(index, staging, current.manifest, keep=keep).version
