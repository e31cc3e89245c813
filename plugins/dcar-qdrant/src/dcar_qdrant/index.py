"""The stored vectors of one version or addition, and their searches.

The id of a point is its row number. A search returns ids and scores, no fields.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from qdrant_client import models

from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import ArtifactError, StoreUnavailableError
from dcar_qdrant import connection
from dcar_qdrant.conditions import to_conditions
from dcar_qdrant.connection import call, connect, reads
from index_jobs.engines.protocol import ScoredRows, VectorIndex
from index_jobs.row_filter import RowFilter

LOCATION = "qdrant.json"
BATCH = 256  # vectors in one call
# of the filters in one call, each of which may name many rows; servers take bodies of
# 32 MB
FILTER_BYTES = 2**20
_QUERIES_PER_SECOND = 10  # at least; a job sends many at once
# candidates of quantized vectors that are compared again, in multiples of k
_OVERSAMPLING = 2.0


@dataclass(frozen=True, kw_only=True)
class QdrantLocation:
    """Where the vectors of a folder are, and how they are searched, as in
    `qdrant.json`.

    fields: key and Arrow type of each stored field. hnsw_ef: None compares every
    vector.
    """

    location: str
    collection: str
    count: int
    dim: int
    fields: dict[str, list[str]]
    is_quantized: bool
    hnsw_ef: int | None = None

    @classmethod
    def read(cls, path: Path) -> "QdrantLocation":
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error


class QdrantIndex(VectorIndex):
    """One collection. Safe for concurrent searches. It is tunable as
    `index_jobs.engines.measure.tune` describes.
    """

    width = "hnsw_ef"
    min_width = 16
    max_width = 4096
    has_reranking = False

    def __init__(self, location: QdrantLocation) -> None:
        """Open a collection. Raise ArtifactError if it is missing or lacks vectors."""
        self.count = location.count
        self.dim = location.dim
        self.ef = location.hnsw_ef
        self._name = location.collection
        self._fields = location.fields
        self._is_quantized = location.is_quantized
        where = location.location
        self._is_local = "://" not in where
        # the client would create it
        if self._is_local and where != ":memory:" and not Path(where).exists():
            raise ArtifactError(
                f"the folder {where} with the vectors is missing; restore it, or"
                " rebuild the index"
            )
        self._client = connect(where)
        self._read = reads(where)
        if not call(lambda: self._client.collection_exists(self._name)):
            raise ArtifactError(
                f"{where} has no collection {self._name}; roll back, or rebuild the"
                " index"
            )
        if fault := self._count_fault(
            call(lambda: self._client.count(self._name, exact=True)).count
        ):
            raise ArtifactError(fault)

    def _count_fault(self, stored: int) -> str | None:
        if stored == self.count:
            return None
        return (
            f"collection {self._name} has {stored:,} vectors, not {self.count:,}; roll"
            " back, or rebuild the index"
        )

    def set(self, name: str, value: int) -> None:
        """Set the width of searches."""
        self.ef = value

    def search(
        self,
        vectors: Floats,
        k: int,
        rows: RowFilter | None = None,
        *,
        is_narrow: bool = False,
    ) -> ScoredRows:
        """As `VectorIndex.search`. Qdrant evaluates the conditions."""
        if rows is None:
            conditions = None
        else:
            conditions = to_conditions(rows, self._fields, self.count)
        parameters = None
        if not self._is_local:  # it has none
            rescoring = models.QuantizationSearchParams(
                rescore=True, oversampling=_OVERSAMPLING
            )
            quantization = rescoring if self._is_quantized else None
            parameters = models.SearchParams(
                hnsw_ef=self.ef,
                exact=self.ef is None,
                quantization=quantization,
            )
        numbers = np.full((len(vectors), k), -1, np.int64)
        scores = np.full((len(vectors), k), -np.inf, np.float32)
        requests = [
            models.QueryRequest(
                query=vector,
                filter=conditions,
                params=parameters,
                limit=min(k, self.count),
            )
            for vector in np.asarray(vectors, np.float32).tolist()
        ]
        if conditions and len(requests) > 1:
            size = len(conditions.model_dump_json(exclude_none=True))
        else:
            size = 0
        step = max(1, min(BATCH, FILTER_BYTES // (size + 1)))
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            seconds = connection.READ_SECONDS + len(part) // _QUERIES_PER_SECOND
            ask = partial(
                self._client.query_batch_points,
                self._name,
                part,
                timeout=seconds,
            )
            for number, response in enumerate(self._read(ask), start):
                hits = response.points
                numbers[number, : len(hits)] = [hit.id for hit in hits]
                scores[number, : len(hits)] = [hit.score for hit in hits]
        return scores, numbers

    def vectors(self, rows: Rows) -> Floats:
        """As `VectorIndex.vectors`."""
        vectors = np.empty((len(rows), self.dim), np.float32)
        options = {
            "with_payload": False,
            "with_vectors": True,
            "timeout": connection.READ_SECONDS,
        }
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH].tolist()
            by_row = {
                point.id: point.vector
                for point in self._read(
                    partial(self._client.retrieve, self._name, part, **options)
                )
            }
            if missing := [row for row in part if row not in by_row]:
                raise StoreUnavailableError(
                    f"collection {self._name} lacks row {missing[0]}; rebuild the index"
                )
            vectors[start : start + len(part)] = [by_row[row] for row in part]
        return vectors
