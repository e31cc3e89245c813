"""Vectors in Milvus, for when one machine is outgrown; behind the same `VectorIndex` as FAISS.

- A collection for each version, named after the index, the version and the encoder's fingerprint, so that a collection
  cannot be taken for another model's. `milvus.json` in the version says which it is.
- CURRENT decides what is served. The alias `<name>_current` follows it, also in a rollback, for other readers.
- Collections that no kept version names are dropped after a publication; so are those of jobs that were killed.
- The primary key is the row, so items, filters, additions and removals work as they do with FAISS.
- The token is read from DCAR_MILVUS_TOKEN, and is never written down. A path as URI is Milvus Lite, in this process.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Blocks
from dcar_core.util.errors import (
    ArtifactError,
    DataError,
    DcarError,
    FingerprintError,
    MissingExtraError,
    StoreUnavailableError,
)
from dcar_core.util.files import write_json
from index_jobs.store.faiss_search import Found, best_of
from index_jobs.store.manifest import VERSIONS

logger = logging.getLogger(__name__)

MILVUS = "milvus.json"
TOKEN = "DCAR_MILVUS_TOKEN"
_ROW, _VECTOR = "row", "vector"
_INSERTED = 1000  # vectors in one request
_MOST_K = 16_384  # results of a search
_LISTED = 5000  # rows in one expression
_FINGERPRINT = 16
_TYPES: dict[str, dict[str, Any]] = {
    "auto": {"index_type": "AUTOINDEX"},
    "flat": {"index_type": "FLAT"},
    "hnsw": {"index_type": "HNSW", "params": {"M": 32, "efConstruction": 80}},
}


@dataclass(frozen=True)
class Place:
    """Where a version's vectors are, as `milvus.json` holds it."""

    uri: str
    collection: str
    count: int
    dim: int
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> "Place":
        """Read milvus.json.

        Raises:
            ArtifactError: it is missing or broken.
        """
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error


class MilvusIndex:
    """One version's collection. Safe for concurrent searches."""

    def __init__(self, place: Place) -> None:
        """Connect.

        Raises:
            ArtifactError: Milvus cannot be reached, or the collection is gone or not whole.
            FingerprintError: the collection holds another encoder's vectors.
        """
        self.count, self.dim, self._name = place.count, place.dim, place.collection
        if not place.collection.endswith(place.fingerprint[:_FINGERPRINT]):
            raise FingerprintError(f"{place.collection} was not made by encoder {place.fingerprint[:12]}; rebuild it")
        if "://" not in place.uri and not Path(place.uri).exists():  # Milvus Lite would make an empty one
            raise ArtifactError(f"the Milvus Lite file {place.uri} is gone; bring it back, or rebuild the index")
        self._client = connect(place.uri)
        with _answering():
            if not self._client.has_collection(self._name):
                raise ArtifactError(f"{place.uri} has no collection {self._name}; roll back, or rebuild the index")
            self._client.load_collection(self._name)
            found = int(self._client.get_collection_stats(self._name)["row_count"])
        if found != self.count:
            raise ArtifactError(
                f"collection {self._name} holds {found:,} vectors, not {self.count:,}; roll back, or rebuild the index"
            )

    def search(self, vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None = None) -> Found:
        scores, rows = [np.empty((len(vectors), 0), np.float32)], [np.empty((len(vectors), 0), np.int64)]
        for chosen in _expressions(mask):
            with _answering():
                answers = self._client.search(
                    self._name, data=list(np.asarray(vectors, np.float32)), limit=min(k, self.count, _MOST_K),
                    filter=chosen, anns_field=_VECTOR, output_fields=[_ROW],
                )  # fmt: skip
            found = np.full((len(vectors), k), -1, np.int64)
            near = np.full((len(vectors), k), -np.inf, np.float32)
            for number, hits in enumerate(answers):
                found[number, : len(hits)] = [hit[_ROW] for hit in hits]
                near[number, : len(hits)] = [hit["distance"] for hit in hits]
            scores.append(near)
            rows.append(found)
        return best_of(scores, rows, k)

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        found = np.empty((len(rows), self.dim), np.float32)
        for start in range(0, len(rows), _INSERTED):
            part = rows[start : start + _INSERTED].tolist()
            with _answering():
                entries = self._client.get(self._name, ids=part, output_fields=[_ROW, _VECTOR])
            by_row = {entry[_ROW]: entry[_VECTOR] for entry in entries}
            if missing := [row for row in part if row not in by_row]:
                raise ArtifactError(f"collection {self._name} lacks row {missing[0]}; rebuild the index")
            found[start : start + len(part)] = [by_row[row] for row in part]
        return found


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except DcarError:
        raise
    except Exception as error:  # pymilvus has many, and grpc's own pass through it
        raise StoreUnavailableError(f"Milvus does not answer: {error}") from error


def create(uri: str, index: Path, version: int, fingerprint: str, kind: str, blocks: Blocks, dim: int) -> Place:
    """Fill a collection for a version that is about to be published.

    Args:
        index: the index directory, which collections are named after.
        kind: auto, flat or hnsw.
        blocks: vectors, L2-normalised; their order is the rows.

    Raises:
        DataError: Milvus does not have the kind.
        ArtifactError: Milvus cannot be reached.
    """
    require_kind(kind)
    client = connect(uri)
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field(_ROW, DataType.INT64, is_primary=True)
    schema.add_field(_VECTOR, DataType.FLOAT_VECTOR, dim=dim)
    parameters = client.prepare_index_params()
    parameters.add_index(_VECTOR, metric_type="IP", **_TYPES[kind])
    name = f"{prefix(index)}_v{version}_{fingerprint[:_FINGERPRINT]}"
    with _answering():
        if client.has_collection(name):  # of a job that was killed
            client.drop_collection(name)
        client.create_collection(name, schema=schema, index_params=parameters, consistency_level="Strong")
    count = 0
    for block in blocks():
        for start in range(0, len(block), _INSERTED):
            part = np.asarray(block[start : start + _INSERTED])
            with _answering():
                client.insert(name, [{_ROW: count + number, _VECTOR: vector} for number, vector in enumerate(part)])
            count += len(part)
    with _answering():
        client.flush(name)
    return Place(uri, name, count, dim, fingerprint)


def require_kind(kind: str) -> None:
    """Refuse a kind that Milvus is not asked for.

    Raises:
        DataError: with those it is.
    """
    if kind not in _TYPES:
        raise DataError(f"vectors in Milvus can be of kind {', '.join(_TYPES)}, not {kind!r}")


def write_place(path: Path, place: Place) -> None:
    """Write milvus.json."""
    write_json(path, asdict(place))


def places(index: Path) -> dict[int, Place]:
    """Where the vectors of each version are that Milvus holds."""
    found = {}
    for path in _place_files(index):
        with contextlib.suppress(ArtifactError):  # damaged: `verify` says so
            found[int(path.parent.name)] = Place.read(path)
    return found


def _place_files(index: Path) -> list[Path]:
    return [path for path in (index / VERSIONS).glob(f"*/{MILVUS}") if path.parent.name.isdecimal()]


def follow(index: Path, version: int, before: Mapping[int, Place] | None = None) -> None:
    """After CURRENT: point the alias to the version's collection, and drop those that no version names any more.

    Args:
        before: the index's `places` before versions were removed, whose collections are to go.

    What fails is logged, since CURRENT alone decides what is served.
    """
    now, name = places(index), prefix(index)
    kept = {place.collection for place in now.values()}
    all_read = len(now) == len(_place_files(index))
    for uri in {place.uri for place in [*(before or {}).values(), *now.values()]}:
        try:
            client, alias = connect(uri), f"{name}_current"
            known = [entry for entry in client.list_collections() if entry.startswith(f"{name}_v")]
            aliased = [entry for entry in known if alias in client.list_aliases(entry)["aliases"]]
            if version not in now or now[version].uri != uri:
                if aliased:
                    client.drop_alias(alias)
            elif aliased:
                client.alter_alias(now[version].collection, alias)
            else:
                client.create_alias(now[version].collection, alias)
            for entry in known:
                if entry not in kept and all_read:
                    client.drop_collection(entry)
        except Exception as error:
            logger.warning("the Milvus at %s could not be told of version %d: %s", uri, version, error)


def prefix(index: Path) -> str:
    """What the names of an index's collections begin with, told apart by its absolute path."""
    whole = str(index.absolute())
    slug = re.sub(r"\W+", "_", index.absolute().name)[:40]
    return f"dcar_{slug}_{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def connect(uri: str) -> Any:
    """A client.

    Raises:
        MissingExtraError: pymilvus is not installed.
        ArtifactError: Milvus cannot be reached.
    """
    try:
        from pymilvus import MilvusClient
    except ImportError:
        raise MissingExtraError("vectors in Milvus", "milvus") from None
    try:
        return MilvusClient(uri, token=os.environ.get(TOKEN, ""), timeout=30)
    except Exception as error:
        raise ArtifactError(f"Milvus at {uri} cannot be reached: {error}") from error


def _expressions(mask: NDArray[np.bool_] | None) -> list[str]:
    """Which rows may be found, as filters of which each names a limited number of rows; searched one by one."""
    if mask is None or mask.all():
        return [""]
    hidden = np.flatnonzero(~mask)
    if len(hidden) <= _LISTED:
        return [f"{_ROW} not in {hidden.tolist()}"]
    allowed = np.flatnonzero(mask)
    return [f"{_ROW} in {allowed[start : start + _LISTED].tolist()}" for start in range(0, len(allowed), _LISTED)]
