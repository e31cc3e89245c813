"""The files of the log: searches and events in SQLite.

FOLDER/key            secret of the service: signs query ids, hashes texts
FOLDER/<host>.sqlite  what the processes of a host have noted; readers take the files of all hosts

An id begins with its time in hexadecimal digits, so ids are in the order of time.
"""

import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from heapq import merge
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from dcar_core.util.errors import DcarError, LockedError

Fault = tuple[str, str]  # the field of an event that changes nothing, and why

_BUSY_S = 5.0  # longest wait for another process
_DAY_S = 86_400
_MAX_EVENTS = 1000  # of a search
_TABLES = "searches", "events"
_PRUNED = 20  # a file that is too large loses the oldest of so many parts
_SCHEMA = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA secure_delete = ON;
CREATE TABLE IF NOT EXISTS searches (query_id TEXT PRIMARY KEY, row TEXT);
CREATE TABLE IF NOT EXISTS events (
  query_id TEXT, timestamp INTEGER, client_id TEXT, action_name TEXT, object_id TEXT, rating INTEGER,
  PRIMARY KEY (query_id, client_id, action_name, object_id)
) WITHOUT ROWID;
"""
# One statement for all rows: between statements, a thread waits for its turn beside the event loop.
_ADD_SEARCHES = "INSERT OR IGNORE INTO searches SELECT key, value FROM json_each(?)"
_FIND = """
SELECT (SELECT :item IN (SELECT value FROM json_each(row, '$.hits')) FROM searches WHERE query_id = :query_id),
       (SELECT count(*) FROM events WHERE query_id = :query_id)
"""
_ADD_EVENT = """
INSERT INTO events VALUES (:query_id, :time, :client, :action, :item, :rating) ON CONFLICT DO UPDATE
SET rating = excluded.rating WHERE rating IS NOT excluded.rating
"""


class QueryRow(NamedTuple):
    """A search that was answered; all but its id are one JSON object in its file.

    time: in milliseconds. hits: ids of the results. kind: text; hash, if the text is one; or other.
    """

    query_id: str
    time: int
    client: str | None
    collection: str
    text: str
    hits: Sequence[str]
    kind: str
    offset: int
    version: int
    nothing_fits: bool = False


class EventRow(NamedTuple):
    """What a client did with a result."""

    query_id: str
    time: int
    client: str
    action: str
    item: str
    rating: int | None


class Store:
    """The file of this host, made unless it exists. Its methods block, and are called by one thread at a time.

    Raises:
        DcarError: the folder cannot hold it.
    """

    def __init__(self, folder: Path) -> None:
        key, made = folder / "key", folder / f".key.{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not key.exists():
                with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(secrets.token_bytes(32))
                with suppress(FileExistsError):  # another process was quicker
                    key.hardlink_to(made)
                made.unlink()
            self.secret = key.read_bytes()
            self._database = _connect(_own_file(folder), "rwc")
        except (OSError, sqlite3.Error) as error:
            raise DcarError(f"{folder} cannot hold the feedback log of DCAR_FEEDBACK: {error}") from None

    def close(self) -> None:
        self._database.close()

    def add(self, searches: Sequence[str], events: Sequence[EventRow | None]) -> list[Fault | None]:
        """Store rows durably, searches as `"ID":{...}`. Return for each event why it changes nothing, if so.

        None stands for an event on a search of somebody else.

        Raises:
            sqlite3.Error: nothing was stored.
        """
        with self._database as database:
            if searches:
                database.execute(_ADD_SEARCHES, (f"{{{','.join(searches)}}}",))
            return [self._add(event) for event in events]

    def _add(self, event: EventRow | None) -> Fault | None:
        if event is None:
            return "query_id", "is of no search of yours in the last day"
        facts = event._asdict()
        is_shown, count = self._database.execute(_FIND, facts).fetchone()
        if is_shown == 0:  # None if another host answered the search
            return "object_id", "was not among the results"
        if count >= _MAX_EVENTS:
            return "query_id", "has too many events"
        is_new = self._database.execute(_ADD_EVENT, facts).rowcount
        return None if is_new else ("action_name", "is known already")


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    uri = f"{file.absolute().as_uri()}?mode={mode}"
    database = sqlite3.connect(uri, _BUSY_S, isolation_level="IMMEDIATE", check_same_thread=False, uri=True)
    if mode != "ro":
        database.executescript(_SCHEMA)
    return database


@contextmanager
def _opened(file: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Open a file that other processes may write. Raise DcarError if it cannot be used."""
    try:
        with closing(_connect(file, mode)) as database:
            yield database
    except sqlite3.Error as error:
        raise DcarError(f"{file} cannot be used; remove it if it is damaged: {error}") from None


def _files(folder: Path) -> list[Path]:
    if not (files := sorted(folder.glob("*.sqlite"))):
        raise DcarError(f"{folder} holds no feedback log; give the directory that DCAR_FEEDBACK names, by --log")
    return files


def _own_file(folder: Path) -> Path:
    return folder / f"{socket.gethostname()}.sqlite"


def _id_at(seconds: float) -> str:
    return f"{int(seconds):08x}"


def _select(file: Path, statement: str, *values: object) -> Iterator[tuple[Any, ...]]:
    with _opened(file, "ro") as database:
        yield from database.execute(statement, values)


def count_queries(folder: Path, since: float) -> int:
    """Return the number of searches since a time in seconds."""
    statement = "SELECT count(*) FROM searches WHERE query_id >= ?"
    return sum(count for file in _files(folder) for (count,) in _select(file, statement, _id_at(since)))


def read_log(folder: Path, since: float = 0, every: int = 1) -> Iterator[tuple[QueryRow | None, list[EventRow]]]:
    """Yield searches in the order of time, with their events; None for events whose search is not in the log.

    since: in seconds. every: only about every n-th search, by the random part of its id.

    Raises:
        DcarError: the folder holds no log, or a file cannot be read.
    """
    chosen = f"'{_id_at(since)}' <= query_id AND substr(query_id, 9, 4) <= '{0x10000 // every - 1:04x}'"
    statement = f"SELECT * FROM {{}} WHERE {chosen} ORDER BY query_id"
    tables = [_select(file, statement.format(name)) for name in _TABLES for file in _files(folder)]
    for query_id, group in groupby(merge(*tables, key=itemgetter(0)), itemgetter(0)):
        rows = [*group]
        query = QueryRow(query_id, **from_json(rows.pop(0)[1])) if len(rows[0]) == 2 else None
        yield query, sorted((EventRow(*row) for row in rows), key=itemgetter(1))


def prune(folder: Path, days: int, max_bytes: int) -> int:
    """Remove rows older than so many days, and the oldest ones of a log that is too large; return their number.

    Other hosts' files are left alone until nobody has written them for a day: SQLite's locks are those of one host.
    """
    removed, now = 0, time.time()
    is_large = sum(path.stat().st_size for path in folder.glob("*.sqlite*")) > max_bytes
    part = f"SELECT query_id FROM searches ORDER BY 1 LIMIT 1 OFFSET (SELECT 1 + count(*) / {_PRUNED} FROM searches)"
    for file in _files(folder):
        written = max(path.stat().st_mtime for path in folder.glob(f"{file.name}*"))
        if file != _own_file(folder) and now - written < _DAY_S:
            continue
        with _opened(file, "rw") as database:
            beyond = database.execute(part).fetchone() if is_large else None
            oldest = max(_id_at(now - days * _DAY_S), *(beyond or ("",)))
            with database:
                gone = [database.execute(f"DELETE FROM {name} WHERE query_id < ?", (oldest,)) for name in _TABLES]
            if count := sum(each.rowcount for each in gone):
                _shrink(database)
            removed += count
    return removed


def forget(folder: Path, client: str) -> tuple[int, int]:
    """Remove the events of a client, and the searches that it made or alone acted on; return their numbers."""
    events, searches, files = 0, 0, _files(folder)
    theirs = [
        (query.query_id,)
        for query, acts in read_log(folder)
        if query is not None and (query.client == client or {each.client for each in acts} == {client})
    ]
    for file in files:
        with _opened(file, "rw") as database:
            with database:
                events += database.execute("DELETE FROM events WHERE client_id = ?", (client,)).rowcount
                searches += database.executemany("DELETE FROM searches WHERE query_id = ?", theirs).rowcount
            if not _shrink(database):
                raise LockedError(f"rows were removed, but {folder} is being read, and keeps their bytes; try again")
    return events, searches


def _shrink(database: sqlite3.Connection) -> bool:
    """Give free pages back, and empty the write-ahead log; return whether nobody was reading it."""
    database.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page
    return not database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
