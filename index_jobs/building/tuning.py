"""Search parameters by measurement: the fastest that reach a target recall on held-out queries.

- Queries are captions where the gallery has them, because people search by text and texts lie elsewhere than images.
  Otherwise they are images of the gallery, each without itself.
- Half of the queries choose the parameters, the other half measures the manifest's recall.
- A neighbour counts by its score, not by its row, since a search may return any of several equal images.
- The width (nprobe, efSearch) is doubled until the recall reaches the target, then bisected to a 32nd. Kinds that
  re-rank candidates (k_factor) start with many candidates; with fewer, they need a wider search. The lowest latency
  wins.
- A compressing kind has a recall ceiling. Below the target, the narrowest search near it is chosen.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import faiss
import numpy as np

from dcar_core.util.arrays import Blocks, Floats, Mask, Rows
from dcar_core.util.retrieval_metrics import TIE_TOLERANCE
from index_jobs.options import RebuildOptions
from index_jobs.store.faiss_search import merge_top_k

logger = logging.getLogger(__name__)

TARGET_RECALL = RebuildOptions.target_recall
MAX_QUERIES = 1000
NEIGHBOURS = 10
_TIMED_QUERIES = 200
_MAX_GRAPH_WIDTH = 4096
_FACTORS = (64, 32, 16, 12, 8, 6, 5, 4, 3, 2, 1)  # candidates to re-rank, in multiples of k
_SLOWER = 1.2  # fewer candidates are not tried after a latency of this multiple of the lowest
_STEPS = 32  # a width is exact to this fraction of itself
_NOISE = 0.0005  # differences in recall below this are not a gain
_RESERVE = 0.25  # the aim exceeds the target by this part of 1 - target, for the sake of other queries
_MIN_DIVIDED = 40  # fewer queries are used for tuning and measuring alike
_SCORED_VECTORS = 1024  # copied at a time
_COARSE_WIDTH = 64  # of a graph over lists; its default of 16 misses some of the nearest lists


@dataclass(frozen=True)
class HeldOutQueries:
    """Held-out queries: vectors float32 (q, E), their source, and for each the row to leave out, or -1."""

    vectors: Floats
    source: str
    own_rows: Rows


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


class Tuner:
    """Held-out queries with their exact neighbours, to tune and measure indexes of the same vectors."""

    def __init__(
        self, blocks: Blocks, queries: HeldOutQueries, *, target: float = TARGET_RECALL, exact: bool = False
    ) -> None:
        """exact: the index is an exact search, which needs no tuning."""
        self._queries, self._target = queries, target
        self._aim = target + _RESERVE * (1 - target)
        self._blocks = blocks
        self._truth = None if exact else find_neighbours(blocks, queries)
        everything = np.arange(len(queries.vectors))
        divided = (everything[::2], everything[1::2]) if len(everything) >= _MIN_DIVIDED else (everything, everything)
        self._tuning_queries, self._measuring_queries = divided

    def tune(self, index: Any, searched: Any = None, tunable: "Tunable | None" = None) -> dict[str, Any]:
        """Set the search parameters of an index; return its measurements, as in the manifest.

        Args:
            index: a FAISS index on the CPU, or with `tunable` anything with a `search`.
            searched: returns the object to measure, such as a GPU copy of the tuned index; None for the index itself.
            tunable: the parameters of an index that is not of FAISS.
        """
        parameters = {} if self._truth is None else self._tune(index, tunable or SearchParameters(index))
        tuned = round(self._recall(index, self._tuning_queries), 4)
        return self.measure(searched(index) if searched else index, parameters) | {"tuning_recall_at_10": tuned}

    def measure(self, index: Any, parameters: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the measurements of anything with a `search`."""
        return {
            "queries": len(self._measuring_queries),
            "query_source": self._queries.source,
            "target_recall": self._target,
            "parameters": dict(parameters or {}),
            "recall_at_10": round(self._recall(index, self._measuring_queries), 4),
            **measure_latency(index, self._queries.vectors[self._measuring_queries][:_TIMED_QUERIES]),
        }

    def _tune(self, index: Any, tunable: "Tunable") -> dict[str, int]:
        timed = self._queries.vectors[self._tuning_queries][: _TIMED_QUERIES // 2]
        points = list[tuple[float, float, dict[str, int]]]()  # recall, latency, parameters
        width: int | None = None
        for factor in _FACTORS if tunable.has_reranking else (None,):
            tunable.set("k_factor", factor)
            recall, width = self._narrowest(index, tunable, width or tunable.min_width)
            if points and recall < min(points[0][0], self._aim) - _NOISE:
                break  # so few candidates lose neighbours at any width
            parameters = {name: n for name, n in ((tunable.width, width), ("k_factor", factor)) if name and n}
            latency = measure_latency(index, timed)["latency_ms_p50"]
            points.append((recall, latency, parameters))
            if latency > _SLOWER * min(point[1] for point in points):
                break
        highest = max(recall for recall, _, _ in points)
        required = highest if highest < self._target else max(self._target, min(self._aim, highest - 2 * _NOISE))
        best = min((point for point in points if point[0] >= required), key=lambda point: point[1])[2]
        for name, value in best.items():
            tunable.set(name, value)
        return best

    def _narrowest(self, index: Any, tunable: "Tunable", lowest: int) -> tuple[float, int | None]:
        """Set the narrowest search, at least `lowest`, that reaches the aim, or comes near the ceiling.

        Returns: its recall and width.
        """
        if not tunable.width:
            return self._recall(index, self._tuning_queries), None
        recalls: dict[int, float] = {}  # by width
        width = min(lowest, tunable.max_width)
        while True:
            tunable.set(tunable.width, width)
            recall = recalls[width] = self._recall(index, self._tuning_queries)
            # too few candidates are re-ranked, or the kind is too coarse
            is_stuck = width >= 64 and recall - recalls.get(width // 2, 0.0) < _NOISE
            if recall >= self._aim or width >= tunable.max_width or is_stuck:
                break
            width = min(2 * width, tunable.max_width)
        highest = max(recalls.values())
        near_ceiling = max(highest - _NOISE, self._target) if highest >= self._target else highest - _NOISE
        goal = self._aim if recall >= self._aim else near_ceiling
        width = min(tried for tried, reached in recalls.items() if reached >= goal)
        low = max((tried for tried in recalls if tried < width), default=width)
        while width - low > max(1, width // _STEPS):
            middle = (low + width) // 2
            tunable.set(tunable.width, middle)
            recalls[middle] = self._recall(index, self._tuning_queries)
            if recalls[middle] >= goal:
                width = middle
            else:
                low = middle
        tunable.set(tunable.width, width)
        return recalls[width], width

    def _recall(self, index: Any, chosen: Rows) -> float:
        if self._truth is None:
            return 1.0
        queries = self._queries
        _, rows = index.search(np.ascontiguousarray(queries.vectors[chosen]), NEIGHBOURS + 1)
        results = drop_own_rows(rows, queries.own_rows[chosen])
        total = int((self._truth.rows[chosen] >= 0).sum())
        return int(self._truth.hits(self._blocks, queries, chosen, results).sum()) / total if total else 1.0


class Tunable(Protocol):
    """Parameters that tuning can set; see `SearchParameters`."""

    width: str | None
    min_width: int
    max_width: int
    has_reranking: bool

    def set(self, name: str, value: int | None) -> None: ...


class SearchParameters:
    """Tunable parameters of an index: the width of its search, and the number of re-ranked candidates.

    width: name of the width parameter, None for kinds without one.
    """

    def __init__(self, index: Any) -> None:
        self._space, self._index = faiss.ParameterSpace(), index
        self.width: str | None = None
        self.min_width, self.max_width = 1, 0
        self._has_coarse_graph = self._accepts("quantizer_efSearch", _COARSE_WIDTH)
        self.has_reranking = self._accepts("k_factor_rf", 1)
        if (inverted := faiss.try_extract_index_ivf(index)) is not None:
            self.width, self.max_width = "nprobe", int(inverted.nlist)
        elif self._accepts("efSearch", 16):
            self.width, self.min_width, self.max_width = "efSearch", 16, _MAX_GRAPH_WIDTH

    def set(self, name: str, value: int | None) -> None:
        """Set a parameter by its name; None leaves it unchanged."""
        if value is None:
            return
        self._space.set_index_parameter(self._index, "k_factor_rf" if name == "k_factor" else name, value)
        if name == "nprobe" and self._has_coarse_graph:
            self._space.set_index_parameter(self._index, "quantizer_efSearch", max(_COARSE_WIDTH, 2 * value))

    def _accepts(self, name: str, value: int) -> bool:
        try:
            self._space.set_index_parameter(self._index, name, value)
        except RuntimeError:
            return False
        return True


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
        query_numbers, places = np.nonzero(~hits & (results >= 0) & self.tied[chosen][:, None])
        rows, start = results[query_numbers, places], 0
        if not len(rows):
            return hits
        for block in blocks():
            inside = np.flatnonzero((rows >= start) & (rows < start + len(block)))
            for part in np.split(inside, range(_SCORED_VECTORS, len(inside), _SCORED_VECTORS)):
                numbers = chosen[query_numbers[part]]
                scores = np.einsum("ne,ne->n", queries.vectors[numbers], block[rows[part] - start])
                hits[query_numbers[part], places[part]] = scores >= self.lowest[numbers] - TIE_TOLERANCE
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
