"""The build of a version: encode, create the vector index, compare with the served
version, publish.

- A build whose spec is that of the served version returns at once, without importing
  PyTorch.
- The checkpoint is copied first and loaded from the copy, so a version contains the
  model that encoded it.
- Errors are found before the first image is encoded: lock, output, checkpoint, fields,
  kind, validation pairs, the served version's model, disk space, and a gallery that has
  shrunk, as one on a disk that is not mounted.
- A killed run resumes after its last complete shard. `out/work` holds the vectors of
  the builds since the last publication and of the served version; the next build by the
  same encoder takes what it can use.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dcar_core import Encoder
from dcar_core.encoder.encoder import add_portable_export, load_exact
from dcar_core.encoder.exports import has_portable
from dcar_core.encoder.runtimes import AUTO, EXPORTED
from dcar_core.model.checkpoint import (
    PORTABLE,
    copy_checkpoint,
    missing_places,
    read_config,
    read_portable_config,
)
from dcar_core.util.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    DcarError,
    GalleryShrunkError,
    GateError,
    ModelError,
    StoreUnavailableError,
    list_fields,
)
from dcar_core.util.machine import is_installed
from index_jobs.encoding.encode import EncodedGallery, encode_gallery, load_replicas
from index_jobs.encoding.shards import ShardStore
from index_jobs.engines.measure import text_queries
from index_jobs.engines.protocol import NewIndex, load_engine
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.index import versions
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.items import (
    BUILT_IN_FIELDS,
    Items,
    field_names,
    infer_types,
    take_rows,
    write_items,
)
from index_jobs.index.lexical import item_texts, write_lexical
from index_jobs.index.manifest import (
    CHECKPOINT,
    CURRENT,
    FAILED,
    ITEMS,
    LEXICAL,
    Manifest,
    quantity,
)
from index_jobs.index.stores import index_name, index_path, location_of
from index_jobs.index.versions import open_current
from index_jobs.jobs import gate
from index_jobs.spec import BuildOptions, IndexSpec

logger = logging.getLogger(__name__)

WORK = "work"
_SUMMARY = ("version", "count", "failed", "dim", "kind", "reason", "measured", "cutoff")


@dataclass(frozen=True, kw_only=True)
class RebuildSummary:
    """Result of a rebuild; the JSON summary has the same fields."""

    index: str
    version: int  # the new one, or the one that is as asked for
    reused: bool
    count: int
    failed: int  # images without a vector
    failures: str  # the file that lists them
    encoded: int  # images that this run encoded or tried to
    resumed: int  # images with vectors from an earlier run
    seconds: float
    fingerprint: str
    dim: int
    kind: str
    reason: str
    measured: dict[str, Any]
    cutoff: dict[str, Any]  # as in the manifest
    # items that came and went since the served version
    changes: dict[str, int] | None = None
    # comparison with the served version; see `gate.GateVerdict`
    gate: dict[str, Any] | None = None

    def to_text(self) -> str:
        """Return the summary as a few lines for people."""
        state = "is up to date with" if self.reused else "published:"
        lines = [
            f"{self.index}: version {self.version} {state} {self.count:,} images,"
            f" {self.kind}, {self.failed} broken"
        ]
        if self.changes:
            numbers = ", ".join(
                f"{count:,} images {name}" for name, count in self.changes.items()
            )
            lines.append(f"since the previous version: {numbers}")
        if self.gate:
            lines.append(f"compared with the previous version: {self.gate['reason']}")
        if self.measured.get("parameters"):
            recall = 100 * self.measured["recall_at_10"]
            source = self.measured["query_source"]
            lines.append(
                f"searches are tuned by {source}, and return {recall:.1f} % of their"
                " ten nearest images"
            )
        if "recall_at_1" in self.cutoff:
            first, ten = (100 * self.cutoff[f"recall_at_{k}"] for k in (1, 10))
            lines.append(
                f"validation: {self.cutoff['pairs']:,} texts find their image first in"
                f" {first:.1f} %, among the first ten in {ten:.1f} %; results are"
                f" likely from a score of {self.cutoff['min_score']:.3f} on"
            )
        return "\n".join(lines + self.notes())

    def notes(self) -> list[str]:
        """Return a line for images that searches leave out."""
        lines = list[str]()
        if self.failed:
            lines.append(
                f"broken images, left out: {self.failed:,}, with reasons in"
                f" {self.failures}"
            )
        return lines


def rebuild(
    gallery: str | Path | Sequence[str] | Gallery,
    checkpoint: Path,
    out: Path,
    **options: Any,
) -> RebuildSummary:
    """Publish an index of a gallery, encoded with a checkpoint.

    Args:
        gallery: a folder, an uncompressed tar, or a list, as a path or URL, or several;
            see `index_jobs.gallery.scan`. A scanned gallery is taken as it is.
        out: the index directory, created if missing, or its URL in an object store.
        options: the fields of `BuildOptions` and of its `IndexSpec`.

    Raises:
        DataError: the gallery or an option cannot be used, or too many images are
            broken.
        CheckpointError, ModelError: the model cannot be loaded; or the served version's
            model cannot, without force.
        LockedError: another job is writing to `out`.
        GalleryShrunkError, GateError: too many of the served images are gone, or the
            rebuilt index ranks worse.
        StoreUnavailableError: the served version's store does not respond, without
            force.
        DcarError: the output cannot be written, or does not read back; published
            versions are unchanged.
    """
    out = index_path(out)
    settings = BuildOptions.of(options)
    start = time.perf_counter()
    if not isinstance(gallery, Gallery):
        logger.info("looking for images")
        gallery = scan(gallery)
    with versions.report_os_errors(out), versions.new_version(out) as new:
        return _Build(settings, gallery, checkpoint, new, start).run()


class _Build:
    """One build. The encoder is known once it runs."""

    encoder: Encoder

    def __init__(
        self,
        options: BuildOptions,
        gallery: Gallery,
        checkpoint: Path,
        new: versions.NewVersion,
        start: float,
    ) -> None:
        self.options = options
        self.gallery = gallery
        self.new = new
        self.start = start
        self.out = new.index
        self.origin = checkpoint.absolute()
        self.served = self._open_served()
        self.checkpoint = self._with_retraining(checkpoint)

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
            pairs_signature=(
                self.pairs.signature if self.options.validation and self.pairs else ""
            ),
        )

    def _open_served(self) -> IndexVersion | None:
        """Open the served version; None if there is nothing to compare with."""
        if not (self.out / CURRENT).exists():
            return None
        try:
            return open_current(self.out)
        except ArtifactError as error:
            if isinstance(error, StoreUnavailableError) and not self.options.force:
                raise StoreUnavailableError(
                    f"the served version cannot be compared: {error}; run this again"
                    " once its store responds, or publish without a comparison by"
                    " --force"
                ) from error
            logger.warning(
                "the served version cannot be read, so nothing is compared with it: %s",
                error,
            )
            return None

    def _with_retraining(self, checkpoint: Path) -> Path:
        """Return the served version's model if it was retrained from a checkpoint, else
        the checkpoint.
        """
        if self.served is None:
            return checkpoint
        # whoever loads it says what is wrong
        with contextlib.suppress(CheckpointError):
            lineage = (
                read_config(self.served.checkpoint)
                .get("training", {})
                .get("retrained", {})
                .get("from", ())
            )
            if lineage and read_config(checkpoint)["fingerprint"] in lineage:
                if self.options.force:
                    outcome = "is lost, by --force"
                else:
                    outcome = "is kept; --force goes back to the checkpoint"
                logger.warning(
                    "the served model was retrained from %s: what it learned %s",
                    checkpoint,
                    outcome,
                )
                return checkpoint if self.options.force else self.served.checkpoint
        return checkpoint

    def _is_published(self) -> bool:
        """Return whether the served version is what this build would publish."""
        if self.served is None or self.options.force:
            return False
        try:
            backbone = read_config(self.served.checkpoint)["backbone"]
        except CheckpointError:
            return False
        is_same = (
            self.served.manifest.spec == self.spec and self.served.manifest.is_as_built
        )
        if self.options.model is not None or missing_places(backbone):
            is_same &= (
                backbone
                == read_portable_config(self.checkpoint, self.options.model)["backbone"]
            )
        return is_same

    def run(self) -> RebuildSummary:
        """Build and publish a version."""
        options = self.options
        gallery = self.gallery
        new = self.new
        served = self.served
        if served is not None and self._is_published():
            return self._summarize(served.manifest)
        _require_fields(gallery, self.spec)  # before a model is loaded
        copy_checkpoint(self.checkpoint, copy := new.folder / CHECKPOINT, options.model)
        logger.info("%s images; loading the model", f"{len(gallery):,}")
        try:
            if options.model is not None:
                # an export would load with any backbone
                Encoder.load(copy, device="cpu")
            # The fastest runtime here may not run on a cluster.
            if options.ray and self.spec.runtime == AUTO:
                runtime = "torch"
            else:
                runtime = self.spec.runtime
            replicas = load_replicas(
                copy,
                options.device,
                exact=self.spec.exact,
                runtime=runtime,
            )
        except (CheckpointError, ModelError) as error:  # the copy is removed
            raise type(error)(
                str(error).replace(str(copy), str(self.checkpoint))
            ) from error
        self.encoder = replicas[0]
        least_bytes = load_engine(self.spec.engine).plan(
            self.spec,
            len(gallery),
            self.encoder.dim,
        )
        store = ShardStore(gallery, self.encoder, self.out / WORK, options)
        self._require_few_removed()
        self._load_served_encoder("cpu")  # a check; encoding may need its memory
        self._add_portable_export(new)  # before the space that is left is measured
        self._make_room(store, least_bytes)
        encoded = self._encode(replicas, copy)
        # what they share with this gallery was copied
        for folder in store.other_folders():
            shutil.rmtree(folder, ignore_errors=True)
        built = new.prepare(self._write(new, encoded))
        verdict = self._require_no_worse(built)
        manifest = new.commit(built.manifest, keep=options.keep)
        if served is not None and self._loses_changes(served):
            logger.warning(
                "version %d holds the gallery as it is; what was added, removed or"
                " changed in %d is not in it",
                manifest.version,
                served.manifest.version,
            )
        _keep_only(store)
        for leftover in store.path.glob(".*.tmp"):  # of a killed job
            leftover.unlink(missing_ok=True)
        changes = self._count_changes(
            take_rows(gallery.table.select(["id"]), encoded.rows())["id"]
        )
        return self._summarize(
            manifest,
            encoded,
            changes=changes,
            gate=asdict(verdict) if verdict else None,
        )

    def _summarize(
        self,
        manifest: Manifest,
        encoded: EncodedGallery | None = None,
        **more: Any,
    ) -> RebuildSummary:
        return RebuildSummary(
            **{name: getattr(manifest, name) for name in _SUMMARY},
            fingerprint=manifest.spec.fingerprint,
            index=location_of(self.out),
            failures=str(manifest.path(self.out, FAILED)),
            reused=encoded is None,
            encoded=encoded.encoded if encoded else 0,
            resumed=encoded.resumed if encoded else 0,
            seconds=round(time.perf_counter() - self.start, 3),
            **more,
        )

    def _served_ids(self) -> pa.ChunkedArray:
        if self.served:
            return self.served.column("id").filter(self.served.live)
        return pa.chunked_array([], pa.string())

    def _count_changes(self, ids: pa.ChunkedArray) -> dict[str, int] | None:
        """Compare the ids of the new version with those of the served one."""
        if self.served is None:
            return None
        kept = pc.sum(pc.is_in(ids, self._served_ids())).as_py() or 0
        return {"added": len(ids) - kept, "removed": self.served.manifest.count - kept}

    def _loses_changes(self, served: IndexVersion) -> bool:
        """Return whether items of the served version were changed, removed or added by
        others than the gallery.
        """
        manifest = served.manifest
        ids = served.column("id")
        removed = {*ids.filter(~served.live).to_pylist()} - {
            *self._served_ids().to_pylist()
        }
        return bool(
            manifest.changed
            or {
                source for addition in manifest.additions for source in addition.sources
            }
            - {manifest.spec.gallery}
            or not removed.isdisjoint(self.gallery.table["id"].to_pylist())
        )

    def _require_few_removed(self) -> None:
        """Raise GalleryShrunkError if too many of the served items are gone, unless
        forced.
        """
        served = self.served
        limit = self.options.max_vanished
        ids = self._served_ids()
        gone = ids.filter(pc.invert(pc.is_in(ids, self.gallery.table["id"])))
        if (
            served is not None
            and not self.options.force
            and len(gone) > limit * len(ids)
        ):
            example = served.item(served.row_of(gone[0].as_py()) or 0).metadata.get(
                "file_name", ""
            )
            raise GalleryShrunkError(
                f"not published: {len(gone):,} of the {len(ids):,} images of version"
                f" {served.manifest.version} are gone from {self.gallery.location},"
                f" such as {example}, and at most {limit:.0%} may be; mount or restore"
                " what is missing, or give --force if they are meant to be gone"
                " (--max-vanished sets the limit)"
            )

    def _make_room(self, store: ShardStore, least_bytes: int) -> None:
        """Raise DcarError if the disk cannot hold the missing vectors and an index,
        without those of other builds.
        """
        vectors = 4 * store.dim * (len(self.gallery) - store.stored_rows())
        needed = vectors + least_bytes + self.gallery.table.nbytes
        if shutil.disk_usage(self.out).free < needed:
            _keep_only(store)
        if (free := shutil.disk_usage(self.out).free) < needed:
            raise DcarError(
                f"the index {self.out} takes at least {needed / 1e9:.1f} GB more,"
                f" {vectors / 1e9:.1f} of them for vectors that the next rebuild can"
                f" use, but its disk has {free / 1e9:.1f} GB left; make room, or give"
                " another --out"
            )

    def _load_served_encoder(self, device: str) -> Encoder | None:
        """Return the model of the served version; None if nothing is compared."""
        if self.served is None or self.options.force:
            return None
        if (
            not self.pairs
            or self.served.manifest.spec.fingerprint == self.encoder.fingerprint
        ):
            return self.encoder
        try:
            return load_exact(self.served.checkpoint, device)
        except (CheckpointError, ModelError) as error:
            version = self.served.manifest.version
            raise CheckpointError(
                f"the served version {version} cannot be compared, because its model"
                f" cannot be loaded: {error}; restore its model's files, or publish by"
                " --force"
            ) from error

    def _require_no_worse(self, built: IndexVersion) -> gate.GateVerdict | None:
        """Compare with the served version, unless forced. Raise GateError if the new
        one ranks worse.
        """
        encoder = self._load_served_encoder(self.options.device.split(",")[0])
        if self.served is None or encoder is None:
            return None
        version = self.served.manifest.version
        logger.info("comparing with version %d", version)
        before = (self.served, encoder.encode_text)
        after = (built, self.encoder.encode_text)
        verdict = gate.compare(before, after, self.pairs, self.options.margin)
        if not verdict.passed:
            raise GateError(
                f"not published: the rebuilt index ranks worse than version {version}:"
                f" {verdict.reason}; its vectors are kept, so --force publishes it"
                " without encoding again"
            )
        return verdict

    def _encode(self, replicas: list[Encoder], checkpoint: Path) -> EncodedGallery:
        if self.options.ray:
            from index_jobs.encoding.ray_cluster import encode_on_ray

            return encode_on_ray(
                self.gallery,
                self.encoder,
                checkpoint,
                self.out / WORK,
                self.options,
            )
        return encode_gallery(self.gallery, replicas, self.out / WORK, self.options)

    def _add_portable_export(self, new: versions.NewVersion) -> None:
        """Add what serves the model without PyTorch, if OpenVINO is installed, or take
        over that of the served version.

        A model that comes with an export keeps it.
        """
        served = self.served
        copy = new.folder / CHECKPOINT
        is_wanted = self.spec.runtime in (AUTO, *EXPORTED)
        if not is_wanted or has_portable(copy) or not is_installed("openvino"):
            return
        if (
            served
            and served.manifest.spec.fingerprint == self.encoder.fingerprint
            and has_portable(served.checkpoint)
        ):
            shutil.rmtree(copy / PORTABLE, ignore_errors=True)  # of another release
            new.link(served, f"{CHECKPOINT}/{PORTABLE}/")
        else:
            add_portable_export(copy, self.encoder.backbone)

    def _write(self, new: versions.NewVersion, encoded: EncodedGallery) -> Manifest:
        """Write vectors, items and failures, and return their manifest."""
        gallery = self.gallery
        spec = self.spec
        encoder = self.encoder
        folder = new.folder
        engine = load_engine(spec.engine)
        rows = encoded.rows()
        table = encoded.table()
        write_items(folder / ITEMS, table, rows)
        vectors = NewIndex(
            name=index_name(self.out),
            folder=folder,
            version=new.number,
            blocks=encoded.blocks,
            fields=Items(folder / ITEMS).field_table(),
            count=len(encoded),
            dim=encoder.dim,
            queries=text_queries(gallery.table, encoder),
        )
        logger.info("building the vector index")
        created = engine.create(spec, vectors)
        logger.info("%d vectors: %s (%s)", len(encoded), created.kind, created.reason)
        logger.info("indexing the words of the items")
        write_lexical(
            folder / LEXICAL, item_texts(take_rows(table, rows), spec.text_fields)
        )
        encoded.write_failed(folder / FAILED)
        logger.info("measuring the scores of matches")
        index = engine.open({path.name: path for path in folder.iterdir()})
        if self.options.validation and self.pairs:
            calibrated = gate.calibrate(index, self.pairs, encoded, encoder)
        else:
            calibrated = gate.calibrate_by_words(index, encoder.encode_text)
        change = f"{quantity(len(encoded), 'image')} added {self.options.origin}"
        if not self.options.origin:
            folders = [
                place.rpartition("/")[2] for place in gallery.location.split(", ")
            ]
            change = f"built from {', '.join(folders)}"
        return Manifest(
            **vars(created),
            spec=spec,
            dim=encoder.dim,
            count=len(encoded),
            # the index may be moved
            root="" if gallery.root == str(self.out.absolute()) else gallery.root,
            roots=list(gallery.roots),
            checkpoint=str(self.origin),
            change=change,
            origin=self.options.origin,
            failed=len(encoded.failed),
            runtime=self.encoder.runtime.name,
            **calibrated,
            image_cutoff=gate.cutoff_of_images(index),
        )


def _keep_only(store: ShardStore) -> None:
    """Remove other folders of vectors; a failure is left to the next build."""
    for folder in store.path.parent.glob("*"):
        if folder != store.path:
            shutil.rmtree(folder, ignore_errors=True)


def _require_fields(gallery: Gallery, spec: IndexSpec) -> None:
    """Raise DataError if no item has the group field or any of the text fields, or the
    group field holds lists.
    """
    metadata = gallery.table["metadata"]
    names = {*BUILT_IN_FIELDS} | (
        field_names(metadata) if spec.text_fields or spec.group_field else set()
    )
    for option, wanted in (
        ("--group-field", {spec.group_field} - {""}),
        ("--text-fields", {*(spec.text_fields or ())}),
    ):
        if wanted and not wanted & names:
            named = " or ".join(map(repr, sorted(wanted)))
            raise DataError(
                f"{option}: no item has the field {named}; there are:"
                f" {list_fields(names)}"
            )
    if spec.group_field and pa.types.is_list(
        infer_types(metadata).get(spec.group_field)
    ):
        raise DataError(
            f"--group-field: {spec.group_field!r} has several values per item; name a"
            " field with one"
        )
