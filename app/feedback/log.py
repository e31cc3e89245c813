"""The log of a running service: it names searches, accepts events, and stores both beside the event loop.

- A query id names a batch of ids, and is a part of the MAC over the batch and the API key's name, so any process of the
  service recognizes its caller, before and after a restart. Without API keys, whoever got the response knows its id.
- Recent searches of this process are kept with their results, and events for other items are ignored. Events for an
  older search, or one of another process, are stored, as far as they are not too many; whoever reads the log compares
  them with the results that were shown.
- A search waits for nothing: it becomes a row of JSON, which is written within a second. Nothing else of it is kept, as
  objects that outlive their request cost more than the row. The row of a cached page is made once, without its id and
  its time. Accepted events are on the disk.
- If the disk is full, rows are dropped and counted, and events get 503.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import os
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from prometheus_client import Counter
from pydantic_core import from_json, to_json

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.supervision import stop, supervise
from app.core.threads import ComputeThreads
from app.feedback import store
from app.feedback.store import EventRow, QueryRow
from app.search.errors import UnavailableError
from app.search.query import Query, SearchResults
from dcar_core.util.errors import DcarError
from dcar_core.util.processes import in_own_process

logger = logging.getLogger(__name__)

_FLUSH_S = 1.0
_ROLL_S = 60.0
_FRESH_S = 60.0  # of a summary
_STORE_S = 10.0  # longest wait for the disk
_MAX_AGE_S = 24 * 3600  # of a search, for events
_RECENT_BYTES = 8 * 2**20  # of searches, some 25,000, after which earlier ones are no longer kept with their results
_BATCH_BYTES = 8 * 2**10  # of a batch without its rows
_MAX_EVENTS = 1000  # of one search in one process
_MAX_SEEN = 200_000  # events that are recognized when they are sent again
_MAX_QUERIES = 20_000  # rows of searches that wait for the disk
_MAC, _BATCH = 12, 16  # characters of a query id: a part of its batch's MAC, one of `_PLACES`, and the batch
_PLACES = ascii_letters + digits  # name the parts of a MAC
_NONCE, _TIME = 8, 4  # bytes of a batch
_BATCH_S = 60  # in which the ids of a batch are given


class _Batch:
    """Ids for one caller, and the searches that were given them, in this order.

    rows: `QueryRow`s in JSON without id and time. written: number of rows that were handed to the journal.
    """

    __slots__ = "began", "ids", "rows", "times", "written"

    def __init__(self, began: float, ids: list[str]) -> None:
        self.began, self.ids = began, ids
        self.rows, self.times, self.written = list[bytes](), array("d"), 0


class FeedbackLog:
    """The feedback log of one process. Its folder is prepared when it is made."""

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        self._folder, self._settings, self._metrics = folder, settings, metrics
        self._default_collection = settings.default_collection
        self._secret, self._journal = store.prepare(folder), store.Journal(folder)
        self._current = dict[str, _Batch]()  # by caller
        # Batches by name. Two tables: taking single old entries out is slow.
        self._recent, self._earlier, self._recent_bytes = dict[str, _Batch](), dict[str, _Batch](), 0
        self._seen = dict[str, dict[tuple[str, str, str], int | None]]()  # of a search: events and their ratings
        self._counts, self._accepted = dict[str, int](), 0  # events of a search, and of all
        self._unwritten, self._events = list[_Batch](), list[EventRow]()
        self._waiting: list[asyncio.Future[bool]] = []
        self._wanted, self._lock, self._tasks = asyncio.Event(), asyncio.Lock(), list[asyncio.Task[None]]()
        self._writing, self._rolling = ComputeThreads(1, "dcar-feedback"), ComputeThreads(1, "dcar-feedback-roll")
        self._is_failing = False
        self._summaries, self._summary_lock = dict[str, tuple[float, dict[str, Any]]](), asyncio.Lock()

        def counter(name: str, description: str, label: str) -> Counter:
            return Counter(name, description, [label], registry=metrics.registry)

        self._stored = counter("dcar_feedback_rows_total", "Rows stored in the feedback log.", "kind")
        self.lost = counter("dcar_feedback_lost_total", "Rows that the feedback log could not store.", "kind")
        self._ignored = counter("dcar_feedback_ignored_total", "Events that changed nothing.", "reason")

    def start(self) -> None:
        for name, run in (("feedback log", self._run), ("roll of the feedback log", self._roll)):
            self._tasks.append(asyncio.create_task(supervise(name, run, self._metrics), name=f"dcar-{name}"))

    async def close(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_STORE_S), self._lock:
                for task in self._tasks:
                    await stop(task)
                await self._write()
                await self._writing.run(self._journal.close)
        for threads in (self._writing, self._rolling):
            threads.shutdown(wait=False, cancel_futures=True)

    def note(
        self, caller: str, collection: str | None, query: Query, results: SearchResults, *, has_image: bool,
        client: str = "",
    ) -> str:  # fmt: skip
        """Note a search, and return its query id.

        Args:
            caller: the name of the API key; "" without keys.
            collection: None for the default one.
            client: who searched, if the request names it.
        """
        batch = self._current.get(caller)
        if batch is None or len(batch.rows) == len(_PLACES):
            batch = self._begin_batch(caller)
        page = results.memo.get("noted")
        if page is None:
            text, is_hashed = query.query, not self._settings.feedback_texts
            is_text = bool(text) and not (has_image or query.more_like or query.less_like or query.without)
            if is_hashed and text:
                text = hashlib.blake2b(text.encode(), key=self._secret, digest_size=16).hexdigest()
            hits, kind = [match.item.id for match in results.matches], "text" if is_text else "other"
            facts = kind, results.offset, results.version, is_hashed, results.nothing_fits
            page = to_json((collection or self._default_collection, text, hits, *facts))[1:]
            self._recent_bytes += len(page)
            results.memo["noted"] = page
        if client:
            page = b"%b,%b]" % (page[:-1], to_json(client))
            self._recent_bytes += len(page)
        batch.times.append(time.time())
        batch.rows.append(page)
        return batch.ids[len(batch.rows) - 1]

    def _begin_batch(self, caller: str) -> _Batch:
        if sum(len(each.rows) - each.written for each in self._unwritten) >= _MAX_QUERIES:
            oldest = self._unwritten.pop(0)
            self.lost.labels("queries").inc(len(oldest.rows) - oldest.written)
            self._current = {caller: each for caller, each in self._current.items() if each is not oldest}
        if self._recent_bytes > _RECENT_BYTES:
            self._recent, self._earlier, self._recent_bytes = {}, self._recent, 0
        now = time.time()
        name = base64.urlsafe_b64encode(os.urandom(_NONCE) + int(now).to_bytes(_TIME)).decode()
        mac = self._mac(name, caller)
        ids = [f"{mac[place * _MAC : (place + 1) * _MAC]}{letter}{name}" for place, letter in enumerate(_PLACES)]
        batch = self._current[caller] = self._recent[name] = _Batch(now, ids)
        self._unwritten.append(batch)
        self._recent_bytes += _BATCH_BYTES
        return batch

    def _mac(self, batch: str, caller: str) -> str:
        mac = hashlib.shake_256(self._secret + f"{batch}{caller}".encode()).digest(len(_PLACES) * _MAC * 3 // 4)
        return base64.urlsafe_b64encode(mac).decode()

    def _is_of(self, caller: str, query_id: str) -> bool:
        """Return True if the service gave this id to this caller within the last day."""
        part, place, batch = query_id[:_MAC], _PLACES.find(query_id[_MAC : _MAC + 1]), query_id[_MAC + 1 :]
        if len(batch) != _BATCH or not query_id.isascii():
            return False
        known = self._mac(batch, caller)[place * _MAC : (place + 1) * _MAC]
        made = base64.urlsafe_b64decode(batch)[_NONCE:] if hmac.compare_digest(part, known) else b""
        return time.time() - int.from_bytes(made) <= _MAX_AGE_S

    def _find(self, query_id: str) -> QueryRow | None:
        """Return a search without its time; None if it was long ago, or of another process."""
        name = query_id[_MAC + 1 :]
        batch, place = self._recent.get(name) or self._earlier.get(name), _PLACES.find(query_id[_MAC : _MAC + 1])
        if batch is None or place >= len(batch.rows) or batch.ids[place] != query_id:
            return None
        return QueryRow(query_id, 0, *from_json(b"[" + batch.rows[place]))

    async def accept(self, caller: str, events: Sequence[EventRow]) -> list[tuple[int, str, str]]:
        """Store events durably, and return (number, field, reason) of those that change nothing.

        Raises:
            UnavailableError: they cannot be stored; the same request may be sent again.
        """
        ignored, accepted = list[tuple[int, str, str]](), list[EventRow]()
        searches = dict[str, QueryRow | None]()
        for number, event in enumerate(events):
            key = event.client, event.action, event.item
            if event.query_id not in searches:
                searches[event.query_id] = self._find(event.query_id)
            search = searches[event.query_id]
            seen = self._seen.get(event.query_id, {})
            if not self._is_of(caller, event.query_id):
                fault = "query_id", "is of no search of yours in the last day"
            elif search is not None and event.item not in search.hits:
                fault = "object_id", "was not among the results"
            elif seen.get(key, -1) == event.rating:
                fault = "action_name", "is known already"
            elif self._counts.get(event.query_id, 0) >= _MAX_EVENTS:
                fault = "query_id", "has too many events"
            else:
                self._seen.setdefault(event.query_id, seen)[key] = event.rating
                self._counts[event.query_id] = self._counts.get(event.query_id, 0) + 1
                collection = "" if search is None else search.collection
                rank = None if search is None else search.offset + search.hits.index(event.item) + 1
                accepted.append(event._replace(collection=collection, position=rank))  # whatever the client says
                continue
            ignored.append((number, *fault))
            self._ignored.labels(fault[0]).inc()
        self._accepted += len(accepted)
        if self._accepted > _MAX_SEEN:
            self._seen, self._counts, self._accepted = {}, {}, 0
        self._events += accepted
        if accepted and not await self._are_stored():
            for event in accepted:  # so that they may be sent again
                self._seen.pop(event.query_id, None)
            raise UnavailableError("The events cannot be stored.", retry_after_s=10)
        return ignored

    async def _are_stored(self) -> bool:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._wanted.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STORE_S):
                return bool(await done)
        return False

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._wanted.wait()
            self._wanted.clear()
            await self._flush()

    async def _flush(self) -> None:
        async with self._lock:
            await self._write()

    async def _write(self) -> None:
        parts, events, waiting = self._take(), self._events, self._waiting
        self._events, self._waiting = [], []
        rows = (
            b'["%b",%d,%b' % (query_id.encode(), moment * 1000, row)
            for batch, new in parts
            for query_id, moment, row in zip(batch.ids[new], batch.times[new], batch.rows[new], strict=True)
        )
        counts, is_stored = {"queries": sum(new.stop - new.start for _, new in parts), "events": len(events)}, False
        try:
            if parts or events:
                await self._writing.run(self._journal.write, rows, events)
            is_stored = True
        except OSError as error:
            if not self._is_failing:
                logger.warning("feedback is lost until it can be stored again: %s; searches go on", error)
        finally:
            self._is_failing = not is_stored
            for kind, count in counts.items():
                (self._stored if is_stored else self.lost).labels(kind).inc(count)
            for done in waiting:
                if not done.done():
                    done.set_result(is_stored)

    def _take(self) -> list[tuple[_Batch, slice]]:
        """Return the rows that were not written, by batches, and end the batches that have lasted."""
        parts, now = [(batch, slice(batch.written, len(batch.rows))) for batch in self._unwritten], time.time()
        for batch, new in parts:
            batch.written = new.stop
        self._current = {caller: each for caller, each in self._current.items() if now - each.began < _BATCH_S}
        open_batches = set(self._current.values())
        self._unwritten = [batch for batch in self._unwritten if batch in open_batches]
        return [(batch, new) for batch, new in parts if new.start < new.stop]

    async def _roll(self) -> None:
        while True:
            await asyncio.sleep(_ROLL_S)
            try:
                await self._rolling.run(self._maintain)
            except (OSError, DcarError) as error:
                logger.warning("the feedback log cannot be rolled or pruned: %s", error)

    async def insights(self, collection: str) -> dict[str, Any]:
        """Return `insights.summarize` of a collection, at most a minute old."""
        from app.feedback.insights import summarize

        async with self._summary_lock:
            made, summary = self._summaries.get(collection, (-inf, {}))
            if time.monotonic() - made >= _FRESH_S:
                summary = await self._rolling.run(in_own_process, summarize, self._folder, collection)
                self._summaries[collection] = time.monotonic(), summary
        return summary

    def _maintain(self) -> None:
        if store.is_due(self._folder):
            in_own_process(store.roll, self._folder)  # it would hold up the event loop
        if removed := store.prune(self._folder, self._settings.feedback_days, self._settings.feedback_bytes):
            logger.info("removed %d files of the feedback log, by DCAR_FEEDBACK_DAYS or _BYTES", removed)
