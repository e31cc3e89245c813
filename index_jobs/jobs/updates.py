"""Items added to a published index, or removed from it, without a rebuild.

- An update is a new version: it shares every unchanged file with the one before by hard links, and rolls back like any.
- What is added is encoded by the version's own model into a part of its own. A small part before it is merged into the
  new one, so a thousand small additions leave a handful of parts, each searched exactly.
- What is removed is a list of rows that searches leave out. The vectors stay in the file until a rebuild.
- The manifest says when a rebuild is worth it: many parts, many rows beside the built index, or many dead ones.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dcar_core.util.errors import DataError
from index_jobs.building import kinds
from index_jobs.building.build import build
from index_jobs.encoding.encode import encode_gallery
from index_jobs.encoding.failures import write_failed
from index_jobs.encoding.replicas import choose_replicas
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.gallery.storage import join_location
from index_jobs.jobs.version_writer import caption_queries
from index_jobs.options import RebuildOptions
from index_jobs.store import publish
from index_jobs.store.artifact import Artifact
from index_jobs.store.columns import FieldTypes
from index_jobs.store.faiss_index import write_faiss
from index_jobs.store.items import COLUMNS, Items, take_rows, write_items
from index_jobs.store.manifest import FAILED, ITEMS, REMOVED, VECTORS, Addition, Manifest
from index_jobs.store.segments import write_removed
from index_jobs.store.versions import open_current

WORK = "work-added"
MOST_PARTS = 8
DEAD_SHARE = 0.2
ADDED_SHARE = 0.2
ADDED_ROWS = kinds.FLAT_UP_TO  # that searches compare one by one, beside the built index
_MERGED_UP_TO = 2  # times the new rows, which makes parts grow geometrically


@dataclass(frozen=True)
class Update:
    """What an update did."""

    version: int
    count: int  # of items that can be found now
    added: int
    removed: int
    failed: int  # pictures that could not be read
    rebuild: str  # why a rebuild is worth it by now, "" while it is not


def remove(index: Path, ids: Sequence[str], *, missing_ok: bool = False, keep: int = RebuildOptions.keep) -> Update:
    """Publish a version in which these items are never found.

    Args:
        missing_ok: ids that are not in the index are no error; where none is, nothing is published.

    Raises:
        DataError: an id is not in the index, or nothing would be left.
        ArtifactError: nothing is published.
        LockedError: another job is writing.
        DcarError: the disk is full or cannot be written; what was published is unchanged.
    """
    with publish.report_os_errors(index), publish.open_staging(index) as staging:
        current = open_current(index)
        wanted = list(dict.fromkeys(ids))
        if missing_ok:
            wanted = [item_id for item_id in wanted if current.row_of(item_id) is not None]
            if not wanted:
                return Update(current.manifest.version, current.manifest.count, 0, 0, 0, current.manifest.rebuild)
        gone = _rows_of(current, wanted)
        dead = np.union1d(np.flatnonzero(~current.live), gone)
        if len(dead) == current.rows:
            raise DataError(f"no item would be left in {index}; delete the directory instead")
        files = {name: info for name, info in current.manifest.files.items() if name != REMOVED}
        shared = publish.share_files(current.path, staging, files)
        write_removed(staging / REMOVED, dead)
        manifest = _updated(current.manifest, current.rows, dead, current.manifest.additions)
        manifest = publish.publish_version(index, staging, manifest, keep=keep, shared=shared)
    return Update(manifest.version, manifest.count, 0, len(gone), 0, manifest.rebuild)


def add(
    index: Path,
    gallery: str | Path,
    *,
    replace_known: bool = False,
    keep: int = RebuildOptions.keep,
    workers: int | None = None,
    batch_size: int = RebuildOptions.batch_size,
    max_failed: float = RebuildOptions.max_failed,
    device: str = "auto",
    runtime: str = "torch",
    progress: bool = True,
) -> Update:
    """Publish a version with the pictures of another gallery besides those that are there.

    Args:
        gallery: a folder, tar or list; see `index_jobs.gallery.scan`.
        replace_known: an item of the gallery takes the place of the one with its id; else such an id is an error.
        keep, workers, batch_size, max_failed, device, runtime, progress: as in `rebuild`.

    Raises:
        DataError: the gallery cannot be used, too many pictures are broken, an id is known already, or a field
            would get values of another type.
        ArtifactError: nothing is published.
        LockedError: another job is writing.
        DcarError: the disk is full or cannot be written; what was published is unchanged.
    """
    scanned = scan(gallery)
    with publish.report_os_errors(index), publish.open_staging(index) as staging:
        current = open_current(index)
        ids = scanned.table["id"].to_pylist()
        known = [item_id for item_id in ids if current.row_of(item_id) is not None]
        if known and not replace_known:
            raise DataError(
                f"{len(known):,} of the {len(ids):,} pictures of {gallery} have an id that is in the index, the first "
                f"is {known[0]!r}; --replace puts them in the place of those"
            )
        _require_fitting(current, scanned, str(gallery))
        lanes = choose_replicas(
            scanned, current.checkpoint, index / WORK, device=device, exact=current.manifest.exact, runtime=runtime,
            batch_size=batch_size,
        )  # fmt: skip
        current.require(lanes[0].fingerprint)
        encoded = encode_gallery(
            scanned, lanes, index / WORK, workers=workers, batch_size=batch_size, max_failed=max_failed,
            progress=progress,
        )  # fmt: skip
        rows = encoded.rows()
        read = {ids[row] for row in rows.tolist()}
        replaced = [item_id for item_id in known if item_id in read]  # a broken picture replaces nothing
        dead = np.union1d(np.flatnonzero(~current.live), _rows_of(current, replaced))
        old, manifest = _Additions(current), current.manifest
        kept = old.worth_keeping(len(rows))
        folder = f"added-{manifest.version + 1}"
        (staging / folder).mkdir()
        tables, blocks = old.live(kept, dead)
        tables.append(take_rows(_absolute(scanned), rows))
        write_failed(staging / folder / FAILED, scanned, encoded.failed)
        table = pa.concat_tables(tables)
        built = build(
            lambda: chain(blocks, encoded.blocks()), table.num_rows, manifest.dim,
            kinds.choose("auto", table.num_rows, manifest.dim, memory=manifest.requested_memory),
            caption_queries(table, lanes[0]), target=manifest.target_recall,
        )  # fmt: skip
        write_faiss(built.index, staging / folder / VECTORS)
        write_items(staging / folder / ITEMS, table, np.arange(table.num_rows))
        dead = dead[dead < old.starts[kept]]  # the merged parts have left theirs behind
        if len(dead):
            write_removed(staging / REMOVED, dead)
        sources = [source for addition in manifest.additions[kept:] for source in addition.sources]
        addition = Addition(
            folder=folder, count=table.num_rows, kind=built.choice.factory, sources=[*sources, scanned.source]
        )
        gone = (*(f"{addition.folder}/" for addition in manifest.additions[kept:]), REMOVED)
        files = {name: info for name, info in manifest.files.items() if not name.startswith(gone)}
        shared = publish.share_files(current.path, staging, files)
        additions = [*manifest.additions[:kept], addition]
        manifest = _updated(manifest, int(old.starts[kept]) + table.num_rows, dead, additions)
        manifest = publish.publish_version(index, staging, manifest, keep=keep, shared=shared)
        publish.remove_directory(index, index / WORK)
    return Update(manifest.version, manifest.count, len(rows), len(replaced), len(encoded.failed), manifest.rebuild)


class _Additions:
    """The additions of a version, and how many of them stay when more is added."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._additions = artifact.manifest.additions
        counts = [addition.count for addition in self._additions]
        self.starts = artifact.rows - sum(counts) + np.cumsum([0, *counts])  # first row of each, and the end

    def worth_keeping(self, new: int) -> int:
        """How many stay as they are; the ones after are merged with `new` rows."""
        kept = len(self._additions)
        for addition in reversed(self._additions):
            if addition.kind != "Flat" or addition.count > min(_MERGED_UP_TO * new, ADDED_ROWS - new):
                break
            kept, new = kept - 1, new + addition.count
        return kept

    def live(self, kept: int, dead: NDArray[np.int64]) -> tuple[list[pa.Table], list[NDArray[np.float32]]]:
        """Items and vectors of the additions that are merged, without the dead ones."""
        tables, blocks = [], []
        for addition, start in zip(self._additions[kept:], self.starts[kept:].tolist(), strict=False):
            rows = np.setdiff1d(np.arange(start, start + addition.count), dead)
            tables.append(Items(self._artifact.path / addition.folder / ITEMS).table(rows - start))
            blocks.append(self._artifact.vectors(rows))
        return tables, blocks


def _rows_of(artifact: Artifact, ids: Sequence[str]) -> NDArray[np.int64]:
    rows = [artifact.row_of(item_id) for item_id in ids]
    unknown = [item_id for item_id, row in zip(ids, rows, strict=True) if row is None]
    if unknown:
        names = ", ".join(map(repr, unknown[:3]))
        raise DataError(f"{len(unknown):,} of {len(ids):,} ids are not in the index: {names}; nothing was removed")
    return np.array(rows, np.int64)


def _require_fitting(artifact: Artifact, gallery: Gallery, given: str) -> None:
    """Refuse values of another type than a field's: as both it would be text, in which 19.90 is not 19.9."""
    known = artifact.fields
    for name, kind in FieldTypes.infer(gallery.table["metadata"]).types.items():
        have = known.get(name, str(kind))
        if have != str(kind) and {have, str(kind)} != {"int64", "double"}:
            raise DataError(
                f"the field {name!r} is {have} in the index and {kind} in {given}: as both it would be text, and "
                f"filters would find other items or none; give values of type {have}, rename the "
                f"field, or rebuild the index from all galleries"
            )


def _absolute(gallery: Gallery) -> pa.Table:
    """The gallery's items with locations that need no root, so that items of several galleries can lie together."""
    locations = gallery.table["location"]
    places = [[join_location(gallery.root, location) for location in chunk.to_pylist()] for chunk in locations.chunks]
    column = gallery.table.schema.get_field_index("location")
    return gallery.table.set_column(column, "location", pa.chunked_array(places, pa.string())).select(COLUMNS)


def _updated(manifest: Manifest, rows: int, dead: NDArray[np.int64], additions: list[Addition]) -> Manifest:
    added = sum(addition.count for addition in additions)
    reasons = []
    if len(additions) >= MOST_PARTS:
        reasons.append(f"every search goes through {len(additions)} additions")
    if added > max(ADDED_SHARE * (rows - added), ADDED_ROWS):
        reasons.append(f"{added:,} of {rows:,} items are outside the built index")
    if len(dead) > DEAD_SHARE * rows:
        reasons.append(f"{len(dead):,} of {rows:,} rows are removed, and passed over in every search")
    return replace(
        manifest,
        count=rows - len(dead),
        removed=len(dead),
        additions=additions,
        rebuild="; ".join(reasons),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
