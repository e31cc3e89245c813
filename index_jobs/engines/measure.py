"""Recall and latency of an index on held-out queries.

- Queries are captions where the gallery has them, because people search by text and texts lie elsewhere than images.
  Otherwise they are images of the gallery, each without itself.
- A neighbour counts by its score, not by its row, since a search may return any of several equal images.
- Half of the queries may choose search parameters; the other half measures the manifest's recall.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from dcar_core.util.arrays import Blocks, Floats, Mask, Rows
from dcar_core.util.retrieval_metrics import TIE_TOLERANCE
from index_jobs.engines.protocol import HeldOutQueries, merge_top_k

MAX_QUERIES = 1000
NEIGHBOURS = 10
_TIMED_QUERIES = 200
_MIN_DIVIDED = 40  # fewer queries are used for tuning and measuring alike
_SCORED_VECTORS = 1024  # copied at a time


def gallery_queries(blocks: Blocks, count: int) -> HeldOutQueries:
    """Return evenly spread vectors of the gallery, each to be searched for without itself."""
    step = max(1, -(-count // MAX_QUERIES))
    vectors = sample_vectors(blocks, count, MAX_QUERIES)
    return HeldOutQueries(vectors, "images", np.arange(0, count, step)[: len(vectors)])


def sample_vectors(blocks: Blocks, count: int, size: int) -> Floats:
    """Return at most `size` vectors, evenly spread."""
    step = max(1, -(-count // size))
    parts, start = [], 0
    for block in blocks():
        parts.append(np.array(block[-start % step :: step]))
        start += len(block)
    return np.concatenate(parts)


class Benchmark:
    """Held-out queries with their exact neighbours, which measure indexes of the same vectors."""

    def __init__(self, blocks: Blocks, queries: HeldOutQueries, *, target: float, exact: bool = False) -> None:
        """target: the recall that searches aim at. exact: the indexes are exact, so their recall is 1."""
        self.queries, self.target, self._blocks = queries, target, blocks
        self._truth = None if exact else find_neighbours(blocks, queries)
        everything = np.arange(len(queries.vectors))
        divided = (everything[::2], everything[1::2]) if len(everything) >= _MIN_DIVIDED else (everything, everything)
        self.tuning_queries, self._measuring_queries = divided

    @property
    def is_exact(self) -> bool:
        return self._truth is None

    def measure(self, index: Any, parameters: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the measurements of anything with a `search`, as in the manifest."""
        return {
            "queries": len(self._measuring_queries),
            "query_source": self.queries.source,
            "target_recall": self.target,
            "parameters": dict(parameters or {}),
            "recall_at_10": round(self.recall(index, self._measuring_queries), 4),
            **measure_latency(index, self.queries.vectors[self._measuring_queries][:_TIMED_QUERIES]),
        }

    def tuning_latency(self, index: Any) -> float:
        """Return the median latency in milliseconds of some of the queries that tune."""
        return measure_latency(index, self.queries.vectors[self.tuning_queries][: _TIMED_QUERIES // 2])[
            "latency_ms_p50"
        ]

    def recall(self, index: Any, chosen: Rows) -> float:
        """Return the recall at 10 of the chosen queries."""
        if self._truth is None:
            return 1.0
        queries = self.queries
        _, rows = index.search(np.ascontiguousarray(queries.vectors[chosen]), NEIGHBOURS + 1)
        results = drop_own_rows(rows, queries.own_rows[chosen])
        total = int((self._truth.rows[chosen] >= 0).sum())
        return int(self._truth.hits(self._blocks, queries, chosen, results).sum()) / total if total else 1.0


@dataclass(frozen=True)
class ExactNeighbours:
    """Exact neighbours of queries: rows int64 (q, 10), -1 where there are fewer.

    lowest: score of the last neighbour, float32 (q,), -inf where there are fewer.
    tied: True where other rows may have the same score.
    """

    rows: Rows
    lowest: Floats
    tied: Mask

    def hits(self, blocks: Blocks, queries: HeldOutQueries, chosen: Rows, results: Rows) -> Mask:
        """Return which results, int64 (n, k), of the chosen queries are neighbours: bool (n, k).

        The exact ten count, and where others tie with the last of them, every row that reaches its score. Scores are
        computed from the vectors themselves, with one block in memory at a time.
        """
        hits: Mask = (results[:, :, None] == self.rows[chosen][:, None, :]).any(2) & (results >= 0)
        query_numbers, positions = np.nonzero(~hits & (results >= 0) & self.tied[chosen][:, None])
        rows, start = results[query_numbers, positions], 0
        if not len(rows):
            return hits
        for block in blocks():
            inside = np.flatnonzero((rows >= start) & (rows < start + len(block)))
            for part in np.split(inside, range(_SCORED_VECTORS, len(inside), _SCORED_VECTORS)):
                numbers = chosen[query_numbers[part]]
                scores = np.einsum("ne,ne->n", queries.vectors[numbers], block[rows[part] - start])
                hits[query_numbers[part], positions[part]] = scores >= self.lowest[numbers] - TIE_TOLERANCE
            start += len(block)
        return hits


def find_neighbours(blocks: Blocks, queries: HeldOutQueries) -> ExactNeighbours:
    """Return the nearest neighbours by brute force, without each query's own row."""
    k = NEIGHBOURS + 2  # its own row, and one more that shows whether the last is tied
    q = len(queries.vectors)
    best_scores = np.full((q, k), -np.inf, np.float32)
    best_rows = np.full((q, k), -1, np.int64)
    start = 0
    for block in blocks():
        if not len(block):
            continue
        scores, rows = faiss.knn(
            queries.vectors, np.ascontiguousarray(block), min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best_scores, best_rows = merge_top_k([best_scores, scores], [best_rows, rows + start], k)
        start += len(block)
    own_last = np.argsort(best_rows == queries.own_rows[:, None], 1, kind="stable")[:, : NEIGHBOURS + 1]
    scores, rows = np.take_along_axis(best_scores, own_last, 1), np.take_along_axis(best_rows, own_last, 1)
    lowest = scores[:, NEIGHBOURS - 1]
    return ExactNeighbours(rows[:, :NEIGHBOURS], lowest, scores[:, NEIGHBOURS] >= lowest - 2 * TIE_TOLERANCE)


def drop_own_rows(rows: Rows, own_rows: Rows) -> Rows:
    """Return int64 (q, 11) as (q, 10) without the own row of each query."""
    kept = [row[row != own][:NEIGHBOURS] for row, own in zip(rows, own_rows, strict=True)]
    return np.stack([np.pad(row, (0, NEIGHBOURS - len(row)), constant_values=-1) for row in kept])


def measure_latency(index: Any, vectors: Floats) -> dict[str, float]:
    """Return latencies in milliseconds of one query at a time on one core, as in a service without load."""
    times = []
    with _one_core():
        for vector in vectors:
            start = time.perf_counter()
            index.search(vector[None], NEIGHBOURS)
            times.append(1000 * (time.perf_counter() - start))
    p50, p99 = np.percentile(times, [50, 99])
    return {"latency_ms_p50": round(float(p50), 3), "latency_ms_p99": round(float(p99), 3)}


@contextmanager
def _one_core() -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
