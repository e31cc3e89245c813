"""The build of a version: encode, create the vector index, compare with the served version, publish.

- A build whose spec is that of the served version returns at once, without importing PyTorch.
- The checkpoint is copied first and loaded from the copy, so a version contains the model that encoded it.
- Errors are found before the first image is encoded: lock, output, checkpoint, fields, kind, validation pairs, the
  served version's model, disk space, and a gallery that has shrunk, as one on a disk that is not mounted.
- A killed run resumes after its last complete shard. `out/work` holds the vectors of the served version, and those of
  one rejected or interrupted build; the next build by the same encoder takes what it can use from both.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dcar_core import Encoder
from dcar_core.data.judgements import read_judgements
from dcar_core.encoder.encoder import add_portable_export
from dcar_core.encoder.export_cache import has_portable
from dcar_core.encoder.runtimes import AUTO, EXPORTED
from dcar_core.model.checkpoint import PORTABLE, copy_checkpoint, missing_places, read_config, read_portable_config
from dcar_core.util.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    DcarError,
    GalleryShrunkError,
    ImageFault,
    ModelError,
    StoreUnavailableError,
    list_fields,
)
from dcar_core.util.files import hash_json
from dcar_core.util.machine import is_installed
from index_jobs.encoding.devices import load_replicas
from index_jobs.encoding.encode import EncodedGallery, encode_gallery
from index_jobs.encoding.shards import ShardStore
from index_jobs.engines.measure import caption_queries
from index_jobs.engines.protocol import NewIndex, load_engine
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.index import versions
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.items import BUILT_IN_FIELDS, FieldTypes, Items, field_names, take_rows, write_items
from index_jobs.index.lexical.lexical_index import item_texts, write_lexical
from index_jobs.index.manifest import CHECKPOINT, CURRENT, DUPLICATES, FAILED, ITEMS, LEXICAL, Manifest, counted
from index_jobs.index.storage import index_name, index_path, location_of
from index_jobs.index.versions import open_current, pull
from index_jobs.jobs import gate
from index_jobs.jobs.summary import RebuildSummary, RejectedError
from index_jobs.spec import BuildOptions, IndexSpec

logger = logging.getLogger(__name__)

WORK = "work"
_SUMMARY = ("version", "count", "failed", "dim", "kind", "reason", "measured", "number_texts", "cutoff")
_COMPARED = ["caption", "category", "metadata", "size"]


def rebuild(
    gallery: str | Path | Sequence[str] | Gallery, checkpoint: Path, out: Path, **options: Any
) -> RebuildSummary:
    """Publish an index of a gallery, encoded with a checkpoint.

    Args:
        gallery: a folder, an uncompressed tar, or a list, as a path or URL, or several; see `index_jobs.gallery.scan`.
            A scanned gallery is taken as it is.
        checkpoint: a DCAR checkpoint directory.
        out: the index directory, created if missing, or its URL in an object store.
        options: the fields of `BuildOptions` and of its `IndexSpec`.

    Raises:
        DataError: the gallery or an option cannot be used, or too many images are broken.
        CheckpointError, ModelError: the model cannot be loaded; or the served version's model cannot, without force.
        LockedError: another job is writing to `out`.
        GalleryShrunkError, RejectedError: too many of the served images are gone, or the rebuilt index ranks worse.
        StoreUnavailableError: the served version's store does not respond, without force.
        DcarError: the output cannot be written, or does not read back; published versions are unchanged.
    """
    out = index_path(out)
    settings = BuildOptions.of(options)
    with versions.report_os_errors(out):
        pull(out, history=True)
        build = _Build(settings, checkpoint, out)
        if not isinstance(gallery, Gallery):
            logger.info("looking for images")
            gallery = scan(gallery)
        build.gallery = gallery
        current = None if build.options.force else build.find_published()
        return build.run() if current is None else build.summarize(current)


class _Build:
    """One build. The encoder and the served version are known once it runs."""

    gallery: Gallery
    encoder: Encoder
    served: IndexVersion | None
    published: IndexVersion | None = None  # when the build began

    def __init__(self, options: BuildOptions, checkpoint: Path, out: Path) -> None:
        self.options, self.out, self.work, self.origin = options, out, out / WORK, checkpoint.absolute()
        with contextlib.suppress(ArtifactError):
            self.published = open_current(out)
        self.checkpoint = _with_retraining(checkpoint, self.published, is_forced=options.force)
        self._start = time.perf_counter()
        self.judged = read_judgements([options.judgements]) if options.judgements else None

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
        if self.published is None:
            return None
        try:
            backbone = read_config(self.published.checkpoint)["backbone"]
        except CheckpointError:
            return None
        manifest = self.published.manifest
        is_same = manifest.spec == self.spec and manifest.is_as_built
        if self.options.model is not None or missing_places(backbone):
            is_same &= backbone == read_portable_config(self.checkpoint, self.options.model)["backbone"]
        return manifest if is_same else None

    def run(self) -> RebuildSummary:
        """Build and publish a version."""
        out, options, gallery = self.out, self.options, self.gallery
        with versions.new_version(out) as new:
            _require_fields(gallery, self.spec)  # before a model is loaded
            copy_checkpoint(self.checkpoint, copy := new.folder / CHECKPOINT, options.model)
            logger.info("%s images; loading the model", f"{len(gallery):,}")
            try:
                if options.model is not None:
                    Encoder.load(copy, device="cpu")  # an export would load with any backbone
                replicas = self._load_replicas(copy)
            except (CheckpointError, ModelError) as error:  # the copy is removed
                raise type(error)(str(error).replace(str(copy), str(self.checkpoint))) from error
            self.encoder = replicas[0]
            least_bytes = load_engine(self.spec.engine).plan(self.spec, len(gallery), self.encoder.dim, options.device)
            store = ShardStore(gallery, self.encoder, self.work, options)
            self.served = self._open_served()
            self._require_few_removed()
            self._load_served_encoder("cpu")  # a check; encoding may need its memory
            self._add_portable_export(new)  # before the space that is left is measured
            self._make_room(store, least_bytes)
            encoded = self._encode(replicas, copy)
            self._clean_work(store)
            changes = self._count_changes(take_rows(gallery.table, encoded.rows()))
            built = new.prepare(self._write(new, encoded))
            verdict = self._require_no_worse(built, encoded)
            manifest = new.commit(built.manifest, keep=options.keep)
            if self.served is not None and not self.served.manifest.is_as_built:
                logger.warning(
                    "version %d holds the gallery as it is; what was added, removed or changed in %d is not in it",
                    manifest.version, self.served.manifest.version,
                )  # fmt: skip
            if options.keep_shards:
                for leftover in store.path.glob(".*.tmp"):  # of a killed job
                    leftover.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # without the marker, the next build encodes again
                    (store.path / _marker(manifest)).touch()
                self._keep_only({store.path})
            else:
                self._keep_only(set())
        return self.summarize(manifest, encoded, verdict, changes=changes)

    def summarize(
        self,
        manifest: Manifest,
        encoded: EncodedGallery | None = None,
        verdict: gate.GateVerdict | None = None,
        *,
        published: bool = True,
        changes: dict[str, int] | None = None,
    ) -> RebuildSummary:
        """Return the summary of this build.

        Args:
            manifest: of the new version, or of the one that stays published.
            encoded: None if nothing had changed.
            published: False if the new version was rejected.
            changes: see `_count_changes`.
        """
        if encoded:
            unread, duplicates = encoded.unread, len(encoded.duplicates())
        else:
            faults = (json.loads(line)["fault"] for line in manifest.path(self.out, FAILED).read_bytes().splitlines())
            unread = sum(ImageFault(fault).is_temporary for fault in faults)
            duplicates = manifest.path(self.out, DUPLICATES).read_bytes().count(b"\n")
        return RebuildSummary(
            **{name: getattr(manifest, name) for name in _SUMMARY},
            fingerprint=manifest.spec.fingerprint,
            index=location_of(self.out),
            published=published and encoded is not None,
            reused=encoded is None,
            unread=unread,
            duplicates=duplicates,
            encoded=encoded.encoded if encoded else 0,
            resumed=encoded.resumed if encoded else 0,
            seconds=round(time.perf_counter() - self._start, 3),
            images_per_second=round(encoded.encoded / encoded.seconds, 1) if encoded and encoded.encoded else 0.0,
            gate=asdict(verdict) if verdict else None,
            hint=f"images that could not be read: {unread:,} ({FAILED} has the reasons); once they can be, give --force"
            if unread and published
            else "",
            changes=changes,
        )

    def _open_served(self) -> IndexVersion | None:
        """Open the served version; None if there is nothing to compare with, also with force if its store is down."""
        if not (self.out / CURRENT).exists():
            return None
        try:
            return open_current(self.out)
        except ArtifactError as error:
            if isinstance(error, StoreUnavailableError) and not self.options.force:
                raise StoreUnavailableError(
                    f"the served version cannot be compared: {error}; run the same command again once its store "
                    f"responds, or publish without a comparison by --force"
                ) from error
            logger.warning("the served version cannot be read, so nothing is compared with it: %s", error)
            return None

    def _count_changes(self, table: pa.Table) -> dict[str, int] | None:
        """Compare the rows that can be indexed with the served version by their ids.

        An item counts as changed if its file's size, caption, category or metadata differ.
        """
        if self.served is None:
            return None
        rows = np.flatnonzero(self.served.live)
        ids = self.served.column("id").filter(self.served.live)
        positions = pc.fill_null(pc.index_in(table["id"], ids), -1).to_numpy()
        is_kept = positions >= 0
        before = np.concatenate([_hash_rows(part.items.table()) for part in self.served.parts])
        changed = before[rows[positions[is_kept]]] != _hash_rows(table)[is_kept]
        removed = len(rows) - int(is_kept.sum())
        return {"added": int((~is_kept).sum()), "removed": removed, "changed": int(changed.sum())}

    def _require_few_removed(self) -> None:
        """Raise GalleryShrunkError if too many of the served items are gone, unless forced."""
        served, limit = self.served, self.options.max_vanished
        if served is None or self.options.force:
            return
        ids = served.column("id").filter(served.live)
        gone = ids.filter(pc.invert(pc.is_in(ids, self.gallery.table["id"])))
        if len(gone) > limit * served.manifest.count:
            example = served.item(served.row_of(gone[0].as_py()) or 0).metadata.get("file_name", "")
            raise GalleryShrunkError(
                f"not published: {len(gone):,} of the {len(ids):,} images of version {served.manifest.version} are "
                f"gone from {self.gallery.location}, such as {example}, and at most {limit:.0%} may be; mount or "
                f"restore what is missing, or give --force if they are meant to be gone (--max-vanished sets the limit)"
            )

    def _make_room(self, store: ShardStore, least_bytes: int) -> None:
        """Remove vectors that are not needed. Raise DcarError if the disk cannot hold the missing ones and an index."""
        for keep_reusable in (True, False):
            self._clean_work(store, keep_reusable=keep_reusable)
            vectors = 4 * store.dim * (len(self.gallery) - store.stored_rows())
            needed, free = vectors + least_bytes + self.gallery.table.nbytes, shutil.disk_usage(self.out).free
            if needed <= free:
                return
        raise DcarError(
            f"the index {self.out} takes at least {needed / 1e9:.1f} GB more, {vectors / 1e9:.1f} of them for vectors "
            f"that the next rebuild can use, but its disk has {free / 1e9:.1f} GB left; make room, or give another "
            f"--out"
        )

    def _load_served_encoder(self, device: str) -> Encoder | str:
        """Return the model of the served version if it is compared; with force, the reason if it cannot be loaded."""
        if self.served is None or not (self.pairs or self.judged):
            return self.encoder
        if self.served.manifest.spec.fingerprint == self.encoder.fingerprint:
            return self.encoder
        try:
            return Encoder.load(self.served.checkpoint, device=device)
        except (CheckpointError, ModelError) as error:
            version = self.served.manifest.version
            reason = f"the served version {version} cannot be compared, because its model cannot be loaded: {error}"
            if not self.options.force:
                raise CheckpointError(f"{reason}; restore its model's files, or publish by --force") from error
            logger.warning("%s", reason)
            return reason

    def _require_no_worse(self, built: IndexVersion, encoded: EncodedGallery) -> gate.GateVerdict | None:
        """Compare with the served version. Raise RejectedError if the new one ranks worse, unless forced."""
        options = self.options
        if self.served is None:
            return None
        logger.info("comparing with version %d", self.served.manifest.version)
        served_encoder = self._load_served_encoder(options.device.split(",")[0])
        if isinstance(served_encoder, str):
            verdict = gate.GateVerdict(served_encoder, options.margin)
        else:
            before, after = (self.served, served_encoder.encode_text), (built, self.encoder.encode_text)
            verdict = gate.compare(before, after, self.pairs, options.margin)
            if self.judged:
                verdict = gate.add_judged(verdict, self.judged, before, after)
        if not verdict.passed and not options.force:
            remedy = "its vectors are kept, so --force publishes it without encoding again"
            if not options.keep_shards:
                self._keep_only(set())
                remedy = "its vectors are not kept, so --force encodes again and publishes it"
            kept = replace(self.served.manifest, measured=built.manifest.measured, kind=built.manifest.kind)
            summary = self.summarize(kept, encoded, verdict, published=False)
            message = f"not published: the rebuilt index ranks worse than version {kept.version}: {verdict.reason}"
            raise RejectedError(f"{message}; {remedy}", summary)
        return verdict

    def _load_replicas(self, checkpoint: Path) -> list[Encoder]:
        is_open = self.options.ray and self.spec.runtime == AUTO  # the fastest runtime here may not run on a cluster
        runtime = "torch" if is_open else self.spec.runtime
        return load_replicas(checkpoint, self.options.device, exact=self.spec.exact, runtime=runtime)

    def _encode(self, replicas: list[Encoder], checkpoint: Path) -> EncodedGallery:
        if self.options.ray:
            from index_jobs.encoding.ray_cluster import encode_on_ray

            return encode_on_ray(self.gallery, self.encoder, checkpoint, self.work, self.options)
        return encode_gallery(self.gallery, replicas, self.work, self.options)

    def _add_portable_export(self, new: versions.NewVersion) -> None:
        """Add what serves the model without PyTorch, if OpenVINO is installed, or take over that of the served version.

        A model that comes with an export keeps it.
        """
        served, copy = self.served, new.folder / CHECKPOINT
        is_wanted = self.spec.runtime in (AUTO, *EXPORTED)
        if not is_wanted or has_portable(copy) or not is_installed("openvino"):
            return
        if served and served.manifest.spec.fingerprint == self.encoder.fingerprint and has_portable(served.checkpoint):
            shutil.rmtree(copy / PORTABLE, ignore_errors=True)  # of another release
            new.link(served, f"{CHECKPOINT}/{PORTABLE}/")
        else:
            add_portable_export(copy, self.encoder.backbone)

    def _write(self, new: versions.NewVersion, encoded: EncodedGallery) -> Manifest:
        """Write vectors, items and failures, and return their manifest."""
        gallery, spec, encoder, folder = self.gallery, self.spec, self.encoder, new.folder
        engine = load_engine(spec.engine)
        rows = encoded.rows()
        field_types = write_items(folder / ITEMS, encoded.table(), rows)
        vectors = NewIndex(
            name=index_name(self.out), folder=folder, version=new.number, blocks=encoded.blocks,
            fields=Items(folder / ITEMS).field_table(), count=len(encoded), dim=encoder.dim,
            queries=caption_queries(gallery.table, encoder), device=self.options.device,
        )  # fmt: skip
        logger.info("building the vector index")
        created = engine.create(spec, vectors)
        logger.info("%d vectors: %s (%s)", len(encoded), created.kind, created.reason)
        logger.info("indexing the words of the items")
        write_lexical(folder / LEXICAL, item_texts(take_rows(gallery.table, rows), spec.text_fields))
        encoded.write_failed(folder / FAILED)
        encoded.write_duplicates(folder / DUPLICATES)
        logger.info("measuring the scores of matches")
        index = engine.open({path.name: path for path in folder.iterdir()})
        if self.options.validation and self.pairs:
            calibrated = gate.calibrate(folder / LEXICAL, index, self.pairs, encoded, encoder)
        else:
            calibrated = gate.calibrate_by_words(index, encoder.encode_text)
        return Manifest(
            **vars(created),
            spec=spec,
            dim=encoder.dim,
            count=len(encoded),
            root="" if gallery.root == str(self.out.absolute()) else gallery.root,  # the index may be moved
            roots=list(gallery.roots),
            checkpoint=str(self.origin),
            change=f"{counted(len(encoded), 'image')} added {self.options.origin}"
            if self.options.origin
            else f"built from {', '.join(place.rpartition('/')[2] for place in gallery.location.split(', '))}",
            origin=self.options.origin,
            failed=len(encoded.failed),
            number_texts=field_types.number_texts,
            runtime=self.encoder.runtime.name,
            **calibrated,
        )

    def _clean_work(self, store: ShardStore, *, keep_reusable: bool = False) -> None:
        """Remove vectors other than this job's and the served version's.

        Args:
            keep_reusable: keep the largest other folder that this job can take vectors from.
        """
        kept = {store.path}
        if self.served is not None:
            kept |= {marker.parent for marker in self.work.glob(f"*/{_marker(self.served.manifest)}")}
        if keep_reusable:
            others = (folder for folder in store.other_folders() if folder not in kept)
            sizes = {folder: sum(path.stat().st_size for path in folder.iterdir()) for folder in others}
            kept.add(max(sizes, key=sizes.__getitem__, default=store.path))
        self._keep_only(kept)

    def _keep_only(self, kept: set[Path]) -> None:
        """Remove other folders of vectors; a failure is left to the next build."""
        for folder in self.work.iterdir() if self.work.is_dir() else ():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        if not kept:
            shutil.rmtree(self.work, ignore_errors=True)


def _with_retraining(checkpoint: Path, served: IndexVersion | None, *, is_forced: bool) -> Path:
    """Return the served version's model if it was retrained from a checkpoint, else the checkpoint."""
    if served is None:
        return checkpoint
    retrained = served.checkpoint
    with contextlib.suppress(CheckpointError):  # whoever loads it says what is wrong
        lineage = read_config(retrained).get("training", {}).get("retrained", {}).get("from", ())
        if lineage and read_config(checkpoint)["fingerprint"] in lineage:
            kept = "is lost, by --force" if is_forced else "is kept; --force goes back to the checkpoint"
            logger.warning("the served model was retrained from %s: what it learned %s", checkpoint, kept)
            return checkpoint if is_forced else retrained
    return checkpoint


def _marker(manifest: Manifest) -> str:
    """Return the name of the file that marks a version's vectors; versions that differ only in their kind share it."""
    return f"of-{hash_json([manifest.spec.fingerprint, manifest.spec.gallery_signature, manifest.runtime])[:16]}"


def _hash_rows(table: pa.Table) -> NDArray[np.int64]:
    """Return a hash of each row's compared columns, int64 (n,), with one batch in memory at a time."""
    batches = table.select(_COMPARED).to_batches()
    hashes = (map(hash, zip(*(column.to_pylist() for column in batch.columns), strict=True)) for batch in batches)
    return np.array([value for batch in hashes for value in batch], np.int64)


def _require_fields(gallery: Gallery, spec: IndexSpec) -> None:
    """Check that items have the fields that searches group by and look words up in.

    One of several text fields may be missing, since items that are added later may have it. That is a warning.

    Raises:
        DataError: no item has the group field, or any of the text fields, or the group field holds lists.
    """
    metadata = gallery.table["metadata"]
    types = dict.fromkeys(BUILT_IN_FIELDS, pa.string()) | (FieldTypes.infer(metadata).types if spec.group_field else {})
    known = {*BUILT_IN_FIELDS} | (field_names(metadata) if spec.text_fields else set())
    groups = [spec.group_field] if spec.group_field else []
    for option, names, found in (("--group-field", groups, {*types}), ("--text-fields", spec.text_fields or (), known)):
        if missing := [name for name in names if name not in found]:
            named = " or ".join(map(repr, missing))
            message = f"{option}: no item has the field {named}; there are: {list_fields(found)}"
            if len(missing) == len(names):
                raise DataError(message)
            logger.warning("%s", message)
    if any(pa.types.is_list(types[name]) for name in groups):
        raise DataError(f"--group-field: {groups[0]!r} has several values per item; name a field with one")
