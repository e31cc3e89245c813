"""Apply waiting jobs in batches: a version for each.

- The last change of an id in a batch is made. If its image cannot be read, the batch is halved, so that the change
  before it is made.
- A job has ended once its changes are in a published version. Killed before that, it is applied again, without the
  images that the version has or could not read.
- Only the job with unusable input fails: its batch is halved until the job is by itself. Any other error, such as a
  full disk or another writer, leaves the jobs in the queue.
- A job whose process has died too often fails, so the jobs behind it are applied.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dcar_core.util.errors import DataError, DcarError
from dcar_core.util.files import atomic_writer
from index_jobs.jobs.update import add, remove
from index_jobs.spec import KEEP_WRITES
from index_jobs.store.artifact import Artifact
from index_jobs.store.changes import apply_patches, open_published
from index_jobs.store.filters import match_rows
from index_jobs.store.items import FieldTypes, fit_one_field
from index_jobs.store.manifest import CHECKPOINT, FAILED, OVER_HTTP
from index_jobs.store.publish import report_os_errors
from index_jobs.store.versions import open_version
from index_jobs.store.writes import WriteJob, WriteQueue, sweep

logger = logging.getLogger(__name__)

MAX_STARTS = 100  # far more than restarts of a machine or a service explain
_MAX_PATCH_STARTS = 3  # a change of metadata alone takes seconds, so restarts seldom meet it
_PROGRESS_S = 1.0
_LIST = "batch.jsonl"


def apply_writes(index: Path, **options: Any) -> int:
    """Apply every waiting job of an index, those included that arrive meanwhile, and return their number.

    Args:
        options: keep (of changes over HTTP), workers, batch_size, device and runtime of `BuildOptions`.

    Raises:
        LockedError: another job is writing, or another process applies these jobs.
        DcarError: nothing can be published now, as with a full disk; the jobs stay in the queue.
    """
    queue, count = WriteQueue(index), 0
    with report_os_errors(index), queue.lock():
        while jobs := queue.next_batch():
            _apply(queue, index, jobs, {"keep": KEEP_WRITES, **options, "origin": OVER_HTTP})
            queue.clear_progress()
            count += len(jobs)
        sweep(queue, index)
    return count


def _apply(queue: WriteQueue, index: Path, jobs: Sequence[WriteJob], options: dict[str, Any]) -> None:
    """Apply jobs together, or in halves where that fails."""
    names, progress = [job.name for job in jobs], queue.progress()
    starts = progress["starts"] + 1 if progress.get("jobs") == names else 1
    most = _MAX_PATCH_STARTS if jobs[0].kind == "patch" else MAX_STARTS
    try:
        if starts > most:
            raise DataError(f"given up: the process that applied it ended {most} times before it was done")
        queue.set_progress(names, starts, 0, sum(len(job.items) for job in jobs))
        if jobs[0].kind == "patch":
            apply_patches(queue, index, jobs, options["keep"])
        else:
            _publish(queue, index, jobs, options)
    except DataError as error:
        if len(jobs) > 1:
            half = len(jobs) // 2
            for part in (jobs[:half], jobs[half:]):
                _apply(queue, index, part, options)
            return
        logger.warning("job %s failed: %s", names[0], error)
        queue.end(jobs[0], status="failed", reason=str(error))
    except (DcarError, OSError):
        queue.clear_progress()  # the jobs are not to blame
        raise


def _publish(queue: WriteQueue, index: Path, jobs: Sequence[WriteJob], options: dict[str, Any]) -> None:
    """Publish the changes of some jobs, and record their ends. Raise DataError if a change cannot be made."""
    _require_same_types(jobs)
    last = {item["id"]: (job, item) for job in jobs for item in job.items}
    current = open_published(index)
    version, failed = (current.manifest.version, read_failures(current)) if current else (None, dict[str, str]())
    puts = [
        (job, item)
        for job, item in last.values()
        if job.kind == "put" and job.image_name(item) not in failed and not (current and _is_held(current, job, item))
    ]
    deleted = [item_id for item_id, (job, _) in last.items() if job.kind == "delete"]
    for condition in (job.filter for job in jobs if job.filter is not None):
        rows = np.flatnonzero(match_rows(current, condition)) if current else ()
        deleted += [current.item(int(row)).id for row in rows] if current else []
    if puts:
        # A broken image must not hide the change that an earlier job makes to the item.
        is_hiding = any(last[item["id"]][0] is not job for job in jobs for item in job.items)
        given = {"progress": False, "max_failed": 0.0 if is_hiding else 1.0, **options}
        version = _put(queue, index, puts, deleted, given, is_new=current is None)
        failed |= read_failures(open_version(index, version))
    elif deleted and current:
        version = remove(index, deleted, missing_ok=True, keep=options["keep"], origin=OVER_HTTP).version
    for job in jobs:
        lost = [
            {"id": item["id"], "reason": failed[name]} for item in job.items if (name := job.image_name(item)) in failed
        ]
        if lost and len(lost) == len(job.items):
            queue.end(job, status="failed", failed=lost, reason=f"no image can be read: {lost[0]['reason']}")
        else:
            queue.end(job, status="done", index_version=version, failed=lost)


def _put(
    queue: WriteQueue,
    index: Path,
    puts: Sequence[tuple[WriteJob, dict[str, Any]]],
    deleted: Sequence[str],
    options: dict[str, Any],
    *,
    is_new: bool,
) -> int:
    """Publish items with images, without the deleted ones, and return the version."""
    done, shown_at = 0, time.monotonic()

    def show_progress(images: int) -> None:
        nonlocal done, shown_at
        done += images
        if time.monotonic() >= shown_at + _PROGRESS_S:
            progress, shown_at = queue.progress(), time.monotonic()
            queue.set_progress(progress["jobs"], progress["starts"], done, len(puts))

    gallery = queue.folder / _LIST
    with atomic_writer(gallery) as file:
        for job, item in puts:
            own = {field: item[field] for field in ("id", "caption", "category")}
            file.write(json.dumps({**item["metadata"], **own, "file_name": job.image_name(item)}).encode() + b"\n")
    if is_new:
        from index_jobs.jobs.build import rebuild

        checkpoint = index / CHECKPOINT
        return rebuild(gallery, checkpoint, index, keep_shards=False, on_encoded=show_progress, **options).version
    return add(index, gallery, replace_existing=True, removed_ids=deleted, on_encoded=show_progress, **options).version


def _require_same_types(jobs: Sequence[WriteJob]) -> None:
    """Raise DataError if two jobs give a field values of different types; `add` compares them with the index."""
    types = dict[str, str]()
    for job in jobs if len(jobs) > 1 else ():
        texts = [json.dumps(item["metadata"]) for item in job.items] if job.kind == "put" else []
        for name, kind in FieldTypes.infer(pa.chunked_array([texts], pa.string())).types.items():
            if not fit_one_field(types.setdefault(name, str(kind)), str(kind)):
                raise DataError(f"the field {name!r} has values of several types")


def _is_held(artifact: Artifact, job: WriteJob, item: dict[str, Any]) -> bool:
    """True if the version has this item from this job."""
    row = artifact.row_of(item["id"])
    return row is not None and artifact.image_location(row)[0].endswith(f"/{job.image_name(item)}")


def read_failures(artifact: Artifact) -> dict[str, str]:
    """Return the reasons of the images that a version lacks, or its newest addition, by name."""
    path = artifact.path / (artifact.manifest.additions[-1].folder if artifact.manifest.additions else "") / FAILED
    failures = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {failure["name"]: failure["reason"] for failure in failures}
