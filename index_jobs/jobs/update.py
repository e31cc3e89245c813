"""Updates: items added or removed, and the accepted jobs of a service applied. Only the
first items need a build.

- An update is a new version. It shares every unchanged file with the one before, and
  rolls back like any.
- Added images are encoded by the version's own model into a segment of their own. Small
  earlier additions are merged into it, so a thousand small additions leave a handful of
  segments. Removed items are rows that searches skip.
- Jobs of one kind make one version. Killed before its end is recorded, a job is applied
  again, without the items that the version has already and the images that it could not
  read. Only the job with unusable input fails: its batch is halved until the job is by
  itself. Any other error, such as a full disk, leaves the jobs waiting.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dcar_core import Encoder
from dcar_core.util.arrays import Rows
from dcar_core.util.errors import DataError, DcarError
from dcar_core.util.files import write_json_lines
from index_jobs.encoding.encode import EncodedGallery, encode_gallery, load_replicas
from index_jobs.engines.measure import text_queries
from index_jobs.engines.protocol import NewIndex, load_engine
from index_jobs.gallery.scan import SCHEMA, Gallery, absolute_locations, scan
from index_jobs.index import versions
from index_jobs.index.changes import FieldChanges, rows_with
from index_jobs.index.filters import match_rows
from index_jobs.index.index_version import IndexVersion, write_rows
from index_jobs.index.items import (
    COLUMNS,
    Items,
    as_scanned,
    fit_one_field,
    infer_types,
    take_rows,
    write_items,
)
from index_jobs.index.job_queue import Job, JobQueue
from index_jobs.index.lexical import item_texts, write_lexical
from index_jobs.index.manifest import (
    CHANGED,
    CHECKPOINT,
    FAILED,
    ITEMS,
    LEXICAL,
    OVER_HTTP,
    REMOVED,
    Addition,
    Manifest,
    quantity,
)
from index_jobs.index.stores import index_name
from index_jobs.index.versions import (
    NewVersion,
    current_version,
    open_current,
    open_version,
    version_numbers,
)
from index_jobs.jobs import build
from index_jobs.spec import KEEP_WRITES, BuildOptions

logger = logging.getLogger(__name__)

WORK = "work-added"
# of a job; images take minutes, so restarts meet them more often
MAX_STARTS = {"put": 100, "patch": 6, "delete": 6}
_MAX_LISTED = 100  # unknown ids in the status of a job
_OWN_FIELDS = ("id", "caption", "category")
_BATCH = "jobs.jsonl"  # the items of a batch with images, as a gallery
# the version with the changes, and the outcome of each job
_Result = tuple[int | None, list[dict[str, Any]]]
# earlier additions up to this multiple of the new rows are merged, so segments grow
# geometrically
_MERGE_RATIO = 2


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
    index: Path,
    ids: Sequence[str],
    *,
    missing_ok: bool = False,
    keep: int = BuildOptions.keep,
    origin: str = "",
) -> UpdateSummary:
    """Publish a version in which these items are never found; none without ids.

    Args:
        missing_ok: ignore ids that are not in the index.

    Raises:
        DataError: an id is not in the index, or no item would be left.
        ArtifactError, LockedError, DcarError: nothing is published, another job is
            writing, or the disk cannot be written; published versions are unchanged.
    """
    with versions.report_os_errors(index), versions.new_version(index) as new:
        current = open_current(index)
        rows = _rows_of(current, ids, missing_ok=missing_ok)
        manifest = current.manifest
        if len(rows):
            removed = np.union1d(np.flatnonzero(~current.live), rows)
            change = f"{quantity(len(rows), 'item')} removed"
            manifest = _publish(
                new,
                current,
                removed,
                manifest.additions,
                change,
                keep,
                origin,
            )
    return UpdateSummary(
        manifest.version,
        manifest.count,
        0,
        len(rows),
        0,
        manifest.rebuild,
    )


def live_gallery(served: IndexVersion) -> Gallery:
    """Return the live items of a version as a gallery, with absolute locations."""
    table = pa.concat_tables(
        [absolute_locations(part.items.table(), part.root) for part in served.parts]
    )
    if "file_name" in served.fields:
        names = served.column("file_name")
    else:
        names = table["location"]
    more = {
        "name": names.cast(pa.string()),
        "mtime_ns": pa.array(np.zeros(len(table), np.int64)),
    }
    for name, column in more.items():
        table = table.append_column(name, column)
    return Gallery(
        served.manifest.spec.gallery,
        "",
        table.select(SCHEMA.names).filter(pa.array(served.live)),
        "",
        "",
    )


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
        gallery: as for `index_jobs.gallery.scan`, or scanned.
        replace_existing: an item of the gallery replaces the one with its id; otherwise
            such an id is an error.
        removed_ids: items to remove in the same version; unknown ones are ignored.
        replicas: encoders of the version's model; they are loaded if none are given.
        options: keep, origin, workers, batch_size, max_failed, device, runtime and
            progress of `BuildOptions`.

    Raises:
        DataError: the gallery cannot be used, too many images are broken, an id exists
            already, or a field would get values of another type.
        ArtifactError, LockedError, DcarError: as by `remove`.
    """
    scanned = gallery if isinstance(gallery, Gallery) else scan(gallery)
    with versions.report_os_errors(index), versions.new_version(index) as new:
        current = open_current(index)
        ids = scanned.table["id"].to_pylist()
        existing = [item_id for item_id in ids if current.row_of(item_id) is not None]
        if existing and not replace_existing:
            raise DataError(
                f"{len(existing):,} of the {len(ids):,} images of {scanned.location}"
                f" have an id that is in the index, such as {existing[0]!r}; --replace"
                " replaces those items; --gallery NAME=LOCATION keeps both, with NAME/"
                " before the new ids"
            )
        _merge_types(current.fields, scanned.table["metadata"], scanned.location)
        settings = BuildOptions.of({"exact": current.manifest.spec.exact, **options})
        spec = settings.spec
        if not replicas:
            replicas = load_replicas(
                current.checkpoint,
                settings.device,
                exact=spec.exact,
                runtime=spec.runtime,
            )
        current.require(replicas[0].fingerprint)
        encoded = encode_gallery(scanned, replicas, index / WORK, settings)
        encoded_ids = {ids[row] for row in encoded.rows().tolist()}
        # a broken image replaces nothing
        replaced = [item_id for item_id in existing if item_id in encoded_ids]
        rows = _rows_of(current, [*replaced, *removed_ids], missing_ok=True)
        removed = np.union1d(np.flatnonzero(~current.live), rows)
        additions, removed = _write_addition(
            new,
            current,
            encoded,
            removed,
            replicas[0],
        )
        change = f"{quantity(len(encoded), 'image')} added"
        change += (
            f" from {scanned.location.rpartition('/')[2]}"
            if not settings.origin
            else ""
        )
        change += (
            f", {quantity(len(rows), 'item')} removed or replaced" if len(rows) else ""
        )
        manifest = _publish(
            new,
            current,
            removed,
            additions,
            change,
            settings.keep,
            settings.origin,
        )
        shutil.rmtree(index / WORK, ignore_errors=True)
    return UpdateSummary(
        manifest.version,
        manifest.count,
        len(encoded),
        len(replaced),
        len(encoded.failed),
        manifest.rebuild,
    )


def _rows_of(opened: IndexVersion, ids: Sequence[str], *, missing_ok: bool) -> Rows:
    rows = {item_id: opened.row_of(item_id) for item_id in ids}
    unknown = [item_id for item_id, row in rows.items() if row is None]
    if unknown and not missing_ok:
        names = ", ".join(map(repr, unknown[:3]))
        raise DataError(
            f"{len(unknown):,} of {len(rows):,} ids are not in the index: {names};"
            " nothing was removed"
        )
    return np.array([row for row in rows.values() if row is not None], np.int64)


def _write_addition(
    new: NewVersion,
    current: IndexVersion,
    encoded: EncodedGallery,
    removed: Rows,
    encoder: Encoder,
) -> tuple[list[Addition], Rows]:
    """Write the new segment, with small earlier additions merged into it.

    Args:
        removed: the removed rows of the current version, replaced items included.

    Returns:
        the additions of the new version, and its removed rows: merged additions lose
        theirs.
    """
    manifest = current.manifest
    gallery = encoded.gallery
    kept = len(manifest.additions)
    size = len(encoded)
    for addition in reversed(manifest.additions):
        if addition.kind != "Flat" or addition.count > min(
            _MERGE_RATIO * size, versions.ADDED_ROWS - size
        ):
            break
        kept = kept - 1
        size = size + addition.count
    merged = manifest.additions[kept:]
    name = f"added-{new.number}"
    (folder := new.folder / name).mkdir()
    tables = []
    blocks = []
    start = merged_from = current.rows - sum(addition.count for addition in merged)
    for addition in merged:
        live = np.setdiff1d(np.arange(start, start + addition.count), removed)
        tables.append(
            Items(manifest.path(new.index, f"{addition.folder}/{ITEMS}")).table(
                live - start
            )
        )
        blocks.append(current.vectors(live))
        start += addition.count
    # the index may be moved
    root = "" if gallery.root == str(new.index.absolute()) else gallery.root
    own = absolute_locations(encoded.table(), root).select(COLUMNS)
    table = pa.concat_tables([*tables, take_rows(own, encoded.rows())])
    encoded.write_failed(folder / FAILED)
    write_items(folder / ITEMS, table, np.arange(table.num_rows))
    new_index = NewIndex(
        name=index_name(new.index),
        folder=folder,
        version=new.number,
        blocks=lambda: chain(blocks, encoded.blocks()),
        fields=Items(folder / ITEMS).field_table(),
        count=table.num_rows,
        dim=manifest.dim,
        queries=text_queries(table, encoder),
    )
    created = load_engine(manifest.spec.engine).create(
        replace(manifest.spec, kind="auto"), new_index
    )
    sources = [source for addition in merged for source in addition.sources] + [
        gallery.location
    ]
    roots = [root for addition in merged for root in addition.roots] + [
        root,
        *gallery.roots,
    ]
    sources = list(dict.fromkeys(sources))
    roots = list(dict.fromkeys(roots))
    added = Addition(
        folder=name,
        count=table.num_rows,
        kind=created.kind,
        sources=sources,
        roots=roots,
    )
    return [*manifest.additions[:kept], added], removed[removed < merged_from]


def _publish(
    new: NewVersion,
    current: IndexVersion,
    removed: Rows,
    additions: list[Addition],
    change: str,
    keep: int,
    origin: str,
) -> Manifest:
    """Publish a version that shares all files with the current one but merged additions
    and the removed rows.
    """
    manifest = current.manifest
    rows = (
        current.rows
        + sum(part.count for part in additions)
        - sum(part.count for part in manifest.additions)
    )
    if len(removed) == rows:
        raise DataError(
            "no item would be left; delete the index or the collection instead"
        )
    merged = tuple(
        f"{addition.folder}/"
        for addition in manifest.additions
        if addition not in additions
    )
    new.link(current, without=(*merged, REMOVED, CHANGED))
    if len(removed):
        write_rows(new.folder / REMOVED, removed)
    # of what is stored anew
    start = rows - additions[-1].count if additions != manifest.additions else rows
    if len(changed := current.changed[current.changed < start]):
        write_rows(new.folder / CHANGED, changed)
    if additions != manifest.additions:
        items = Items(new.folder / additions[-1].folder / ITEMS)
        texts = item_texts(
            items.table(np.arange(len(items))), manifest.spec.text_fields
        )
        write_lexical(new.folder / LEXICAL, texts, rows - len(items))
    change = f"{change} {origin}".rstrip()
    count = rows - len(removed)
    manifest = replace(
        manifest,
        count=count,
        removed=len(removed),
        additions=additions,
        change=change,
        origin=origin,
    )
    return new.publish(manifest, keep=keep)


def _merge_types(
    types: Mapping[str, str],
    metadata: pa.ChunkedArray,
    source: str,
) -> dict[str, str]:
    """Return the types of fields with those of new items. Refuse values of another
    type: as text, 19.90 is not 19.9.
    """
    new = {name: str(kind) for name, kind in infer_types(metadata).items()}
    for name in new.keys() & types.keys():
        if not fit_one_field(types[name], new[name]):
            raise DataError(
                f"the field {name!r} is {types[name]} in the index and {new[name]} in"
                f" {source}; give values of type {types[name]}, rename the field, or"
                " rebuild the index from all galleries"
            )
    return {**new, **types}


def apply_waiting(index: Path, *, images: bool = True, **options: Any) -> int:
    """Apply the waiting jobs of an index, those included that arrive meanwhile, and
    return their number.

    Args:
        images: False stops before a job with images, and before one that has been
            begun: it may have ended its process.
        options: keep (of changes over HTTP), workers, batch_size, device and runtime of
            `BuildOptions`.

    Raises:
        LockedError: another job is writing, or another process applies these jobs.
        DcarError: nothing can be published now, as with a full disk; the jobs wait.
    """
    queue = JobQueue(index)
    count = 0
    options = {"keep": KEEP_WRITES, **options, "origin": OVER_HTTP}
    with versions.report_os_errors(index), queue.lock():
        while (jobs := queue.next_batch()) and (
            images or not (jobs[0].kind == "put" or jobs[0].starts)
        ):
            queue.show_progress(jobs)
            try:
                apply(queue, jobs, options)
            except (DcarError, OSError):
                queue.put_back(jobs)
                raise
            count += len(jobs)
        queue.sweep()
    return count


def apply(queue: JobQueue, jobs: Sequence[Job], options: dict[str, Any]) -> None:
    """Publish the changes of jobs of one kind, in halves where that fails, and record
    how they ended.
    """
    try:
        if jobs[0].starts >= MAX_STARTS[jobs[0].kind]:
            raise DataError(
                f"given up: the process that applied it ended {jobs[0].starts} times"
                " before it was done"
            )
        version, outcomes = {"put": _put, "patch": _patch, "delete": _delete}[
            jobs[0].kind
        ](queue, jobs, options)
    except DataError as error:
        if len(jobs) > 1:
            for part in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
                apply(queue, part, options)
            return
        logger.warning("a job failed: %s", error)
        version = None
        outcomes = [{"status": "failed", "reason": str(error)}]
    done = {"status": "done", "index_version": version}
    queue.end(
        jobs,
        [outcome if "status" in outcome else done | outcome for outcome in outcomes],
    )


def _patch(queue: JobQueue, jobs: Sequence[Job], options: dict[str, Any]) -> _Result:
    """Merge fields into items. A value that does not fit its field fails its job
    alone.
    """
    if open_published(queue.index) is None:
        return None, [
            {"changed": 0, "unknown": [item["id"] for item in job.items][:_MAX_LISTED]}
            for job in jobs
        ]
    outcomes = list[dict[str, Any]]()
    with versions.new_version(queue.index) as new:
        current = open_current(queue.index)
        draft = FieldChanges(current)
        version = current.manifest.version
        for job in jobs:
            try:
                changes, unknown = _chosen(current, job)
                outcomes.append(
                    {"changed": draft.merge(changes), "unknown": unknown[:_MAX_LISTED]}
                )
            except DataError as error:
                outcomes.append({"status": "failed", "reason": str(error)})
        if draft.records:
            change = f"{quantity(len(draft.records), 'item')} changed"
            version = draft.publish(
                new,
                change,
                keep=options["keep"],
                origin=OVER_HTTP,
            ).version
    return version, outcomes


def _delete(queue: JobQueue, jobs: Sequence[Job], options: dict[str, Any]) -> _Result:
    version = None
    if (current := open_published(queue.index)) is not None:
        ids = [
            current.item(row).id
            for job in jobs
            for rows, _ in _chosen(current, job)[0]
            for row in rows
        ]
        version = remove(
            queue.index,
            ids,
            missing_ok=True,
            keep=options["keep"],
            origin=OVER_HTTP,
        ).version
    return version, [{"failed": []} for _ in jobs]


def _put(queue: JobQueue, jobs: Sequence[Job], options: dict[str, Any]) -> _Result:
    """Encode images, and publish their items. An image that cannot be read fails its
    item alone.
    """
    types = dict[str, str]()
    for job in jobs:
        texts = pa.chunked_array(
            [[json.dumps(item["metadata"]) for item in job.items]], pa.string()
        )
        types = _merge_types(types, texts, "another change")
    current = open_published(queue.index)
    done = 0
    version = current.manifest.version if current else None
    if current and any(job.starts for job in jobs):
        failed = read_failures(current)
    else:
        failed = {}

    def show_progress(images: int) -> None:
        nonlocal done
        done += images
        queue.show_progress(jobs, done)

    wanted = [item for job in jobs for item in job.items if item["image"] not in failed]
    if wanted and len(gallery := _list_new(queue.index, current, wanted)):
        settings = {
            "progress": False,
            "max_failed": 1.0,
            "on_encoded": show_progress,
            **options,
        }
        if current is not None:
            version = add(
                queue.index,
                gallery,
                replace_existing=True,
                **settings,
            ).version
        else:
            version = build.rebuild(
                gallery,
                queue.index / CHECKPOINT,
                queue.index,
                **settings,
            ).version
            shutil.rmtree(queue.index / build.WORK, ignore_errors=True)
        failed |= read_failures(open_version(queue.index, version))
    outcomes = list[dict[str, Any]]()
    for job in jobs:
        lost = [
            {"id": item["id"], "reason": failed[item["image"]]}
            for item in job.items
            if item["image"] in failed
        ]
        is_lost = len(lost) == len(job.items)
        if is_lost:
            reason = {
                "status": "failed",
                "reason": f"no image can be read: {lost[0]['reason']}",
            }
        else:
            reason = {}
        outcomes.append({"failed": lost, **reason})
    return version, outcomes


def _list_new(
    index: Path,
    current: IndexVersion | None,
    items: Sequence[dict[str, Any]],
) -> Gallery:
    """Return the items that the version lacks, as a gallery."""
    rows = (
        {
            **item["metadata"],
            **{name: item[name] for name in _OWN_FIELDS},
            "file_name": item["image"],
        }
        for item in items
    )
    write_json_lines(index / _BATCH, rows)
    gallery = scan(index / _BATCH)
    is_new = [
        current is None or not _is_held(current, row)
        for row in gallery.table.to_pylist()
    ]
    return gallery.filter(pa.array(is_new))


def _is_held(opened: IndexVersion, new: dict[str, Any]) -> bool:
    if (row := opened.row_of(new["id"])) is None:
        return False
    item = opened.item(row)
    location = opened.image_location(row)[0]
    metadata = as_scanned(item.fields.as_py(), new["metadata"])
    is_same = (item.caption, item.category, metadata) == (
        new["caption"],
        new["category"],
        new["metadata"],
    )
    return is_same and location.endswith(f"/{new['location']}")


def _chosen(
    opened: IndexVersion, job: Job
) -> tuple[list[tuple[list[int], dict[str, Any]]], list[str]]:
    """Return rows of a job's items with the fields to merge, and the ids, or values,
    that the index lacks.

    Raise FilterError for a wrong filter, and DataError if no item has the field `by`.
    """
    if job.filter is not None:
        return [
            (np.flatnonzero(match_rows(opened, job.filter)).tolist(), job.fields)
        ], []
    rows = rows_with(opened, job.by, (item["id"] for item in job.items))
    changes = [(rows[item["id"]], item.get("fields", job.fields)) for item in job.items]
    return changes, [value for value in rows if not rows[value]]


def open_published(index: Path) -> IndexVersion | None:
    """Open the published version; None for a created collection that has none yet."""
    if (index / CHECKPOINT).is_dir() and current_version(index) is None:
        if not version_numbers(index):
            return None
        versions.rollback(index)  # killed just before the end of the first publication
    return open_current(index)


def read_failures(opened: IndexVersion) -> dict[str, str]:
    """Return the reasons of the images that a version lacks, or its newest addition, by
    name.
    """
    manifest = opened.manifest
    name = f"{manifest.additions[-1].folder}/{FAILED}" if manifest.additions else FAILED
    failures = map(
        json.loads,
        manifest.path(opened.index, name).read_text(encoding="utf-8").splitlines(),
    )
    return {failure["name"]: failure["reason"] for failure in failures}
