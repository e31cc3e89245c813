"""The queue of one index: jobs survive a crash from the moment they are accepted until they have ended.

INDEX/writes/queue/<job>.json   an accepted job that has not ended; writing this file accepts it
INDEX/writes/ended/<job>.json   how a job ended; kept for a week
INDEX/writes/images/<job>/      its image files, which stay there for the index
INDEX/writes/progress.json      the jobs that are being applied, the number of starts, and of encoded images
INDEX/writes/.lock              held by the process that applies jobs

- A job's name is the time of its acceptance and a random number, so jobs are applied in their order. The time is later
  than those of the queued jobs even if the clock was set back.
- Image files are numbered: nothing that a caller sends becomes a path.
"""

import contextlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dcar_core.util.files import fsync_path, write_json
from dcar_core.util.processes import hold_lock

WRITES = "writes"
_JOB = re.compile(r"[0-9a-f]{32}")

JobKind = Literal["put", "delete"]


@dataclass(frozen=True)
class WriteJob:
    """An accepted job.

    items: of a put, objects with `id`, `caption`, `category`, `metadata` and `file`, the name of the image file; of a
        delete, objects with `id`.
    """

    name: str
    kind: JobKind
    items: list[dict[str, Any]]

    def image_name(self, item: dict[str, Any]) -> str:
        """Return the name of an item's image below INDEX/writes; that of no file for an item without image."""
        return f"images/{self.name}/{item.get('file')}"


class WriteQueue:
    """The jobs of one index. Several processes may use a queue at once."""

    def __init__(self, index: Path) -> None:
        folder = index.resolve() / WRITES
        self.folder, self.images, self.ended = folder, folder / "images", folder / "ended"
        self._queue, self._progress = folder / "queue", folder / "progress.json"

    def accept(self, kind: JobKind, items: Sequence[dict[str, Any]], images: Sequence[tuple[bytes, str]] = ()) -> str:
        """Store a job durably and return its name.

        Args:
            items: as in `WriteJob`, without `file`.
            images: of a put, the file and the suffix of each item's image.

        Raises:
            OSError: the disk is full or cannot be written; nothing is accepted.
        """
        last = max((path.name[:16] for path in self._queue.glob("[0-9a-f]*.json")), default="0")
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
            write_json(path, {"kind": kind, "accepted": _now(), "items": stored})
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return name

    def waiting(self) -> list[str]:
        """Return the names of the jobs that have not ended, in order."""
        with contextlib.suppress(FileNotFoundError):
            names = sorted(path.stem for path in self._queue.iterdir() if _JOB.fullmatch(path.stem))
            return [name for name in names if not (self.ended / f"{name}.json").exists()]
        return []

    def read(self, name: str) -> WriteJob:
        values = json.loads((self._queue / f"{name}.json").read_bytes())
        return WriteJob(name, values["kind"], values["items"])

    def end(self, job: WriteJob, **outcome: Any) -> None:
        """Record how a job ended, and take it out of the queue."""
        queued = self._queue / f"{job.name}.json"
        accepted = json.loads(queued.read_bytes())["accepted"]
        status = {"kind": job.kind, "items": len(job.items), "accepted": accepted, "ended": _now()}
        write_json(self.ended / queued.name, status | outcome)
        queued.unlink()

    def status(self, name: str) -> dict[str, Any] | None:
        """Return `kind`, `items`, `accepted`, `status` and what else is known of a job; None if there is none."""
        if not _JOB.fullmatch(name):
            return None
        for _ in range(2):  # a job may end between the two looks
            with contextlib.suppress(FileNotFoundError):
                ended: dict[str, Any] = json.loads((self.ended / f"{name}.json").read_bytes())
                return ended
            with contextlib.suppress(FileNotFoundError):
                values = json.loads((self._queue / f"{name}.json").read_bytes())
                progress = self.progress()
                found = {"kind": values["kind"], "items": len(values["items"]), "accepted": values["accepted"]}
                if name not in progress.get("jobs", ()):
                    return {**found, "status": "waiting"}
                return {**found, "status": "running", "progress": {each: progress[each] for each in ("done", "total")}}
        return None

    def progress(self) -> dict[str, Any]:
        """Return `jobs`, `starts`, `done` and `total` of the batch that is being applied, {} without one."""
        try:
            values: dict[str, Any] = json.loads(self._progress.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return values

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

    def lock(self) -> AbstractContextManager[None]:
        """Admit one process that applies jobs. Raise LockedError if another one does."""
        self.folder.mkdir(exist_ok=True)
        message = f"another process applies the jobs in {self.folder}; wait until it has ended"
        return hold_lock(self.folder / ".lock", message)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
