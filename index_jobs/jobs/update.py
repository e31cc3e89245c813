"""Addition and removal of items without a rebuild.

- An update is a new version. It shares every unchanged file with the one before by hard links, and rolls back like any.
- Added images are encoded by the version's own model into a segment of their own. Small earlier additions are merged
  into it, so a thousand small additions leave a handful of segments.
- Removed items are a list of rows that searches skip. Their vectors stay in the file until a rebuild.
- The manifest says when a rebuild is recommended: many segments, many rows outside the built index, or many removed
  rows.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dcar_core import Encoder
from dcar_core.util.arrays import Rows
from dcar_core.util.errors import DataError
from index_jobs.encoding.devices import choose_replicas
from index_jobs.encoding.encode import EncodedGallery, encode_gallery, write_failed
from index_jobs.engines.protocol import NewIndex
from index_jobs.engines.registry import load_engine
from index_jobs.gallery.scan import Gallery, absolute_locations, scan
from index_jobs.gallery.storage import join_location
from index_jobs.jobs.contents import caption_queries
from index_jobs.jobs.gallery_changes import count_indexed_files
from index_jobs.spec import BuildOptions
from index_jobs.store import publish
from index_jobs.store.artifact import Artifact, write_removed
from index_jobs.store.items import COLUMNS, FieldTypes, Items, fit_one_field, take_rows, write_items
from index_jobs.store.lexical.lexical_index import item_texts, write_lexical
from index_jobs.store.manifest import (
    ADDITIONS_ENGINE,
    FAILED,
    ITEMS,
    LEXICAL,
    REMOVED,
    Addition,
    FileInfo,
    Manifest,
    utc_now,
)
from index_jobs.store.versions import open_current

logger = logging.getLogger(__name__)

WORK = "work-added"
MAX_ADDITIONS = 8
REMOVED_SHARE = 0.2
ADDED_SHARE = 0.2
ADDED_ROWS = 20_000  # compared one by one in every search, in addition to the built index
_MERGE_RATIO = 2  # earlier additions up to this multiple of the new rows are merged, so segments grow geometrically


class NoItemLeftError(DataError):
    """A removal would leave no item."""


@dataclass(frozen=True)
class UpdateSummary:
    """Result of an update. count: items that can be found. failed: images that could not be read.

    rebuild: why a rebuild is recommended, or "".
    """

    version: int
    count: int
    added: int
    removed: int
    failed: int
    rebuild: str


def remove(
    index: Path, ids: Sequence[str], *, missing_ok: bool = False, keep: int = BuildOptions.keep
) -> UpdateSummary:
    """Publish a version in which these items are never found.

    Args:
        ids: without any, nothing is published.
        missing_ok: ignore ids that are not in the index.

    Raises:
        DataError: an id is not in the index.
        NoItemLeftError: no item would be left.
        ArtifactError: nothing is published.
        LockedError: another job is writing.
        DcarError: the disk is full or cannot be written; published versions are unchanged.
    """
    with publish.report_os_errors(index), publish.open_staging(index) as staging:
        current = open_current(index)
        manifest = current.manifest
        ids = list(dict.fromkeys(ids))
        if missing_ok:
            ids = [item_id for item_id in ids if current.row_of(item_id) is not None]
        if not ids:
            return UpdateSummary(manifest.version, manifest.count, 0, 0, 0, manifest.rebuild)
        rows = _rows_of(current, ids)
        removed = np.union1d(np.flatnonzero(~current.live), rows)
        if len(removed) == current.rows:
            raise NoItemLeftError(f"no item would be left in {index}; delete the directory instead")
        files = {name: info for name, info in manifest.files.items() if name != REMOVED}
        shared = publish.share_files(current.path, staging, files)
        write_removed(staging / REMOVED, removed)
        manifest = _updated_manifest(manifest, current.rows, removed, manifest.additions)
        manifest = publish.publish_version(index, staging, manifest, keep=keep, shared=shared)
    return UpdateSummary(manifest.version, manifest.count, 0, len(rows), 0, manifest.rebuild)


def add(
    index: Path,
    gallery: str | Path,
    *,
    replace_existing: bool = False,
    **options: Any,
) -> UpdateSummary:
    """Publish a version with the images of another gallery added.

    Args:
        gallery: a folder, tar or list; see `index_jobs.gallery.scan`.
        replace_existing: an item of the gallery replaces the one with its id; otherwise such an id is an error.
        options: keep, workers, batch_size, max_failed, device, runtime and progress of `BuildOptions`.

    Raises:
        DataError: the gallery cannot be used, too many images are broken, an id exists already, or a field would get
            values of another type.
        ArtifactError: nothing is published.
        LockedError: another job is writing.
        DcarError: the disk is full or cannot be written; published versions are unchanged.
    """
    scanned = scan(gallery)
    with publish.report_os_errors(index), publish.open_staging(index) as staging:
        current = open_current(index)
        ids = scanned.table["id"].to_pylist()
        existing = [item_id for item_id in ids if current.row_of(item_id) is not None]
        if existing and not replace_existing:
            raise _collision(current, scanned, existing)
        _require_same_types(current, scanned, str(gallery))
        repeated, example = count_indexed_files(current, scanned)
        if repeated:
            logger.warning(
                "%d images, such as %s, are in the index already, below another folder: searches find both items; "
                "`dcar index rollback %s` undoes this, and a rebuild indexes files that are new in its gallery",
                repeated, example, index,
            )  # fmt: skip
        settings = BuildOptions.of({"exact": current.manifest.spec.exact, **options})
        replicas = choose_replicas(scanned, current.checkpoint, index / WORK, settings)
        current.require(replicas[0].fingerprint)
        encoded = encode_gallery(scanned, replicas, index / WORK, settings)
        rows = encoded.rows()
        encoded_ids = {ids[row] for row in rows.tolist()}
        replaced = [item_id for item_id in existing if item_id in encoded_ids]  # a broken image replaces nothing
        removed = np.union1d(np.flatnonzero(~current.live), _rows_of(current, replaced))
        manifest = _write_addition(staging, current, scanned, encoded, removed, replicas[0])
        shared = publish.share_files(current.path, staging, _unchanged_files(current.manifest, manifest))
        if manifest.has_lexical:
            shared = _update_lexical(staging, manifest, shared)
        manifest = publish.publish_version(index, staging, manifest, keep=settings.keep, shared=shared)
        publish.remove_directory(index, index / WORK)
    return UpdateSummary(
        manifest.version, manifest.count, len(rows), len(replaced), len(encoded.failed), manifest.rebuild
    )


def _write_addition(
    staging: Path, current: Artifact, gallery: Gallery, encoded: EncodedGallery, removed: Rows, encoder: Encoder
) -> Manifest:
    """Write the new segment, with small earlier additions merged into it, and return the manifest.

    Args:
        removed: the removed rows of the current version, replaced items included.
    """
    manifest, rows = current.manifest, encoded.rows()
    kept = _count_kept(manifest.additions, len(rows))
    folder = f"added-{manifest.version + 1}"
    (staging / folder).mkdir()
    tables, blocks = [], []
    start = merged_from = current.rows - sum(addition.count for addition in manifest.additions[kept:])
    for addition in manifest.additions[kept:]:
        live = np.setdiff1d(np.arange(start, start + addition.count), removed)
        tables.append(Items(current.path / addition.folder / ITEMS).table(live - start))
        blocks.append(current.vectors(live))
        start += addition.count
    new = absolute_locations(encoded.with_sizes(gallery.table), gallery.root).select(COLUMNS)
    table = pa.concat_tables([*tables, take_rows(new, rows)])
    new_index = NewIndex(
        folder=staging / folder, version=manifest.version + 1, blocks=lambda: chain(blocks, encoded.blocks()),
        count=table.num_rows, dim=manifest.dim, queries=caption_queries(table, encoder),
    )  # fmt: skip
    engine, spec = load_engine(ADDITIONS_ENGINE), replace(manifest.spec, engine=ADDITIONS_ENGINE, kind="auto")
    created = engine.create(spec, new_index)
    write_failed(staging / folder / FAILED, gallery, encoded.failed)
    write_items(staging / folder / ITEMS, table, np.arange(table.num_rows))
    removed = removed[removed < merged_from]  # merged additions lose their removed rows
    if len(removed):
        write_removed(staging / REMOVED, removed)
    merged = manifest.additions[kept:]
    sources = [source for addition in merged for source in addition.sources] + [gallery.location]
    roots = [root for addition in merged for root in addition.roots] + [gallery.root, *gallery.roots]
    added = Addition(
        folder=folder,
        count=table.num_rows,
        kind=created.kind,
        sources=list(dict.fromkeys(sources)),
        roots=list(dict.fromkeys(roots)),
    )
    return _updated_manifest(manifest, merged_from + table.num_rows, removed, [*manifest.additions[:kept], added])


def _update_lexical(staging: Path, manifest: Manifest, shared: dict[str, FileInfo]) -> dict[str, FileInfo]:
    """Bring the shared lexical index up to date, and return the shared files without those that tantivy replaced."""
    addition = manifest.additions[-1]
    first_row = manifest.count + manifest.removed - addition.count
    items = Items(staging / addition.folder / ITEMS)
    texts = item_texts(items.table(np.arange(len(items))), manifest.spec.text_fields)
    replaced = write_lexical(staging / LEXICAL, texts, first_row)
    return {name: info for name, info in shared.items() if name not in replaced}


def _unchanged_files(before: Manifest, after: Manifest) -> dict[str, FileInfo]:
    """Return the files of a version that the next one shares: all but merged additions and the removed rows."""
    merged = [addition.folder for addition in before.additions if addition not in after.additions]
    changed = (*(f"{folder}/" for folder in merged), REMOVED)
    return {name: info for name, info in before.files.items() if not name.startswith(changed)}


def _count_kept(additions: Sequence[Addition], new_rows: int) -> int:
    """Return how many additions stay as they are; the later ones are merged with the new rows."""
    kept = len(additions)
    for addition in reversed(additions):
        if addition.kind != "Flat" or addition.count > min(_MERGE_RATIO * new_rows, ADDED_ROWS - new_rows):
            break
        kept, new_rows = kept - 1, new_rows + addition.count
    return kept


def _rows_of(artifact: Artifact, ids: Sequence[str]) -> Rows:
    rows = [artifact.row_of(item_id) for item_id in ids]
    unknown = [item_id for item_id, row in zip(ids, rows, strict=True) if row is None]
    if unknown:
        names = ", ".join(map(repr, unknown[:3]))
        raise DataError(f"{len(unknown):,} of {len(ids):,} ids are not in the index: {names}; nothing was removed")
    return np.array(rows, np.int64)


def _require_same_types(artifact: Artifact, gallery: Gallery, location: str) -> None:
    """Refuse values of another type than a field's: as text, 19.90 is not 19.9."""
    types = artifact.fields
    for name, new_type in FieldTypes.infer(gallery.table["metadata"]).types.items():
        current_type = types.get(name, str(new_type))
        if not fit_one_field(current_type, str(new_type)):
            raise DataError(
                f"the field {name!r} is {current_type} in the index and {new_type} in {location}: both together would "
                f"become text, and filters would match other items or none; give values of type {current_type}, rename "
                f"the field, or rebuild the index from all galleries"
            )


def _collision(current: Artifact, gallery: Gallery, existing: Sequence[str]) -> DataError:
    """Return the error for ids that are in the index; it advises --replace only if their files are the same."""
    columns = zip(*(gallery.table[name].to_pylist() for name in ("id", "location", "offset")), strict=True)
    locations = {item_id: (join_location(gallery.root, location), offset) for item_id, location, offset in columns}
    indexed = {item_id: current.image_location(current.row_of(item_id) or 0) for item_id in existing}
    others = [item_id for item_id in existing if locations[item_id] != indexed[item_id]]
    message = f"{len(existing):,} of the {len(gallery):,} images of {gallery.location} have an id that is in the index"
    if not others:
        return DataError(f"{message}, such as {existing[0]!r}, and are the same files; --replace indexes them again")
    return DataError(
        f"{message}, such as {others[0]!r}, which is {indexed[others[0]][0]} there and {locations[others[0]][0]} here; "
        f"--gallery NAME=LOCATION keeps both, with NAME/ before the new ids (--replace takes the "
        f"indexed ones out)"
    )


def _updated_manifest(manifest: Manifest, rows: int, removed: Rows, additions: list[Addition]) -> Manifest:
    added = sum(addition.count for addition in additions)
    reasons = []
    if len(additions) >= MAX_ADDITIONS:
        reasons.append(f"every search goes through {len(additions)} additions")
    if added > max(ADDED_SHARE * (rows - added), ADDED_ROWS):
        reasons.append(f"{added:,} of {rows:,} items are outside the built index")
    if len(removed) > REMOVED_SHARE * rows:
        reasons.append(f"{len(removed):,} of {rows:,} rows are removed, and skipped in every search")
    return replace(
        manifest,
        count=rows - len(removed),
        removed=len(removed),
        additions=additions,
        rebuild="; ".join(reasons),
        created=utc_now(),
    )
