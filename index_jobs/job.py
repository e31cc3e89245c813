"""The steps of one rebuild: encode, build, compare with what is served, publish, tell.

- The checkpoint is copied first and loaded from the copy, so the model in the version is the one that encoded it.
- What can be wrong is found early: lock, output, checkpoint, kind and validation pairs before the first picture.
- Another kind or other captions need no encoding: the vectors of the last version are kept, unless they are not wanted.
"""

import datetime
import logging
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcar_core.errors import ArtifactError
from index_jobs.artifact import open_current
from index_jobs.manifest import CHECKPOINT, CURRENT, DUPLICATES, VERSIONS, Manifest
from index_jobs.options import Options, RebuildSummary, RejectedError

if TYPE_CHECKING:
    from dcar_core import Encoder
    from index_jobs.artifact import Artifact
    from index_jobs.gallery import Gallery
    from index_jobs.gate import Pairs, Verdict
    from index_jobs.kinds import Choice
    from index_jobs.progress import Encoded

logger = logging.getLogger(__name__)

WORK = "work"
AUTO = "auto"


@dataclass(frozen=True)
class Job:
    """One rebuild."""

    gallery: "Gallery"
    checkpoint: Path
    signature: str  # of the checkpoint
    out: Path
    options: Options
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
        """What indexes are compared by; see `gate.pairs_of`."""
        from index_jobs import gate

        return gate.pairs_of(self.gallery, self.options.validation)

    def _is_calibrated(self, manifest: Manifest) -> bool:
        from index_jobs.cutoff import SIGNATURE, signature

        if self.options.validation is None or self.pairs is None:
            return True
        return manifest.cutoff.get(SIGNATURE) == signature(self.pairs)

    def run(self) -> RebuildSummary:
        """Do all steps that are needed; see `rebuild`."""
        from dcar_core import Encoder
        from dcar_core.checkpoint import copy_checkpoint
        from index_jobs import gate, gpu, publish
        from index_jobs.notify import notify
        from index_jobs.progress import store_of
        from index_jobs.staging import choose, require_room

        options, gallery = self.options, self.gallery
        pairs = self.pairs
        with publish.writing(self.out) as staging:
            copy_checkpoint(self.checkpoint, staging / CHECKPOINT)
            lanes, runtime = self._lanes(staging / CHECKPOINT)
            encoder = lanes[0]
            if not options.force and (same := self.published(fingerprint=encoder.fingerprint)):
                return self.summary(same)
            gpu_memory = gpu.memory() if _wants_gpu(options.kind, options.device) else 0
            # An unknown kind or a disk that is too small is an error now, not after encoding.
            expected = choose(options, len(gallery), encoder.dim, gpu_memory)[0]
            store = store_of(gallery, encoder, runtime, self.out / WORK, options.batch_size, options.shard_rows)
            require_room(self.out, gallery, store, expected)
            serving = self._serving()
            encoded = self._encode(lanes, runtime, staging / CHECKPOINT)
            choices = choose(options, len(encoded), encoder.dim, gpu_memory)
            manifest = replace(self._stage(staging, encoder, encoded, choices), runtime=runtime)
            verdict: gate.Verdict | None = None

            def accept(staged: "Artifact") -> None:
                nonlocal verdict
                if serving is None:
                    return
                same_model = serving.manifest.fingerprint == encoder.fingerprint
                old = encoder if same_model else Encoder.load(serving.checkpoint, device=options.device.split(",")[0])
                verdict = gate.compare(serving, old, staged, encoder, pairs, options.margin)
                logger.info("compared with version %d: %s", serving.manifest.version, verdict.reason)
                if not verdict.passed and not options.force:
                    kept = replace(serving.manifest, measured=staged.manifest.measured, kind=staged.manifest.kind)
                    raise RejectedError(self.summary(kept, encoded, verdict, published=False), verdict.reason)

            manifest = publish.publish(self.out, staging, manifest, keep=options.keep, accept=accept)
            if serving is not None and (serving.manifest.additions or serving.manifest.removed):
                logger.warning(
                    "version %d holds the gallery as it is; what was added to or removed from version %d by hand is "
                    "not in it", manifest.version, serving.manifest.version,
                )  # fmt: skip
            self._clear_work(encoded)
        told = notify(options.notify, self.out, manifest.version)
        return self.summary(manifest, encoded, verdict, notified=told)

    def _serving(self) -> "Artifact | None":
        """What is served now, whole; None where there is nothing to compare with."""
        if not (self.out / CURRENT).exists():
            return None  # the first version
        try:
            return open_current(self.out)
        except ArtifactError as error:
            logger.info("there is nothing to compare with: %s", error)
            return None

    def _lanes(self, checkpoint: Path) -> "tuple[list[Encoder], str]":
        """The encoders, and the name of the runtime that makes the vectors, which on a cluster is not theirs."""
        from index_jobs.devices import load_encoders
        from index_jobs.lanes import begun_with, choose_lanes

        options, work = self.options, self.out / WORK
        device, exact, batch, rows = options.device, options.exact, options.batch_size, options.shard_rows
        if options.ray:
            lanes = load_encoders(checkpoint, device, exact=exact)
            known = options.runtime != AUTO
            return lanes, options.runtime if known else begun_with(self.gallery, lanes[0], "torch", work, batch, rows)
        lanes = choose_lanes(
            self.gallery, checkpoint, work, device=device, exact=exact, runtime=options.runtime, batch_size=batch,
            shard_rows=rows,
        )  # fmt: skip
        return lanes, lanes[0].runtime.name

    def _encode(self, lanes: "list[Encoder]", runtime: str, checkpoint: Path) -> "Encoded":
        from index_jobs.pixels import PixelCache

        options, folder = self.options, self.options.pixel_cache
        cache = PixelCache.open(folder, lanes[0].preprocess) if folder else None
        how: dict[str, Any] = {
            "workers": options.workers, "batch_size": options.batch_size, "shard_rows": options.shard_rows,
            "max_failed": options.max_failed, "progress": options.progress,
        }  # fmt: skip
        if options.ray:
            from index_jobs.cluster import encode_on_ray

            return encode_on_ray(
                self.gallery, lanes[0], self.out / WORK, address=options.ray, checkpoint=checkpoint,
                device=options.device, runtime=runtime, exact=options.exact, pixel_cache=folder, **how,
            )  # fmt: skip
        from index_jobs.encode import encode

        return encode(self.gallery, lanes, self.out / WORK, cache=cache, **how)

    def _stage(self, staging: Path, encoder: "Encoder", encoded: "Encoded", choices: "list[Choice]") -> Manifest:
        """Write vectors, items and failures; the manifest that goes with them."""
        from index_jobs.staging import caption_queries, stage_items, stage_vectors

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

    def _calibrated(self, encoder: "Encoder", encoded: "Encoded") -> dict[str, Any]:
        from index_jobs.cutoff import calibrate

        if self.options.validation is None or self.pairs is None:
            return {}
        return calibrate(self.gallery, self.pairs, encoder, encoded)

    def _duplicates_of(self, manifest: Manifest) -> int:
        try:
            lines = (self.out / VERSIONS / str(manifest.version) / DUPLICATES).read_bytes()
        except FileNotFoundError:  # of a version that is older than the list
            return 0
        return lines.count(b"\n")

    def _clear_work(self, encoded: "Encoded") -> None:
        """Only this version's vectors are worth their room on the disk, and only if they are wanted."""
        from index_jobs.publish import discard

        work = self.out / WORK
        if not self.options.keep_shards:
            discard(self.out, work)
            return
        own = {shard.path.parent for shard in encoded.shards}
        for folder in work.iterdir():
            if folder not in own:
                discard(self.out, folder)

    def summary(
        self,
        manifest: Manifest,
        encoded: "Encoded | None" = None,
        verdict: "Verdict | None" = None,
        *,
        published: bool = True,
        notified: dict[str, str] | None = None,
    ) -> RebuildSummary:
        """What the command prints."""
        return RebuildSummary(
            index=str(self.out),
            version=manifest.version,
            published=published and encoded is not None,
            reused=encoded is None,
            count=manifest.count,
            failed=manifest.failed,
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
        )


def _wants_gpu(kind: str, device: str) -> bool:
    return kind.startswith("gpu-") or (kind == "auto" and device.startswith("cuda"))
