"""The worker of a service that accepts writes: it applies changes of metadata, and runs `dcar index apply` for others.

- Changes of metadata need no model. They are made in a thread, without the seconds that a process takes to start.
- A process of its own holds the model that encodes new images, so a failure there ends no search. It has a lower
  priority than the service.
- Jobs are files beside the index, so a restarted service, or another one on the same index, continues with them.
- If the process fails, for example because the disk is full or another job is writing, the jobs wait and it is started
  again.
- Disks may hang: storing jobs, reading their status and looking for them have threads of their own, and metrics show
  the last count.
"""

import asyncio
import contextlib
import errno
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.supervision import stop, supervise
from app.core.threads import ComputeThreads
from app.search.errors import UnavailableError, without_directories
from app.service.collections import Collections, ServedIndex
from dcar_core.util import files
from dcar_core.util.errors import DcarError, LockedError
from index_jobs.store.changes import apply_waiting
from index_jobs.store.location import store_of
from index_jobs.store.writes import JobKind, WriteQueue

logger = logging.getLogger(__name__)

_RETRY_S = 5.0
_POLL_S = 30.0  # between looks for jobs that another process has stored
_STOP_S = 5.0
_STATUS_S = 10.0  # longest wait for the status of a job
_MAX_ACCEPTING = 16  # jobs that are being stored; of each, the service holds the whole body
_PRIORITY = 5  # as of nice; at 10, jobs hardly progress beside other busy processes


@asynccontextmanager
async def _responding_disk() -> AsyncIterator[None]:
    """Raise UnavailableError if the body waits too long for a disk."""
    try:
        async with asyncio.timeout(_STATUS_S):
            yield
    except TimeoutError:
        raise UnavailableError("The disk of the jobs does not respond.", retry_after_s=5) from None


def require_writable(settings: Settings) -> None:
    """Check that the service may write where its settings demand it. Raise DcarError if not."""
    for index in settings.indexes.values() if settings.writes else ():
        if (store := store_of(index)) is not None:
            raise DcarError(f"{store.url} is in an object store, to which only jobs publish; unset DCAR_WRITES")
        if not os.access(index, os.W_OK):
            raise DcarError(f"{index} cannot be written, which DCAR_WRITES needs; unset it, or allow it")
    if settings.writes and settings.collections_dir is not None:
        files.require_writable(settings.collections_dir)
    if settings.feedback is True and store_of(settings.index) is not None:
        raise DcarError("DCAR_FEEDBACK must name a directory: that of an index in an object store is a cache")


class WriteWorker:
    """Accepts jobs and has them applied. One per process."""

    def __init__(self, settings: Settings, collections: Collections, metrics: Metrics) -> None:
        self._settings, self._collections, self._metrics = settings, collections, metrics
        self._arrived = asyncio.Event()
        self._reasons: dict[str, str] = {}  # why the jobs of a collection wait
        self._task: asyncio.Task[None] | None = None
        self._storing = ComputeThreads(4, "dcar-store")
        self._reading = ComputeThreads(2, "dcar-jobs")
        self._looking = ComputeThreads(1, "dcar-queue")
        self._changing = ComputeThreads(1, "dcar-changes")
        self._accepting = 0
        served = collections if settings.writes else ()
        metrics.add_gauge(
            "dcar_jobs_waiting",
            "Changes of items that have not ended.",
            "collection",
            lambda: [(name, float(each.waiting_jobs)) for name, each in served],
        )

    def start(self) -> None:
        self._task = asyncio.create_task(supervise("writer", self._run, self._metrics), name="dcar-writer")

    async def close(self) -> None:
        """Stop the process that applies jobs; they continue after the next start."""
        await stop(self._task)
        for threads in (self._storing, self._reading, self._looking, self._changing):
            threads.shutdown(wait=False, cancel_futures=True)

    async def accept(
        self,
        collection: str,
        kind: JobKind,
        items: Sequence[dict[str, Any]],
        images: Sequence[tuple[bytes, str]],
        more: dict[str, Any],
    ) -> dict[str, Any]:
        """Store a job as `WriteQueue.accept` does, and return its status.

        Raises:
            OSError: the disk is full, or the collection has been dropped.
            UnavailableError: too many jobs are being stored, or wait.
        """
        served = self._collections[collection]
        if self._accepting >= _MAX_ACCEPTING:
            raise UnavailableError("Too many changes are being stored.", retry_after_s=2)
        if served.waiting_jobs >= self._settings.max_jobs:
            raise UnavailableError("Too many changes of this collection wait to be applied.", retry_after_s=30)
        self._accepting += 1
        served.waiting_jobs += 1
        try:
            job = await self._storing.run(WriteQueue(served.index).accept, kind, items, images, more)
        except BaseException:
            served.waiting_jobs -= 1
            raise
        finally:
            self._accepting -= 1
        self._arrived.set()
        status = await self._status_in(collection, served, job)
        if status is None:
            raise FileNotFoundError(errno.ENOENT, "the collection has been dropped", str(served.index))
        return status

    async def status(self, collections: Sequence[str], job: str) -> dict[str, Any] | None:
        """Return the status of a job in some collections; None if there is none. The disk may be unavailable."""
        async with _responding_disk():
            for name in collections:
                if (status := await self._status_in(name, self._collections[name], job)) is not None:
                    return status
        return None

    async def newest(self, collections: Sequence[str], limit: int) -> list[dict[str, Any]]:
        """Return the status of the jobs of some collections that were accepted last, the newest first."""
        async with _responding_disk():
            named = [(name, self._collections[name]) for name in collections]
            found = [
                (job, name, served)
                for name, served in named
                for job in await self._reading.run(WriteQueue(served.index).newest, limit)
            ]
            newest = sorted(found, key=lambda each: each[0], reverse=True)[:limit]
            shown = [await self._status_in(name, served, job) for job, name, served in newest]
        return [status for status in shown if status is not None]

    async def has_put(self, collection: str, item_id: str) -> bool:
        """Return True if a waiting job of a collection puts this item."""
        async with _responding_disk():
            return await self._reading.run(WriteQueue(self._collections[collection].index).has_put, item_id)

    async def _status_in(self, name: str, served: ServedIndex, job: str) -> dict[str, Any] | None:
        status = await self._reading.run(WriteQueue(served.index).status, job)
        if status is None:
            return None
        if (served.live.version if served.live else 0) < (status.get("index_version") or 0):
            with contextlib.suppress(DcarError):  # the items of a job are found once its status is done
                await served.reload()
        reason = self._reasons.get(name) if status["status"] == "waiting" else status.get("reason")
        shown = {} if reason is None else {"reason": without_directories(reason, served.index)}
        return {"id": job, "collection": name, **status, **shown}

    async def _run(self) -> None:
        while True:
            self._arrived.clear()
            waiting = [(name, served) for name, served in self._collections if await self._count(served)]
            outcomes = [await self._apply(name, served) for name, served in waiting]
            if not all(outcomes):
                await asyncio.sleep(_RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):  # `wait_for` can lose a cancellation in Python 3.11
                    await self._arrived.wait()

    async def _count(self, served: ServedIndex) -> int:
        served.waiting_jobs = len(await self._looking.run(WriteQueue(served.index).waiting))
        return served.waiting_jobs

    async def _apply(self, name: str, served: ServedIndex) -> bool:
        """Apply the waiting jobs of a collection, and return False if they have to wait."""
        try:
            is_left = await self._changing.run(apply_waiting, served.index, self._settings.keep_writes)
            code, errors = await self.run_apply(served) if is_left else (0, "")
        except DcarError as error:
            code, errors = error.exit_code, str(error)
        if code == 0:
            self._reasons.pop(name, None)
        else:
            lines = errors.strip().splitlines() or [f"the process that applies jobs ended with status {code}"]
            reason = lines[-1].removeprefix("error: ")
            is_locked = code == LockedError.exit_code
            if not is_locked:
                self._metrics.task_failures.labels("changes of items").inc()
            if self._reasons.get(name) != reason:
                (logger.info if is_locked else logger.warning)("the jobs of %s wait: %s", name, reason)
            self._reasons[name] = reason
        await self._count(served)
        with contextlib.suppress(DcarError):  # logged, and shown by /readyz
            await served.reload()
        return code == 0

    async def run_apply(self, served: ServedIndex) -> tuple[int, str]:
        """Run the process, and return its exit status and stderr."""
        settings = self._settings
        command = ["index", "apply", str(served.index), "--device", settings.device, "--runtime", settings.runtime]
        command += ["--keep-writes", str(settings.keep_writes)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "app.cli", *command, env=environment,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _PRIORITY)
        try:
            _, errors = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError, TimeoutError):  # unless it has ended
                process.terminate()
                await asyncio.wait_for(process.wait(), _STOP_S)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        assert process.returncode is not None
        return process.returncode, errors.decode(errors="replace")
