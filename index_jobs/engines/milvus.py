"""The engine `milvus=URI`: vectors in a Milvus.

- Each built version has a collection, named after the index, the version and the encoder's fingerprint; `milvus.json`
  in the version names it. The primary key is the row number.
- CURRENT decides which version is served. The alias `<name>_current` follows it, also in a rollback, for other readers.
- Collections of removed versions and killed jobs are dropped after a publication.
- The token is read from DCAR_MILVUS_TOKEN and never written. A path as URI is Milvus Lite, in this process.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import (
    ArtifactError,
    DataError,
    DcarError,
    MissingExtraError,
    StoreUnavailableError,
)
from dcar_core.util.files import write_json
from index_jobs.engines.measure import Benchmark, gallery_queries
from index_jobs.engines.protocol import CreatedIndex, NewIndex, ScoredRows, merge_top_k
from index_jobs.spec import IndexSpec

logger = logging.getLogger(__name__)

MILVUS = "milvus.json"
TOKEN = "DCAR_MILVUS_TOKEN"
_ROW, _VECTOR = "row", "vector"
_INSERT_ROWS = 1000  # vectors in one insert
_MAX_K = 16_384  # results of one search
_MAX_OVERFETCH = 4096  # results of a search without a filter, to choose the allowed ones from
_LISTED_UP_TO = 5000  # rows whose list in a filter costs little: some 15 us a row
_MAX_LISTED = 100_000  # rows in one filter
_TYPES: dict[str, dict[str, Any]] = {
    "auto": {"index_type": "AUTOINDEX"},
    "flat": {"index_type": "FLAT"},
    "hnsw": {"index_type": "HNSW", "params": {"M": 32, "efConstruction": 80}},
}


@dataclass(frozen=True)
class MilvusLocation:
    """The collection with a version's vectors, as in `milvus.json`."""

    uri: str
    collection: str
    count: int
    dim: int
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> "MilvusLocation":
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error


class MilvusEngine:
    """Collections of one Milvus; see `index_jobs.engines.protocol.Engine`."""

    def __init__(self, uri: str) -> None:
        """uri: of a server, or the path of a Milvus Lite file."""
        if not uri:
            raise DataError(
                "the engine milvus needs a location: milvus=http://HOST:19530, or milvus=FILE for Milvus Lite"
            )
        self._uri = uri

    def plan(self, spec: IndexSpec, count: int, dim: int, device: str) -> int:
        """Check that Milvus has the kind and responds."""
        if spec.kind not in _TYPES:
            raise DataError(f"vectors in Milvus can be of kind {', '.join(_TYPES)}, not {spec.kind!r}")
        connect(self._uri).close()
        return 0

    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        """Create and fill the collection of a version, and write `milvus.json`."""
        from pymilvus import DataType

        name = f"{collection_prefix(new.folder.parent.parent)}_v{new.version}_{spec.fingerprint[:16]}"
        client = connect(self._uri)
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(_ROW, DataType.INT64, is_primary=True)
        schema.add_field(_VECTOR, DataType.FLOAT_VECTOR, dim=new.dim)
        parameters = client.prepare_index_params()
        parameters.add_index(_VECTOR, metric_type="IP", **_TYPES[spec.kind])
        with _translate_errors():
            if client.has_collection(name):  # of a killed job
                client.drop_collection(name)
            client.create_collection(name, schema=schema, index_params=parameters, consistency_level="Strong")
            row = 0
            for block in new.blocks():
                for start in range(0, len(block), _INSERT_ROWS):
                    part = np.asarray(block[start : start + _INSERT_ROWS])
                    client.insert(name, [{_ROW: number, _VECTOR: vector} for number, vector in enumerate(part, row)])
                    row += len(part)
            client.flush(name)
        location = MilvusLocation(self._uri, name, new.count, new.dim, spec.fingerprint)
        write_json(new.folder / MILVUS, asdict(location))
        queries = new.queries or gallery_queries(new.blocks, new.count)
        measured = Benchmark(new.blocks, queries, target=spec.target_recall).measure(MilvusIndex(location))
        return CreatedIndex(kind=f"milvus {spec.kind}", reason=f"requested: {spec.kind} in Milvus", measured=measured)

    def open(self, folder: Path, *, gpu: bool = False) -> "MilvusIndex":
        """Connect to the collection that `milvus.json` names."""
        return MilvusIndex(MilvusLocation.read(folder / MILVUS))

    def sync(self, index: Path, version: int) -> None:
        """Point the alias to the current version's collection, and drop collections that no version names."""
        prefix = collection_prefix(index)
        alias = f"{prefix}_current"
        try:
            paths = (index / "versions").glob(f"[0-9]*/{MILVUS}")
            locations = {path.parent.name: MilvusLocation.read(path) for path in paths}
            named = {location.collection for location in locations.values()}
            served = locations.get(str(version))
            client = connect(self._uri)
            collections = [entry for entry in client.list_collections() if entry.startswith(f"{prefix}_v")]
            is_aliased = any(alias in client.list_aliases(entry)["aliases"] for entry in collections)
            if served and served.uri == self._uri:
                (client.alter_alias if is_aliased else client.create_alias)(served.collection, alias)
            elif is_aliased:
                client.drop_alias(alias)
            for entry in collections:
                if entry not in named:
                    client.drop_collection(entry)
        except Exception as error:
            logger.warning("the Milvus at %s could not be updated to version %d: %s", self._uri, version, error)


class MilvusIndex:
    """The collection of one version. Safe for concurrent searches."""

    def __init__(self, location: MilvusLocation) -> None:
        uri, self.count, self.dim, self._name = location.uri, location.count, location.dim, location.collection
        if "://" not in uri and not Path(uri).exists():  # Milvus Lite would create an empty file
            raise ArtifactError(f"the Milvus Lite file {uri} is missing; restore it, or rebuild the index")
        self._client = connect(uri)
        with _translate_errors():
            if not self._client.has_collection(self._name):
                raise ArtifactError(f"{uri} has no collection {self._name}; roll back, or rebuild the index")
            self._client.load_collection(self._name)
            count = int(self._client.get_collection_stats(self._name)["row_count"])
        if count != self.count:
            raise ArtifactError(
                f"collection {self._name} holds {count:,} vectors, not {self.count:,}; roll back, or rebuild the index"
            )

    def search(self, vectors: Floats, k: int, mask: Mask | None = None, *, is_narrow: bool = False) -> ScoredRows:
        """As `VectorIndex.search`.

        A filter that names thousands of rows is slow in Milvus. A mask that allows many rows is therefore applied to a
        larger unfiltered result first; only if that leaves fewer than k rows, the filter names the rows.
        """
        if mask is None or mask.all():
            return self._search(vectors, k)
        allowed, hidden = np.flatnonzero(mask), np.flatnonzero(~mask)
        overfetch = 2 * k * len(mask) // max(1, len(allowed))
        if min(len(allowed), len(hidden)) > _LISTED_UP_TO and overfetch <= _MAX_OVERFETCH:
            scores, rows = self._search(vectors, overfetch)
            rows[~mask[rows]] = -1  # row -1 reads the mask's last value, but is -1 either way
            scores, rows = merge_top_k([scores], [rows], k)
            if (rows[:, k - 1] >= 0).all():
                return scores, rows
        if len(hidden) <= min(_MAX_LISTED, len(allowed)):
            return self._search(vectors, k, f"{_ROW} not in {hidden.tolist()}")
        parts = np.split(allowed, range(_MAX_LISTED, len(allowed), _MAX_LISTED))
        results = [self._search(vectors, k, f"{_ROW} in {part.tolist()}") for part in parts]
        return merge_top_k([scores for scores, _ in results], [rows for _, rows in results], k)

    def _search(self, vectors: Floats, k: int, expression: str = "") -> ScoredRows:
        with _translate_errors():
            results = self._client.search(
                self._name, data=list(np.asarray(vectors, np.float32)), limit=min(k, self.count, _MAX_K),
                filter=expression, anns_field=_VECTOR, output_fields=[_ROW],
            )  # fmt: skip
        rows = np.full((len(vectors), k), -1, np.int64)
        scores = np.full((len(vectors), k), -np.inf, np.float32)
        for number, hits in enumerate(results):
            rows[number, : len(hits)] = [hit[_ROW] for hit in hits]
            scores[number, : len(hits)] = [hit["distance"] for hit in hits]
        return merge_top_k([scores], [rows], k)

    def vectors(self, rows: Rows) -> Floats:
        """As `VectorIndex.vectors`."""
        vectors = np.empty((len(rows), self.dim), np.float32)
        for start in range(0, len(rows), _INSERT_ROWS):
            part = rows[start : start + _INSERT_ROWS].tolist()
            with _translate_errors():
                entries = self._client.get(self._name, ids=part, output_fields=[_ROW, _VECTOR])
            by_row = {entry[_ROW]: entry[_VECTOR] for entry in entries}
            if missing := [row for row in part if row not in by_row]:
                raise ArtifactError(f"collection {self._name} lacks row {missing[0]}; rebuild the index")
            vectors[start : start + len(part)] = [by_row[row] for row in part]
        return vectors


@contextlib.contextmanager
def _translate_errors(problem: str = "Milvus is unavailable") -> Iterator[None]:
    """Turn the errors of pymilvus and of grpc into a StoreUnavailableError."""
    try:
        yield
    except DcarError:
        raise
    except Exception as error:
        raise StoreUnavailableError(f"{problem}: {error}") from error


def collection_prefix(index: Path) -> str:
    """Return the prefix of an index's collections, which depends on its absolute path."""
    path = index.absolute()
    slug = re.sub(r"\W+", "_", path.name)[:40]
    return f"dcar_{slug}_{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def connect(uri: str) -> Any:
    try:
        from pymilvus import MilvusClient
    except ImportError:
        raise MissingExtraError("vectors in Milvus", "milvus") from None
    with _translate_errors(f"Milvus at {uri} cannot be reached"):
        return MilvusClient(uri, token=os.environ.get(TOKEN, ""), timeout=30)
