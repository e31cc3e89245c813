"""Collections: the indexes that one process serves, by name, and the swap to new versions without dropping a request.

- The default collection is DCAR_INDEX, named after its directory; routes without a name mean it.
- A `ServedIndex` loads a new version beside the live one, warms it up, then replaces one reference.
- If a version cannot be loaded, the live one stays; `reason` says why, and the version is tried again later.
- A version whose vector store does not respond, which the poller asks, stays in service, but degraded.
- A supervised task polls CURRENT. `reload` does the same at once, for `POST /admin/reload`.
- The service is ready when every collection of the settings is loaded, and stays ready when one cannot follow a new
  version.
- Created collections are opened after these, one after the other; a request for one that is not open yet waits for it.
"""

import asyncio
import contextlib
import gc
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.supervision import ENDS, stop, supervise
from app.core.threads import ComputeThreads, run_in_new_thread
from app.search.errors import CollectionNotFoundError, UnavailableError, without_directories
from app.search.snapshots import Snapshot, is_published, load_snapshot
from dcar_core.util.errors import ArtifactError, DcarError
from index_jobs.index.created import list_collections
from index_jobs.index.storage import location_of, store_of
from index_jobs.index.versions import current_version, pull, require_index

logger = logging.getLogger(__name__)

RETRY_S = 30.0
CLOSE_S = 3.0  # for a load in progress; measuring runtimes takes a minute
LOOK_S = 1.0  # for a look at the gallery
OPEN_S = 5.0  # for a collection that is being opened
_LOADING, _OPENING = "The model is being loaded.", "The collection is being opened."


class ServedIndex:
    """One published index and its live snapshot.

    Attributes:
        live: the snapshot in use; None while the first one is loaded.
        reason: why the published version is not served, without directories, since anybody may read it; None if it is.
        store_fault: why the vector store of the live version could not be searched at the last poll; None if it could.
        waiting_jobs: number of changes of its items that have not ended, when they were last counted.
        was_tried: set once the first load has ended, or the collection is closed.
        is_created: True for a collection that was created over HTTP; without items it is version 0.
    """

    def __init__(self, index: Path, collections: "Collections", *, is_created: bool = False) -> None:
        self.index = index
        self.is_created = is_created
        self.live: Snapshot | None = None
        self.reason: str | None = _OPENING if is_created else _LOADING
        self.store_fault: str | None = None
        self.waiting_jobs = 0
        self.was_tried = asyncio.Event()
        self._collections = collections
        self._tried_version: int | None = None
        self._retry_at = 0.0
        self._poller: asyncio.Task[None] | None = None
        self._loads: set[asyncio.Task[bool]] = set()
        self._is_closing = False

    def require(self) -> Snapshot:
        """Return the live snapshot. Raise UnavailableError if none is loaded."""
        if self.live is None:
            raise UnavailableError(self.reason or _LOADING)
        return self.live

    def start(self) -> None:
        """Load the first version and begin to poll, in the background."""
        poll = supervise("version poller", self._poll, self._collections.metrics, on_failure=self._record_poll_failure)
        self._poller = asyncio.create_task(poll, name="dcar-snapshots")

    async def close(self) -> None:
        """Stop polling, wait a little for a load, whose thread cannot be stopped, and release the snapshot."""
        self._is_closing = True
        self.was_tried.set()
        await stop(self._poller)
        if self._loads:
            await asyncio.wait(self._loads, timeout=CLOSE_S)
        self.live = None

    async def reload(self) -> bool:
        """Serve the published version. Return False if it is live already.

        A load that has begun continues, and keeps the lock, if its caller stops waiting.

        Raises:
            DcarError: the version cannot be loaded; the live one stays.
        """
        load = asyncio.create_task(self._load(), name="dcar-load")
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        load.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved without a waiting caller
        load.add_done_callback(lambda _: self.was_tried.set())
        return await asyncio.shield(load)

    async def _load(self) -> bool:
        lost, started = await self._pull(), time.perf_counter()
        async with self._collections.load_lock:
            if self._is_closing or (self.is_created and not await self._collections.disk.run(self.index.is_dir)):
                return False
            self._tried_version = None
            try:
                snapshot = await run_in_new_thread(self._load_new, self._collections.loaded)
            except ENDS:
                raise
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they refer to snapshots until a full garbage collection
                failure = self._record_failure(lost or error)
                raise failure from (None if failure is error else error)
            if snapshot is not None:
                if self.live is None:
                    gc.freeze()  # else each full collection would stop every request for a quarter of a second
                self.live, where, seconds = snapshot, location_of(self.index), time.perf_counter() - started
                count = snapshot.artifact.manifest.count
                logger.info(
                    "serving version %d of %s: %d items, loaded in %.1f s", snapshot.version, where, count, seconds
                )
            if lost is not None:
                raise self._record_failure(lost, "served, and its object store is not followed")
            self.reason, self._retry_at = None, 0.0
            return snapshot is not None

    def _load_new(self, loaded: list[Snapshot]) -> Snapshot | None:
        """Load the published version unless it is live."""
        is_empty = self.is_created and current_version(self.index) is None
        version = self._tried_version = 0 if is_empty else require_index(self.index).version
        if self.live is not None and is_published(self.live, self.index, version):
            return None
        return load_snapshot(self.index, self._collections.settings, loaded, is_empty)

    async def _pull(self) -> DcarError | None:
        """Bring the version from its object store, if it is in one, and return what prevents it: what is here remains.

        Another collection may load meanwhile, since this can take minutes.
        """
        if store_of(self.index) is None:
            return None
        try:
            await run_in_new_thread(pull, self.index)
        except OSError as error:
            return ArtifactError(f"{self.index} cannot be written: {error.strerror}")
        except DcarError as error:
            return error
        return None

    @property
    def fault(self) -> str | None:
        """Why the collection is degraded: `store_fault` or `reason`; None if it is not, or not open yet."""
        return (self.store_fault or self.reason) if self.was_tried.is_set() else None

    def _record_failure(self, error: BaseException, state: str = "not served") -> DcarError:
        """Note why a version is not served; log it once, or report it if the service cannot start."""
        failure = error if isinstance(error, DcarError) else ArtifactError(f"the index cannot be loaded: {error}")
        reason = without_directories(str(failure), self.index)
        if self.live is None and not self.is_created and self._collections.on_start_failure is not None:
            self._collections.on_start_failure(failure)
        elif reason != self.reason:
            logger.error("version %s of %s is %s: %s", self._tried_version or "?", self.index, state, failure)
        self.reason, self._retry_at = reason, time.monotonic() + RETRY_S
        return failure

    def _record_poll_failure(self, error: BaseException) -> None:
        self.reason = f"The check for new versions failed: {type(error).__name__}; the log has the details."
        self.was_tried.set()

    async def _poll(self) -> None:
        disk, poll_s = self._collections.disk, self._collections.settings.poll_s
        while True:
            version = None
            if self.was_tried.is_set():
                with contextlib.suppress(ArtifactError):  # `reload` reports why it cannot be read
                    version = await disk.run(current_version, self.index)
            if version is None or version != self._tried_version or time.monotonic() >= self._retry_at:
                with contextlib.suppress(DcarError):  # `_record_failure` has logged it
                    await self.reload()
            fault = await disk.run(self.live.artifact.find_store_fault) if self.live else None
            if fault is not None and self.store_fault is None:
                logger.error("%s cannot be searched: %s", self.index, fault)
            self.store_fault = fault
            if poll_s == 0:
                return
            await asyncio.sleep(poll_s)


class Collections:
    """All collections by name; the default one is first.

    Attributes:
        default: name of the default collection.
        disk: threads that look for published versions; a disk may hang.
        load_lock: held while a version is loaded, so one is loaded at a time.
        on_start_failure: called if the first version of a collection in the settings cannot be loaded.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, *, on_start_failure: Callable[[DcarError], None] | None = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.on_start_failure = on_start_failure
        self.load_lock = asyncio.Lock()
        self.disk = ComputeThreads(4, "dcar-versions")
        self._indexes = {name: ServedIndex(index, self) for name, index in settings.indexes.items()}
        for name, path in list_collections(settings.collections_dir).items() if settings.collections_dir else ():
            self._indexes.setdefault(name, ServedIndex(path, self, is_created=True))
        self._sync_lock = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self.default = next(iter(self._indexes))
        self._look: asyncio.Task[str | None] | None = None  # at the files of the galleries

    @property
    def loaded(self) -> list[Snapshot]:
        """The live snapshots of all collections."""
        return [index.live for index in self._indexes.values() if index.live is not None]

    def __iter__(self) -> Iterator[tuple[str, ServedIndex]]:
        return iter([*self._indexes.items()])

    def __getitem__(self, name: str | None) -> ServedIndex:
        return self.find(name)

    def find(self, name: str | None, field: str = "collection") -> ServedIndex:
        """Return the collection that a field names, None for the default. Raise CollectionNotFoundError."""
        index = self._indexes.get(self.default if name is None else name)
        if index is None:
            raise CollectionNotFoundError(str(name), field)
        return index

    async def open(self, name: str | None, field: str = "collection") -> Snapshot:
        """Return the live snapshot of a collection, as `find`.

        Raise UnavailableError if it is not loaded, or a created one not open within `OPEN_S`.
        """
        index = self.find(name, field)
        if index.live is None and index.is_created:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OPEN_S):
                    await index.was_tried.wait()
            if index.live is None and not await self.disk.run(index.index.is_dir):
                await self.sync()
            index = self.find(name, field)
        return index.require()

    @property
    def opening(self) -> int:
        """Number of created collections that are not open yet."""
        return sum(not index.was_tried.is_set() for _, index in self if index.is_created)

    @property
    def missing(self) -> str | None:
        """Why a collection of the settings cannot be searched; None if all can."""
        for name, index in self:
            if index.live is None and not index.is_created:
                return self._with_name(name, index.reason or _LOADING)
        return None

    @property
    def reason(self) -> str | None:
        """Why some collection is degraded, see `ServedIndex.fault`; None if none is."""
        reasons = [self._with_name(name, index.fault) for name, index in self if index.fault is not None]
        return "; ".join(reasons) or None

    async def gallery_fault(self) -> str | None:
        """Return why images cannot be shown, by a sample of each gallery's files; None if they can."""
        if self._look is None or self._look.done():  # callers share one look, which may hang on a network disk
            self._look = asyncio.create_task(run_in_new_thread(self._find_gallery_fault))
        look = self._look
        done, _ = await asyncio.wait([look], timeout=LOOK_S)
        return look.result() if done else "the gallery does not respond"

    def _find_gallery_fault(self) -> str | None:
        for name, index in self:
            if index.live and (fault := index.live.artifact.find_gallery_fault()):
                return self._with_name(name, without_directories(fault, index.index))
        return None

    def start(self) -> None:
        """Load the collections of the settings, then created ones, and begin to poll, in the background."""
        for _, index in self:  # which take turns by `load_lock`
            index.start()
        if self.settings.collections_dir is not None:
            watch = supervise("collections watcher", self._watch, self.metrics)
            self._watcher = asyncio.create_task(watch, name="dcar-watcher")

    async def close(self) -> None:
        await stop(self._watcher)
        await asyncio.gather(*(index.close() for _, index in self))
        self.disk.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while self.settings.poll_s > 0:
            await asyncio.sleep(self.settings.poll_s)
            await self.sync()

    async def sync(self) -> None:
        """Serve the collections that were created over HTTP, and no longer those that were dropped."""
        if self.settings.collections_dir is None:
            return
        async with self._sync_lock:
            found = await self.disk.run(list_collections, self.settings.collections_dir)
            for name in [name for name, index in self if index.is_created and found.get(name) != index.index]:
                await self._indexes.pop(name).close()
                logger.info("no longer serving the collection %s: it was dropped, or its directory is gone", name)
            for name, path in found.items():
                if name not in self._indexes:
                    created = self._indexes[name] = ServedIndex(path, self, is_created=True)
                    created.start()
                    await created.was_tried.wait()

    async def reload(self) -> dict[str, bool]:
        """Serve the published version of every collection, created ones included. Return which changed, by name.

        Raises:
            DcarError: some cannot be loaded; the others have been reloaded.
        """
        await self.sync()
        changed: dict[str, bool] = {}
        failures: list[str] = []
        for name, index in self:
            try:
                changed[name] = await index.reload()
            except DcarError as error:
                failures.append(self._with_name(name, str(error)))
        if failures:
            raise DcarError("; ".join(failures))
        return changed

    def _with_name(self, name: str, message: str) -> str:
        return message if len(self._indexes) == 1 else f"{name}: {message}"
