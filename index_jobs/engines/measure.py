"""Recall and latency of an index on held-out queries, and the search parameters that
they choose.

- Queries are texts, since they lie elsewhere than images: captions and common words. A
  word needs a wider search than a caption, and people type words.
- A neighbour counts by its score, since a search may return any of several equal
  images.
- Half of the queries choose the fastest parameters that reach the target; the other
  half measures the recall.
"""

import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from dcar_core import Encoder
from dcar_core.model.tokenizer import common_words
from dcar_core.util.arrays import Blocks, Floats, Rows
from dcar_core.util.metrics import TIE_TOLERANCE
from index_jobs.engines.protocol import (
    HeldOutQueries,
    ScoredRows,
    merge_top_k,
    no_results,
)

MAX_QUERIES = 1000
NEIGHBOURS = 10
TIMED_QUERIES = 200
# tuning aims above the target by this part of 1 - target, for the sake of other queries
_RECALL_MARGIN = 0.25
_MIN_DIVIDED = 40  # fewer queries are used for tuning and measuring alike
# candidates to re-rank, in multiples of k
_FACTORS = (64, 32, 16, 12, 8, 6, 5, 4, 3, 2, 1)
# fewer candidates are not tried after a latency of this multiple of the lowest
_SLOWER = 1.2
_STEPS = 32  # a width is exact to this fraction of itself
_NOISE = 0.0005  # differences in recall below this are not a gain


def text_queries(table: pa.Table, encoder: Encoder) -> HeldOutQueries:
    """Return evenly spread captions and at least as many common words as held-out
    queries.
    """
    step = max(1, -(-2 * table.num_rows // MAX_QUERIES))
    # read cell by cell, because `take` joins all text first and fails at 2 GiB
    column = table["caption"]
    sampled = [column[row].as_py() for row in range(0, table.num_rows, step)]
    captions = [caption for caption in sampled if caption]
    words = common_words(2 * len(sampled) - len(captions))
    return HeldOutQueries(
        encoder.encode_text(captions + words),
        "captions and words" if captions else "words",
    )


def sample_vectors(blocks: Blocks, count: int, size: int) -> Floats:
    """Return at most `size` vectors, evenly spread."""
    step = max(1, -(-count // size))
    parts = []
    start = 0
    for block in blocks():
        parts.append(np.array(block[-start % step :: step]))
        start += len(block)
    return np.concatenate(parts)


class Benchmark:
    """Held-out queries with their exact neighbours, which measure indexes of the same
    vectors.
    """

    def __init__(
        self,
        blocks: Blocks,
        queries: HeldOutQueries,
        *,
        target: float,
        exact: bool = False,
    ) -> None:
        """target: the recall to reach. exact: the indexes are exact, so their recall is
        1.
        """
        self.aim = target + _RECALL_MARGIN * (1 - target)
        self.queries = queries
        self.target = target
        self.is_exact = exact
        self._blocks = blocks
        self._scores = (
            np.empty((0, NEIGHBOURS), np.float32)
            if exact
            else find_neighbours(blocks, queries.vectors)[0]
        )
        everything = np.arange(len(queries.vectors))
        if len(everything) >= _MIN_DIVIDED:
            divided = (everything[::2], everything[1::2])
        else:
            divided = (everything, everything)
        self.tuning_queries, self._measuring_queries = divided

    def measure(
        self,
        index: Any,
        parameters: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Return the measurements of anything with a `search`, as in the manifest."""
        return {
            "queries": len(self._measuring_queries),
            "query_source": self.queries.source,
            "target_recall": self.target,
            "parameters": dict(parameters or {}),
            "recall_at_10": round(self.recall(index, self._measuring_queries), 4),
            **measure_latency(
                index, self.queries.vectors[self._measuring_queries][:TIMED_QUERIES]
            ),
        }

    def recall(self, index: Any, chosen: Rows) -> float:
        """Return the recall at 10 of the chosen queries: results that reach the score
        of the last exact neighbour.
        """
        if self.is_exact:
            return 1.0
        queries = np.ascontiguousarray(self.queries.vectors[chosen])
        exact = self._scores[chosen]
        rows = index.search(queries, NEIGHBOURS)[1]
        scores = np.einsum("qe,qke->qk", queries, self._vectors(rows))
        hits = (rows >= 0) & (scores >= exact[:, -1:] - TIE_TOLERANCE)
        total = int(np.isfinite(exact).sum())
        return int(hits.sum()) / total if total else 1.0

    def _vectors(self, rows: Rows) -> Floats:
        """Return the vectors of rows (...): (..., E). One block is in memory at a
        time.
        """
        vectors = np.zeros((*rows.shape, self.queries.vectors.shape[1]), np.float32)
        start = 0
        for block in self._blocks():
            inside = (rows >= start) & (rows < start + len(block))
            vectors[inside] = block[rows[inside] - start]
            start += len(block)
        return vectors


def find_neighbours(blocks: Blocks, queries: Floats) -> ScoredRows:
    """Return the ten nearest neighbours of queries (q, E) by brute force."""
    start = 0
    best = no_results(len(queries))
    for block in blocks():
        if not len(block):
            continue
        scores, rows = faiss.knn(
            queries,
            np.ascontiguousarray(block),
            min(NEIGHBOURS, len(block)),
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        best = merge_top_k([best[0], scores], [best[1], rows + start], NEIGHBOURS)
        start += len(block)
    return best


def measure_latency(index: Any, vectors: Floats) -> dict[str, float]:
    """Return latencies in milliseconds of one query at a time on one core, as in a
    service without load.
    """
    times = []
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for vector in vectors:
            start = time.perf_counter()
            index.search(vector[None], NEIGHBOURS)
            times.append(1000 * (time.perf_counter() - start))
    finally:
        faiss.omp_set_num_threads(threads)
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "latency_ms_p50": round(float(p50), 3),
        "latency_ms_p99": round(float(p99), 3),
    }


def tune(benchmark: Benchmark, index: Any, tunable: Any) -> dict[str, Any]:
    """Set the fastest search parameters that reach the target, of anything with a
    `search`.

    Return the measurements, as in the manifest. `tunable` has a method `set` for
    parameters by name, and the `width` of searches, the name of a parameter or None,
    with `min_width`, `max_width` and `has_reranking`, of a k_factor.

    - The width is doubled until the recall reaches the target, then bisected to a 32nd.
      Kinds that re-rank candidates start with many; with fewer, they need a wider
      search. The lowest latency wins.
    - A compressing kind has a recall ceiling. Below the target, the narrowest search
      near it is chosen.
    """
    parameters = {} if benchmark.is_exact else _choose(benchmark, index, tunable)
    recall = round(benchmark.recall(index, benchmark.tuning_queries), 4)
    return benchmark.measure(index, parameters) | {"tuning_recall_at_10": recall}


def _choose(benchmark: Benchmark, index: Any, tunable: Any) -> dict[str, int]:
    """Set and return the fastest parameters that reach the aim."""
    target = benchmark.target
    aim = benchmark.aim
    timed = benchmark.queries.vectors[benchmark.tuning_queries][: TIMED_QUERIES // 2]
    points = list[tuple[float, float, dict[str, int]]]()  # recall, latency, parameters
    width: int | None = None
    for factor in _FACTORS if tunable.has_reranking else (None,):
        if factor:
            tunable.set("k_factor", factor)
        recall, width = _narrowest(
            benchmark,
            index,
            tunable,
            width or tunable.min_width,
        )
        if points and recall < min(points[0][0], aim) - _NOISE:
            break  # so few candidates lose neighbours at any width
        parameters = {
            name: n
            for name, n in ((tunable.width, width), ("k_factor", factor))
            if name and n
        }
        latency = measure_latency(index, timed)["latency_ms_p50"]
        points.append((recall, latency, parameters))
        if latency > _SLOWER * min(point[1] for point in points):
            break
    highest = max(recall for recall, _, _ in points)
    if highest < target:
        required = highest
    else:
        required = max(target, min(aim, highest - 2 * _NOISE))
    best = min(
        (point for point in points if point[0] >= required), key=lambda point: point[1]
    )[2]
    for name, value in best.items():
        tunable.set(name, value)
    return best


def _narrowest(
    benchmark: Benchmark,
    index: Any,
    tunable: Any,
    lowest: int,
) -> tuple[float, int | None]:
    """Set the narrowest search, at least `lowest`, that reaches the aim or the ceiling;
    return its recall and width.
    """
    if not (name := tunable.width):
        return benchmark.recall(index, benchmark.tuning_queries), None
    # by width
    aim = benchmark.aim
    recalls = dict[int, float]()

    def measure(width: int) -> float:
        tunable.set(name, width)
        recalls[width] = benchmark.recall(index, benchmark.tuning_queries)
        return recalls[width]

    width = min(lowest, tunable.max_width)
    while measure(width) < aim and width < tunable.max_width:
        if width >= 64 and recalls[width] - recalls.get(width // 2, 0.0) < _NOISE:
            break  # too few candidates are re-ranked, or the kind is too coarse
        width = min(2 * width, tunable.max_width)
    highest = max(recalls.values())
    goal = aim if highest >= aim else highest - _NOISE
    if highest >= benchmark.target:
        goal = max(goal, benchmark.target)
    width = min(tried for tried, reached in recalls.items() if reached >= goal)
    low = max((tried for tried in recalls if tried < width), default=width)
    step = max(1, width // _STEPS)
    between = range(low + step, width, step)
    width = [*between, width][bisect_left(between, goal, key=measure)]
    tunable.set(name, width)
    return recalls[width], width
