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
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from prometheus_client import Counter
from pydantic_core import to_json

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.supervision import stop, supervise
from app.core.threads import ComputeThreads, run_in_new_thread
from app.feedback import store
from app.feedback.store import EventRow
from app.search.errors import UnavailableError
from app.search.query import Query
from app.search.results import SearchResponse
from dcar_core.util.errors import DcarError
from dcar_core.util.processes import in_own_process

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
MAX_QUERIES = 20_000  # rows of searches that wait for the disk
_PRUNE_S = 60.0
_FRESH_S = 60.0  # of a summary
_STORE_S = 10.0  # longest wait for the disk
_MAX_AGE_S = 24 * 3600  # of a search, for events
_START = 16  # digits of an id before its hash: 8 of the time, and 8 random ones

Ignored = tuple[int, str, str]  # the place of an event, its field at fault, and why


class FeedbackLog:
    """The feedback log of one process."""

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        self._folder, self._settings, self._metrics = folder, settings, metrics
        self._default_collection = settings.default_collection
        self._store, self._writing = store.Store(folder), ComputeThreads(1, "dcar-feedback")
        self._queries = list[str]()  # rows in JSON
        self._tasks = list[asyncio.Task[None]]()
        self._is_failing = False
        self._summaries, self._summary_lock = dict[str, tuple[float, dict[str, Any]]](), asyncio.Lock()

        def counter(name: str, description: str, label: str) -> Counter:
            return Counter(name, description, [label], registry=metrics.registry)

        self._stored = counter("dcar_feedback_rows_total", "Rows stored in the feedback log.", "kind")
        self.lost = counter("dcar_feedback_lost_total", "Rows that the feedback log could not store.", "kind")
        self._ignored = counter("dcar_feedback_ignored_total", "Events that changed nothing.", "reason")

    def start(self) -> None:
        for name, run in (("feedback log", self._run), ("pruning of the feedback log", self._prune)):
            self._tasks.append(asyncio.create_task(supervise(name, run, self._metrics), name=f"dcar-{name}"))

    async def close(self) -> None:
        for task in self._tasks:
            await stop(task)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STORE_S):
                await self.flush()
                await self._writing.run(self._store.close)
        self._writing.shutdown(wait=False, cancel_futures=True)

    def note(
        self, caller: str, collection: str | None, query: Query, body: SearchResponse, *, has_image: bool,
        client: str = "",
    ) -> str:  # fmt: skip
        """Note a search, and return its query id.

        Args:
            caller: the name of the API key; "" without keys.
            collection: None for the default one.
            client: who searched, if the request names it.
        """
        now = time.time()
        query_id = self._sign(caller, f"{int(now):08x}{os.urandom(4).hex()}")
        if len(self._queries) == MAX_QUERIES:
            self.lost.labels("queries").inc()
            return query_id
        text, is_hashed = query.query, not self._settings.feedback_texts
        is_text = bool(text) and not (has_image or query.more_like or query.less_like or query.without)
        if is_hashed and text:
            text = hashlib.blake2b(text.encode(), key=self._store.secret, digest_size=16).hexdigest()
        row = {
            "time": int(now * 1000),
            "client": client or None,
            "collection": collection or self._default_collection,
            "text": text,
            "hits": [result["id"] for result in body["results"]],
            "kind": "text" if is_text else "other",
            "offset": query.offset,
            "version": body["index_version"],
            "is_hashed": is_hashed,
            "nothing_fits": body["nothing_fits"],
        }
        self._queries.append(f'"{query_id}":{to_json(row).decode()}')
        return query_id

    def _sign(self, caller: str, start: str) -> str:
        return start + hashlib.blake2b(f"{start}{caller}".encode(), key=self._store.secret, digest_size=12).hexdigest()

    def _is_of(self, caller: str, query_id: str) -> bool:
        """Return True if the service gave this id to this caller within the last day."""
        known = self._sign(caller, query_id[:_START]).encode()
        return hmac.compare_digest(known, query_id.encode()) and time.time() - int(query_id[:8], 16) <= _MAX_AGE_S

    async def accept(self, caller: str, events: Sequence[EventRow]) -> list[Ignored]:
        """Store events durably, and return those that change nothing.

        Raises:
            UnavailableError: they cannot be stored; the same request may be sent again.
        """
        own = [place for place, event in enumerate(events) if self._is_of(caller, event.query_id)]
        ignored = await self._write([events[place] for place in own]) if own else []
        if ignored is None:
            raise UnavailableError("The events cannot be stored.", retry_after_s=10)
        foreign = {*range(len(events))} - {*own}
        found = [(own[place], field, reason) for place, field, reason in ignored]
        found += [(place, "query_id", "is of no search of yours in the last day") for place in foreign]
        for _, field, _ in found:
            self._ignored.labels(field).inc()
        return sorted(found)

    async def flush(self) -> None:
        """Store the searches that wait."""
        if self._queries:
            await self._write([])

    async def _write(self, events: Sequence[EventRow]) -> list[Ignored] | None:
        """Store the searches that wait, and events; return those that change nothing, or None if nothing was stored."""
        queries, self._queries = self._queries, []
        with suppress(TimeoutError):
            async with asyncio.timeout(_STORE_S):
                return await asyncio.shield(asyncio.ensure_future(self._add(queries, events)))
        return None

    async def _add(self, queries: Sequence[str], events: Sequence[EventRow]) -> list[Ignored] | None:
        ignored: list[Ignored] | None = None
        try:
            ignored = await self._writing.run(self._store.add, queries, events)
        except sqlite3.Error as error:
            if not self._is_failing:
                logger.warning("feedback is lost until it can be stored again: %s; searches go on", error)
        self._is_failing = ignored is None
        counter = self.lost if ignored is None else self._stored
        counter.labels("queries").inc(len(queries))
        counter.labels("events").inc(len(events) - len(ignored or ()))
        return ignored

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(_PRUNE_S)
            days, size = self._settings.feedback_days, self._settings.feedback_bytes
            try:
                if removed := await run_in_new_thread(store.prune, self._folder, days, size):
                    logger.info("removed %d rows of the feedback log, by DCAR_FEEDBACK_DAYS or _BYTES", removed)
            except (OSError, sqlite3.Error, DcarError) as error:
                logger.warning("the feedback log cannot be pruned: %s", error)

    async def insights(self, collection: str) -> dict[str, Any]:
        """Return `insights.summarize` of a collection, at most a minute old."""
        from app.feedback.insights import summarize

        async with self._summary_lock:
            made, summary = self._summaries.get(collection, (-inf, {}))
            if time.monotonic() - made >= _FRESH_S:
                summary = await run_in_new_thread(in_own_process, summarize, self._folder, collection)
                self._summaries[collection] = time.monotonic(), summary
        return summary
