"""Recall and latency of an index on held-out queries.

- Queries are captions where the gallery has them, because texts lie elsewhere than images. Otherwise they are images
  of the gallery, each without itself.
- A neighbour counts by its score, since a search may return any of several equal images.
- Half of the queries may choose search parameters; the other half measures the manifest's recall.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from dcar_core import Encoder
from dcar_core.util.arrays import Blocks, Floats, Mask, Rows
from dcar_core.util.metrics import TIE_TOLERANCE
from index_jobs.engines.protocol import HeldOutQueries, merge_top_k

MAX_QUERIES = 1000
NEIGHBOURS = 10
TIMED_QUERIES = 200
_RECALL_MARGIN = 0.25  # tuning aims above the target by this part of 1 - target, for the sake of other queries
_MIN_DIVIDED = 40  # fewer queries are used for tuning and measuring alike
SCORED_VECTORS = 1024  # copied at a time


def caption_queries(table: pa.Table, encoder: Encoder) -> HeldOutQueries | None:
    """Return evenly spread captions as held-out queries; None if less than half of the images have one."""
    step = max(1, -(-table.num_rows // MAX_QUERIES))
    column = table["caption"]  # read cell by cell, because `take` joins all text first and fails at 2 GiB
    sampled = [column[row].as_py() for row in range(0, table.num_rows, step)]
    captions = [caption for caption in sampled if caption]
    if 2 * len(captions) < len(sampled):
        return None
    return HeldOutQueries(encoder.encode_text(captions), "captions", np.full(len(captions), -1))


def gallery_queries(blocks: Blocks, count: int) -> HeldOutQueries:
    """Return evenly spread vectors of the gallery, each to be searched for without itself."""
    vectors = sample_vectors(blocks, count, MAX_QUERIES)
    return HeldOutQueries(vectors, "images", np.arange(0, count, -(-count // MAX_QUERIES))[: len(vectors)])


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
        """target: the recall to reach. exact: the indexes are exact, so their recall is 1."""
        self.aim = target + _RECALL_MARGIN * (1 - target)
        self.queries, self.target, self.is_exact, self._blocks = queries, target, exact, blocks
        self._truth = None if exact else find_neighbours(blocks, queries)
        everything = np.arange(len(queries.vectors))
        divided = (everything[::2], everything[1::2]) if len(everything) >= _MIN_DIVIDED else (everything, everything)
        self.tuning_queries, self._measuring_queries = divided

    def measure(self, index: Any, parameters: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the measurements of anything with a `search`, as in the manifest."""
        return {
            "queries": len(self._measuring_queries),
            "query_source": self.queries.source,
            "target_recall": self.target,
            "parameters": dict(parameters or {}),
            "recall_at_10": round(self.recall(index, self._measuring_queries), 4),
            **measure_latency(index, self.queries.vectors[self._measuring_queries][:TIMED_QUERIES]),
        }

    def recall(self, index: Any, chosen: Rows) -> float:
        """Return the recall at 10 of the chosen queries."""
        if self._truth is None:
            return 1.0
        queries = self.queries
        _, rows = index.search(np.ascontiguousarray(queries.vectors[chosen]), NEIGHBOURS + 1)
        results = np.take_along_axis(rows, _own_last(rows, queries.own_rows[chosen]), 1)[:, :NEIGHBOURS]
        total = int((self._truth.rows[chosen] >= 0).sum())
        return int(self._truth.hits(self._blocks, queries, chosen, results).sum()) / total if total else 1.0


@dataclass(frozen=True)
class ExactNeighbours:
    """Exact neighbours of queries."""

    rows: Rows  # int64 (q, 10), -1 where there are fewer
    lowest: Floats  # score of the last neighbour, float32 (q,), -inf where there are fewer
    tied: Mask  # where other rows may have the same score

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
            for part in np.split(inside, range(SCORED_VECTORS, len(inside), SCORED_VECTORS)):
                numbers = chosen[query_numbers[part]]
                scores = np.einsum("ne,ne->n", queries.vectors[numbers], block[rows[part] - start])
                hits[query_numbers[part], positions[part]] = scores >= self.lowest[numbers] - TIE_TOLERANCE
            start += len(block)
        return hits


def find_neighbours(blocks: Blocks, queries: HeldOutQueries) -> ExactNeighbours:
    """Return the nearest neighbours by brute force, without each query's own row."""
    k, start, q = NEIGHBOURS + 2, 0, len(queries.vectors)  # its own row, and one that shows whether the last is tied
    best_scores, best_rows = np.empty((q, 0), np.float32), np.empty((q, 0), np.int64)
    for block in blocks():
        if not len(block):
            continue
        scores, rows = faiss.knn(
            queries.vectors, np.ascontiguousarray(block), min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best_scores, best_rows = merge_top_k([best_scores, scores], [best_rows, rows + start], k)
        start += len(block)
    own_last = _own_last(best_rows, queries.own_rows)
    scores, rows = np.take_along_axis(best_scores, own_last, 1), np.take_along_axis(best_rows, own_last, 1)
    lowest = scores[:, NEIGHBOURS - 1]
    return ExactNeighbours(rows[:, :NEIGHBOURS], lowest, scores[:, NEIGHBOURS] >= lowest - 2 * TIE_TOLERANCE)


def _own_last(rows: Rows, own_rows: Rows) -> Rows:
    """Return the order of each query's rows in which its own row is the last."""
    order: Rows = np.argsort(rows == own_rows[:, None], 1, kind="stable")
    return order


def measure_latency(index: Any, vectors: Floats) -> dict[str, float]:
    """Return latencies in milliseconds of one query at a time on one core, as in a service without load."""
    times, threads = [], faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for vector in vectors:
            start = time.perf_counter()
            index.search(vector[None], NEIGHBOURS)
            times.append(1000 * (time.perf_counter() - start))
    finally:
        faiss.omp_set_num_threads(threads)
    p50, p99 = np.percentile(times, [50, 99])
    return {"latency_ms_p50": round(float(p50), 3), "latency_ms_p99": round(float(p99), 3)}
