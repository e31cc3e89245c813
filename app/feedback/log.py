"""The log of a running service: it names searches, accepts events, and stores both beside the event loop.

- A query id is its time, a random number, and a keyed hash over them and the name of the API key, so any process of the
  service recognizes its caller, before and after a restart. Without API keys, whoever got the response knows its id.
- A search waits for nothing: its row is stored within a second, or with the next events. Accepted events are on disk.
- Events for searches of another host are stored, and whoever reads the log compares them with what was shown.
- If the disk is full, rows are dropped and counted, and events get 503.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

from prometheus_client import Counter
from pydantic_core import to_json

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.turns import ComputeThreads, stop, supervise
from app.feedback import store
from app.feedback.store import EventRow, Fault
from app.search.errors import UnavailableError
from app.search.query import Query
from app.search.results import SearchResponse
from dcar_core.util.errors import DcarError

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
MAX_QUERIES = 20_000  # rows of searches that wait for the disk
_PRUNED = 60  # flushes between two prunings
_CLOSE_S = 10.0  # longest wait for the disk at the end
_MAX_AGE_S = 24 * 3600  # of a search, for events
_START = 16  # digits of an id before its hash: 8 of the time, and 8 random ones


class FeedbackLog:
    """The feedback log of one process. folder: its directory."""

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        self.folder, self._settings, self._metrics = folder, settings, metrics
        self._store, self._writing = store.Store(folder), ComputeThreads(1, "dcar-feedback")
        self._searches = deque[str]()  # rows in JSON
        self._task: asyncio.Task[None] | None = None
        self._is_failing = False
        counter = partial(Counter, registry=metrics.registry)
        self._stored = counter("dcar_feedback_rows_total", "Rows stored in the feedback log.", ["kind"])
        self.lost = counter("dcar_feedback_lost_total", "Rows that the feedback log could not store.", ["kind"])
        self._ignored = counter("dcar_feedback_ignored_total", "Events that changed nothing.", ["reason"])

    def start(self) -> None:
        self._task = asyncio.create_task(supervise("feedback log", self._run, self._metrics), name="dcar-feedback")

    async def close(self) -> None:
        await stop(self._task)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self.flush()
                await self._writing.run(self._store.close)
        self._writing.shutdown(wait=False, cancel_futures=True)

    def note(
        self, caller: str, collection: str | None, query: Query, body: SearchResponse, *, has_image: bool,
        client: str = "",
    ) -> str:  # fmt: skip
        """Note a search of an API key, or "", in a collection, or the default one; return its query id."""
        now = time.time()
        query_id = self._sign(caller, f"{int(now):08x}{os.urandom(4).hex()}")
        if len(self._searches) == MAX_QUERIES:
            self.lost.labels("queries").inc()
            return query_id
        text, is_hashed = query.query, not self._settings.feedback_texts
        is_text = bool(text) and not (has_image or query.more_like or query.less_like or query.without)
        if is_hashed and text:
            text = hashlib.blake2b(text.encode(), key=self._store.secret, digest_size=16).hexdigest()
        row = {
            "time": int(now * 1000),
            "client": client or None,
            "collection": collection or self._settings.default_collection,
            "text": text,
            "hits": [result["id"] for result in body["results"]],
            "kind": "other" if not is_text else "hash" if is_hashed else "text",
            "offset": query.offset,
            "version": body["index_version"],
            "nothing_fits": body["nothing_fits"],
        }
        self._searches.append(f'"{query_id}":{to_json(row).decode()}')
        return query_id

    def _sign(self, caller: str, start: str) -> str:
        return start + hashlib.blake2b(f"{start}{caller}".encode(), key=self._store.secret, digest_size=12).hexdigest()

    def _is_of(self, caller: str, query_id: str) -> bool:
        """Return True if the service gave this id to this caller within the last day."""
        known = self._sign(caller, query_id[:_START]).encode()
        return hmac.compare_digest(known, query_id.encode()) and time.time() - int(query_id[:8], 16) <= _MAX_AGE_S

    async def accept(self, caller: str, events: Sequence[EventRow]) -> list[Fault | None]:
        """Store events durably. Return for each one why it changes nothing, if so.

        Raises:
            UnavailableError: they cannot be stored; the same request may be sent again.
        """
        own = [event if self._is_of(caller, event.query_id) else None for event in events]
        faults = await self._writing.run(self._write, own)
        if faults is None:
            raise UnavailableError("The events cannot be stored.", retry_after_s=10)
        for field, _ in filter(None, faults):
            self._ignored.labels(field).inc()
        return faults

    async def flush(self) -> None:
        """Store the searches that wait."""
        if self._searches:
            await self._writing.run(self._write)

    def _write(self, events: Sequence[EventRow | None] = ()) -> list[Fault | None] | None:
        """Store the searches that wait, and events; return what `Store.add` does, or None if nothing was stored."""
        searches = [self._searches.popleft() for _ in range(len(self._searches))]
        faults: list[Fault | None] | None = None
        try:
            faults = self._store.add(searches, events)
        except sqlite3.Error as error:
            if not self._is_failing:
                logger.warning("feedback is lost until it can be stored again: %s; searches go on", error)
        self._is_failing = faults is None
        counter = self.lost if faults is None else self._stored
        counter.labels("queries").inc(len(searches))
        counter.labels("events").inc(sum(map(bool, events)) if faults is None else faults.count(None))
        return faults

    async def _run(self) -> None:
        for flushes in count(1):
            await asyncio.sleep(FLUSH_S)
            await self.flush()
            if flushes % _PRUNED == 0:
                await self._writing.run(self._prune)

    def _prune(self) -> None:
        try:
            if removed := store.prune(self.folder, self._settings.feedback_days, self._settings.feedback_bytes):
                logger.info("removed %d rows of the feedback log, by DCAR_FEEDBACK_DAYS or _BYTES", removed)
        except (OSError, DcarError) as error:
            logger.warning("the feedback log cannot be pruned: %s", error)
