"""Names that were taught by examples, the same for all versions and models of an index.

INDEX/concepts.json   the names; each `pull` brings those of a store to its mirror
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from dcar_core.util.errors import ArtifactError, DataError, LockedError
from index_jobs.index.stores import Directory, Storage, store_of, swap

T = TypeVar("T")

MAX_CONCEPTS = 200
_CONCEPTS = "concepts.json"
_LOCK = ".concepts.lock"


@dataclass(frozen=True)
class Concept:
    """A taught name. kind: what it is, in words, or "". ids: its examples. not_ids:
    similar items that are none.
    """

    name: str
    kind: str
    ids: tuple[str, ...]
    not_ids: tuple[str, ...]


def read_concepts(index: Path) -> list[Concept]:
    """Return the taught names, sorted. Raise ArtifactError if they cannot be read."""
    return _parse(Directory(index).read(_CONCEPTS), str(index))


def put_concept(index: Path, concept: Concept) -> None:
    """Store a concept, in place of one of its name.

    Raise DataError if there are too many, an error of `Storage`, or OSError if the disk
    is full.
    """

    def put(known: dict[str, Concept]) -> None:
        known[concept.name] = concept
        if len(known) > MAX_CONCEPTS:
            raise DataError(f"an index has at most {MAX_CONCEPTS} names; forget one")

    _change(index, put)


def drop_concept(index: Path, name: str) -> bool:
    """Forget a concept. Return False if there is none of this name."""
    return _change(index, lambda known: known.pop(name, None)) is not None


def pull_concepts(store: Storage, mirror: Directory) -> None:
    """Bring the names of a store to its mirror."""
    with FileLock(mirror.path / _LOCK):
        mirror.follow(_CONCEPTS, store.read(_CONCEPTS))


def _change(index: Path, change: Callable[[dict[str, Concept]], T]) -> T:
    storage = store_of(index) or Directory(index)
    with FileLock(index / _LOCK):
        while True:
            before = storage.read(_CONCEPTS)
            known = {concept.name: concept for concept in _parse(before, storage.name)}
            outcome = change(known)
            data = json.dumps(
                [asdict(known[name]) for name in sorted(known)], ensure_ascii=False
            ).encode()
            with suppress(LockedError):  # another machine was first
                swap(index, _CONCEPTS, before, data)
                return outcome


def _parse(data: bytes | None, storage: str) -> list[Concept]:
    try:
        found = json.loads(data or b"[]")
        return [
            Concept(own["name"], own["kind"], tuple(own["ids"]), tuple(own["not_ids"]))
            for own in found
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{_CONCEPTS} of {storage} is damaged; remove it, and teach the names again"
        ) from error
