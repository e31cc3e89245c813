"""The log of a running service: it names searches, accepts events, and stores both beside the event loop.

- A query id holds its time and a MAC over it and the API key's name, so any process of the service recognizes its
  caller, before and after a restart. Without API keys, whoever got the response knows its query id.
- Recent searches of this process are kept with their results, and events for other items are ignored. Events for an
  older search, or one of another process, are stored, as far as they are not too many; whoever reads the log compares
  them with the results that were shown.
- Searches wait for nothing: their rows are written within a second. Accepted events are on the disk.
- If the disk is full, rows are dropped and counted, and events get 503.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import Counter

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
_STORE_S = 10.0  # longest wait for the disk
_MAX_AGE_S = 24 * 3600  # of a search, for events
_RECENT = 20_000  # searches kept with their results
_MAX_EVENTS = 1000  # of one search in one process
_MAX_SEEN = 200_000  # events that are recognized when they are sent again
_MAX_PENDING = 50_000  # rows that wait for the disk
_NONCE, _TIME, _MAC = 8, 4, 12  # bytes of a query id


class _Shown:
    """A search that events may name. hits: ids of its results; None if this process does not know them."""

    __slots__ = ("collection", "hits", "seen")

    def __init__(self, collection: str, hits: Sequence[str] | None) -> None:
        self.collection, self.hits = collection, hits
        self.seen: dict[tuple[str, str, str], int | None] | None = None  # (client, action, item) to rating


class FeedbackLog:
    """The feedback log of one process. Its folder is prepared when it is made."""

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        self._folder, self._settings, self._metrics = folder, settings, metrics
        self._secret, self._journal = store.prepare(folder), store.Journal(folder)
        self._recent: dict[str, _Shown] = {}
        self._seen = 0
        self._queries, self._events = list[QueryRow](), list[EventRow]()
        self._waiting: list[asyncio.Future[bool]] = []
        self._wanted, self._lock, self._tasks = asyncio.Event(), asyncio.Lock(), list[asyncio.Task[None]]()
        self._writing, self._rolling = ComputeThreads(1, "dcar-feedback"), ComputeThreads(1, "dcar-feedback-roll")
        self._is_failing = False

        def counter(name: str, description: str, label: str) -> Counter:
            return Counter(name, description, [label], registry=metrics.registry)

        self._stored = counter("dcar_feedback_rows_total", "Rows stored in the feedback log.", "kind")
        self._lost = counter("dcar_feedback_lost_total", "Rows that the feedback log could not store.", "kind")
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

    def note(self, caller: str, collection: str, query: Query, results: SearchResults, *, has_image: bool) -> str:
        """Note a search, and return its query id.

        Args:
            caller: the name of the API key; "" without keys.
        """
        head = os.urandom(_NONCE) + int(now := time.time()).to_bytes(_TIME)
        query_id = base64.urlsafe_b64encode(head + self._mac(head, caller)).decode()
        hits = [match.item.id for match in results.matches]
        text, is_hashed = query.query, not self._settings.feedback_texts
        kind = "other" if has_image or query.more_like or query.less_like or query.without or not text else "text"
        if is_hashed and text:
            text = hashlib.blake2b(text.encode(), key=self._secret, digest_size=16).hexdigest()
        row = (query_id, int(now * 1000), collection, text, hits, kind, results.offset, results.version, is_hashed)
        if len(self._queries) < _MAX_PENDING:
            self._queries.append(QueryRow._make(row))
        else:
            self._lost.labels("queries").inc()
        self._remember(query_id, _Shown(collection, hits))
        return query_id

    def _mac(self, head: bytes, caller: str) -> bytes:
        return hashlib.blake2b(head + caller.encode(), key=self._secret, digest_size=_MAC).digest()

    def _remember(self, query_id: str, shown: _Shown) -> None:
        if len(self._recent) >= _RECENT:
            del self._recent[next(iter(self._recent))]
        self._recent[query_id] = shown

    def _is_of(self, caller: str, query_id: str) -> bool:
        """Return True if the service gave this id to this caller within the last day."""
        try:
            given = base64.b64decode(query_id.encode(), altchars=b"-_", validate=True)
        except ValueError:
            return False
        head, mac = given[: _NONCE + _TIME], given[_NONCE + _TIME :]
        age = time.time() - int.from_bytes(head[_NONCE:])
        return hmac.compare_digest(mac, self._mac(head, caller)) and age <= _MAX_AGE_S

    async def accept(self, caller: str, events: Sequence[EventRow]) -> list[tuple[int, str, str]]:
        """Store events durably, and return (number, field, reason) of those that change nothing.

        Raises:
            UnavailableError: they cannot be stored; the same request may be sent again.
        """
        ignored, accepted = list[tuple[int, str, str]](), list[tuple[_Shown, tuple[str, str, str]]]()
        for number, event in enumerate(events):
            shown = self._recent.get(event.query_id)
            key = event.client, event.action, event.item
            if not self._is_of(caller, event.query_id):
                fault = "query_id", "is of no search of yours in the last day"
            elif shown is not None and shown.hits is not None and event.item not in shown.hits:
                fault = "object_id", "was not among the results"
            elif shown is not None and shown.seen and shown.seen.get(key, -1) == event.rating:
                fault = "action_name", "is known already"
            elif shown is not None and shown.seen and len(shown.seen) >= _MAX_EVENTS:
                fault = "query_id", "has too many events"
            else:
                if shown is None:
                    self._remember(event.query_id, shown := _Shown("", None))
                shown.seen = shown.seen or {}
                shown.seen[key] = event.rating
                self._seen += 1
                self._events.append(event._replace(collection=shown.collection))
                accepted.append((shown, key))
                continue
            ignored.append((number, *fault))
            self._ignored.labels(fault[0]).inc()
        if self._seen > _MAX_SEEN:
            self._seen = 0
            self._recent.clear()
        if accepted and not await self._are_stored():
            for shown, key in accepted:
                (shown.seen or {}).pop(key, None)
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
        queries, events, waiting = self._queries, self._events, self._waiting
        self._queries, self._events, self._waiting = [], [], []
        counts, is_stored = {"queries": len(queries), "events": len(events)}, False
        try:
            if queries or events:
                await self._writing.run(self._journal.write, queries, events)
            is_stored = True
        except OSError as error:
            if not self._is_failing:
                logger.warning("feedback is lost until it can be stored again: %s; searches go on", error)
        finally:
            self._is_failing = not is_stored
            for kind, count in counts.items():
                (self._stored if is_stored else self._lost).labels(kind).inc(count)
            for done in waiting:
                if not done.done():
                    done.set_result(is_stored)

    async def _roll(self) -> None:
        while True:
            await asyncio.sleep(_ROLL_S)
            try:
                await self._rolling.run(self._maintain)
            except (OSError, DcarError) as error:
                logger.warning("the feedback log cannot be rolled or pruned: %s", error)

    def _maintain(self) -> None:
        if store.is_due(self._folder):
            in_own_process(store.roll, self._folder)  # it would hold up the event loop
        if removed := store.prune(self._folder, self._settings.feedback_days, self._settings.feedback_bytes):
            logger.info("removed %d files of the feedback log, by DCAR_FEEDBACK_DAYS or _BYTES", removed)
