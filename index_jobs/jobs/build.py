"""The build of a version: encode, create the vector index, compare with the served version, publish, notify.

- A build whose spec is that of the served version returns at once, without importing PyTorch.
- The checkpoint is copied first and loaded from the copy, so a version contains the model that encoded it.
- Errors are found before the first image is encoded: lock, output, checkpoint, fields, kind, validation pairs, the
  served version's model, and disk space.
- A killed run resumes after its last complete shard. Another kind or other captions need no encoding; see `work`.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dcar_core import Encoder
from dcar_core.model.checkpoint import copy_checkpoint, read_config
from dcar_core.runtimes.registry import AUTO
from dcar_core.util.errors import ArtifactError, CheckpointError, DcarError, ModelError, StoreUnavailableError
from index_jobs.encoding.devices import choose_replicas, load_replicas, runtime_in_use
from index_jobs.encoding.encode import EncodedGallery, encode_gallery
from index_jobs.encoding.pixel_cache import PixelCache
from index_jobs.encoding.shards import ShardStore
from index_jobs.engines.protocol import NewIndex
from index_jobs.engines.registry import load_engine
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.jobs import contents, gate
from index_jobs.jobs.gallery_changes import GalleryChanges, count_changes
from index_jobs.jobs.notify import notify
from index_jobs.jobs.summary import RebuildSummary, RejectedError, summarize
from index_jobs.jobs.work import WORK, clean_work, discard_vectors, keep_vectors
from index_jobs.spec import BuildOptions, IndexSpec
from index_jobs.store import publish
from index_jobs.store.artifact import Artifact
from index_jobs.store.items import take_rows
from index_jobs.store.manifest import CHECKPOINT, CURRENT, Manifest, utc_now
from index_jobs.store.versions import open_current

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Build:
    """One build. start: of the job, by `time.perf_counter`."""

    gallery: Gallery
    checkpoint: Path
    out: Path
    options: BuildOptions
    start: float

    @cached_property
    def pairs(self) -> gate.QueryPairs | None:
        """The pairs that compare indexes; see `gate.find_pairs`."""
        return gate.find_pairs(self.gallery, self.options.validation)

    @cached_property
    def spec(self) -> IndexSpec:
        """What is asked for."""
        return replace(
            self.options.spec,
            gallery=self.gallery.location,
            gallery_signature=self.gallery.content_signature,
            fingerprint=read_config(self.checkpoint)["fingerprint"],
            pairs_signature=self.pairs.signature if self.options.validation and self.pairs else "",
        )

    def find_published(self) -> Manifest | None:
        """Return the served version's manifest if it is what this build would publish."""
        try:
            manifest = open_current(self.out).manifest
        except ArtifactError:
            return None
        return manifest if manifest.spec == self.spec and manifest.is_as_built and manifest.has_term_lists else None


def rebuild(
    gallery: str | Path | Sequence[str] | Gallery, checkpoint: Path, out: Path, **options: Any
) -> RebuildSummary:
    """Publish an index of a gallery, encoded with a checkpoint.

    Args:
        gallery: a folder, an uncompressed tar, or a list, as a path or URL, or several; see `index_jobs.gallery.scan`.
            A scanned gallery is taken as it is.
        checkpoint: a DCAR checkpoint directory.
        out: the index directory; created if missing.
        options: the fields of `BuildOptions` and of its `IndexSpec`.

    Raises:
        DataError: the gallery cannot be used, too many images are broken, no item has a field that the options name,
            or the kind or the engine is unknown.
        CheckpointError, ModelError: the model cannot be loaded; or the served version's model cannot, without force.
        LockedError: another job is writing to `out`.
        GalleryShrunkError: too many of the served images are gone from the gallery.
        RejectedError: the rebuilt index ranks worse than the served one, which stays published.
        StoreUnavailableError: the served version's store does not respond, without force.
        ArtifactError: a shard is corrupted, or the written files do not read back.
        DcarError: the output cannot be written; published versions are unchanged.
    """
    start, asked = time.perf_counter(), BuildOptions.of(options)
    with publish.report_os_errors(out):
        scanned = gallery if isinstance(gallery, Gallery) else scan(gallery)
        build = _Build(scanned, checkpoint, out, asked, start)
        if not asked.force and (current := build.find_published()):
            return summarize(out, current, start=start)
        return _run(build)


def _run(build: _Build) -> RebuildSummary:
    options, gallery, out, spec = build.options, build.gallery, build.out, build.spec
    with publish.open_staging(out) as staging:
        checkpoint = staging / CHECKPOINT
        copy_checkpoint(build.checkpoint, checkpoint)
        replicas, runtime = _load_replicas(build, checkpoint)
        encoder = replicas[0]
        contents.require_fields(gallery, spec)
        least_bytes = load_engine(spec.engine).plan(spec, len(gallery), encoder.dim, options.device)
        store = ShardStore(gallery, encoder, runtime, out / WORK, options)
        served = _open_served(out, force=options.force)
        changes = None if served is None else _compare_items(build, served, encoder)
        clean_work(out, store, served, keep_reusable=True)
        try:
            _require_disk_space(out, gallery, store, least_bytes)
        except DcarError:
            clean_work(out, store, served)
            _require_disk_space(out, gallery, store, least_bytes)
        encoded = _encode(build, replicas, runtime, checkpoint)
        clean_work(out, store, served)
        if served is not None and encoded.failed:
            changes = count_changes(served, take_rows(gallery.table, encoded.rows()))
        staged = publish.prepare_version(out, staging, _stage(build, staging, encoder, encoded, runtime))
        verdict = None if served is None else _require_no_worse(build, served, staged, encoded, encoder)
        manifest = publish.commit_version(out, staged, keep=options.keep)
        if served is not None and not served.manifest.is_as_built:
            logger.warning(
                "version %d holds the gallery as it is; what was added to or removed from version %d is not in it",
                manifest.version, served.manifest.version,
            )  # fmt: skip
        if options.keep_shards:
            keep_vectors(out, store.path, manifest)
        else:
            discard_vectors(out)
    notified = notify(options.notify, out, manifest.version)
    return summarize(out, manifest, encoded, verdict, changes, start=build.start, notified=notified)


def _open_served(index: Path, *, force: bool) -> Artifact | None:
    """Open the served version; None if there is nothing to compare with, also with force if its store is down."""
    if not (index / CURRENT).exists():
        return None
    try:
        return open_current(index)
    except ArtifactError as error:
        if isinstance(error, StoreUnavailableError) and not force:
            raise StoreUnavailableError(
                f"the served version cannot be compared: {error}; run the same command again once its store responds, "
                f"or publish without a comparison by --force"
            ) from error
        logger.warning("the served version cannot be read, so nothing is compared with it: %s", error)
        return None


def _compare_items(build: _Build, served: Artifact, encoder: Encoder) -> GalleryChanges:
    """Compare the gallery with the served items. Check that the served model loads, and release it.

    Encoding may need the memory.
    """
    changes = count_changes(served, build.gallery.table)
    if not build.options.force:
        changes.require_few_removed(served.manifest, build.gallery.location, build.options.max_vanished)
    if build.pairs is not None and served.manifest.fingerprint != encoder.fingerprint:
        _load_served_encoder(served, "cpu", force=build.options.force)
    return changes


def _require_disk_space(out: Path, gallery: Gallery, store: ShardStore, least_bytes: int) -> None:
    """Check that the disk can hold the vectors and an index of `least_bytes`, before images are encoded."""
    vectors = 4 * store.dim * (len(gallery) - store.stored_rows())
    needed = vectors + least_bytes + gallery.table.nbytes
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DcarError(
            f"the index {out} takes at least {needed / 1e9:.1f} GB more, {vectors / 1e9:.1f} of them for vectors that "
            f"the next rebuild can use, but its disk has {free / 1e9:.1f} GB left; make room, or give another --out"
        )


def _load_served_encoder(served: Artifact, device: str, *, force: bool) -> Encoder | str:
    """Return the model of the served version; with force, the reason if it cannot be loaded."""
    try:
        return Encoder.load(served.checkpoint, device=device)
    except (CheckpointError, ModelError) as error:
        version = served.manifest.version
        reason = f"the served version {version} cannot be compared, because its model cannot be loaded: {error}"
        if not force:
            raise CheckpointError(
                f"{reason}; restore the files of its model, or publish without a comparison by --force"
            ) from error
        logger.warning("%s", reason)
        return reason


def _require_no_worse(
    build: _Build, served: Artifact, staged: Artifact, encoded: EncodedGallery, encoder: Encoder
) -> gate.GateVerdict:
    options = build.options
    served_encoder: Encoder | str = encoder
    if build.pairs is not None and served.manifest.fingerprint != encoder.fingerprint:
        served_encoder = _load_served_encoder(served, options.device.split(",")[0], force=options.force)
    if isinstance(served_encoder, str):
        verdict = gate.pass_uncompared(served_encoder, options.margin)
    else:
        verdict = gate.compare(served, served_encoder, staged, encoder, build.pairs, options.margin)
    if not verdict.passed and not options.force:
        if not options.keep_shards:
            discard_vectors(build.out)
        kept = replace(served.manifest, measured=staged.manifest.measured, kind=staged.manifest.kind)
        summary = summarize(build.out, kept, encoded, verdict, start=build.start, published=False)
        raise RejectedError(summary, verdict.reason, has_vectors=options.keep_shards)
    return verdict


def _load_replicas(build: _Build, checkpoint: Path) -> tuple[list[Encoder], str]:
    """Return encoders, and the runtime that encodes the images: on a cluster it is not theirs."""
    options, spec, work = build.options, build.spec, build.out / WORK
    if not options.ray:
        replicas = choose_replicas(build.gallery, checkpoint, work, options)
        return replicas, replicas[0].runtime.name
    replicas = load_replicas(checkpoint, options.device, exact=spec.exact)
    if spec.runtime != AUTO:
        return replicas, spec.runtime
    return replicas, runtime_in_use(build.gallery, replicas[0], "torch", work, options)


def _encode(build: _Build, replicas: list[Encoder], runtime: str, checkpoint: Path) -> EncodedGallery:
    options, work = build.options, build.out / WORK
    cache = PixelCache(options.pixel_cache, replicas[0].preprocess) if options.pixel_cache else None
    if options.ray:
        from index_jobs.encoding.ray_cluster import encode_on_ray

        return encode_on_ray(build.gallery, replicas[0], work, options, checkpoint=checkpoint, runtime=runtime)
    return encode_gallery(build.gallery, replicas, work, options, cache)


def _stage(build: _Build, staging: Path, encoder: Encoder, encoded: EncodedGallery, runtime: str) -> Manifest:
    """Write vectors, items and failures, and return their manifest."""
    gallery, spec = build.gallery, build.spec
    new = NewIndex(
        folder=staging, version=publish.next_version(build.out), blocks=encoded.blocks, count=len(encoded),
        dim=encoder.dim, queries=contents.caption_queries(gallery.table, encoder), device=build.options.device,
    )  # fmt: skip
    created = load_engine(spec.engine).create(spec, new)
    logger.info("%d vectors: %s (%s)", len(encoded), created.kind, created.reason)
    fields = contents.stage_items(staging, gallery, encoded, spec.text_fields)
    pairs = build.pairs if build.options.validation else None
    vectors = load_engine(spec.engine).open(staging) if pairs else None
    return Manifest(
        spec=spec,
        dim=encoder.dim,
        count=len(encoded),
        kind=created.kind,
        reason=created.reason,
        gpu=created.gpu,
        root=gallery.root,
        roots=list(gallery.roots),
        checkpoint=str(build.checkpoint.absolute()),
        created=utc_now(),
        failed=len(encoded.failed),
        number_texts=fields.number_texts,
        measured=created.measured,
        cutoff=contents.calibrate_cutoff(pairs, encoder, encoded) if pairs else {},
        hybrid_weight=contents.choose_hybrid_weight(staging, vectors, pairs, gallery, encoded, encoder)
        if pairs and vectors
        else None,
        runtime=runtime,
    )
