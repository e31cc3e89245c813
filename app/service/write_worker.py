"""The worker of a service that accepts writes: it stores jobs, and has them applied.

- Changes without images are applied in a thread. Those with images are applied by `dcar
  index apply`, a process with the model and a lower priority than the service, so a
  failure there ends no search.
- A restarted service, or another one on the same index, continues with the jobs. If
  they cannot be applied, for example because the disk is full or another job is
  writing, they wait and are tried again.
"""

import asyncio
import contextlib
import errno
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.turns import ComputeThreads, run_in_new_thread, stop, supervise
from app.search.errors import UnavailableError, without_directories
from app.service.collections import Collection, Collections
from dcar_core.util import files
from dcar_core.util.errors import DcarError, LockedError
from index_jobs.index.job_queue import JobKind, JobQueue
from index_jobs.index.stores import store_of
from index_jobs.jobs.update import apply_waiting

logger = logging.getLogger(__name__)

RETRY_S = 5.0
_POLL_S = 30.0  # between looks for jobs that another process has stored
_PRIORITY = 5  # as of nice; at 10, jobs hardly progress beside other busy processes


def require_writable(settings: Settings) -> None:
    """Check that the service may write where its settings demand it. Raise DcarError if
    not.
    """
    for index in settings.indexes.values() if settings.writes else ():
        if (store := store_of(index)) is not None:
            raise DcarError(
                f"{store.name} is in an object store, to which only jobs publish; unset"
                " DCAR_WRITES"
            )
        files.require_writable(index)
    if settings.writes and settings.collections_dir is not None:
        files.require_writable(settings.collections_dir)
    if settings.feedback is True and store_of(settings.index) is not None:
        raise DcarError(
            "DCAR_FEEDBACK must name a directory: that of an index in an object store"
            " is a cache"
        )


class WriteWorker:
    """Accepts jobs and has them applied. One per process."""

    def __init__(
        self,
        settings: Settings,
        collections: Collections,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._collections = collections
        self._metrics = metrics
        self._arrived = asyncio.Event()
        self._reasons: dict[str, str] = {}  # why the jobs of a collection wait
        self._task: asyncio.Task[None] | None = None
        self._disk = ComputeThreads(4, "dcar-jobs")
        writable = collections if settings.writes else ()
        metrics.add_gauge(
            "dcar_jobs_waiting",
            "Changes of items that have not ended.",
            "collection",
            lambda: [
                (name, float(collection.waiting_jobs)) for name, collection in writable
            ],
        )

    def start(self) -> None:
        self._task = asyncio.create_task(
            supervise("writer", self._run, self._metrics), name="dcar-writer"
        )

    async def close(self) -> None:
        """Stop the process that applies jobs; they continue after the next start."""
        await stop(self._task)
        self._disk.shutdown(wait=False, cancel_futures=True)

    async def accept(
        self,
        name: str,
        kind: JobKind,
        items: Sequence[Mapping[str, Any]],
        images: Sequence[bytes] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """Store a job as `JobQueue.accept` does, and return its status.

        Raises:
            OSError: the disk is full, or the collection has been dropped.
            UnavailableError: too many jobs wait.
        """
        collection = self._collections[name]
        if collection.waiting_jobs >= self._settings.max_jobs:
            raise UnavailableError(
                "Too many changes of this collection wait to be applied.",
                retry_after_s=30,
            )
        collection.waiting_jobs += 1
        try:
            job = await self._disk.run(
                partial(JobQueue(collection.path).accept, kind, items, images, **more)
            )
        except BaseException:
            collection.waiting_jobs -= 1
            raise
        self._arrived.set()
        if (status := await self.status([name], job)) is None:
            raise FileNotFoundError(
                errno.ENOENT,
                "the collection has been dropped",
                str(collection.path),
            )
        return status

    async def status(
        self,
        collections: Sequence[str],
        job: str,
    ) -> dict[str, Any] | None:
        """Return the status of a job in some collections; None if there is none. The
        disk may be unavailable.
        """
        for name, collection in self._named(collections):
            if (
                status := await self._disk.run(JobQueue(collection.path).status, job)
            ) is not None:
                return await self._shown(name, collection, status)
        return None

    async def newest(
        self,
        collections: Sequence[str],
        limit: int,
    ) -> list[dict[str, Any]]:
        """Return the status of the jobs of some collections that were accepted last,
        the newest first.
        """
        statuses = [
            (name, collection, status)
            for name, collection in self._named(collections)
            for status in await self._disk.run(JobQueue(collection.path).newest, limit)
        ]
        newest = sorted(
            statuses, key=lambda status: status[2]["accepted"], reverse=True
        )[:limit]
        return [await self._shown(*status) for status in newest]

    def _named(self, collections: Sequence[str]) -> list[tuple[str, Collection]]:
        # one may be dropped during the next call
        return [(name, self._collections[name]) for name in collections]

    async def _shown(
        self,
        name: str,
        collection: Collection,
        status: dict[str, Any],
    ) -> dict[str, Any]:
        """Return the status of a job as callers see it. The items of one that is done
        are found from then on.
        """
        if (collection.current.version if collection.current else 0) < (
            status.get("index_version") or 0
        ):
            with contextlib.suppress(DcarError):
                await collection.reload()
        if status["status"] == "waiting":
            reason = self._reasons.get(name)
        else:
            reason = status.get("reason")
        if reason is None:
            shown = {}
        else:
            shown = {"reason": without_directories(reason, collection.path)}
        return {"collection": name, **status, **shown}

    async def _run(self) -> None:
        while True:
            self._arrived.clear()
            waiting = [
                (name, collection)
                for name, collection in self._collections
                if await self._count(collection)
            ]
            outcomes = [
                await self._apply(name, collection) for name, collection in waiting
            ]
            if not all(outcomes):
                await asyncio.sleep(RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                # `wait_for` can lose a cancellation in Python 3.11
                async with asyncio.timeout(_POLL_S):
                    await self._arrived.wait()

    async def _count(self, collection: Collection) -> int:
        collection.waiting_jobs = await self._disk.run(
            JobQueue(collection.path).waiting
        )
        return collection.waiting_jobs

    async def _apply(self, name: str, collection: Collection) -> bool:
        """Apply the waiting jobs of a collection, and return False if they have to
        wait.
        """
        try:
            keep = self._settings.keep_writes
            await run_in_new_thread(
                partial(apply_waiting, collection.path, images=False, keep=keep)
            )
            code, errors = (
                await self.run_apply(collection)
                if await self._count(collection)
                else (0, "")
            )
        except DcarError as error:
            code = error.exit_code
            errors = str(error)
        previous = self._reasons.pop(name, None)
        if code != 0:
            lines = errors.strip().splitlines() or [
                f"the process that applies jobs ended with status {code}"
            ]
            reason = self._reasons[name] = lines[-1].removeprefix("error: ")
            if code != LockedError.exit_code:
                self._metrics.task_failures.labels("changes of items").inc()
            if reason != previous:
                logger.warning("the jobs of %s wait: %s", name, reason)
        await self._count(collection)
        with contextlib.suppress(DcarError):  # logged, and shown by /readyz
            await collection.reload()
        return code == 0

    async def run_apply(self, collection: Collection) -> tuple[int, str]:
        """Run the process, and return its exit status and stderr."""
        settings = self._settings
        command = [
            "index",
            "apply",
            str(collection.path),
            "--device",
            settings.device,
            "--runtime",
            settings.runtime,
        ]
        command += ["--keep-writes", str(settings.keep_writes)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "app.cli",
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _PRIORITY)
        try:
            _, errors = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                process.kill()
        assert process.returncode is not None
        return process.returncode, errors.decode(errors="replace")
