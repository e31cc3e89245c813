"""The files of the log: searches and events in SQLite.

FOLDER/key            secret of the service: signs query ids, hashes texts
FOLDER/<host>.sqlite  what the processes of a host have noted; readers take the files of all hosts

An id begins with its time in hexadecimal digits, so ids are in the order of time.
"""

import logging
import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from heapq import merge
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from dcar_core.util.errors import DcarError, LockedError

logger = logging.getLogger(__name__)

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
_ADD_EVENT = """
INSERT INTO events VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
SET rating = excluded.rating WHERE rating IS NOT excluded.rating
"""


class QueryRow(NamedTuple):
    """A search that was answered; all but its id are one JSON object in its file.

    time: in milliseconds. hits: ids of the results. kind: text, or other.
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
    is_hashed: bool
    nothing_fits: bool = False


class EventRow(NamedTuple):
    """What a client did with a result."""

    query_id: str
    time: int
    client: str
    action: str
    item: str
    rating: int | None


def prepare(folder: Path) -> None:
    """Create the log unless it exists. Raise DcarError if it cannot be written."""
    if (folder / "journal").exists():
        logger.warning("%s holds the log of an earlier version, in journals and Parquet, which is ignored", folder)
    Store(folder).close()


class Store:
    """The file of this host. Its methods block, and are called by one thread at a time.

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
            self._database = _connect(_own_file(folder))
        except (OSError, DcarError) as error:
            reason = getattr(error, "strerror", error)
            raise DcarError(f"{folder} cannot hold the feedback log of DCAR_FEEDBACK: {reason}") from None

    def close(self) -> None:
        self._database.close()

    def add(self, searches: Sequence[str], events: Sequence[EventRow]) -> list[tuple[int, str, str]]:
        """Store rows durably, searches as `"ID":{...}`. Return (place, field, reason) of ignored events.

        Raises:
            sqlite3.Error: nothing was stored.
        """
        ignored, known = list[tuple[int, str, str]](), dict[str, tuple[set[str] | None, int]]()
        with _transaction(self._database) as execute:
            if searches:
                execute(_ADD_SEARCHES, (f"{{{','.join(searches)}}}",))
            for place, event in enumerate(events):
                hits, count = known.get(event.query_id) or self._find(event.query_id)
                if hits is not None and event.item not in hits:
                    ignored.append((place, "object_id", "was not among the results"))
                elif count >= _MAX_EVENTS:
                    ignored.append((place, "query_id", "has too many events"))
                elif execute(_ADD_EVENT, event).rowcount:
                    count += 1
                else:
                    ignored.append((place, "action_name", "is known already"))
                known[event.query_id] = hits, count
        return ignored

    def _find(self, query_id: str) -> tuple[set[str] | None, int]:
        """Return the results of a search, None if another host answered it, and its number of events."""
        execute, of_search = self._database.execute, (query_id,)
        row = execute("SELECT row FROM searches WHERE query_id = ?", of_search).fetchone()
        (count,) = execute("SELECT count(*) FROM events WHERE query_id = ?", of_search).fetchone()
        return row and {*from_json(row[0])["hits"]}, count


def _connect(file: Path) -> sqlite3.Connection:
    """Open a file for writing. Raise DcarError if it cannot be."""
    try:
        database = sqlite3.connect(file, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        database.executescript(_SCHEMA)
    except sqlite3.Error as error:
        raise DcarError(f"{file} cannot be written; remove it if it is damaged: {error}") from None
    return database


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[Any]:
    """Yield `execute` of a transaction, which ends on the disk."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database.execute
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _files(folder: Path) -> list[Path]:
    if not (files := sorted(folder.glob("*.sqlite"))):
        raise DcarError(f"{folder} holds no feedback log; give the directory that DCAR_FEEDBACK names, by --log")
    return files


def _own_file(folder: Path) -> Path:
    return folder / f"{socket.gethostname()}.sqlite"


def _id_at(seconds: float) -> str:
    return f"{int(seconds):08x}"


def _select(file: Path, statement: str, *values: object) -> Iterator[tuple[Any, ...]]:
    """Yield rows of a file that other processes may write. Raise DcarError if it cannot be read."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", timeout=_BUSY_S, uri=True)) as database:
            yield from database.execute(statement, values)
    except sqlite3.Error as error:
        raise DcarError(f"{file} cannot be read; remove it if it is damaged: {error}") from None


def count_queries(folder: Path, since: float) -> int:
    """Return the number of searches since a time in seconds."""
    statement = "SELECT count(*) FROM searches WHERE query_id >= ?"
    return sum(count for file in _files(folder) for (count,) in _select(file, statement, _id_at(since)))


def read_log(folder: Path, since: float = 0, every: int = 1) -> Iterator[tuple[QueryRow | None, list[EventRow]]]:
    """Yield searches in the order of time, with their events; None for events whose search is not in the log.

    Args:
        since: a time in seconds.
        every: read every n-th search, by the random part of its id.

    Raises:
        DcarError: the folder holds no log, or a file cannot be read.
    """
    chosen = "WHERE query_id >= ? AND substr(query_id, 9, 4) <= ? ORDER BY query_id", _id_at(since)
    last = f"{0x10000 // every - 1:04x}"
    tables = [
        _select(file, f"SELECT * FROM {name} {chosen[0]}", chosen[1], last)
        for name in _TABLES
        for file in _files(folder)
    ]
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
    for file in _files(folder):
        written = max(path.stat().st_mtime for path in folder.glob(f"{file.name}*"))
        if file != _own_file(folder) and now - written < _DAY_S:
            continue
        with closing(_connect(file)) as database:
            part = f"SELECT 1 + count(*) / {_PRUNED} FROM searches"
            place = f"SELECT query_id FROM searches ORDER BY query_id LIMIT 1 OFFSET ({part})"
            beyond = database.execute(place).fetchone() if is_large else None
            oldest = max([_id_at(now - days * _DAY_S), *(beyond or ())])
            with _transaction(database) as execute:
                gone = sum(execute(f"DELETE FROM {name} WHERE query_id < ?", (oldest,)).rowcount for name in _TABLES)
            if gone:
                _shrink(database)
            removed += gone
    return removed


def forget(folder: Path, client: str) -> tuple[int, int]:
    """Remove the events of a client, and the searches that it made or alone acted on; return their numbers."""
    events, searches = 0, 0
    with ExitStack() as stack:
        databases = [stack.enter_context(closing(_connect(file))) for file in _files(folder)]
        acted = "SELECT DISTINCT query_id FROM events WHERE client_id = ?"
        theirs = {row for database in databases for row in database.execute(acted, (client,))}
        shared = "SELECT 1 FROM events WHERE query_id = ? AND client_id <> ?"
        for database in databases:
            theirs = {row for row in theirs if not database.execute(shared, (*row, client)).fetchone()}
        for database in databases:
            with _transaction(database) as execute:
                events += execute("DELETE FROM events WHERE client_id = ?", (client,)).rowcount
                searches += execute("DELETE FROM searches WHERE json_extract(row, '$.client') = ?", (client,)).rowcount
                for row in theirs:
                    searches += execute("DELETE FROM searches WHERE query_id = ?", row).rowcount
            if not _shrink(database):
                raise LockedError(f"rows were removed, but {folder} is being read, and keeps their bytes; try again")
    return events, searches


def _shrink(database: sqlite3.Connection) -> bool:
    """Give free pages back, and empty the write-ahead log; return whether nobody was reading it."""
    database.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page
    return not database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
