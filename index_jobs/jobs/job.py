"""A rebuild: the entry, and the check whether the current version is already what the job would publish.

- An unchanged gallery, checkpoint and kind return the current version at once, without importing PyTorch.
- A killed run resumes after its last complete shard. Another kind or other captions need no encoding.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.util.errors import ArtifactError, CheckpointError
from dcar_core.util.files import canonical_json, sha256_of
from index_jobs.jobs.summary import RebuildSummary, summarize
from index_jobs.options import RebuildOptions
from index_jobs.store.manifest import Manifest
from index_jobs.store.publish import report_os_errors
from index_jobs.store.versions import open_current

if TYPE_CHECKING:
    from index_jobs.gallery.scan import Gallery
    from index_jobs.jobs.quality_gate import QueryPairs


def rebuild(gallery: str | Path | Sequence[str], checkpoint: Path, out: Path, **options: Any) -> RebuildSummary:
    """Publish an index of a gallery, encoded with a checkpoint.

    Args:
        gallery: a folder, an uncompressed tar, or a list, as a path or URL, or several; see `index_jobs.gallery.scan`.
        checkpoint: a DCAR checkpoint directory.
        out: the index directory; created if missing.
        options: the fields of `RebuildOptions`.

    Raises:
        DataError: the gallery cannot be used, too many images are broken, or the kind is unknown.
        CheckpointError, ModelError: the model cannot be loaded; or the served version's model cannot, without force.
        LockedError: another job is writing to `out`.
        GalleryShrunkError: too many of the served images are gone from the gallery.
        RejectedError: the rebuilt index ranks worse than the served one, which stays published.
        ArtifactError: a shard is corrupted, or the written files do not read back.
        DcarError: the output cannot be written; published versions are unchanged.
    """
    start = time.perf_counter()
    settings = RebuildOptions(**options)
    with report_os_errors(out):
        from index_jobs.gallery.scan import scan

        scanned = scan(gallery)
        job = RebuildJob(scanned, checkpoint, _checkpoint_signature(checkpoint), out, settings, start)
        if not settings.force and (current := job.find_published(checkpoint_signature=job.signature)):
            return summarize(out, current, start=start)

        from index_jobs.jobs.rebuild_run import run

        return run(job)


def _checkpoint_signature(checkpoint: Path) -> str:
    """Return a hash over the directory's files, to recognise an unchanged checkpoint without loading a model.

    The configuration holds a hash of the backbone, so the signature covers that as well.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no checkpoint directory; `dcar train --out DIR` writes one")
    files = {path.name: sha256_of(path) for path in checkpoint.iterdir() if path.is_file()}
    return hashlib.sha256(canonical_json(files)).hexdigest()


@dataclass(frozen=True)
class RebuildJob:
    """One rebuild. signature: hash of the checkpoint's files. start: of the job, by `time.perf_counter`."""

    gallery: "Gallery"
    checkpoint: Path
    signature: str
    out: Path
    options: RebuildOptions
    start: float

    def find_published(self, **required: str) -> Manifest | None:
        """Return the current version's manifest if it is what this job would publish.

        Args:
            required: values that the manifest must have besides those of the options.
        """
        try:
            manifest = open_current(self.out).manifest
        except ArtifactError:
            return None
        options = self.options
        matches = (
            manifest.gallery_signature == self.gallery.content_signature
            and manifest.source == self.gallery.source
            and manifest.requested_kind == options.kind
            and manifest.milvus == (options.milvus or "")
            and manifest.requested_memory == options.memory
            and manifest.target_recall == options.target_recall
            and manifest.exact == options.exact
            and manifest.has_lexical
            and manifest.text_fields == (None if options.text_fields is None else list(options.text_fields))
            and manifest.group_field == options.group_field
            and options.runtime in {"auto", manifest.runtime}
            and not manifest.additions
            and not manifest.removed
            and self._is_calibrated(manifest)
            and manifest.failed <= options.max_failed * len(self.gallery)
            and all(getattr(manifest, name) == value for name, value in required.items())
        )
        return manifest if matches else None

    @cached_property
    def pairs(self) -> "QueryPairs | None":
        """The pairs that compare indexes; see `quality_gate.find_pairs`."""
        from index_jobs.jobs import quality_gate

        return quality_gate.find_pairs(self.gallery, self.options.validation)

    def _is_calibrated(self, manifest: Manifest) -> bool:
        if self.options.validation is None or self.pairs is None:
            return True
        return bool(manifest.cutoff.get("pairs_signature") == self.pairs.signature)
