"""Collections: the indexes that one process serves, by name, and the swap to new
versions without dropping a request.

- The default collection is DCAR_INDEX, named after its directory; routes without a name
  mean it.
- A `Collection` loads a new version beside the current one, warms it up, then replaces
  one reference. If a version cannot be loaded, the current one stays; `reason` says
  why, and the version is tried again later.
- The files of what is served are looked at every CHECK_S; one that is missing or cut
  off degrades the collection.
- The service is ready when every collection of the settings is loaded, and stays ready
  when one cannot follow a new version. Created collections are opened after these, one
  after the other.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.turns import ENDS, ComputeThreads, run_in_new_thread, stop, supervise
from app.search.errors import (
    CollectionNotFoundError,
    UnavailableError,
    without_directories,
)
from app.search.served_version import ServedVersion, is_published, load_served_version
from dcar_core.util.errors import ArtifactError, DcarError
from index_jobs.index.created_collections import list_collections
from index_jobs.index.index_version import IndexVersion, check_files
from index_jobs.index.manifest import WAITING
from index_jobs.index.stores import location_of, store_of
from index_jobs.index.versions import current_version, pull, require_index

logger = logging.getLogger(__name__)

RETRY_S = 30.0
CHECK_S = 600.0
_LOADING = "The model is being loaded."
_OPENING = "The collection is being opened."


class Collection:
    """One published index and its current version. is_created: over HTTP; without items
    it is version 0.
    """

    def __init__(
        self,
        path: Path,
        collections: "Collections",
        *,
        is_created: bool = False,
    ) -> None:
        self.path = path
        self.is_created = is_created
        # in use; None while the first one is loaded
        self.current: ServedVersion | None = None
        # why it is not served, without directories
        self.reason: str | None = _OPENING if is_created else _LOADING
        # changes of its items that had not ended when they were last counted
        self.waiting_jobs = 0
        # set once the first load has ended, or the collection is closed
        self.was_tried = asyncio.Event()
        # why the watch of its gallery takes no more changes, without directories
        self.waits_for: str | None = None
        # a served file that is missing or cut off, without directories
        self.damage: str | None = None
        # Unix time of the last look at the served files; 0 before
        self.checked_at = 0.0
        self._collections = collections
        self._tried_version: int | None = None
        self._retry_at = self._check_at = 0.0
        self._poller: asyncio.Task[None] | None = None
        self._loads: set[asyncio.Task[bool]] = set()
        self._is_closing = False

    def require(self) -> ServedVersion:
        """Return the current version. Raise UnavailableError if none is loaded."""
        if self.current is None:
            raise UnavailableError(self.reason or _LOADING)
        return self.current

    def start(self) -> None:
        """Load the first version and begin to poll, in the background."""
        poll = supervise(
            "version poller",
            self._poll,
            self._collections.metrics,
            on_failure=self._record_poll_failure,
        )
        self._poller = asyncio.create_task(poll, name="dcar-versions")

    async def close(self) -> None:
        """Stop polling, and release the version. The thread of a load in progress
        cannot be stopped.
        """
        self._is_closing = True
        self.was_tried.set()
        await stop(self._poller)
        self.current = None

    async def reload(self) -> bool:
        """Serve the published version. Return False if it is served already.

        A load that has begun continues, and keeps the lock, if its caller stops
        waiting.

        Raises:
            DcarError: the version cannot be loaded; the current one stays.
        """
        load = asyncio.create_task(self._load(), name="dcar-load")
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        # retrieved without a waiting caller
        load.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(load)

    async def _load(self) -> bool:
        lost = await self._pull()
        started = time.perf_counter()
        async with self._collections.load_lock:
            if self._is_closing or (
                self.is_created
                and not await self._collections.disk.run(self.path.is_dir)
            ):
                return False
            self._tried_version = None
            try:
                served = await run_in_new_thread(
                    self._load_new, self._collections.loaded
                )
            except ENDS:
                raise
            except BaseException as error:
                failure = self._record_failure(lost or error)
                raise failure from (None if failure is error else error)
            finally:
                self.was_tried.set()
            if served is not None and not self._is_closing:
                if self.current is None:
                    # else each full collection would stop every request for a quarter
                    # of a second
                    gc.freeze()
                self.current = served
                where = location_of(self.path)
                seconds = time.perf_counter() - started
                count = served.index.manifest.count
                logger.info(
                    "serving version %d of %s: %d items, loaded in %.1f s",
                    served.version,
                    where,
                    count,
                    seconds,
                )
            if lost is not None:
                raise self._record_failure(
                    lost, "served, and its object store is not followed"
                )
            self.reason = None
            self._retry_at = 0.0
            return served is not None

    def _load_new(self, loaded: list[ServedVersion]) -> ServedVersion | None:
        """Load the published version unless it is served."""
        is_empty = self.is_created and current_version(self.path) is None
        version = self._tried_version = (
            0 if is_empty else require_index(self.path).version
        )
        if self.current is not None and is_published(self.current, self.path, version):
            return None
        return load_served_version(
            self.path,
            self._collections.settings,
            loaded,
            is_empty,
        )

    async def _pull(self) -> DcarError | None:
        """Bring the version from its object store, if it is in one, and return what
        prevents it: what is here remains.

        Another collection may load meanwhile, since this can take minutes.
        """
        try:
            if store_of(self.path) is not None:
                await run_in_new_thread(pull, self.path)
        except OSError as error:
            return ArtifactError(f"{self.path} cannot be written: {error.strerror}")
        except DcarError as error:
            return error
        return None

    @property
    def fault(self) -> str | None:
        """Why the collection is degraded; None if it is not, or not open yet."""
        if self.was_tried.is_set():
            return self.reason or self.damage or self.waits_for
        return None

    def _record_failure(
        self,
        error: BaseException,
        state: str = "not served",
    ) -> DcarError:
        """Note why a version is not served; log it once, or report it if the service
        cannot start.
        """
        if isinstance(error, DcarError):
            failure = error
        else:
            failure = ArtifactError(f"the index cannot be loaded: {error}")
        reason = without_directories(str(failure), self.path)
        if (
            self.current is None
            and not self.is_created
            and self._collections.on_start_failure is not None
        ):
            self._collections.on_start_failure(failure)
        elif reason != self.reason:
            logger.error(
                "version %s of %s is %s: %s",
                self._tried_version or "?",
                self.path,
                state,
                failure,
            )
        self.reason = reason
        self._retry_at = time.monotonic() + RETRY_S
        return failure

    def _record_poll_failure(self, error: BaseException) -> None:
        self.reason = (
            f"The check for new versions failed: {type(error).__name__}; the log has"
            " the details."
        )
        self.was_tried.set()

    async def _poll(self) -> None:
        poll_s = self._collections.settings.poll_s
        while True:
            version = None
            if self.was_tried.is_set():
                # `reload` reports why it cannot be read
                with contextlib.suppress(ArtifactError):
                    version = await self._collections.disk.run(
                        current_version, self.path
                    )
            if (
                version is None
                or version != self._tried_version
                or time.monotonic() >= self._retry_at
            ):
                with contextlib.suppress(DcarError):  # `_record_failure` has logged it
                    await self.reload()
            self.waits_for = await self._collections.disk.run(self._read_waiting)
            if (current := self.current) is not None:
                await self._collections.disk.run(current.concepts.refresh)
                if (
                    self.damage is not None
                    or time.monotonic() + poll_s > self._check_at
                ):
                    await self._check_files(current.index)
            if poll_s == 0:
                return
            await asyncio.sleep(poll_s)

    async def _check_files(self, index: IndexVersion) -> None:
        """Note which file of a version is missing or has another length, and log it
        once.
        """
        self._check_at = time.monotonic() + CHECK_S
        damage = None
        try:
            await self._collections.disk.run(check_files, index.index, index.manifest)
        except (ArtifactError, OSError) as error:
            damage = without_directories(str(error), self.path)
            if damage != self.damage:
                logger.error(
                    "version %d of %s is damaged: %s",
                    index.manifest.version,
                    self.path,
                    error,
                )
        self.damage = damage
        self.checked_at = time.time()

    def _read_waiting(self) -> str | None:
        """Return the reason that a watch has written lately; None if none waits."""
        with contextlib.suppress(OSError):
            if time.time() - (path := self.path / WAITING).stat().st_mtime < RETRY_S:
                return without_directories(path.read_text(encoding="utf-8"), self.path)
        return None


class Collections:
    """All collections by name; the default one is first.

    on_start_failure: called if the first version of a collection in the settings cannot
    be loaded.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        on_start_failure: Callable[[DcarError], None] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.on_start_failure = on_start_failure
        # one version is loaded at a time
        self.load_lock = asyncio.Lock()
        self._sync_lock = asyncio.Lock()
        # which look for published versions; a disk may hang
        self.disk = ComputeThreads(4, "dcar-versions")
        self._by_name = {
            name: Collection(index, self) for name, index in settings.indexes.items()
        }
        for name, path in (
            list_collections(settings.collections_dir).items()
            if settings.collections_dir
            else ()
        ):
            self._by_name.setdefault(name, Collection(path, self, is_created=True))
        self._watcher: asyncio.Task[None] | None = None
        self.default = next(iter(self._by_name))
        about = "Longest time between two checks of the served files; 0 without checks."
        interval_s = CHECK_S if settings.poll_s else 0.0
        metrics.add_gauge(
            "dcar_file_check_interval_seconds",
            about,
            "collection",
            lambda: [(name, interval_s) for name, _ in self],
        )
        about = "Unix time of the last check of the served files; 0 before."
        metrics.add_gauge(
            "dcar_file_check_timestamp_seconds",
            about,
            "collection",
            lambda: [(name, collection.checked_at) for name, collection in self],
        )

    @property
    def loaded(self) -> list[ServedVersion]:
        """The current versions of all collections."""
        return [
            collection.current
            for collection in self._by_name.values()
            if collection.current is not None
        ]

    def __iter__(self) -> Iterator[tuple[str, Collection]]:
        return iter([*self._by_name.items()])

    def find(self, name: str | None, field: str = "collection") -> Collection:
        """Return the collection that a field names, None for the default. Raise
        CollectionNotFoundError.
        """
        collection = self._by_name.get(self.default if name is None else name)
        if collection is None:
            raise CollectionNotFoundError(str(name), field)
        return collection

    __getitem__ = find

    def open(self, name: str | None, field: str = "collection") -> ServedVersion:
        """Return the current version of a collection, as `find`. Raise UnavailableError
        if it is not loaded.
        """
        return self.find(name, field).require()

    @property
    def missing(self) -> str | None:
        """Why a collection of the settings cannot be searched; None if all can."""
        for name, collection in self:
            if collection.current is None and not collection.is_created:
                return self._with_name(name, collection.reason or _LOADING)
        return None

    @property
    def reason(self) -> str | None:
        """Why some collection is degraded, see `Collection.fault`; None if none is."""
        faults = [
            self._with_name(name, collection.fault)
            for name, collection in self
            if collection.fault is not None
        ]
        return "; ".join(faults) or None

    def start(self) -> None:
        """Load the collections of the settings, then created ones, and begin to poll,
        in the background.
        """
        for _, collection in self:  # which take turns by `load_lock`
            collection.start()
        if self.settings.collections_dir is not None:
            watch = supervise("collections watcher", self._watch, self.metrics)
            self._watcher = asyncio.create_task(watch, name="dcar-watcher")

    async def close(self) -> None:
        await stop(self._watcher)
        await asyncio.gather(*(collection.close() for _, collection in self))
        self.disk.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while self.settings.poll_s > 0:
            await asyncio.sleep(self.settings.poll_s)
            await self.sync()

    async def sync(self) -> None:
        """Serve the collections that were created over HTTP, and no longer those that
        were dropped.
        """
        if self.settings.collections_dir is None:
            return
        async with self._sync_lock:
            paths = await self.disk.run(list_collections, self.settings.collections_dir)
            for name, collection in self:
                if collection.is_created and paths.get(name) != collection.path:
                    await self._by_name.pop(name).close()
                    logger.info(
                        "no longer serving the collection %s: it was dropped, or its"
                        " directory is gone",
                        name,
                    )
            for name, path in paths.items():
                if name not in self._by_name:
                    created = self._by_name[name] = Collection(
                        path,
                        self,
                        is_created=True,
                    )
                    created.start()
                    await created.was_tried.wait()

    async def reload(self) -> dict[str, bool]:
        """Serve the published version of every collection, created ones included.
        Return which changed, by name.

        Raises:
            DcarError: some cannot be loaded; the others have been reloaded.
        """
        await self.sync()
        changed = dict[str, bool]()
        failures = list[str]()
        for name, collection in self:
            try:
                changed[name] = await collection.reload()
            except DcarError as error:
                failures.append(self._with_name(name, str(error)))
        if failures:
            raise DcarError("; ".join(failures))
        return changed

    def _with_name(self, name: str, message: str) -> str:
        return message if len(self._by_name) == 1 else f"{name}: {message}"
