"""The entry of a rebuild: scan the gallery, and run the steps unless nothing has changed.

- An unchanged gallery, checkpoint and kind return the current version at once, without importing PyTorch.
- A killed run resumes after its last complete shard. Another kind or other captions need no encoding.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.util.errors import CheckpointError
from dcar_core.util.files import canonical_json, sha256_of
from index_jobs.jobs.rebuild_job import RebuildJob
from index_jobs.jobs.summary import RebuildSummary, summarise
from index_jobs.options import RebuildOptions
from index_jobs.store.publish import report_os_errors

if TYPE_CHECKING:
    from index_jobs.gallery.scan import Gallery


def rebuild(
    gallery: "str | Path | Sequence[str] | Gallery", checkpoint: Path, out: Path, **options: Any
) -> RebuildSummary:
    """Publish an index of a gallery, encoded with a checkpoint.

    Args:
        gallery: a folder, an uncompressed tar, or a list, as a path or URL, or several; see `index_jobs.gallery.scan`.
            A scanned gallery is taken as it is.
        checkpoint: a DCAR checkpoint directory.
        out: the index directory; created if missing.
        options: the fields of `RebuildOptions`.

    Raises:
        DataError: the gallery cannot be used, too many images are broken, no item has a field that the options name,
            or the kind is unknown.
        CheckpointError, ModelError: the model cannot be loaded; or the served version's model cannot, without force.
        LockedError: another job is writing to `out`.
        GalleryShrunkError: too many of the served images are gone from the gallery.
        RejectedError: the rebuilt index ranks worse than the served one, which stays published.
        StoreUnavailableError: the served version's store does not respond, without force.
        ArtifactError: a shard is corrupted, or the written files do not read back.
        DcarError: the output cannot be written; published versions are unchanged.
    """
    start = time.perf_counter()
    settings = RebuildOptions(**options)
    with report_os_errors(out):
        from index_jobs.gallery.scan import Gallery, scan

        scanned = gallery if isinstance(gallery, Gallery) else scan(gallery)
        job = RebuildJob(scanned, checkpoint, _checkpoint_signature(checkpoint), out, settings, start)
        if not settings.force and (current := job.find_published(checkpoint_signature=job.signature)):
            return summarise(out, current, start=start)

        from index_jobs.jobs.rebuild_run import run

        return run(job)


def _checkpoint_signature(checkpoint: Path) -> str:
    """Return a hash over the directory's files, to recognise an unchanged checkpoint without loading a model.

    The configuration holds a hash of the backbone, so the signature covers that as well.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no checkpoint directory; `dcar train` or `dcar zero-shot` writes one")
    files = {path.name: sha256_of(path) for path in checkpoint.iterdir() if path.is_file()}
    return hashlib.sha256(canonical_json(files)).hexdigest()
