"""The files of the log: durable journals, and the Parquet files that they become.

FOLDER/key                           secret of the service: signs query ids, hashes texts
FOLDER/lock                          held while Parquet files are written or filtered
FOLDER/journal/<day>.<hex>.jsonl     a journal of one process; each line is a batch of rows
FOLDER/journal/<day>.<hex>.taken     one that is being turned into Parquet
FOLDER/ubi_queries/<day>.<hex>.parquet
FOLDER/ubi_events/<day>.<hex>.parquet

- A journal ends with its day, or when it is large. Any process turns any journal into Parquet files of its name, so an
  interrupted attempt is repeated without harm. A batch may be stored twice, and readers count a row once.
- A journal is renamed before it is read. Its writer checks its name after each batch, and writes the batch again, to
  a new journal, if it is gone. So no lock is needed, and no batch is lost.
- A torn last line of a killed process is skipped.
"""

import os
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import chain, product
from pathlib import Path
from string import ascii_letters, digits
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic_core import from_json, to_json

from dcar_core.util.errors import DcarError
from dcar_core.util.files import atomic_writer
from dcar_core.util.processes import hold_lock

JOURNAL, QUERIES, EVENTS = "journal", "ubi_queries", "ubi_events"
_LARGE_BYTES = 32 * 2**20  # of a journal
_WAIT_S = 600  # for another process
_ROW_BYTES = 300  # of a search in a journal, with ten results
_TIME = pa.timestamp("ms", "UTC")
_STARTS = ["".join(pair) for pair in product(ascii_letters + digits + "-_", repeat=2)]  # of query ids
_ID_FIELD = "id"  # the field of an item that object ids are of

QUERY_SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "timestamp": _TIME,
        "application": pa.string(),
        "user_query": pa.string(),
        "query_response_hit_ids": pa.list_(pa.string()),
        "object_id_field": pa.string(),
        "query_attributes": pa.struct(
            {
                "kind": pa.string(),
                "offset": pa.int32(),
                "index_version": pa.int32(),
                "is_hashed": pa.bool_(),
                "nothing_fits": pa.bool_(),
            }
        ),
        "client_id": pa.string(),
    }
)
EVENT_SCHEMA = pa.schema(
    {
        "query_id": pa.string(),
        "timestamp": _TIME,
        "application": pa.string(),
        "client_id": pa.string(),
        "action_name": pa.string(),
        "event_attributes": pa.struct(
            {
                "object": pa.struct({"object_id": pa.string(), "object_id_field": pa.string()}),
                "position": pa.struct({"ordinal": pa.int32()}),
                "rating": pa.int32(),
            }
        ),
    }
)


class QueryRow(NamedTuple):
    """A search that was answered: the fields of `QUERY_SCHEMA` and of its attributes, in their order.

    time: in milliseconds. hits: ids of the results. kind: text, or other.
    """

    query_id: str
    time: int
    collection: str
    text: str
    hits: Sequence[str]
    kind: str
    offset: int
    version: int
    is_hashed: bool
    nothing_fits: bool = False
    client: str | None = None


class EventRow(NamedTuple):
    """What a client did with a result. position: its rank, from 1; None if another process answered the search."""

    query_id: str
    time: int
    collection: str
    client: str
    action: str
    item: str
    position: int | None
    rating: int | None


def in_ubi(rows: Sequence[QueryRow] | Sequence[EventRow], schema: pa.Schema) -> pa.Table:
    """Return rows in the columns of their schema."""
    if not rows:
        return schema.empty_table()
    columns = [*zip(*rows, strict=True)]
    columns.insert(5 if schema is QUERY_SCHEMA else 6, (_ID_FIELD,) * len(rows))
    values = iter(columns)

    def array_of(kind: pa.DataType) -> pa.Array:
        if not pa.types.is_struct(kind):
            return pa.array(next(values), kind)
        return pa.StructArray.from_arrays([array_of(field.type) for field in kind], fields=[*kind])

    return pa.Table.from_arrays([array_of(field.type) for field in schema], schema=schema)


def prepare(folder: Path) -> bytes:
    """Create the folder of a log unless it exists, and return its secret. Raise DcarError if it cannot be written."""
    path, made = folder / "key", folder / f".key.{secrets.token_hex(8)}"
    try:
        for name in (JOURNAL, QUERIES, EVENTS):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            with suppress(FileExistsError):  # another process was quicker
                path.hardlink_to(made)
            made.unlink()
        if not os.access(folder / JOURNAL, os.W_OK):
            raise PermissionError(13, os.strerror(13))
        return path.read_bytes()
    except OSError as error:
        raise DcarError(f"{folder} cannot hold the feedback log of DCAR_FEEDBACK: {error.strerror}") from None


class Journal:
    """Appends rows to a journal of this process. Its methods block, and are called by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / JOURNAL
        self._path = self._folder
        self._file = -1
        self._size = 0
        self._day = ""

    def write(self, queries: Iterable[bytes], events: Sequence[EventRow]) -> None:
        """Store rows durably, queries as `QueryRow`s in JSON. Raise OSError if they cannot be; then none is."""
        line = b"[[%b],%b]\n" % (b",".join(queries), to_json(events))
        while True:
            self._open()
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                os.fsync(self._file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, self._size)
                self.close()
                raise
            if self._path.exists():
                self._size += len(line)
                return
            self.close()  # another process took the journal

    def _open(self) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        if self._file >= 0 and self._day == day:
            return
        self.close()
        self._path, self._size, self._day = self._folder / f"{day}.{secrets.token_hex(8)}.jsonl", 0, day
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if not self._size:
                self._path.unlink(missing_ok=True)


def is_due(folder: Path) -> bool:
    """Return True if a journal should become Parquet."""
    return any(path.suffix == ".taken" or _is_over(path) for path in (folder / JOURNAL).iterdir())


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Wait until no other process changes Parquet files."""
    return hold_lock(folder / "lock", f"another process changes the files of {folder}; try again later", _WAIT_S)


def roll(folder: Path, *, everything: bool = False) -> None:
    """Turn journals of past days, and large ones, into Parquet files."""
    with _alone(folder):
        _roll(folder, everything=everything)


def _roll(folder: Path, *, everything: bool) -> None:
    for path in sorted((folder / JOURNAL).glob("*.jsonl")):
        if everything or _is_over(path):
            with suppress(FileNotFoundError):
                path.rename(path.with_suffix(".taken"))
    for path in sorted((folder / JOURNAL).glob("*.taken")):
        queries, events = _read_journal(path)
        for name, table in ((QUERIES, queries), (EVENTS, events)):
            if table.num_rows:
                write_table(folder / name / f"{path.stem}.parquet", table)
        path.unlink(missing_ok=True)


def _is_over(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return path.name[:10] < time.strftime("%Y-%m-%d", time.gmtime()) or path.stat().st_size > _LARGE_BYTES
    return False


def write_table(path: Path, table: pa.Table) -> None:
    with atomic_writer(path, shared=True) as file:
        pq.write_table(table, file, compression="zstd")


def prune(folder: Path, days: int, max_bytes: int) -> int:
    """Remove Parquet files older than so many days, and the oldest beyond a size; return the number removed."""
    oldest = time.strftime("%Y-%m-%d", time.gmtime(time.time() - days * 86_400))
    files = [path for name in (QUERIES, EVENTS) for path in (folder / name).glob("*.parquet")]
    files.sort(key=lambda path: (path.name, path.parent.name))
    sizes = [path.stat().st_size for path in files]
    excess, removed = sum(sizes) + sum(path.stat().st_size for path in _journals(folder)) - max_bytes, 0
    for path, size in zip(files, sizes, strict=True):
        if path.name < oldest or excess > 0:
            path.unlink(missing_ok=True)
            excess -= size
            removed += 1
    return removed


def _journals(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / JOURNAL).iterdir() if path.suffix in (".jsonl", ".taken"))


def list_days(folder: Path) -> dict[str, int]:
    """Return the days of the log, the last one first, with their numbers of searches; in journals about that many."""
    days = Counter[str]()
    for path in (*_journals(folder), *(folder / QUERIES).glob("*.parquet")):
        days[path.name[:10]] += 0
        with suppress(FileNotFoundError, pa.ArrowException):  # `read_log` names a damaged one
            is_table = path.suffix == ".parquet"
            days[path.name[:10]] += pq.read_metadata(path).num_rows if is_table else path.stat().st_size // _ROW_BYTES
    return dict(sorted(days.items(), reverse=True))


def read_log(folder: Path, day: str = "", every: int = 1) -> tuple[pa.Table, pa.Table]:
    """Return the rows of queries and of events; a row may occur twice.

    Args:
        day: whose files are read; "" for all.
        every: read every n-th search with its events, by its id.

    Raises:
        DcarError: the folder holds no log, or a file cannot be read.
    """
    if not (folder / JOURNAL).is_dir():
        raise DcarError(f"{folder} holds no feedback log; give the directory that DCAR_FEEDBACK names, by --log")
    starts = pa.array(_STARTS[::every])

    def chosen(table: pa.Table) -> pa.Table:
        return table if every == 1 else table.filter(pc.is_in(pc.utf8_slice_codeunits(table["query_id"], 0, 2), starts))

    # Journals first: one that becomes Parquet meanwhile is then read twice, not missed.
    read = [_read_journal(path) for path in _journals(folder) if path.name.startswith(day)]
    tables = []
    for place, (name, schema) in enumerate(((QUERIES, QUERY_SCHEMA), (EVENTS, EVENT_SCHEMA))):
        parts = chain((tables[place] for tables in read), (table for _, table in _parquet(folder / name, schema, day)))
        tables.append(pa.concat_tables([schema.empty_table(), *map(chosen, parts)]))
    return tables[0], tables[1]


def _parquet(folder: Path, schema: pa.Schema, day: str = "") -> Iterator[tuple[Path, pa.Table]]:
    for path in sorted(folder.glob(f"{day}*.parquet")):
        try:
            yield path, pq.read_table(path, schema=schema, partitioning=None)
        except FileNotFoundError:  # too old meanwhile
            continue
        except (OSError, pa.ArrowException) as error:
            raise DcarError(f"{path} is damaged; remove it: {error}") from None


def _read_journal(path: Path) -> tuple[pa.Table, pa.Table]:
    queries, events = list[QueryRow](), list[EventRow]()
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    for line in lines:
        with suppress(ValueError, TypeError):  # torn
            found, given = from_json(line)
            queries += [QueryRow(*row) for row in found]
            events += [EventRow(*row) for row in given]
    return in_ubi(queries, QUERY_SCHEMA), in_ubi(events, EVENT_SCHEMA)


def forget(folder: Path, client: str) -> tuple[int, int]:
    """Remove the events of a client, and the searches that it made or alone acted on; return their numbers."""
    theirs, others, removed, searches = set[str](), set[str](), 0, 0
    with _alone(folder):
        _roll(folder, everything=True)
        for path, table in [*_parquet(folder / EVENTS, EVENT_SCHEMA)]:
            is_theirs = pc.equal(table["client_id"], client)
            theirs |= set(table.filter(is_theirs)["query_id"].to_pylist())
            others |= set(table.filter(pc.invert(is_theirs))["query_id"].to_pylist())
            removed += _keep(path, table, pc.invert(is_theirs))
        gone = pa.array(theirs - others, pa.string())
        for path, table in [*_parquet(folder / QUERIES, QUERY_SCHEMA)]:
            is_theirs = pc.equal(table["client_id"], client).fill_null(False)
            searches += _keep(path, table, pc.invert(pc.or_(is_theirs, pc.is_in(table["query_id"], gone))))
    return removed, searches


def _keep(path: Path, table: pa.Table, mask: pa.ChunkedArray) -> int:
    kept = table.filter(mask)
    if kept.num_rows == 0:
        path.unlink(missing_ok=True)
    elif kept.num_rows < table.num_rows:
        write_table(path, kept)
    return int(table.num_rows - kept.num_rows)
