"""Changes that were accepted over HTTP: the queue of an index, and the collections that were created.

INDEX/writes/queue/<job>.json   an accepted job that has not ended; writing this file accepts it. Its first line is the
                                job's summary, its second one the job
INDEX/writes/ended/<job>.json   how a job ended; kept for a week
INDEX/writes/images/<job>/      its image files, which stay there for the index
INDEX/writes/progress.json      the jobs that are being applied, the number of starts, and of encoded images
INDEX/writes/.lock              held by the process that applies jobs
FOLDER/.lock                    held while a collection is put into the folder
FOLDER/<hash>/collection.json   the name of a created collection; that of its folder is a hash of it
FOLDER/<hash>/checkpoint/       the model that its items are encoded with
FOLDER/<hash>/...               an index directory, once the first items are published; until then `empty_artifact`

- Jobs survive a crash from the moment they are accepted until they have ended; `index_jobs.jobs.apply` applies them.
- A job's name is the time of its acceptance and a random number, so jobs are applied in their order. The time is later
  than those of the queued jobs even if the clock was set back.
- Image files are numbered: nothing that a caller sends becomes a path.
"""

import contextlib
import hashlib
import heapq
import json
import logging
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dcar_core.model.checkpoint import copy_checkpoint
from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import fsync_path, fsync_tree, write_json, write_json_lines
from dcar_core.util.processes import hold_lock
from index_jobs.spec import IndexSpec
from index_jobs.store.artifact import Artifact
from index_jobs.store.manifest import CHECKPOINT, Manifest
from index_jobs.store.versions import open_version, version_numbers

logger = logging.getLogger(__name__)

WRITES = "writes"
_JOB = re.compile(r"[0-9a-f]{32}")
_DESCRIPTION = "collection.json"
_NEW, _OLD, _LOCK = ".new-", ".old-", ".lock"

BATCH_ITEMS = 2000
_SWEEP_S = 3600.0
_DROP_S = 2.0
_KEEP_S = 7 * 24 * 3600.0  # how long the end of a job is remembered
_IMAGE = r"(?:^|/)images/(?P<name>[0-9a-f]{32}/[0-9]+\.[a-z]+)$"  # the folders above may change when an index moves

JobKind = Literal["put", "patch", "delete"]


@dataclass(frozen=True)
class WriteJob:
    """An accepted job.

    items: of a put, objects with `id`, `caption`, `category`, `metadata` and `file`, the name of the image file; of
        others, objects with `id`.
    filter: instead of items, which ones a patch or a delete changes.
    fields: of a patch, the metadata fields, `caption` and `category` to merge; None removes one.
    notes: what the job's status shows as well.
    """

    name: str
    kind: JobKind
    items: list[dict[str, Any]]
    accepted: str
    filter: dict[str, Any] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """The part of its status that does not change."""
        return {"kind": self.kind, "items": len(self.items), "accepted": self.accepted, **self.notes}

    def image_name(self, item: dict[str, Any]) -> str:
        """Return the name of an item's image below INDEX/writes; that of no file for an item without image."""
        return f"images/{self.name}/{item.get('file')}"


class WriteQueue:
    """The jobs of one index. Several processes may use a queue at once."""

    def __init__(self, index: Path) -> None:
        folder = index.resolve() / WRITES
        self.folder, self.images, self.ended = folder, folder / "images", folder / "ended"
        self._queue, self._progress = folder / "queue", folder / "progress.json"

    def accept(
        self,
        kind: JobKind,
        items: Sequence[dict[str, Any]],
        images: Sequence[tuple[bytes, str]] = (),
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """Store a job durably and return its name.

        Args:
            items: as in `WriteJob`, without `file`.
            images: of a put, the file and the suffix of each item's image.
            more: other fields of `WriteJob`.

        Raises:
            OSError: the disk is full or cannot be written; nothing is accepted.
        """
        last = max(_jobs_in(self._queue), default="0")[:16]
        name = f"{max(time.time_ns(), int(last, 16) + 1):016x}{secrets.token_hex(8)}"
        path, folder = self._queue / f"{name}.json", self.images / name
        files = [f"{number}.{suffix}" for number, (_, suffix) in enumerate(images)]
        try:
            for parent in (self.folder, self._queue, self.ended, self.images):
                parent.mkdir(exist_ok=True)  # without the index: it may have been dropped
            if images:
                folder.mkdir()
                for file, (data, _) in zip(files, images, strict=True):
                    (folder / file).write_bytes(data)
                    fsync_path(folder / file)
                for parent in (folder, self.images, self.folder):
                    fsync_path(parent)
            stored = [{**item, "file": file} for item, file in zip(items, files, strict=True)] if images else [*items]
            fields = {"kind": kind, "accepted": _now(), "items": stored, **(more or {})}
            write_json_lines(path, [WriteJob(name, **fields).summary, fields])
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return name

    def waiting(self) -> list[str]:
        """Return the names of the jobs that have not ended, in order."""
        return [name for name in sorted(_jobs_in(self._queue)) if not (self.ended / f"{name}.json").exists()]

    def read(self, name: str) -> WriteJob:
        _, _, job = (self._queue / f"{name}.json").read_bytes().partition(b"\n")
        return WriteJob(name, **json.loads(job))

    def _summary(self, name: str) -> dict[str, Any]:
        """Return the `summary` of a waiting job, without the time that reading its items takes."""
        with (self._queue / f"{name}.json").open("rb") as file:
            summary: dict[str, Any] = json.loads(file.readline())
        return summary

    def next_batch(self) -> list[WriteJob]:
        """Return the first waiting jobs that can be applied together; the same ones again if a process was killed.

        Changes of metadata are apart from those with images. A job with a filter is by itself, since it depends on the
        jobs before it.
        """
        waiting, started = self.waiting(), set(self.progress().get("jobs", ()))
        if begun := [name for name in waiting if name in started]:
            return [self.read(name) for name in begun]
        batch, count = list[WriteJob](), 0
        for name in waiting:
            job = self.read(name)
            count += len(job.items)
            kinds = {"patch" if each.kind == "patch" else "others" for each in (*batch, job)}
            has_filter = any(each.filter is not None for each in (*batch, job))
            if batch and (count > BATCH_ITEMS or len(kinds) > 1 or has_filter):
                break
            batch.append(job)
        return batch

    def newest(self, limit: int) -> list[str]:
        """Return the names of the jobs that were accepted last, the newest first."""
        return heapq.nlargest(limit, _jobs_in(self._queue) | _jobs_in(self.ended))

    def has_put(self, item_id: str) -> bool:
        """Return True if a waiting job puts this item."""
        for name in self.waiting():
            with contextlib.suppress(FileNotFoundError):  # it has ended
                is_put = self._summary(name)["kind"] == "put"
                if is_put and any(item["id"] == item_id for item in self.read(name).items):
                    return True
        return False

    def end(self, job: WriteJob, **outcome: Any) -> None:
        """Record how a job ended, and take it out of the queue."""
        write_json(self.ended / f"{job.name}.json", {**job.summary, "ended": _now(), **outcome})
        (self._queue / f"{job.name}.json").unlink()

    def status(self, name: str) -> dict[str, Any] | None:
        """Return `kind`, `items`, `accepted`, `status` and what else is known of a job; None if there is none."""
        if not _JOB.fullmatch(name):
            return None
        for _ in range(2):  # a job may end between the two looks
            with contextlib.suppress(FileNotFoundError):
                ended: dict[str, Any] = json.loads((self.ended / f"{name}.json").read_bytes())
                return ended
            with contextlib.suppress(FileNotFoundError):
                summary, progress = self._summary(name), self.progress()
                if name not in progress.get("jobs", ()):
                    return {**summary, "status": "waiting"}
                done = {each: progress[each] for each in ("done", "total")}
                return {**summary, "status": "running", "progress": done}
        return None

    def progress(self) -> dict[str, Any]:
        """Return `jobs`, `starts`, `done` and `total` of the batch that is being applied, {} without one."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            values: dict[str, Any] = json.loads(self._progress.read_bytes())
            return values
        return {}

    def set_progress(self, jobs: Sequence[str], starts: int, done: int, total: int) -> None:
        write_json(self._progress, {"jobs": [*jobs], "starts": starts, "done": done, "total": total})

    def clear_progress(self) -> None:
        self._progress.unlink(missing_ok=True)

    def forget(self, before: float) -> None:
        """Remove the records of jobs that ended before a time in seconds, and of ended jobs that are still queued."""
        for path in self.ended.glob("*.json"):
            (self._queue / path.name).unlink(missing_ok=True)
            if path.stat().st_mtime < before:
                path.unlink()

    def lock(self, wait_s: float = 0) -> AbstractContextManager[None]:
        """Admit one process that applies jobs. Raise LockedError if another one does, for so long."""
        self.folder.mkdir(exist_ok=True)
        message = f"another process applies the jobs in {self.folder}; wait until it has ended"
        return hold_lock(self.folder / _LOCK, message, wait_s)


def _jobs_in(folder: Path) -> set[str]:
    """Return the names of the jobs in a folder; none without the folder, which a drop of the collection may remove."""
    try:
        return {path.stem for path in folder.iterdir() if path.suffix == ".json" and _JOB.fullmatch(path.stem)}
    except FileNotFoundError:
        return set()


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
    shown = set[str]()
    try:
        for artifact in (open_version(index, number) for number in version_numbers(index)):
            tables = [segment.items.table().select(["location"]) for segment in artifact.segments]
            locations = pa.concat_tables(tables).filter(pa.array(artifact.live))["location"]
            shown.update(each["name"] for each in pc.drop_null(pc.extract_regex(locations, _IMAGE)).to_pylist())
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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def empty_artifact(index: Path, fingerprint: str, dim: int) -> Artifact:
    """Return version 0 of a created collection, without rows; its model has this fingerprint and vectors (dim,)."""
    manifest = Manifest(spec=IndexSpec(fingerprint=fingerprint), dim=dim, kind="Flat")
    return Artifact(index, manifest, [], np.empty(0, np.int64))


def list_collections(folder: Path) -> dict[str, Path]:
    """Return the index directories of the created collections by name. One without a readable name is logged."""
    found = {}
    for path in sorted(folder.glob(f"[0-9a-f]*/{_DESCRIPTION}")):
        try:
            found[json.loads(path.read_bytes())["name"]] = path.parent
        except FileNotFoundError:  # dropped meanwhile
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            _report(path, str(error))
    return found


@cache
def _report(path: Path, reason: str) -> None:
    """Log a damaged description once: it is read every few seconds."""
    logger.error("the collection in %s is not served: %s cannot be read: %s", path.parent, path.name, reason)


def create_collection(folder: Path, name: str, checkpoint: Path) -> None:
    """Create a collection without items, unless there is one of this name.

    Args:
        checkpoint: is copied.
    """
    target = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
    staging = folder / f"{_NEW}{secrets.token_hex(8)}"
    try:
        copy_checkpoint(checkpoint, staging / CHECKPOINT)
        write_json(staging / _DESCRIPTION, {"name": name})
        fsync_tree(staging)
        with hold_lock(folder / _LOCK, f"another collection is being created in {folder}", wait_s=-1):
            if not (target / _DESCRIPTION).exists():  # otherwise another request has created it
                with contextlib.suppress(FileNotFoundError):
                    _put_aside(target)  # a drop that waits for another one makes the folder again, for its lock
                staging.rename(target)
                fsync_path(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def drop_collection(index: Path) -> None:
    """Remove a created collection with its versions and images. Raise LockedError if its jobs are being applied."""
    with WriteQueue(index).lock(_DROP_S):  # for as long as another drop, or a change of metadata, takes at most
        _put_aside(index)  # a killed removal leaves no half of it
    for leftover in index.parent.glob(f"{_OLD}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _put_aside(index: Path) -> None:
    """Give a folder a name under which it is removed."""
    index.rename(index.with_name(f"{_OLD}{secrets.token_hex(8)}"))
