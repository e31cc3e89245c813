"""The steps of one rebuild: encode, build, compare with what is served, publish, tell.

- The checkpoint is copied first and loaded from the copy, so the model in the version is the one that encoded it.
- What can be wrong is found early: lock, output, checkpoint, kind, validation pairs and the model that is served, with
  which the new one is to be compared, before the first picture.
- Another kind or other captions need no encoding: the served version's vectors are kept, unless they are not wanted.
  Beside them lie those of one version that was not published, until a job makes others.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.util.errors import ArtifactError, CheckpointError, ModelError
from dcar_core.util.files import canonical_json, sha256_of
from index_jobs.jobs.summary import RebuildSummary, RejectedError
from index_jobs.options import RebuildOptions
from index_jobs.store.manifest import CHECKPOINT, CURRENT, DUPLICATES, FAILED, VERSIONS, Manifest
from index_jobs.store.publish import report_os_errors
from index_jobs.store.versions import open_current

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcar_core import Encoder
    from index_jobs.building.kinds import Choice
    from index_jobs.encoding.encoding_state import EncodedGallery
    from index_jobs.gallery.scan import Gallery
    from index_jobs.jobs.quality_gate import Pairs, Verdict
    from index_jobs.store.artifact import Artifact

logger = logging.getLogger(__name__)

WORK = "work"
AUTO = "auto"
_OF = "of-"  # begins the name of an empty file among the shards, which says of which versions they are


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
        job = Job(scanned, checkpoint, _checkpoint_signature(checkpoint), out, settings, start)
        if not settings.force and (current := job.published(checkpoint_signature=job.signature)):
            return job.summary(current)
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
class Job:
    """One rebuild."""

    gallery: "Gallery"
    checkpoint: Path
    signature: str  # of the checkpoint
    out: Path
    options: RebuildOptions
    start: float

    def published(self, **same: str) -> Manifest | None:
        """The current version's manifest if it is what is wanted."""
        try:
            manifest = open_current(self.out).manifest
        except ArtifactError:
            return None
        options = self.options
        fits = (
            manifest.gallery_signature == self.gallery.content_signature
            and manifest.source == self.gallery.source
            and manifest.requested_kind == options.kind
            and manifest.milvus == (options.milvus or "")
            and manifest.requested_memory == options.memory
            and manifest.target_recall == options.target_recall
            and manifest.exact == options.exact
            and options.runtime in {AUTO, manifest.runtime}
            and not manifest.additions
            and not manifest.removed
            and self._is_calibrated(manifest)
            and manifest.failed <= options.max_failed * len(self.gallery)
            and all(getattr(manifest, name) == value for name, value in same.items())
        )
        return manifest if fits else None

    @cached_property
    def pairs(self) -> "Pairs | None":
        """What indexes are compared by; see `quality_gate.pairs_of`."""
        from index_jobs.jobs import quality_gate

        return quality_gate.pairs_of(self.gallery, self.options.validation)

    def _is_calibrated(self, manifest: Manifest) -> bool:
        from index_jobs.jobs.cutoff_calibration import SIGNATURE, signature

        if self.options.validation is None or self.pairs is None:
            return True
        return manifest.cutoff.get(SIGNATURE) == signature(self.pairs)

    def run(self) -> RebuildSummary:
        """Do all steps that are needed; see `rebuild`."""
        from dcar_core.model.checkpoint import copy_checkpoint
        from index_jobs.encoding.encoding_state import shard_store
        from index_jobs.jobs.notify import notify
        from index_jobs.jobs.version_writer import choose, require_room
        from index_jobs.store import gpu_search, milvus, publish

        options, gallery = self.options, self.gallery
        pairs = self.pairs
        with publish.open_staging(self.out) as staging:
            copy_checkpoint(self.checkpoint, staging / CHECKPOINT)
            lanes, runtime = self._lanes(staging / CHECKPOINT)
            encoder = lanes[0]
            if not options.force and (same := self.published(fingerprint=encoder.fingerprint)):
                return self.summary(same)
            gpu_memory = gpu_search.free_gpu_memory() if _wants_gpu(options.kind, options.device) else 0
            # Told now, not after hours: an unknown kind, a Milvus out of reach, a served model that is gone, a disk
            # that is too small.
            expected = choose(options, len(gallery), encoder.dim, gpu_memory)[0]
            if options.milvus:
                milvus.connect(options.milvus).close()
            store = shard_store(gallery, encoder, runtime, self.out / WORK, options.batch_size, options.shard_rows)
            serving = self._serving()
            if serving is not None:
                self._require_model(serving, encoder.fingerprint, pairs)
            publish.clean_work(self.out, self.out / WORK, self._wanted(store.path, serving))
            require_room(self.out, gallery, store, expected)
            encoded = self._encode(lanes, runtime, staging / CHECKPOINT)
            choices = choose(options, len(encoded), encoder.dim, gpu_memory)
            manifest = replace(self._stage(staging, encoder, encoded, choices), runtime=runtime)
            staged = publish.prepare_version(self.out, staging, manifest)
            verdict = None if serving is None else self._require_no_worse(serving, staged, encoded, encoder)
            manifest = publish.commit_version(self.out, staged, keep=options.keep)
            if serving is not None and (serving.manifest.additions or serving.manifest.removed):
                logger.warning(
                    "version %d holds the gallery as it is; what was added to or removed from version %d by hand is "
                    "not in it", manifest.version, serving.manifest.version,
                )  # fmt: skip
            self._keep_work(store.path, manifest)
        told = notify(options.notify, self.out, manifest.version)
        return self.summary(manifest, encoded, verdict, notified=told)

    def _require_no_worse(
        self, serving: "Artifact", staged: "Artifact", encoded: "EncodedGallery", encoder: "Encoder"
    ) -> "Verdict":
        """Compare with what is served.

        Raises:
            RejectedError: the staged version is worse, and force is not set.
        """
        from index_jobs.store import publish

        options = self.options
        verdict = self._compare(serving, staged, encoder, self.pairs)
        logger.info("compared with version %d: %s", serving.manifest.version, verdict.reason)
        if not verdict.passed and not options.force:
            if not options.keep_shards:
                publish.remove_directory(self.out, self.out / WORK)
            kept = replace(serving.manifest, measured=staged.manifest.measured, kind=staged.manifest.kind)
            summary = self.summary(kept, encoded, verdict, published=False)
            raise RejectedError(summary, verdict.reason, has_vectors=options.keep_shards)
        return verdict

    def _serving(self) -> "Artifact | None":
        """What is served now, whole; None where there is nothing to compare with."""
        if not (self.out / CURRENT).exists():
            return None  # the first version
        try:
            return open_current(self.out)
        except ArtifactError as error:
            logger.info("there is nothing to compare with: %s", error)
            return None

    def _require_model(self, serving: "Artifact", fingerprint: str, pairs: "Pairs | None") -> None:
        """Load the served version's model where it will be asked, and let it go: encoding may need the memory.

        Raises:
            CheckpointError: it cannot be loaded, and force is not set.
        """
        from dcar_core import Encoder

        if pairs is None or serving.manifest.fingerprint == fingerprint:
            return
        try:
            Encoder.load(serving.checkpoint, device="cpu")
        except (CheckpointError, ModelError) as error:
            if not self.options.force:
                raise self._incomparable(serving, error) from error
            logger.warning("%s", _without_model(serving, error))

    def _compare(self, serving: "Artifact", staged: "Artifact", encoder: "Encoder", pairs: "Pairs | None") -> "Verdict":
        """How the staged version ranks beside the served one.

        Raises:
            CheckpointError: the served version's model cannot be loaded any more, and force is not set.
        """
        from dcar_core import Encoder
        from index_jobs.jobs import quality_gate

        options, old = self.options, encoder
        if pairs is not None and serving.manifest.fingerprint != encoder.fingerprint:
            try:
                old = Encoder.load(serving.checkpoint, device=options.device.split(",")[0])
            except (CheckpointError, ModelError) as error:
                if not options.force:
                    raise self._incomparable(serving, error) from error
                return quality_gate.uncompared(_without_model(serving, error), options.margin)
        return quality_gate.compare(serving, old, staged, encoder, pairs, options.margin)

    def _incomparable(self, serving: "Artifact", error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{_without_model(serving, error)}; bring back what it was made on, or --force publishes without comparing"
        )

    def _lanes(self, checkpoint: Path) -> "tuple[list[Encoder], str]":
        """The encoders, and the name of the runtime that makes the vectors, which on a cluster is not theirs."""
        from index_jobs.encoding.devices import load_replicas
        from index_jobs.encoding.replicas import choose_replicas, runtime_in_use

        options, work = self.options, self.out / WORK
        device, exact, batch, rows = options.device, options.exact, options.batch_size, options.shard_rows
        if options.ray:
            lanes = load_replicas(checkpoint, device, exact=exact)
            known = options.runtime != AUTO
            return lanes, options.runtime if known else runtime_in_use(
                self.gallery, lanes[0], "torch", work, batch, rows
            )
        lanes = choose_replicas(
            self.gallery, checkpoint, work, device=device, exact=exact, runtime=options.runtime, batch_size=batch,
            shard_rows=rows,
        )  # fmt: skip
        return lanes, lanes[0].runtime.name

    def _encode(self, lanes: "list[Encoder]", runtime: str, checkpoint: Path) -> "EncodedGallery":
        from index_jobs.encoding.pixel_cache import PixelCache

        options, folder = self.options, self.options.pixel_cache
        cache = PixelCache.open(folder, lanes[0].preprocess) if folder else None
        how: dict[str, Any] = {
            "workers": options.workers, "batch_size": options.batch_size, "shard_rows": options.shard_rows,
            "max_failed": options.max_failed, "progress": options.progress,
        }  # fmt: skip
        if options.ray:
            from index_jobs.encoding.ray_cluster import encode_on_ray

            return encode_on_ray(
                self.gallery, lanes[0], self.out / WORK, address=options.ray, checkpoint=checkpoint,
                device=options.device, runtime=runtime, exact=options.exact, pixel_cache=folder, **how,
            )  # fmt: skip
        from index_jobs.encoding.encode import encode_gallery

        return encode_gallery(self.gallery, lanes, self.out / WORK, cache=cache, **how)

    def _stage(self, staging: Path, encoder: "Encoder", encoded: "EncodedGallery", choices: "list[Choice]") -> Manifest:
        """Write vectors, items and failures; the manifest that goes with them."""
        from index_jobs.jobs.version_writer import caption_queries, stage_items, stage_vectors

        options, gallery = self.options, self.gallery
        logger.info("%d vectors: %s (%s)", len(encoded), choices[0].factory, choices[0].reason)
        queries = caption_queries(gallery.table, encoder)
        choice, measured = stage_vectors(staging, self.out, options, encoder, encoded, choices, queries)
        stage_items(staging, gallery, encoded)
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
            measured=measured,
            cutoff=self._calibrated(encoder, encoded),
            files={},
        )

    def _calibrated(self, encoder: "Encoder", encoded: "EncodedGallery") -> dict[str, Any]:
        from index_jobs.jobs.cutoff_calibration import calibrate

        if self.options.validation is None or self.pairs is None:
            return {}
        return calibrate(self.gallery, self.pairs, encoder, encoded)

    def _unread_of(self, manifest: Manifest) -> int:
        """Return the number of images of a version that a later job may be able to read; 0 if its list is gone."""
        from dcar_core.util.errors import ImageFault

        def is_temporary(row: dict[str, str]) -> bool:
            if "fault" in row:
                return ImageFault(row["fault"]).is_temporary
            return row.get("kind") != "picture"  # the field of older versions; the oldest have none

        try:
            lines = (self.out / VERSIONS / str(manifest.version) / FAILED).read_bytes().splitlines()
            return sum(is_temporary(json.loads(line)) for line in lines)
        except (OSError, ValueError):
            return 0

    def _duplicates_of(self, manifest: Manifest) -> int:
        try:
            lines = (self.out / VERSIONS / str(manifest.version) / DUPLICATES).read_bytes()
        except FileNotFoundError:  # of a version that is older than the list
            return 0
        return lines.count(b"\n")

    def _wanted(self, own: Path, serving: "Artifact | None") -> "Callable[[Path], bool]":
        """Which vectors this job leaves: those that it goes on with, and those of the version that is served."""
        mark = None if serving is None else _mark(serving.manifest)
        return lambda folder: folder == own or (mark is not None and (folder / mark).exists())

    def _keep_work(self, own: Path, manifest: Manifest) -> None:
        """Only the published version's vectors are worth their room on the disk, and only if they are wanted."""
        from index_jobs.store import publish

        work = self.out / WORK
        if not self.options.keep_shards:
            publish.remove_directory(self.out, work)
            return
        with contextlib.suppress(OSError):  # it is published; without the mark, it is encoded again at worst
            (own / _mark(manifest)).touch()
        publish.clean_work(self.out, work, lambda folder: folder == own)

    def summary(
        self,
        manifest: Manifest,
        encoded: "EncodedGallery | None" = None,
        verdict: "Verdict | None" = None,
        *,
        published: bool = True,
        notified: dict[str, str] | None = None,
    ) -> RebuildSummary:
        """What the command prints."""
        unread = encoded.unread if encoded else self._unread_of(manifest)
        hint = f"pictures that could not be read: {unread:,} ({FAILED} says why); once they can be, give --force"
        return RebuildSummary(
            index=str(self.out),
            version=manifest.version,
            published=published and encoded is not None,
            reused=encoded is None,
            count=manifest.count,
            failed=manifest.failed,
            unread=unread,
            duplicates=len(encoded.duplicates()) if encoded else self._duplicates_of(manifest),
            encoded=encoded.encoded if encoded else 0,
            resumed=encoded.resumed if encoded else 0,
            seconds=round(time.perf_counter() - self.start, 3),
            images_per_second=round(encoded.encoded / encoded.seconds, 1) if encoded and encoded.encoded else 0.0,
            fingerprint=manifest.fingerprint,
            dim=manifest.dim,
            kind=manifest.kind,
            reason=manifest.reason,
            measured=manifest.measured,
            gate=verdict.to_dict() if verdict else None,
            notified=notified or {},
            hint=hint if unread and published else "",
        )


def _mark(manifest: Manifest) -> str:
    """The name of the file that says whose vectors lie beside it; the same for versions that differ in kind alone."""
    made_of = [manifest.fingerprint, manifest.gallery_signature, manifest.runtime]
    return _OF + hashlib.sha256(canonical_json(made_of)).hexdigest()[:16]


def _without_model(serving: "Artifact", error: Exception) -> str:
    version = serving.manifest.version
    return f"there is no comparing with version {version}, which is served, since its model cannot be loaded: {error}"


def _wants_gpu(kind: str, device: str) -> bool:
    return kind.startswith("gpu-") or (kind == "auto" and device.startswith("cuda"))
