"""The feedback log: searches and events in SQLite, which a running service stores
beside the event loop.

FOLDER/key            secret of the service: signs query ids
FOLDER/<host>.sqlite  what the processes of a host have noted; readers take the files of
                      all hosts

- A query id is its time in hexadecimal digits, a random number, and a keyed hash over
  them and the name of the API key.
- A search waits for nothing: its row is stored within a second. Accepted events are on
  disk, or get 503.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import socket
import sqlite3
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from heapq import merge
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import Counter
from pydantic_core import from_json, to_json

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.turns import ComputeThreads, stop, supervise
from app.search.errors import UnavailableError
from app.search.query import Query
from app.search.results import SearchResponse
from dcar_core.util.errors import DcarError, LockedError
from dcar_core.util.files import write_bytes

logger = logging.getLogger(__name__)

Fault = tuple[str, str]  # the field of an event that changes nothing, and why

FLUSH_S = 1.0
MAX_QUERIES = 20_000  # rows of searches that wait for the disk
_FLUSHES = 60  # between two prunings
_CLOSE_S = 10.0  # longest wait for the disk at the end
_BUSY_S = 5.0  # longest wait for another process
_DAY_S = 86_400
_START = 16  # digits of an id before its hash: 8 of the time, and 8 random ones
_PARTS = 20  # a file that is too large loses the oldest of so many
_TABLES = "searches", "events"
_SCHEMA = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA secure_delete = ON;
CREATE TABLE IF NOT EXISTS searches (query_id TEXT PRIMARY KEY, row TEXT);
CREATE TABLE IF NOT EXISTS events (
  query_id TEXT, timestamp INTEGER, client_id TEXT, action_name TEXT, object_id TEXT,
  rating INTEGER,
  PRIMARY KEY (query_id, client_id, action_name, object_id)
) WITHOUT ROWID;
"""
# One statement for all rows: between statements, a thread waits for its turn beside the
# event loop.
_ADD_SEARCHES = "INSERT OR IGNORE INTO searches SELECT key, value FROM json_each(?)"
_IS_SHOWN = (
    "SELECT :item IN (SELECT value FROM json_each(row, '$.hits')) FROM searches WHERE"
    " query_id = :query_id"
)
_ADD_EVENT = """
INSERT INTO events VALUES (:query_id, :time, :client, :action, :item, :rating)
ON CONFLICT DO UPDATE
SET rating = excluded.rating WHERE rating IS NOT excluded.rating
"""


class QueryRow(NamedTuple):
    """A search. time: in milliseconds. text: "" unless texts are stored, and for
    searches with images or examples.
    """

    query_id: str
    time: int
    collection: str
    text: str
    hits: Sequence[str]
    offset: int
    version: int
    nothing_fits: bool = False


class EventRow(NamedTuple):
    """What a client did with a result. time: in milliseconds."""

    query_id: str
    time: int
    client: str
    action: str
    item: str
    rating: int | None


class Store:
    """The file of this host, made unless it exists. Its methods block, and are called
    by one thread at a time.

    Raises:
        DcarError: the folder cannot hold it.
    """

    def __init__(self, folder: Path) -> None:
        key = folder / "key"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not key.exists():
                write_bytes(key, secrets.token_bytes(32), shared=True)
                key.chmod(0o600)
            self.secret = key.read_bytes()
            self._database = _connect(_own_file(folder), "rwc")
        except (OSError, sqlite3.Error) as error:
            raise DcarError(
                f"{folder} cannot hold the feedback log of DCAR_FEEDBACK: {error}"
            ) from None

    def close(self) -> None:
        self._database.close()

    def add(
        self,
        searches: Sequence[QueryRow],
        events: Sequence[EventRow | None],
    ) -> list[Fault | None]:
        """Store rows durably. Return for each event why it changes nothing, if so.

        None stands for an event on a search of somebody else. After sqlite3.Error
        nothing is stored.
        """
        with self._database as database:
            if searches:
                database.execute(
                    _ADD_SEARCHES,
                    (
                        to_json(
                            {row.query_id: row._asdict() for row in searches}
                        ).decode(),
                    ),
                )
            return [self._add(event) for event in events]

    def _add(self, event: EventRow | None) -> Fault | None:
        if event is None:
            return "query_id", "is of no search of yours in the last day"
        values = event._asdict()
        # None if another host answered the search
        if self._database.execute(_IS_SHOWN, values).fetchone() == (0,):
            return "object_id", "was not among the results"
        if self._database.execute(_ADD_EVENT, values).rowcount:
            return None
        return ("action_name", "is known already")


class FeedbackLog:
    """The feedback log of one process. folder: its directory."""

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        self.folder = folder
        self._settings = settings
        self._metrics = metrics
        self._store = Store(folder)
        self._writing = ComputeThreads(1, "dcar-feedback")
        self._searches = deque[QueryRow]()
        self._task: asyncio.Task[None] | None = None
        self._is_failing = False
        lost = "Rows that the feedback log could not store."
        self.lost = Counter(
            "dcar_feedback_lost_total",
            lost,
            ["kind"],
            registry=metrics.registry,
        )

    def start(self) -> None:
        self._task = asyncio.create_task(
            supervise("feedback log", self._run, self._metrics), name="dcar-feedback"
        )

    async def close(self) -> None:
        await stop(self._task)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self.flush()
                await self._writing.run(self._store.close)
        self._writing.shutdown(wait=False, cancel_futures=True)

    def note(
        self,
        caller: str,
        collection: str | None,
        query: Query,
        body: SearchResponse,
        *,
        has_image: bool,
    ) -> str:
        """Note a search of an API key, or "", in a collection, or the default one;
        return its query id.
        """
        now = time.time()
        query_id = self._sign(caller, f"{int(now):08x}{os.urandom(4).hex()}")
        if len(self._searches) == MAX_QUERIES:
            self.lost.labels("queries").inc()
            return query_id
        is_text = not (
            has_image
            or query.more_like
            or query.less_like
            or query.without
            or "@" in query.query
        )
        text = query.query if is_text and self._settings.feedback_texts else ""
        hits = [result["id"] for result in body["results"]]
        name = collection or self._settings.default_collection
        version = body["index_version"]
        row = QueryRow(
            query_id,
            int(now * 1000),
            name,
            text,
            hits,
            query.offset,
            version,
            body["nothing_fits"],
        )
        self._searches.append(row)
        return query_id

    def _sign(self, caller: str, start: str) -> str:
        return (
            start
            + hashlib.blake2b(
                f"{start}{caller}".encode(),
                key=self._store.secret,
                digest_size=12,
            ).hexdigest()
        )

    def _is_of(self, caller: str, query_id: str) -> bool:
        """Return True if the service gave this id to this caller within the last
        day.
        """
        own = self._sign(caller, query_id[:_START]).encode()
        return (
            hmac.compare_digest(own, query_id.encode())
            and time.time() - int(query_id[:8], 16) <= _DAY_S
        )

    async def accept(
        self,
        caller: str,
        events: Sequence[EventRow],
    ) -> list[Fault | None]:
        """Store events durably, or raise UnavailableError. Return for each one why it
        changes nothing, if so.
        """
        own = [
            event if self._is_of(caller, event.query_id) else None for event in events
        ]
        faults = await self._writing.run(self._write, own)
        if faults is None:
            raise UnavailableError("The events cannot be stored.", retry_after_s=10)
        return faults

    async def flush(self) -> None:
        """Store the searches that wait."""
        if self._searches:
            await self._writing.run(self._write)

    def _write(
        self, events: Sequence[EventRow | None] = ()
    ) -> list[Fault | None] | None:
        """Store the searches that wait, and events; return what `Store.add` does, or
        None if nothing was stored.
        """
        searches = [self._searches.popleft() for _ in range(len(self._searches))]
        faults: list[Fault | None] | None = None
        try:
            faults = self._store.add(searches, events)
        except sqlite3.Error as error:
            if not self._is_failing:
                logger.warning(
                    "feedback is lost until it can be stored again: %s; searches go on",
                    error,
                )
            self.lost.labels("queries").inc(len(searches))
            self.lost.labels("events").inc(sum(map(bool, events)))
        self._is_failing = faults is None
        return faults

    async def _run(self) -> None:
        for flushes in count(1):
            await asyncio.sleep(FLUSH_S)
            await self.flush()
            if flushes % _FLUSHES == 0:
                await self._writing.run(self._prune)

    def _prune(self) -> None:
        try:
            if removed := prune(
                self.folder,
                self._settings.feedback_days,
                self._settings.feedback_bytes,
            ):
                logger.info(
                    "removed %d rows of the feedback log, by DCAR_FEEDBACK_DAYS or"
                    " _BYTES",
                    removed,
                )
        except (OSError, DcarError) as error:
            logger.warning("the feedback log cannot be pruned: %s", error)


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    uri = f"{file.absolute().as_uri()}?mode={mode}"
    database = sqlite3.connect(
        uri,
        _BUSY_S,
        isolation_level="IMMEDIATE",
        check_same_thread=False,
        uri=True,
    )
    if mode != "ro":
        database.executescript(_SCHEMA)
    return database


@contextmanager
def _opened(file: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Open a file that other processes may write. Raise DcarError if it cannot be
    used.
    """
    try:
        with closing(_connect(file, mode)) as database:
            yield database
    except sqlite3.Error as error:
        raise DcarError(
            f"{file} cannot be used; remove it if it is damaged: {error}"
        ) from None


def _files(folder: Path) -> list[Path]:
    if not (files := sorted(folder.glob("*.sqlite"))):
        raise DcarError(
            f"{folder} holds no feedback log; give the directory that DCAR_FEEDBACK"
            " names, by --log"
        )
    return files


def _own_file(folder: Path) -> Path:
    return folder / f"{socket.gethostname()}.sqlite"


def _id_at(seconds: float) -> str:
    return f"{int(seconds):08x}"


def _rows(file: Path, table: str, since: float) -> Iterator[tuple[Any, ...]]:
    with _opened(file, "ro") as database:
        yield from database.execute(
            f"SELECT * FROM {table} WHERE query_id >= ? ORDER BY query_id",
            (_id_at(since),),
        )


def read_log(
    folder: Path, since: float = 0
) -> Iterator[tuple[QueryRow | None, list[EventRow]]]:
    """Yield searches since a time in seconds, in their order, with their events; None
    for a search not in the log.
    """
    tables = [_rows(file, table, since) for table in _TABLES for file in _files(folder)]
    for _, group in groupby(merge(*tables, key=itemgetter(0)), itemgetter(0)):
        rows = [*group]
        query = QueryRow(**from_json(rows.pop(0)[1])) if len(rows[0]) == 2 else None
        yield query, sorted((EventRow(*row) for row in rows), key=itemgetter(1))


def prune(folder: Path, days: int, max_bytes: int) -> int:
    """Remove rows older than so many days, and the oldest ones of a log that is too
    large; return their number.

    Other hosts' files are left alone until nobody has written them for a day: SQLite's
    locks are those of one host.
    """
    removed = 0
    now = time.time()
    is_large = sum(path.stat().st_size for path in folder.glob("*.sqlite*")) > max_bytes
    part = (
        "SELECT query_id FROM searches ORDER BY 1 LIMIT 1 OFFSET (SELECT 1 + count(*)"
        f" / {_PARTS} FROM searches)"
    )
    for file in _files(folder):
        written = max(path.stat().st_mtime for path in folder.glob(f"{file.name}*"))
        if file != _own_file(folder) and now - written < _DAY_S:
            continue
        with _opened(file, "rw") as database:
            beyond = database.execute(part).fetchone() if is_large else None
            oldest = max(_id_at(now - days * _DAY_S), *(beyond or ("",)))
            with database:
                deletions = [
                    database.execute(
                        f"DELETE FROM {name} WHERE query_id < ?", (oldest,)
                    )
                    for name in _TABLES
                ]
            if count := sum(deletion.rowcount for deletion in deletions):
                _shrink(database)
            removed += count
    return removed


def forget(folder: Path, client: str) -> tuple[int, int]:
    """Remove the events of a client, and the searches that it alone acted on; return
    their numbers.
    """
    events = 0
    searches = 0
    files = _files(folder)
    theirs = [
        (query.query_id,)
        for query, acts in read_log(folder)
        if query is not None and {event.client for event in acts} == {client}
    ]
    for file in files:
        with _opened(file, "rw") as database:
            with database:
                events += database.execute(
                    "DELETE FROM events WHERE client_id = ?", (client,)
                ).rowcount
                searches += database.executemany(
                    "DELETE FROM searches WHERE query_id = ?", theirs
                ).rowcount
            if not _shrink(database):
                raise LockedError(
                    f"rows were removed, but {folder} is being read, and keeps their"
                    " bytes; try again"
                )
    return events, searches


def _shrink(database: sqlite3.Connection) -> bool:
    """Give free pages back, and empty the write-ahead log; return whether nobody was
    reading it.
    """
    database.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page
    return not database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
