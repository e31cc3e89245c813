"""The stored vectors of one version or addition, and their searches.

- The id of a point is its row number. A search returns ids and scores, no fields.
- Calls are repeated after a pause if the server is busy or the connection breaks, and end after a time limit.
- A server that does not respond is tried by one read at a time. Others fail at once, so no thread waits for it.
- A location is the URL of a server. A folder, or `:memory:`, is the client's local mode, which compares every vector.
  One process at a time can open a folder.
"""

import atexit
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import ArtifactError, MissingExtraError, StoreUnavailableError
from index_jobs.engines.protocol import ScoredRows, VectorIndex
from index_jobs.row_filter import RowFilter

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

LOCATION = "qdrant.json"
API_KEY = "DCAR_QDRANT_API_KEY"
BATCH = 256  # vectors in one call
_FILTER_BYTES = 2**20  # of the filters in one call, each of which may name many rows; servers take bodies of 32 MB
_SECONDS = 30  # of one call
_ATTEMPTS, _READ_ATTEMPTS = 4, 2  # somebody waits for a search
_READ_SECONDS = 4  # of one attempt, so both end before a request of the service does
_QUERIES_PER_SECOND = 10  # at least; a job sends many at once
_REST_SECONDS = 1  # between reads of a server that does not respond
_PAUSE_SECONDS = 0.2  # before the second attempt; then twice as long each time
_BUSY = frozenset({429, 500, 502, 503, 504})
_OVERSAMPLING = 2.0  # candidates of quantized vectors that are compared again, in multiples of k

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class QdrantLocation:
    """Where the vectors of a folder are, and how they are searched, as in `qdrant.json`.

    fields: key and Arrow type of each stored field. hnsw_ef: None compares every vector.
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
    """One collection. Safe for concurrent searches. It is tunable as `engines.faiss.tuning` describes."""

    width, min_width, max_width, has_reranking = "hnsw_ef", 16, 4096, False

    def __init__(self, location: QdrantLocation) -> None:
        """Open a collection. Raise ArtifactError if it is missing or lacks vectors."""
        self.count, self.dim, self._name, self._fields = (
            location.count, location.dim, location.collection, location.fields
        )  # fmt: skip
        where, self._is_quantized, self.ef = location.location, location.is_quantized, location.hnsw_ef
        self._is_local = "://" not in where
        if self._is_local and where != ":memory:" and not Path(where).exists():  # the client would create it
            raise ArtifactError(f"the folder {where} with the vectors is missing; restore it, or rebuild the index")
        self._client, self._read = connect(where), _reads(where)
        if not call(lambda: self._client.collection_exists(self._name)):
            raise ArtifactError(f"{where} has no collection {self._name}; roll back, or rebuild the index")
        if fault := self._count_fault(call(lambda: self._client.count(self._name, exact=True)).count):
            raise ArtifactError(fault)

    def _count_fault(self, stored: int) -> str | None:
        if stored == self.count:
            return None
        return f"collection {self._name} has {stored:,} vectors, not {self.count:,}; roll back, or rebuild the index"

    def set(self, name: str, value: int) -> None:
        """Set the width of searches."""
        self.ef = value

    def search(self, vectors: Floats, k: int, rows: RowFilter | None = None, *, is_narrow: bool = False) -> ScoredRows:
        """As `VectorIndex.search`. Qdrant evaluates the conditions."""
        from qdrant_client import models

        from index_jobs.engines.qdrant.conditions import to_conditions

        conditions = None if rows is None else to_conditions(rows, self._fields, self.count)
        parameters = None
        if not self._is_local:  # it has none
            rescoring = models.QuantizationSearchParams(rescore=True, oversampling=_OVERSAMPLING)
            parameters = models.SearchParams(
                hnsw_ef=self.ef,
                exact=self.ef is None,
                quantization=rescoring if self._is_quantized else None,
            )
        found = np.full((len(vectors), k), -1, np.int64)
        scores = np.full((len(vectors), k), -np.inf, np.float32)
        requests = [
            models.QueryRequest(query=vector, filter=conditions, params=parameters, limit=min(k, self.count))
            for vector in np.asarray(vectors, np.float32).tolist()
        ]
        size = len(conditions.model_dump_json(exclude_none=True)) if conditions and len(requests) > 1 else 0
        step = max(1, min(BATCH, _FILTER_BYTES // (size + 1)))
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            seconds = _READ_SECONDS + len(part) // _QUERIES_PER_SECOND
            ask = partial(self._client.query_batch_points, self._name, part, timeout=seconds)
            for number, response in enumerate(self._read(ask), start):
                hits = response.points
                found[number, : len(hits)] = [hit.id for hit in hits]
                scores[number, : len(hits)] = [hit.score for hit in hits]
        return scores, found

    def find_fault(self) -> str | None:
        """As `VectorIndex.find_fault`."""
        stored = 0
        try:
            for is_exact in (False, True):  # an exact count reads every id
                stored = self._read(
                    partial(self._client.count, self._name, exact=is_exact, timeout=_READ_SECONDS)
                ).count
                if stored >= self.count:
                    return None
        except StoreUnavailableError as error:
            return str(error)
        return self._count_fault(stored)

    def vectors(self, rows: Rows) -> Floats:
        """As `VectorIndex.vectors`."""
        vectors = np.empty((len(rows), self.dim), np.float32)
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH].tolist()
            ask = partial(
                self._client.retrieve, self._name, part, with_payload=False, with_vectors=True, timeout=_READ_SECONDS
            )
            by_row = {point.id: point.vector for point in self._read(ask)}
            if missing := [row for row in part if row not in by_row]:
                raise StoreUnavailableError(f"collection {self._name} lacks row {missing[0]}; rebuild the index")
            vectors[start : start + len(part)] = [by_row[row] for row in part]
        return vectors


class _Reads:
    """Read from one server, for all threads."""

    def __init__(self) -> None:
        self._fault, self._retry_at, self._responded = "", 0.0, 0.0

    def __call__(self, function: Callable[[], T]) -> T:
        """As `call`. While the server does not respond, one read at a time tries it, and others fail at once."""
        began = time.monotonic()
        if self._fault:
            if began < self._retry_at:
                raise StoreUnavailableError(self._fault)
            self._retry_at = began + _READ_ATTEMPTS * _READ_SECONDS
        try:
            result = call(function, _READ_ATTEMPTS)
        except StoreUnavailableError as error:
            if not _is_silence(error.__cause__):
                self._fault = ""
            elif self._responded < began:  # to no read meanwhile
                self._fault, self._retry_at = str(error), time.monotonic() + _REST_SECONDS
            raise
        self._responded, self._fault = time.monotonic(), ""
        return result


@lru_cache
def _reads(location: str) -> _Reads:
    """Return the reads of a location, which its collections share."""
    return _Reads()


@lru_cache
def connect(location: str) -> "QdrantClient":
    """Return the client of a location; threads share it."""
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise MissingExtraError("vectors in Qdrant", "qdrant") from None
    place: dict[str, Any] = {"location": location} if location == ":memory:" else {"path": location}
    if "://" in location:
        key = os.environ.get(API_KEY, "").strip()  # files of secrets end with a newline
        if not (key.isascii() and key.isprintable()):  # the client's error would show it
            raise StoreUnavailableError(f"Qdrant is unavailable: {API_KEY} has characters that no key has")
        place = {"url": location, "api_key": key or None, "timeout": _SECONDS, "check_compatibility": False}
    client = call(lambda: QdrantClient(**place, force_disable_check_same_thread=True))
    atexit.register(client.close)  # later, the local mode could not
    return client


def call(function: Callable[[], T], attempts: int = _ATTEMPTS) -> T:
    """Call Qdrant. Raise StoreUnavailableError if it refuses, or does not respond in several attempts."""
    for attempt in range(attempts):
        try:
            return function()
        except Exception as error:
            if attempt + 1 == attempts or not _is_temporary(error):
                is_refused = getattr(error, "status_code", None) in (401, 403)
                reason = f"it refuses the key of {API_KEY}: " * is_refused + " ".join(str(error).split())[:300]
                raise StoreUnavailableError(f"Qdrant is unavailable: {reason}") from error
            time.sleep(_PAUSE_SECONDS * 2**attempt)
    raise AssertionError


def _is_temporary(error: Exception) -> bool:
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import UnexpectedResponse

    is_busy = isinstance(error, UnexpectedResponse) and error.status_code in _BUSY
    return is_busy or _is_silence(error) or isinstance(error, ResourceExhaustedResponse)


def _is_silence(error: BaseException | None) -> bool:
    """Return whether an error of the client means that no response came."""
    from qdrant_client.http.exceptions import ResponseHandlingException

    return isinstance(error, ResponseHandlingException)
