"""Apply waiting jobs in batches: one version for the items that they put, and one for those that they delete.

- The last change of an id in a batch is the one that is made. If its image cannot be read, the batch is halved, so that
  the change before it is made.
- A job has ended once its changes are in a complete version that is published. Killed before that, it is applied again;
  images of the job that the published version has, or could not read, are not tried again.
- Only the job with unusable input fails: its batch is halved until the job is by itself. Any other error, such as a
  full disk or another writer, leaves the jobs in the queue.
- A job whose process has died too often fails, so the jobs behind it are applied.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.images.workers import DecodeWorker
from dcar_core.util.errors import ArtifactError, DataError, DcarError
from dcar_core.util.files import atomic_writer
from index_jobs.store.artifact import Artifact
from index_jobs.store.items import FieldTypes, fit_one_field
from index_jobs.store.manifest import CHECKPOINT, FAILED
from index_jobs.store.publish import report_os_errors, rollback
from index_jobs.store.versions import current_version, open_current, open_version, version_numbers
from index_jobs.store.writes import WriteJob, WriteQueue

logger = logging.getLogger(__name__)

BATCH_ITEMS = 2000
MAX_STARTS = 100  # far more than restarts of a machine or a service explain
_PROGRESS_S = 1.0
_SWEEP_S = 3600.0
_KEEP_S = 7 * 24 * 3600.0  # how long the end of a job is remembered
_LIST = "batch.jsonl"


def apply_writes(index: Path, **options: Any) -> int:
    """Apply every waiting job of an index, those included that arrive meanwhile, and return their number.

    Args:
        options: keep, workers, batch_size, device and runtime of `BuildOptions`.

    Raises:
        LockedError: another job is writing, or another process applies these jobs.
        ArtifactError: nothing is published, or the published version is damaged.
        DcarError: the disk is full or cannot be written, or the model cannot be loaded; the jobs stay in the queue.
    """
    queue, count = WriteQueue(index), 0
    with report_os_errors(index), queue.lock():
        while names := _next_batch(queue):
            _apply(queue, index, [queue.read(name) for name in names], options)
            queue.clear_progress()
            count += len(names)
        sweep(queue, index)
    return count


def _next_batch(queue: WriteQueue) -> list[str]:
    """Return the first waiting jobs; the same ones again if a process was killed with them."""
    waiting, started = queue.waiting(), set(queue.progress().get("jobs", ()))
    begun = [name for name in waiting if name in started]
    if begun:
        return begun
    names, count = list[str](), 0
    for name in waiting:
        count += len(queue.read(name).items)
        if names and count > BATCH_ITEMS:
            break
        names.append(name)
    return names


def _apply(queue: WriteQueue, index: Path, jobs: Sequence[WriteJob], options: dict[str, Any]) -> None:
    """Apply jobs together, or in halves where that fails."""
    names, progress = [job.name for job in jobs], queue.progress()
    starts = progress["starts"] + 1 if progress.get("jobs") == names else 1
    try:
        if starts > MAX_STARTS:
            raise DataError(f"given up: the process that applied it ended {MAX_STARTS} times before it was done")
        queue.set_progress(names, starts, 0, sum(len(job.items) for job in jobs))
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
    _require_readable(queue, jobs, last)
    current = _open_published(index)
    version, failed = (current.manifest.version, _failures(current)) if current else (None, dict[str, str]())
    puts = [
        (job, item)
        for job, item in last.values()
        if job.kind == "put" and job.image_name(item) not in failed and not (current and _is_held(current, job, item))
    ]
    if puts:
        given = {**options, "max_failed": 1.0, "progress": False, "on_encoded": _Reporter(queue, len(last))}
        version = _put(queue.folder / _LIST, index, puts, given, is_new=current is None)
        failed |= _failures(open_version(index, version))
    deleted = [item_id for item_id, (job, _) in last.items() if job.kind == "delete"]
    if deleted and version is not None:
        version = _delete(index, deleted, {name: value for name, value in options.items() if name == "keep"})
    for job in jobs:
        lost = [
            {"id": item["id"], "reason": failed[name]} for item in job.items if (name := job.image_name(item)) in failed
        ]
        if len(lost) == len(job.items):
            queue.end(job, status="failed", failed=lost, reason=f"no image can be read: {lost[0]['reason']}")
        else:
            queue.end(job, status="done", index_version=version, failed=lost)


def _require_readable(
    queue: WriteQueue, jobs: Sequence[WriteJob], last: Mapping[str, tuple[WriteJob, dict[str, Any]]]
) -> None:
    """Raise DataError if the image of an item's last change is broken, and an earlier job changes the item too."""
    with contextlib.closing(DecodeWorker()) as worker:
        for item_id in {item["id"] for job in jobs for item in job.items if last[item["id"]][0] is not job}:
            job, item = last[item_id]
            if job.kind == "put" and not _is_readable(queue.folder / job.image_name(item), worker):
                reason = f"the last image of {item_id!r} cannot be read, and an earlier job changes the item too"
                raise DataError(reason)


def _open_published(index: Path) -> Artifact | None:
    """Open the published version; None for a created collection that has none yet."""
    if (index / CHECKPOINT).is_dir() and current_version(index) is None:
        if not version_numbers(index):
            return None
        rollback(index)  # killed just before the end of the first publication
    return open_current(index)


def _put(
    gallery: Path,
    index: Path,
    puts: Sequence[tuple[WriteJob, dict[str, Any]]],
    options: dict[str, Any],
    *,
    is_new: bool,
) -> int:
    """Publish items with images, listed in the file `gallery`, and return the version."""
    from index_jobs.jobs.build import rebuild
    from index_jobs.jobs.update import add

    _write_list(gallery, puts)
    if is_new:
        return rebuild(gallery, index / CHECKPOINT, index, keep_shards=False, **options).version
    return add(index, gallery, replace_existing=True, **options).version


def _delete(index: Path, ids: Sequence[str], options: dict[str, Any]) -> int:
    """Publish a version without some items, and return it."""
    from index_jobs.jobs.update import NoItemLeftError, remove

    try:
        return remove(index, ids, missing_ok=True, **options).version
    except NoItemLeftError:  # the caller knows of no directory
        raise DataError("a collection cannot lose its last item; delete the collection") from None


def _require_same_types(jobs: Sequence[WriteJob]) -> None:
    """Refuse to publish values of several types in one new field together; `add` compares them with those of the index.

    Raises:
        DataError: two jobs give a field values of different types.
    """
    types = dict[str, str]()
    for job in jobs if len(jobs) > 1 else ():
        texts = [json.dumps(item["metadata"]) for item in job.items] if job.kind == "put" else []
        for name, kind in FieldTypes.infer(pa.chunked_array([texts], pa.string())).types.items():
            if not fit_one_field(types.setdefault(name, str(kind)), str(kind)):
                raise DataError(f"the field {name!r} has values of several types")


class _Reporter:
    """Records how many images of the batch have been encoded, at most once a second."""

    def __init__(self, queue: WriteQueue, total: int) -> None:
        self._queue, self._total, self._done, self._next = queue, total, 0, time.monotonic() + _PROGRESS_S

    def __call__(self, images: int) -> None:
        self._done += images
        if time.monotonic() >= self._next:
            progress = self._queue.progress()
            self._queue.set_progress(progress["jobs"], progress["starts"], self._done, self._total)
            self._next = time.monotonic() + _PROGRESS_S


def _is_held(artifact: Artifact, job: WriteJob, item: dict[str, Any]) -> bool:
    """True if the version has this item from this job."""
    row = artifact.row_of(item["id"])
    return row is not None and artifact.image_location(row)[0].endswith(f"/{job.image_name(item)}")


def _is_readable(path: Path, worker: DecodeWorker) -> bool:
    from index_jobs.encoding.decode import is_readable

    try:
        return is_readable(path.read_bytes(), worker)
    except OSError:
        return False


def _write_list(path: Path, puts: Sequence[tuple[WriteJob, dict[str, Any]]]) -> None:
    with atomic_writer(path) as file:
        for job, item in puts:
            own = {field: item[field] for field in ("id", "caption", "category")}
            file.write(json.dumps({**item["metadata"], **own, "file_name": job.image_name(item)}).encode() + b"\n")


def _failures(artifact: Artifact) -> dict[str, str]:
    """Return the reasons of the images that a version lacks, or its newest addition, by name."""
    path = artifact.path / (artifact.manifest.additions[-1].folder if artifact.manifest.additions else "") / FAILED
    failures = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {failure["name"]: failure["reason"] for failure in failures}


def sweep(queue: WriteQueue, index: Path, *, older_s: float = _SWEEP_S) -> None:
    """Remove image files that no version shows and no waiting job has, and old records; at most once in `older_s`.

    Args:
        older_s: younger files stay, since their job may not be in the queue yet.
    """
    mark, now = queue.folder / "swept", time.time()
    if mark.exists() and now - mark.stat().st_mtime < older_s:
        return
    mark.touch()
    queue.forget(now - _KEEP_S)
    waiting = set(queue.waiting())
    try:
        shown = {name for number in version_numbers(index) for name in _shown(open_version(index, number))}
    except ArtifactError as error:  # a version that cannot be read now may show any image
        logger.warning("unused images are kept: %s", error)
        return
    for folder in queue.images.iterdir() if queue.images.is_dir() else ():
        if folder.name in waiting or now - folder.stat().st_mtime < older_s:
            continue
        for path in folder.iterdir():
            if f"{folder.name}/{path.name}" not in shown:
                path.unlink()
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _shown(artifact: Artifact) -> Iterator[str]:
    """Yield the images of jobs that a version shows, as JOB/FILE. The folders above may change when an index moves."""
    start = 0
    for segment in artifact.segments:
        stop = start + len(segment.items)
        locations = segment.items.table(np.flatnonzero(artifact.live[start:stop]))["location"]
        start = stop
        found = pc.extract_regex(locations, r"(?:^|/)images/(?P<name>[0-9a-f]{32}/[0-9]+\.[a-z]+)$")
        yield from (each["name"] for each in pc.drop_null(found).to_pylist())
