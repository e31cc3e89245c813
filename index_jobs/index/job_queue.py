"""The queue of accepted changes of an index's items: a database with their progress and
outcomes.

INDEX/jobs.sqlite       the jobs; one is accepted once its row is committed
INDEX/images/<sha256>   pictures that were put, on the disk before their job is
                        committed
INDEX/.jobs.lock        held by the process that applies jobs

- Jobs are applied in the order of their acceptance, by `index_jobs.jobs.update`. They
  survive a crash until they end.
- Several processes of one machine may use a database at once. It is opened for each
  call: a collection may be dropped.
- Nothing that a caller sends becomes a path.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import write_bytes
from dcar_core.util.processes import hold_lock
from index_jobs.index.versions import open_version, version_numbers

logger = logging.getLogger(__name__)

JOBS = "jobs.sqlite"
IMAGES = "images"
BATCH_ITEMS = 2000
# of a job whose process has died more often, it is applied by itself
MAX_STARTS_TOGETHER = 3
_BUSY_S = 30.0
_SWEEP_S = 3600.0
_KEEP_S = 7 * 24 * 3600.0  # how long the end of a job is remembered
_IMAGE = r"(?:^|/)(?P<name>images/[0-9a-f]{64})$"
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL, summary TEXT NOT NULL,
    body TEXT, outcome TEXT, ended REAL
);
CREATE TABLE IF NOT EXISTS progress (
    job INTEGER PRIMARY KEY, starts INTEGER NOT NULL,
    done INTEGER NOT NULL, total INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS jobs_ended ON jobs (ended);
"""

JobKind = Literal["put", "patch", "delete"]


@dataclass(frozen=True)
class Job:
    """A job that waits.

    items: of a put, objects with `id`, `caption`, `category`, `metadata` and `image`, a
    name below INDEX; of others, objects with `id`. filter: selects the items of a patch
    or a delete instead. fields: of a patch, to be merged; None removes one. starts:
    earlier attempts, during which the process has died. by: the field that the `id` of
    each object is a value of, in a patch whose objects have `fields` of their own.
    """

    number: int
    kind: JobKind
    items: list[dict[str, Any]]
    filter: dict[str, Any] | None
    fields: dict[str, Any]
    starts: int
    by: str = "id"


class JobQueue:
    """The jobs of one index. All methods raise OSError if the disk is full or the index
    is gone.
    """

    def __init__(self, index: Path) -> None:
        self.index = index
        self.images = index / IMAGES
        self._path = index / JOBS

    @contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """Open the database for one change of it."""
        try:
            with closing(
                sqlite3.connect(
                    self._path,
                    timeout=_BUSY_S,
                    isolation_level="IMMEDIATE",
                )
            ) as database:
                database.executescript(_SCHEMA)
                yield database
                database.commit()
        except sqlite3.Error as error:
            if not self.index.is_dir():
                raise FileNotFoundError(
                    errno.ENOENT,
                    os.strerror(errno.ENOENT),
                    str(self.index),
                ) from error
            code = errno.ENOSPC if "full" in str(error) else errno.EIO
            raise OSError(code, str(error), str(self._path)) from error

    def _read(self, query: str, *values: object) -> Iterator[Any]:
        if self._path.exists():
            with suppress(FileNotFoundError), self.database() as database:
                yield from database.execute(query, values)

    def accept(
        self,
        kind: JobKind,
        items: Sequence[Mapping[str, Any]],
        images: Sequence[bytes] = (),
        *,
        filter: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
        by: str = "id",
        notes: Mapping[str, Any] | None = None,
    ) -> str:
        """Store a job durably and return its id.

        items, filter, fields, by: as in `Job`, without `image`. images: of a put, the
        image file of each item. notes: what the status of the job shows as well.
        """
        job = secrets.token_hex(16)
        names = [hashlib.sha256(data).hexdigest() for data in images]
        if images:
            items = [
                {**item, "image": f"{IMAGES}/{name}"}
                for item, name in zip(items, names, strict=True)
            ]
        summary = {
            "kind": kind,
            "items": len(items),
            "accepted": _now(),
            **(notes or {}),
        }
        body = {"items": [*items], "filter": filter, "fields": fields or {}, "by": by}
        with self.database() as database:
            database.execute("BEGIN IMMEDIATE")  # against a sweep
            for name, data in zip(names, images, strict=True):
                self.images.mkdir(exist_ok=True)
                if not (self.images / name).exists():
                    write_bytes(self.images / name, data, shared=True)
            values = job, kind, json.dumps(summary), json.dumps(body)
            database.execute(
                "INSERT INTO jobs (id, kind, summary, body) VALUES (?, ?, ?, ?)", values
            )
        return job

    def waiting(self) -> int:
        """Return the number of jobs that have not ended."""
        return sum(
            count
            for (count,) in self._read("SELECT count(*) FROM jobs WHERE ended IS NULL")
        )

    def next_batch(self) -> list[Job]:
        """Return the first waiting jobs of one kind, which are applied together.

        A job with a filter or another field than `id` is by itself, since it depends on
        the jobs before it; no two put the same item.
        """
        batch = list[Job]()
        ids = set[str]()
        query = (
            "SELECT number, kind, body, coalesce(starts, 0) FROM jobs LEFT JOIN"
            " progress ON job = number"
        )
        query += " WHERE ended IS NULL ORDER BY number"
        for number, kind, body, starts in self._read(query):
            job = Job(number, kind, **json.loads(body), starts=starts)
            new = {item["id"] for item in job.items}
            is_alone = any(
                other.filter or other.by != "id" or other.starts >= MAX_STARTS_TOGETHER
                for other in [*batch, job]
            )
            is_other = batch and (
                kind != batch[0].kind or (kind == "put" and not ids.isdisjoint(new))
            )
            if batch and (is_alone or is_other or len(ids) + len(new) > BATCH_ITEMS):
                break
            batch.append(job)
            ids |= new
        return batch

    def status(self, job: str) -> dict[str, Any] | None:
        """Return `id`, `kind`, `items`, `accepted`, `status` and more of a job; None
        for an unknown one.
        """
        return next(iter(self._statuses("id = ?", job)), None)

    def newest(self, limit: int) -> list[dict[str, Any]]:
        """Return the status of the jobs that were accepted last, the newest first."""
        return self._statuses("true ORDER BY number DESC LIMIT ?", limit)

    def _statuses(self, condition: str, value: object) -> list[dict[str, Any]]:
        query = (
            "SELECT id, summary, outcome, done, total FROM jobs LEFT JOIN progress ON"
            " job = number WHERE "
        )
        statuses = list[dict[str, Any]]()
        for job, summary, outcome, done, total in self._read(query + condition, value):
            state: dict[str, Any] = {"status": "waiting"}
            if total is not None:
                state = {
                    "status": "running",
                    "progress": {"done": done, "total": total},
                }
            statuses.append(
                {
                    "id": job,
                    **json.loads(summary),
                    **(json.loads(outcome) if outcome else state),
                }
            )
        return statuses

    def show_progress(self, jobs: Sequence[Job], done: int = 0) -> None:
        """Record that jobs have been begun, and the number of encoded images."""
        total = sum(len(job.items) for job in jobs)
        rows = [(job.number, job.starts + 1, done, total) for job in jobs]
        with self.database() as database:
            database.executemany(
                "INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?)", rows
            )

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Record that jobs wait, since what failed was not their fault."""
        with self.database() as database:
            database.executemany(
                "DELETE FROM progress WHERE job = ?", [(job.number,) for job in jobs]
            )

    def end(self, jobs: Sequence[Job], outcomes: Sequence[Mapping[str, Any]]) -> None:
        """Record how jobs ended, all at once."""
        now = time.time()
        texts = [json.dumps({"ended": _now(), **outcome}) for outcome in outcomes]
        ends = [(text, now, job.number) for job, text in zip(jobs, texts, strict=True)]
        with self.database() as database:
            database.executemany(
                "UPDATE jobs SET outcome = ?, ended = ?, body = NULL WHERE number = ?",
                ends,
            )
            database.executemany(
                "DELETE FROM progress WHERE job = ?", [(job.number,) for job in jobs]
            )
            database.execute("DELETE FROM jobs WHERE ended < ?", (now - _KEEP_S,))

    @contextmanager
    def lock(self, wait_s: float = 0) -> Iterator[None]:
        """Admit one process that applies jobs. Raise LockedError if another one does,
        for so long.
        """
        gone = FileNotFoundError(
            errno.ENOENT,
            os.strerror(errno.ENOENT),
            str(self.index),
        )
        if not self.index.is_dir():  # the lock would make it
            raise gone
        file = self.index / ".jobs.lock"
        message = f"another process applies the jobs of {self.index}; wait for its end"
        with hold_lock(file, message, wait_s):
            # it was dropped, and the lock has made it
            if [path.name for path in self.index.iterdir()] == [file.name]:
                shutil.rmtree(self.index)
                raise gone
            yield

    def sweep(self, *, older_s: float = _SWEEP_S) -> None:
        """Remove pictures that no version shows and no waiting job puts; within `lock`,
        at most once in `older_s`.
        """
        mark = self.images / ".swept"
        now = time.time()
        if not self.images.is_dir() or (
            mark.exists() and now - mark.stat().st_mtime < older_s
        ):
            return
        mark.touch()
        try:
            kept = self._shown_images()
        except ArtifactError as error:
            # a version that cannot be read now may show any picture
            logger.warning("unused images are kept: %s", error)
            return
        with self.database() as database:
            database.execute("BEGIN IMMEDIATE")
            query = (
                "SELECT json_extract(value, '$.image') FROM jobs, json_each(body,"
                " '$.items')"
            )
            kept |= {
                image
                for (image,) in self._read(
                    f"{query} WHERE ended IS NULL AND kind = 'put'"
                )
            }
            for path in self.images.iterdir():
                if (
                    f"{IMAGES}/{path.name}" not in kept
                    and path != mark
                    and now - path.stat().st_mtime >= older_s
                ):
                    path.unlink()

    def _shown_images(self) -> set[str]:
        shown = set[str]()
        for opened in (
            open_version(self.index, number) for number in version_numbers(self.index)
        ):
            locations = opened.live_table("location")["location"]
            shown.update(
                match["name"]
                for match in pc.drop_null(
                    pc.extract_regex(locations, _IMAGE)
                ).to_pylist()
            )
        return shown


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
