"""One rebuild: its inputs, and the check whether the current version is already what it would publish."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dcar_core.util.errors import ArtifactError
from index_jobs.options import RebuildOptions
from index_jobs.store.manifest import Manifest
from index_jobs.store.versions import open_current

if TYPE_CHECKING:
    from index_jobs.gallery.scan import Gallery
    from index_jobs.jobs.quality_gate import QueryPairs


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
            and manifest.has_term_lists
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
