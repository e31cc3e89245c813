"""Versions that are made without a rebuild: items added or removed.

- An update is a new version. It shares every unchanged file with the one before, and rolls back like any.
- Added images are encoded by the version's own model into a segment of their own. Small earlier additions are merged
  into it, so a thousand small additions leave a handful of segments.
- Removed items are a list of rows that searches skip, until a rebuild; the manifest says when that is recommended.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcar_core import Encoder
from dcar_core.util.arrays import Rows
from dcar_core.util.errors import DataError
from index_jobs.encoding.devices import load_replicas
from index_jobs.encoding.encode import EncodedGallery, encode_gallery
from index_jobs.engines.measure import caption_queries
from index_jobs.engines.protocol import NewIndex, load_engine
from index_jobs.gallery.scan import SCHEMA, Gallery, absolute_locations, scan
from index_jobs.gallery.storage import join_location
from index_jobs.index import versions
from index_jobs.index.index_version import IndexVersion, write_rows
from index_jobs.index.items import COLUMNS, FieldTypes, Items, fit_one_field, take_rows, write_items
from index_jobs.index.lexical.lexical_index import item_texts, write_lexical
from index_jobs.index.manifest import CHANGED, FAILED, ITEMS, LEXICAL, REMOVED, Addition, Manifest, counted
from index_jobs.index.storage import index_name
from index_jobs.index.versions import NewVersion, open_current
from index_jobs.spec import BuildOptions

logger = logging.getLogger(__name__)

WORK = "work-added"
_MERGE_RATIO = 2  # earlier additions up to this multiple of the new rows are merged, so segments grow geometrically


@dataclass(frozen=True)
class UpdateSummary:
    """Result of an update."""

    version: int
    count: int  # items that can be found
    added: int
    removed: int
    failed: int  # images that could not be read
    rebuild: str  # why a rebuild is recommended, or ""


def remove(
    index: Path, ids: Sequence[str], *, missing_ok: bool = False, keep: int = BuildOptions.keep, origin: str = ""
) -> UpdateSummary:
    """Publish a version in which these items are never found.

    Args:
        ids: without any, nothing is published.
        missing_ok: ignore ids that are not in the index.
        keep, origin: as in `BuildOptions`.

    Raises:
        DataError: an id is not in the index, or no item would be left.
        ArtifactError: nothing is published.
        LockedError: another job is writing.
        DcarError: the disk is full or cannot be written; published versions are unchanged.
    """
    with versions.report_os_errors(index), versions.new_version(index) as new:
        current = open_current(index)
        rows = _rows_of(current, ids, missing_ok=missing_ok)
        manifest = current.manifest
        if len(rows):
            removed = np.union1d(np.flatnonzero(~current.live), rows)
            change = f"{counted(len(rows), 'item')} removed"
            manifest = _publish(new, current, removed, manifest.additions, change, keep=keep, origin=origin)
    return UpdateSummary(manifest.version, manifest.count, 0, len(rows), 0, manifest.rebuild)


def live_gallery(served: IndexVersion) -> Gallery:
    """Return the live items of a version as a gallery, with absolute locations."""
    table = pa.concat_tables([absolute_locations(each.items.table(), each.root) for each in served.parts])
    names = served.column("file_name") if "file_name" in served.fields else table["location"]
    more = {"name": names.cast(pa.string()), "mtime_ns": pa.array(np.zeros(len(table), np.int64))}
    for name, column in more.items():
        table = table.append_column(name, column)
    return Gallery(served.manifest.spec.gallery, "", table.select(SCHEMA.names).filter(pa.array(served.live)), "", "")


def add(
    index: Path,
    gallery: str | Path | Gallery,
    *,
    replace_existing: bool = False,
    removed_ids: Sequence[str] = (),
    replicas: Sequence[Encoder] = (),
    **options: Any,
) -> UpdateSummary:
    """Publish a version with the images of another gallery added.

    Args:
        gallery: a folder, tar or list; see `index_jobs.gallery.scan`. A scanned gallery is taken as it is.
        replace_existing: an item of the gallery replaces the one with its id; otherwise such an id is an error.
        removed_ids: items to remove in the same version; unknown ones are ignored.
        replicas: encoders of the version's model; they are loaded if none are given.
        options: keep, origin, workers, batch_size, max_failed, device, runtime and progress of `BuildOptions`.

    Raises:
        DataError: the gallery cannot be used, too many images are broken, an id exists already, or a field would get
            values of another type.
        ArtifactError, LockedError, DcarError: as by `remove`.
    """
    scanned = gallery if isinstance(gallery, Gallery) else scan(gallery)
    with versions.report_os_errors(index), versions.new_version(index) as new:
        current = open_current(index)
        ids = scanned.table["id"].to_pylist()
        existing = [item_id for item_id in ids if current.row_of(item_id) is not None]
        if existing and not replace_existing:
            raise _collision(current, scanned, existing)
        _require_same_types(current, scanned)
        _warn_of_indexed_files(current, scanned, index)
        settings = BuildOptions.of({"exact": current.manifest.spec.exact, **options})
        spec = settings.spec
        if not replicas:
            replicas = load_replicas(current.checkpoint, settings.device, exact=spec.exact, runtime=spec.runtime)
        current.require(replicas[0].fingerprint)
        encoded = encode_gallery(scanned, replicas, index / WORK, settings)
        encoded_ids = {ids[row] for row in encoded.rows().tolist()}
        replaced = [item_id for item_id in existing if item_id in encoded_ids]  # a broken image replaces nothing
        rows = _rows_of(current, [*replaced, *removed_ids], missing_ok=True)
        removed = np.union1d(np.flatnonzero(~current.live), rows)
        additions, removed = _write_addition(new, current, encoded, removed, replicas[0])
        change = f"{counted(len(encoded), 'image')} added"
        change += f" from {scanned.location.rpartition('/')[2]}" if not settings.origin else ""
        change += f", {counted(len(rows), 'item')} removed or replaced" if len(rows) else ""
        manifest = _publish(new, current, removed, additions, change, keep=settings.keep, origin=settings.origin)
        shutil.rmtree(index / WORK, ignore_errors=True)
    return UpdateSummary(
        manifest.version, manifest.count, len(encoded), len(replaced), len(encoded.failed), manifest.rebuild
    )


def _rows_of(artifact: IndexVersion, ids: Sequence[str], *, missing_ok: bool) -> Rows:
    rows = {item_id: artifact.row_of(item_id) for item_id in ids}
    unknown = [item_id for item_id, row in rows.items() if row is None]
    if unknown and not missing_ok:
        names = ", ".join(map(repr, unknown[:3]))
        raise DataError(f"{len(unknown):,} of {len(rows):,} ids are not in the index: {names}; nothing was removed")
    return np.array([row for row in rows.values() if row is not None], np.int64)


def _write_addition(
    new: NewVersion, current: IndexVersion, encoded: EncodedGallery, removed: Rows, encoder: Encoder
) -> tuple[list[Addition], Rows]:
    """Write the new segment, with small earlier additions merged into it.

    Args:
        removed: the removed rows of the current version, replaced items included.

    Returns:
        the additions of the new version, and its removed rows: merged additions lose theirs.
    """
    manifest, gallery = current.manifest, encoded.gallery
    kept, size = len(manifest.additions), len(encoded)
    for addition in reversed(manifest.additions):
        if addition.kind != "Flat" or addition.count > min(_MERGE_RATIO * size, versions.ADDED_ROWS - size):
            break
        kept, size = kept - 1, size + addition.count
    merged, name = manifest.additions[kept:], f"added-{new.number}"
    (folder := new.folder / name).mkdir()
    tables, blocks = [], []
    start = merged_from = current.rows - sum(addition.count for addition in merged)
    for addition in merged:
        live = np.setdiff1d(np.arange(start, start + addition.count), removed)
        tables.append(Items(manifest.path(new.index, f"{addition.folder}/{ITEMS}")).table(live - start))
        blocks.append(current.vectors(live))
        start += addition.count
    root = "" if gallery.root == str(new.index.absolute()) else gallery.root  # the index may be moved
    own = absolute_locations(encoded.table(), root).select(COLUMNS)
    table = pa.concat_tables([*tables, take_rows(own, encoded.rows())])
    encoded.write_failed(folder / FAILED)
    write_items(folder / ITEMS, table, np.arange(table.num_rows))
    new_index = NewIndex(
        name=index_name(new.index), folder=folder, version=new.number,
        blocks=lambda: chain(blocks, encoded.blocks()), fields=Items(folder / ITEMS).field_table(),
        count=table.num_rows, dim=manifest.dim, queries=caption_queries(table, encoder),
    )  # fmt: skip
    created = load_engine(manifest.spec.engine).create(replace(manifest.spec, kind="auto"), new_index)
    sources = [source for addition in merged for source in addition.sources] + [gallery.location]
    roots = [root for addition in merged for root in addition.roots] + [root, *gallery.roots]
    added = Addition(
        folder=name,
        count=table.num_rows,
        kind=created.kind,
        sources=list(dict.fromkeys(sources)),
        roots=list(dict.fromkeys(roots)),
    )
    return [*manifest.additions[:kept], added], removed[removed < merged_from]


def _publish(
    new: NewVersion,
    current: IndexVersion,
    removed: Rows,
    additions: list[Addition],
    change: str,
    *,
    keep: int,
    origin: str,
) -> Manifest:
    """Publish a version that shares all files with the current one but merged additions and the removed rows."""
    manifest = current.manifest
    rows = current.rows + sum(each.count for each in additions) - sum(each.count for each in manifest.additions)
    if len(removed) == rows:
        raise DataError("no item would be left; delete the index or the collection instead")
    merged = tuple(f"{addition.folder}/" for addition in manifest.additions if addition not in additions)
    new.link(current, without=(*merged, REMOVED, CHANGED))
    if len(removed):
        write_rows(new.folder / REMOVED, removed)
    start = rows - additions[-1].count if additions != manifest.additions else rows  # of what is stored anew
    if len(changed := current.changed[current.changed < start]):
        write_rows(new.folder / CHANGED, changed)
    if additions != manifest.additions:
        items = Items(new.folder / additions[-1].folder / ITEMS)
        texts = item_texts(items.table(np.arange(len(items))), manifest.spec.text_fields)
        write_lexical(new.folder / LEXICAL, texts, rows - len(items))
    manifest = replace(
        manifest,
        count=rows - len(removed),
        removed=len(removed),
        additions=additions,
        change=f"{change} {origin}".rstrip(),
        origin=origin,
    )
    return new.publish(manifest, keep=keep)


def _warn_of_indexed_files(current: IndexVersion, gallery: Gallery, index: Path) -> None:
    """Warn of images whose files live items of other ids have."""
    live = current.live_table("id", "location")
    locations = absolute_locations(gallery.table, gallery.root)["location"]
    below_root = pc.replace_substring_regex(locations, f"^{re.escape(current.manifest.root)}/", "")
    is_new = pc.invert(pc.is_in(gallery.table["id"], live["id"]))
    is_indexed = pc.or_(pc.is_in(locations, live["location"]), pc.is_in(below_root, live["location"]))
    if len(repeated := locations.filter(pc.and_(is_new, is_indexed))):
        logger.warning(
            "%d images, such as %s, are in the index already, below another folder: searches find both items; "
            "`dcar index rollback %s` undoes this, and a rebuild indexes files that are new in its gallery",
            len(repeated), repeated[0].as_py(), index,
        )  # fmt: skip


def _require_same_types(artifact: IndexVersion, gallery: Gallery) -> None:
    """Refuse values of another type than a field's: as text, 19.90 is not 19.9."""
    types = artifact.fields
    for name, new_type in FieldTypes.infer(gallery.table["metadata"]).types.items():
        current_type = types.get(name, str(new_type))
        if not fit_one_field(current_type, str(new_type)):
            raise DataError(
                f"the field {name!r} is {current_type} in the index and {new_type} in {gallery.location}: both "
                f"together would become text, and filters would match other items or none; give values of type "
                f"{current_type}, rename the field, or rebuild the index from all galleries"
            )


def _collision(current: IndexVersion, gallery: Gallery, existing: Sequence[str]) -> DataError:
    """Return the error for ids that are in the index; it advises --replace only if their files are the same."""
    message = f"{len(existing):,} of the {len(gallery):,} images of {gallery.location} have an id that is in the index"
    columns = (gallery.table[name].to_pylist() for name in ("id", "location", "offset"))
    for item_id, location, offset in zip(*columns, strict=True):
        new, row = (join_location(gallery.root, location), offset), current.row_of(item_id)
        if row is not None and (indexed := current.image_location(row)) != new:
            return DataError(
                f"{message}, such as {item_id!r}, which is {indexed[0]} there and {new[0]} here; --gallery "
                f"NAME=LOCATION keeps both, with NAME/ before the new ids (--replace takes the indexed ones out)"
            )
    return DataError(f"{message}, such as {existing[0]!r}, and are the same files; --replace indexes them again")
