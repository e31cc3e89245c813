"""The steps of a rebuild: encode, build, compare with the served version, publish, notify.

- An unchanged gallery, checkpoint and kind return the current version at once. A killed run resumes after its last
  complete shard. Another kind or other captions need no encoding.
- The checkpoint is copied first and loaded from the copy, so a version contains the model that encoded it.
- Errors are found before the first image is encoded: lock, output, checkpoint, kind, validation pairs, the served
  version's model, and disk space.
- `out/work` keeps the vectors of the served version, and those of one rejected or interrupted rebuild.
"""

import contextlib
import datetime
import hashlib
import logging
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.util.errors import ArtifactError, CheckpointError
from dcar_core.util.files import canonical_json, sha256_of
from index_jobs.jobs.summary import RebuildSummary, RejectedError, summarize
from index_jobs.options import RebuildOptions
from index_jobs.store.manifest import CHECKPOINT, Manifest
from index_jobs.store.publish import report_os_errors
from index_jobs.store.versions import open_current

if TYPE_CHECKING:
    from dcar_core import Encoder
    from index_jobs.building.kinds import IndexChoice
    from index_jobs.encoding.encoding_state import EncodedGallery
    from index_jobs.gallery.scan import Gallery
    from index_jobs.jobs.quality_gate import GateVerdict, QueryPairs
    from index_jobs.jobs.served_version import ServedVersion
    from index_jobs.store.artifact import Artifact

logger = logging.getLogger(__name__)

WORK = "work"
AUTO = "auto"
_MARK_PREFIX = "of-"  # of an empty file among the shards that names the versions they belong to


def rebuild(gallery: str | Path, checkpoint: Path, out: Path, **options: Any) -> RebuildSummary:
    """Publish an index of a gallery, encoded with a checkpoint.

    Args:
        gallery: a folder, an uncompressed tar, or a list, as a path or URL; see `index_jobs.gallery.scan`.
        checkpoint: a DCAR checkpoint directory.
        out: the index directory; created if missing.
        options: the fields of `RebuildOptions`.

    Raises:
        DataError: the gallery cannot be used, too many images are broken, or the kind is unknown.
        CheckpointError, ModelError: the model cannot be loaded; or the served version's model cannot, without force.
        LockedError: another job is writing to `out`.
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
        return job.run()


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
            and options.runtime in {AUTO, manifest.runtime}
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
        from index_jobs.jobs.cutoff_calibration import SIGNATURE, pairs_signature

        if self.options.validation is None or self.pairs is None:
            return True
        return manifest.cutoff.get(SIGNATURE) == pairs_signature(self.pairs)

    def run(self) -> RebuildSummary:
        """Do all necessary steps; see `rebuild`."""
        from dcar_core.model.checkpoint import copy_checkpoint
        from index_jobs.encoding.encoding_state import shard_store
        from index_jobs.jobs.notify import notify
        from index_jobs.jobs.served_version import ServedVersion
        from index_jobs.jobs.version_writer import choose_kinds, require_disk_space
        from index_jobs.store import gpu_search, milvus, publish

        options, gallery, out, work = self.options, self.gallery, self.out, self.out / WORK
        pairs = self.pairs
        with publish.open_staging(out) as staging:
            copy_checkpoint(self.checkpoint, staging / CHECKPOINT)
            replicas, runtime = self._load_replicas(staging / CHECKPOINT)
            encoder = replicas[0]
            if not options.force and (current := self.find_published(fingerprint=encoder.fingerprint)):
                return summarize(out, current, start=self.start)
            gpu_memory = gpu_search.free_gpu_memory() if _uses_gpu(options.kind, options.device) else 0
            expected = choose_kinds(options, len(gallery), encoder.dim, gpu_memory)[0]
            if options.milvus:
                milvus.connect(options.milvus).close()
            store = shard_store(gallery, encoder, runtime, work, options.batch_size, options.shard_rows)
            served = ServedVersion.open(out, force=options.force)
            if served is not None:
                served.require_model(encoder.fingerprint, pairs)
            self._clean_work(store.path, served)
            require_disk_space(out, gallery, store, expected)
            encoded = self._encode(replicas, runtime, staging / CHECKPOINT)
            choices = choose_kinds(options, len(encoded), encoder.dim, gpu_memory)
            manifest = replace(self._stage(staging, encoder, encoded, choices), runtime=runtime)
            staged = publish.prepare_version(out, staging, manifest)
            verdict = None if served is None else self._require_no_worse(served, staged, encoded, encoder)
            manifest = publish.commit_version(out, staged, keep=options.keep)
            if served is not None:
                _warn_of_lost_updates(served.artifact.manifest, manifest)
            self._keep_vectors(store.path, manifest)
        notified = notify(options.notify, out, manifest.version)
        return summarize(out, manifest, encoded, verdict, start=self.start, notified=notified)

    def _require_no_worse(
        self, served: "ServedVersion", staged: "Artifact", encoded: "EncodedGallery", encoder: "Encoder"
    ) -> "GateVerdict":
        """Compare the staged version with the served one.

        Raises:
            RejectedError: the staged version ranks worse, and force is not set.
        """
        from index_jobs.store import publish

        options, served_manifest = self.options, served.artifact.manifest
        device = options.device.split(",")[0]
        verdict = served.compare(staged, encoder, self.pairs, margin=options.margin, device=device)
        logger.info("compared with version %d: %s", served_manifest.version, verdict.reason)
        if not verdict.passed and not options.force:
            if not options.keep_shards:
                publish.remove_directory(self.out, self.out / WORK)
            kept = replace(served_manifest, measured=staged.manifest.measured, kind=staged.manifest.kind)
            summary = summarize(self.out, kept, encoded, verdict, start=self.start, published=False)
            raise RejectedError(summary, verdict.reason, has_vectors=options.keep_shards)
        return verdict

    def _load_replicas(self, checkpoint: Path) -> "tuple[list[Encoder], str]":
        """Return encoders, and the runtime that encodes the images: on a cluster it is not theirs."""
        from index_jobs.encoding.devices import load_replicas
        from index_jobs.encoding.replicas import choose_replicas, runtime_in_use

        options, work = self.options, self.out / WORK
        device, exact, batch, rows = options.device, options.exact, options.batch_size, options.shard_rows
        if not options.ray:
            replicas = choose_replicas(
                self.gallery, checkpoint, work, device=device, exact=exact, runtime=options.runtime, batch_size=batch,
                shard_rows=rows,
            )  # fmt: skip
            return replicas, replicas[0].runtime.name
        replicas = load_replicas(checkpoint, device, exact=exact)
        if options.runtime != AUTO:
            return replicas, options.runtime
        return replicas, runtime_in_use(self.gallery, replicas[0], "torch", work, batch, rows)

    def _encode(self, replicas: "list[Encoder]", runtime: str, checkpoint: Path) -> "EncodedGallery":
        from index_jobs.encoding.pixel_cache import PixelCache

        options, folder = self.options, self.options.pixel_cache
        cache = PixelCache.open(folder, replicas[0].preprocess) if folder else None
        settings: dict[str, Any] = {
            "workers": options.workers, "batch_size": options.batch_size, "shard_rows": options.shard_rows,
            "max_failed": options.max_failed, "progress": options.progress,
        }  # fmt: skip
        if options.ray:
            from index_jobs.encoding.ray_cluster import encode_on_ray

            return encode_on_ray(
                self.gallery, replicas[0], self.out / WORK, address=options.ray, checkpoint=checkpoint,
                device=options.device, runtime=runtime, exact=options.exact, pixel_cache=folder, **settings,
            )  # fmt: skip
        from index_jobs.encoding.encode import encode_gallery

        return encode_gallery(self.gallery, replicas, self.out / WORK, cache=cache, **settings)

    def _stage(
        self, staging: Path, encoder: "Encoder", encoded: "EncodedGallery", choices: "list[IndexChoice]"
    ) -> Manifest:
        """Write vectors, items and failures, and return their manifest."""
        from index_jobs.jobs.version_writer import caption_queries, stage_items, stage_vectors

        options, gallery = self.options, self.gallery
        logger.info("%d vectors: %s (%s)", len(encoded), choices[0].factory, choices[0].reason)
        queries = caption_queries(gallery.table, encoder)
        choice, measured = stage_vectors(staging, self.out, options, encoder, encoded, choices, queries)
        stage_items(staging, gallery, encoded, options.text_fields)
        return Manifest(
            version=0,
            fingerprint=encoder.fingerprint,
            count=len(encoded),
            dim=encoder.dim,
            kind=choice.factory,
            reason=choice.reason,
            gpu=choice.gpu,
            milvus=options.milvus or "",
            requested_kind=options.kind,
            requested_memory=options.memory,
            target_recall=options.target_recall,
            source=gallery.source,
            root=gallery.root,
            checkpoint=str(self.checkpoint.absolute()),
            checkpoint_signature=self.signature,
            gallery_signature=gallery.content_signature,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            failed=len(encoded.failed),
            exact=options.exact,
            text_fields=None if options.text_fields is None else list(options.text_fields),
            group_field=options.group_field,
            measured=measured,
            cutoff=self._calibrate(encoder, encoded),
            files={},
        )

    def _calibrate(self, encoder: "Encoder", encoded: "EncodedGallery") -> dict[str, Any]:
        from index_jobs.jobs.cutoff_calibration import calibrate_cutoff

        if self.options.validation is None or self.pairs is None:
            return {}
        return calibrate_cutoff(self.gallery, self.pairs, encoder, encoded)

    def _clean_work(self, own: Path, served: "ServedVersion | None") -> None:
        """Remove vectors other than this job's and the served version's."""
        from index_jobs.store import publish

        mark = None if served is None else _vectors_mark(served.artifact.manifest)
        publish.clean_work(
            self.out, self.out / WORK, lambda path: path == own or (mark is not None and (path / mark).exists())
        )

    def _keep_vectors(self, own: Path, manifest: Manifest) -> None:
        """Keep the published version's vectors for the next rebuild, if the options say so, and remove all others."""
        from index_jobs.store import publish

        work = self.out / WORK
        if not self.options.keep_shards:
            publish.remove_directory(self.out, work)
            return
        with contextlib.suppress(OSError):  # without the mark, the next rebuild encodes again
            (own / _vectors_mark(manifest)).touch()
        publish.clean_work(self.out, work, lambda path: path == own)


def _vectors_mark(manifest: Manifest) -> str:
    """Return the name of the file that marks a version's vectors; versions that differ in kind alone share it."""
    inputs = [manifest.fingerprint, manifest.gallery_signature, manifest.runtime]
    return _MARK_PREFIX + hashlib.sha256(canonical_json(inputs)).hexdigest()[:16]


def _warn_of_lost_updates(served: Manifest, published: Manifest) -> None:
    if served.additions or served.removed:
        logger.warning(
            "version %d holds the gallery as it is; items added to or removed from version %d by hand are not in it",
            published.version, served.version,
        )  # fmt: skip


def _uses_gpu(kind: str, device: str) -> bool:
    return kind.startswith("gpu-") or (kind == "auto" and device.startswith("cuda"))
