"""Names that were taught by examples: a table of the index's database, the same for all versions and models."""

import json
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from dcar_core.util.errors import DataError
from index_jobs.index.job_queue import JOBS, JobQueue

MAX_CONCEPTS = 200


@dataclass(frozen=True)
class Concept:
    """A taught name. kind: what it is, in words, or "". ids: its examples. not_ids: similar items that are none."""

    name: str
    kind: str
    ids: tuple[str, ...]
    not_ids: tuple[str, ...]


def read_concepts(index: Path) -> list[Concept]:
    """Return the taught names, sorted. Raise sqlite3.Error if the database cannot be read."""
    path = index.absolute() / JOBS
    if not path.exists():
        return []
    mode = "ro" if os.access(index, os.W_OK) else "ro&immutable=1"  # which needs no files of locks
    with closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True)) as database:
        is_there = database.execute("PRAGMA table_info(concepts)").fetchone()  # not before the first change
        rows = database.execute("SELECT * FROM concepts ORDER BY name") if is_there else ()
        return [Concept(name, kind, *(tuple(json.loads(ids)) for ids in lists)) for name, kind, *lists in rows]


def put_concept(index: Path, concept: Concept) -> None:
    """Store a concept, in place of one of its name. Raise DataError if there are too many, OSError as `JobQueue`."""
    with JobQueue(index).database() as database:
        values = concept.name, concept.kind, json.dumps(concept.ids), json.dumps(concept.not_ids)
        database.execute("INSERT OR REPLACE INTO concepts VALUES (?, ?, ?, ?)", values)
        if database.execute("SELECT count(*) FROM concepts").fetchone() > (MAX_CONCEPTS,):
            raise DataError(f"an index has at most {MAX_CONCEPTS} names; forget one")


def drop_concept(index: Path, name: str) -> bool:
    """Forget a concept. Return False if there is none of this name."""
    with JobQueue(index).database() as database:
        return database.execute("DELETE FROM concepts WHERE name = ?", (name,)).rowcount > 0
