"""The steps of a rebuild: encode, build, compare with the served version, publish, notify.

- The checkpoint is copied first and loaded from the copy, so a version contains the model that encoded it.
- Errors are found before the first image is encoded: lock, output, checkpoint, fields, kind, validation pairs, the
  served version's model, and disk space.
- `out/work` keeps the vectors of the served version, and those of one rejected or interrupted rebuild. The next rebuild
  by the same encoder takes what it can use from both, also if the gallery has changed in between.
"""

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dcar_core import Encoder
from dcar_core.model.checkpoint import copy_checkpoint
from dcar_core.runtimes.registry import AUTO
from dcar_core.util.errors import ArtifactError, CheckpointError, DcarError, ModelError, StoreUnavailableError
from dcar_core.util.files import canonical_json
from index_jobs.building.kinds import IndexChoice
from index_jobs.encoding.devices import load_replicas
from index_jobs.encoding.encode import encode_gallery
from index_jobs.encoding.encoding_state import EncodedGallery, shard_store
from index_jobs.encoding.pixel_cache import PixelCache
from index_jobs.encoding.replicas import choose_replicas, runtime_in_use
from index_jobs.encoding.shards import ShardStore
from index_jobs.jobs.gallery_changes import count_changes
from index_jobs.jobs.notify import notify
from index_jobs.jobs.quality_gate import GateVerdict, compare, pass_uncompared
from index_jobs.jobs.rebuild_job import RebuildJob
from index_jobs.jobs.summary import RebuildSummary, RejectedError, summarise
from index_jobs.jobs.version_writer import (
    calibrate_cutoff,
    caption_queries,
    choose_hybrid_weight,
    choose_kinds,
    require_disk_space,
    require_fields,
    stage_items,
    stage_vectors,
)
from index_jobs.store import gpu_search, milvus, publish
from index_jobs.store.artifact import Artifact
from index_jobs.store.items import take_rows
from index_jobs.store.manifest import CHECKPOINT, CURRENT, Manifest, utc_now
from index_jobs.store.versions import open_current

logger = logging.getLogger(__name__)

WORK = "work"
_MARK_PREFIX = "of-"  # of an empty file among the shards that names the versions they belong to


def run(job: RebuildJob) -> RebuildSummary:
    """Publish what the job describes; see `index_jobs.jobs.rebuild_entry.rebuild`."""
    options, gallery, out, pairs = job.options, job.gallery, job.out, job.pairs
    with publish.open_staging(out) as staging:
        checkpoint = staging / CHECKPOINT
        copy_checkpoint(job.checkpoint, checkpoint)
        replicas, runtime = _load_replicas(job, checkpoint)
        encoder = replicas[0]
        if not options.force and (current := job.find_published(fingerprint=encoder.fingerprint)):
            return summarise(out, current, start=job.start)
        require_fields(gallery, options)
        uses_gpu = options.kind.startswith("gpu-") or (options.kind == "auto" and options.device.startswith("cuda"))
        gpu_memory = gpu_search.free_gpu_memory() if uses_gpu else 0
        expected = choose_kinds(options, len(gallery), encoder.dim, gpu_memory)[0]
        if options.milvus:
            milvus.connect(options.milvus).close()
        store = shard_store(gallery, encoder, runtime, out / WORK, options)
        served = _open_served(out, force=options.force)
        changes = None
        if served is not None:
            changes = count_changes(served, gallery.table)
            if not options.force:
                changes.require_few_removed(served.manifest, gallery.source, options.max_vanished)
            if pairs is not None and served.manifest.fingerprint != encoder.fingerprint:
                _load_served_encoder(served, "cpu", force=options.force)  # and release it: encoding may need the memory
        _clean_work(out, store, served, keep_reusable=True)
        try:
            require_disk_space(out, gallery, store, expected)
        except DcarError:
            _clean_work(out, store, served)
            require_disk_space(out, gallery, store, expected)
        encoded = _encode(job, replicas, runtime, checkpoint)
        _clean_work(out, store, served)
        if served is not None and encoded.failed:
            changes = count_changes(served, take_rows(gallery.table, encoded.rows()))
        choices = choose_kinds(options, len(encoded), encoder.dim, gpu_memory)
        manifest = _stage(job, staging, encoder, encoded, choices, runtime)
        staged = publish.prepare_version(out, staging, manifest)
        verdict = None if served is None else _require_no_worse(job, served, staged, encoded, encoder)
        manifest = publish.commit_version(out, staged, keep=options.keep)
        if served is not None:
            _warn_of_lost_updates(served.manifest, manifest)
        _keep_vectors(job, store.path, manifest)
    notified = notify(options.notify, out, manifest.version)
    return summarise(out, manifest, encoded, verdict, changes, start=job.start, notified=notified)


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
    job: RebuildJob, served: Artifact, staged: Artifact, encoded: EncodedGallery, encoder: Encoder
) -> GateVerdict:
    options = job.options
    served_encoder: Encoder | str = encoder
    if job.pairs is not None and served.manifest.fingerprint != encoder.fingerprint:
        served_encoder = _load_served_encoder(served, options.device.split(",")[0], force=options.force)
    if isinstance(served_encoder, str):
        verdict = pass_uncompared(served_encoder, options.margin)
    else:
        verdict = compare(served, served_encoder, staged, encoder, job.pairs, options.margin)
    if not verdict.passed and not options.force:
        if not options.keep_shards:
            publish.remove_directory(job.out, job.out / WORK)
        kept = replace(served.manifest, measured=staged.manifest.measured, kind=staged.manifest.kind)
        summary = summarise(job.out, kept, encoded, verdict, start=job.start, published=False)
        raise RejectedError(summary, verdict.reason, has_vectors=options.keep_shards)
    return verdict


def _load_replicas(job: RebuildJob, checkpoint: Path) -> tuple[list[Encoder], str]:
    """Return encoders, and the runtime that encodes the images: on a cluster it is not theirs."""
    options, work = job.options, job.out / WORK
    if not options.ray:
        replicas = choose_replicas(job.gallery, checkpoint, work, options)
        return replicas, replicas[0].runtime.name
    replicas = load_replicas(checkpoint, options.device, exact=options.exact)
    if options.runtime != AUTO:
        return replicas, options.runtime
    return replicas, runtime_in_use(job.gallery, replicas[0], "torch", work, options)


def _encode(job: RebuildJob, replicas: list[Encoder], runtime: str, checkpoint: Path) -> EncodedGallery:
    options, work = job.options, job.out / WORK
    cache = PixelCache.open(options.pixel_cache, replicas[0].preprocess) if options.pixel_cache else None
    if options.ray:
        from index_jobs.encoding.ray_cluster import encode_on_ray

        return encode_on_ray(job.gallery, replicas[0], work, options, checkpoint=checkpoint, runtime=runtime)
    return encode_gallery(job.gallery, replicas, work, options, cache)


def _stage(
    job: RebuildJob, staging: Path, encoder: Encoder, encoded: EncodedGallery, choices: Sequence[IndexChoice],
    runtime: str,
) -> Manifest:  # fmt: skip
    """Write vectors, items and failures, and return their manifest."""
    options, gallery = job.options, job.gallery
    logger.info("%d vectors: %s (%s)", len(encoded), choices[0].factory, choices[0].reason)
    queries = caption_queries(gallery.table, encoder)
    choice, measured = stage_vectors(staging, job.out, options, encoder, encoded, choices, queries)
    fields = stage_items(staging, gallery, encoded, options.text_fields)
    pairs = job.pairs if options.validation else None
    searchable = None if options.milvus else pairs
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
        roots=list(gallery.roots),
        checkpoint=str(job.checkpoint.absolute()),
        checkpoint_signature=job.signature,
        gallery_signature=gallery.content_signature,
        created=utc_now(),
        failed=len(encoded.failed),
        exact=options.exact,
        text_fields=None if options.text_fields is None else list(options.text_fields),
        group_field=options.group_field,
        number_texts=fields.number_texts,
        measured=measured,
        cutoff=calibrate_cutoff(pairs, encoder, encoded) if pairs else {},
        hybrid_weight=choose_hybrid_weight(staging, searchable, gallery, encoded, encoder) if searchable else None,
        runtime=runtime,
        files={},
    )


def _clean_work(out: Path, store: ShardStore, served: Artifact | None, *, keep_reusable: bool = False) -> None:
    """Remove vectors other than this job's and the served version's.

    Args:
        keep_reusable: keep the largest other folder that this job can take vectors from.
    """
    kept = {store.path}
    if served is not None:
        kept |= {mark.parent for mark in (out / WORK).glob(f"*/{_vectors_mark(served.manifest)}")}
    if keep_reusable:
        others = (folder for folder in store.other_folders() if folder not in kept)
        kept.add(max(others, key=_count_bytes, default=store.path))
    publish.clean_work(out, out / WORK, lambda path: path in kept)


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _keep_vectors(job: RebuildJob, own: Path, manifest: Manifest) -> None:
    """Keep the published version's vectors for the next rebuild, if the options say so, and remove all others."""
    work = job.out / WORK
    if not job.options.keep_shards:
        publish.remove_directory(job.out, work)
        return
    for leftover in own.glob(".*.tmp"):  # of a killed job
        leftover.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # without the mark, the next rebuild encodes again
        (own / _vectors_mark(manifest)).touch()
    publish.clean_work(job.out, work, lambda path: path == own)


def _vectors_mark(manifest: Manifest) -> str:
    """Return the name of the file that marks a version's vectors; versions that differ in kind alone share it."""
    inputs = [manifest.fingerprint, manifest.gallery_signature, manifest.runtime]
    return _MARK_PREFIX + hashlib.sha256(canonical_json(inputs)).hexdigest()[:16]


def _warn_of_lost_updates(served: Manifest, published: Manifest) -> None:
    if served.additions or served.removed:
        logger.warning(
            "version %d holds the gallery as it is; what was added to or removed from version %d is not in it",
            published.version, served.version,
        )  # fmt: skip
