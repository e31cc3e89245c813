"""Apply accepted jobs in batches of one kind: a version for each.

- A job has ended once its changes are in a published version. Killed before its end is recorded, it is applied again,
  without the items that the version has already and the images that it could not read.
- Only the job with unusable input fails: its batch is halved until the job is by itself. Any other error, such as a
  full disk or another writer, leaves the jobs waiting.
- A job whose process has died too often fails, so the jobs behind it are applied.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dcar_core.util.errors import DataError, DcarError
from dcar_core.util.files import write_json_lines
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.index import versions
from index_jobs.index.changes import Draft
from index_jobs.index.filters import match_rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.items import FieldTypes, fit_one_field
from index_jobs.index.jobs import Job, JobQueue
from index_jobs.index.manifest import CHECKPOINT, FAILED, OVER_HTTP, counted
from index_jobs.index.versions import current_version, open_current, open_version, version_numbers
from index_jobs.jobs.update import add, remove
from index_jobs.spec import KEEP_WRITES

logger = logging.getLogger(__name__)

MAX_STARTS = {"put": 100, "patch": 6, "delete": 6}  # images take minutes, so restarts of a service meet them more often
_MAX_LISTED = 100  # unknown ids in the status of a job
_OWN = ("id", "caption", "category")
_LIST = "jobs.jsonl"  # the items of a batch with images, as a gallery
_Result = tuple[int | None, list[dict[str, Any]]]  # the version with the changes, and the outcome of each job


def apply_waiting(index: Path, *, images: bool = True, **options: Any) -> int:
    """Apply the waiting jobs of an index, those included that arrive meanwhile, and return their number.

    Args:
        images: False stops before a job with images, and before one that has been begun: it may have ended its process.
        options: keep (of changes over HTTP), workers, batch_size, device and runtime of `BuildOptions`.

    Raises:
        LockedError: another job is writing, or another process applies these jobs.
        DcarError: nothing can be published now, as with a full disk; the jobs wait.
    """
    queue, count, options = JobQueue(index), 0, {"keep": KEEP_WRITES, **options, "origin": OVER_HTTP}
    with versions.report_os_errors(index), queue.lock():
        while (jobs := queue.next_batch()) and (images or not (jobs[0].kind == "put" or jobs[0].starts)):
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
    """Publish the changes of jobs of one kind, in halves where that fails, and record how they ended."""
    try:
        if jobs[0].starts >= MAX_STARTS[jobs[0].kind]:
            raise DataError(f"given up: the process that applied it ended {jobs[0].starts} times before it was done")
        version, outcomes = {"put": _put, "patch": _patch, "delete": _delete}[jobs[0].kind](queue, jobs, options)
    except DataError as error:
        if len(jobs) > 1:
            for part in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
                apply(queue, part, options)
            return
        logger.warning("a job failed: %s", error)
        version, outcomes = None, [{"status": "failed", "reason": str(error)}]
    done = {"status": "done", "index_version": version}
    queue.end(jobs, [outcome if "status" in outcome else done | outcome for outcome in outcomes])


def _patch(queue: JobQueue, jobs: Sequence[Job], options: dict[str, Any]) -> _Result:
    """Merge fields into items. A value that does not fit its field fails its job alone."""
    if open_published(queue.index) is None:
        return None, [{"changed": 0, "unknown": [item["id"] for item in job.items][:_MAX_LISTED]} for job in jobs]
    outcomes = list[dict[str, Any]]()
    with versions.new_version(queue.index) as new:
        current = open_current(queue.index)
        draft, version = Draft(current), current.manifest.version
        for job in jobs:
            try:
                rows, unknown = _chosen(current, job)
                outcomes.append({"changed": draft.merge(rows, job.fields), "unknown": unknown[:_MAX_LISTED]})
            except DataError as error:
                outcomes.append({"status": "failed", "reason": str(error)})
        if draft.records:
            change = f"{counted(len(draft.records), 'item')} changed"
            version = draft.publish(new, change, keep=options["keep"], origin=OVER_HTTP).version
    return version, outcomes


def _delete(queue: JobQueue, jobs: Sequence[Job], options: dict[str, Any]) -> _Result:
    version = None
    if (current := open_published(queue.index)) is not None:
        ids = [current.item(row).id for job in jobs for row in _chosen(current, job)[0]]
        version = remove(queue.index, ids, missing_ok=True, keep=options["keep"], origin=OVER_HTTP).version
    return version, [{"failed": []} for _ in jobs]


def _put(queue: JobQueue, jobs: Sequence[Job], options: dict[str, Any]) -> _Result:
    """Encode images, and publish their items. An image that cannot be read fails its item alone."""
    _require_same_types(jobs)
    current, done = open_published(queue.index), 0
    version = current.manifest.version if current else None
    failed = read_failures(current) if current and any(job.starts for job in jobs) else {}

    def show_progress(images: int) -> None:
        nonlocal done
        done += images
        queue.show_progress(jobs, done)

    wanted = [item for job in jobs for item in job.items if item["image"] not in failed]
    if wanted and len(gallery := _list_new(queue.index, current, wanted)):
        given = {"progress": False, "max_failed": 1.0, "on_encoded": show_progress, **options}
        if current is not None:
            version = add(queue.index, gallery, replace_existing=True, **given).version
        else:
            from index_jobs.jobs.build import rebuild

            version = rebuild(gallery, queue.index / CHECKPOINT, queue.index, keep_shards=False, **given).version
        failed |= read_failures(open_version(queue.index, version))
    outcomes = list[dict[str, Any]]()
    for job in jobs:
        lost = [{"id": item["id"], "reason": failed[item["image"]]} for item in job.items if item["image"] in failed]
        is_lost = len(lost) == len(job.items)
        reason = {"status": "failed", "reason": f"no image can be read: {lost[0]['reason']}"} if is_lost else {}
        outcomes.append({"failed": lost, **reason})
    return version, outcomes


def _require_same_types(jobs: Sequence[Job]) -> None:
    """Raise DataError if two jobs give a field values of different types; `add` compares them with the index."""
    types = dict[str, str]()
    for job in jobs if len(jobs) > 1 else ():
        texts = pa.chunked_array([[json.dumps(item["metadata"]) for item in job.items]], pa.string())
        for name, kind in FieldTypes.infer(texts).types.items():
            if not fit_one_field(types.setdefault(name, str(kind)), str(kind)):
                raise DataError(f"the field {name!r} has values of several types")


def _list_new(index: Path, current: IndexVersion | None, items: Sequence[dict[str, Any]]) -> Gallery:
    """Return as a gallery what the version lacks of some items."""
    rows = ({**item["metadata"], **{name: item[name] for name in _OWN}, "file_name": item["image"]} for item in items)
    write_json_lines(index / _LIST, rows)
    gallery = scan(index / _LIST)
    is_new = [current is None or not _is_held(current, row) for row in gallery.table.to_pylist()]
    return gallery.filter(pa.array(is_new))


def _is_held(artifact: IndexVersion, new: dict[str, Any]) -> bool:
    if (row := artifact.row_of(new["id"])) is None:
        return False
    item, location = artifact.item(row), artifact.image_location(row)[0]
    is_same = (item.caption, item.category, item.fields.as_py()) == (new["caption"], new["category"], new["metadata"])
    return is_same and location.endswith(f"/{new['location']}")


def _chosen(artifact: IndexVersion, job: Job) -> tuple[list[int], list[str]]:
    """Return the rows of a job's items, and the ids that the index lacks. Raise FilterError for a wrong filter."""
    if job.filter is not None:
        return np.flatnonzero(match_rows(artifact, job.filter)).tolist(), []
    found = {item["id"]: artifact.row_of(item["id"]) for item in job.items}
    rows = [row for row in found.values() if row is not None]
    return rows, [item_id for item_id, row in found.items() if row is None]


def open_published(index: Path) -> IndexVersion | None:
    """Open the published version; None for a created collection that has none yet."""
    if (index / CHECKPOINT).is_dir() and current_version(index) is None:
        if not version_numbers(index):
            return None
        versions.rollback(index)  # killed just before the end of the first publication
    return open_current(index)


def read_failures(artifact: IndexVersion) -> dict[str, str]:
    """Return the reasons of the images that a version lacks, or its newest addition, by name."""
    manifest = artifact.manifest
    name = f"{manifest.additions[-1].folder}/{FAILED}" if manifest.additions else FAILED
    failures = map(json.loads, manifest.path(artifact.index, name).read_text(encoding="utf-8").splitlines())
    return {failure["name"]: failure["reason"] for failure in failures}
