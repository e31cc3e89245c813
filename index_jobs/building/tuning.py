"""Search parameters by measurement: the fastest that reach a target recall on held-out queries.

- Queries are texts where the gallery has captions, since that is how people search and texts lie elsewhere than
  pictures; else the gallery's own pictures, each without itself.
- Half of the queries choose the parameters, the other half says what recall they give; so the manifest's recall was not
  fitted.
- A neighbour counts as found by its score, not by its row: of pictures that are the same, such as placeholders, any is
  as good as another, and which of them a search gives is chance.
- Latency is that of one query on one core: a service answers others on the other cores.
- The width of a search (nprobe, efSearch) is doubled until the target is reached, then halved in; kinds that rank
  candidates again (k_factor) are tried with several factors, and the lowest latency wins.
- What compresses has a ceiling. Where that lies below the aim, the narrowest search that comes near it is taken: going
  through ever more for the last hit in two thousand costs several times as much.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Blocks, Floats
from dcar_core.util.retrieval_metrics import TIE_TOLERANCE
from index_jobs.options import RebuildOptions
from index_jobs.store.faiss_search import merge_top_k

logger = logging.getLogger(__name__)


TARGET_RECALL = RebuildOptions.target_recall
MAX_QUERIES = 1000
NEIGHBOURS = 10
_TIMED_QUERIES = 200
_WIDEST_GRAPH = 4096
_FACTORS = (1, 2, 4, 8, 16, 32, 64)  # times k candidates are ranked again
_BISECTIONS = 3
_NOISE = 0.0005  # of a recall: so little more is no gain
_RESERVE = 0.25  # of what the target lets be missed, so that other queries reach it too
_FEW = 40  # queries that are not worth dividing
_SCORED = 1024  # vectors that are copied at a time
_COARSE_WIDTH = 64  # of the search for lists by a graph; its default of 16 misses some of the nearest


@dataclass(frozen=True)
class Queries:
    """Held-out queries: vectors float32 (q, E), where they come from, and for each the row to leave out, or -1."""

    vectors: Floats
    source: str
    own_rows: NDArray[np.int64]


def own_queries(blocks: Blocks, count: int) -> Queries:
    """Vectors of the gallery, evenly spread, each to be searched for without itself."""
    step = max(1, -(-count // MAX_QUERIES))
    vectors = sample(blocks, count, MAX_QUERIES)
    return Queries(vectors, "pictures", np.arange(0, count, step)[: len(vectors)])


def sample(blocks: Blocks, count: int, size: int) -> Floats:
    """At most `size` vectors, evenly spread."""
    step = max(1, -(-count // size))
    parts, start = [], 0
    for block in blocks():
        parts.append(np.array(block[-start % step :: step]))
        start += len(block)
    return np.concatenate(parts)


class Tuning:
    """Held-out queries with their exact neighbours, to tune and measure indexes of the same vectors."""

    def __init__(self, blocks: Blocks, queries: Queries, *, target: float = TARGET_RECALL, exact: bool = False) -> None:
        self._queries, self._target = queries, target
        self._aim = target + _RESERVE * (1 - target)
        self._blocks = blocks
        self._truth = None if exact else neighbours(blocks, queries)
        every = np.arange(len(queries.vectors))
        divided = len(every) >= _FEW
        self._tuned = every[::2] if divided else every
        self._held_out = every[1::2] if divided else every

    def run(self, index: Any, searched: Any = None) -> dict[str, Any]:
        """Set the index's parameters; what was measured, as it stands in the manifest.

        Args:
            index: a FAISS index on the CPU.
            searched: makes what is measured of the tuned index, such as its copy on a GPU; None for itself.
        """
        parameters = {} if self._truth is None else self._tune(index)
        return self.measure(searched(index) if searched else index, parameters)

    def measure(self, index: Any, parameters: Mapping[str, int] | None = None) -> dict[str, Any]:
        """As `run`, for what is not tuned here, or was already; index needs a `search` alone."""
        recall = 1.0 if self._truth is None else round(self._recall(index, self._held_out), 4)
        return {
            "queries": len(self._held_out),
            "query_source": self._queries.source,
            "target_recall": self._target,
            "parameters": dict(parameters or {}),
            "recall_at_10": recall,
            **latency(index, self._queries.vectors[self._held_out][:_TIMED_QUERIES]),
        }

    def _tune(self, index: Any) -> dict[str, int]:
        knobs = Knobs(index)
        points = list[tuple[float, float, dict[str, int]]]()
        for factor in _FACTORS if knobs.refines else (None,):
            knobs.set("k_factor", factor)
            reached, width = self._narrowest(index, knobs)
            parameters = {name: n for name, n in ((knobs.width, width), ("k_factor", factor)) if name and n}
            time_taken = latency(index, self._queries.vectors[self._tuned][: _TIMED_QUERIES // 2])["latency_ms_p50"]
            points.append((reached, time_taken, parameters))
        highest = max(reached for reached, _, _ in points)
        enough = highest if highest < self._target else max(self._target, min(self._aim, highest - 2 * _NOISE))
        best = min((point for point in points if point[0] >= enough), key=lambda point: point[1])[2]
        for name, value in best.items():
            knobs.set(name, value)
        return best

    def _narrowest(self, index: Any, knobs: "Knobs") -> tuple[float, int | None]:
        """Set the narrowest search that reaches the aim or comes near what can be reached; its recall and width."""
        if not knobs.width:
            return self._recall(index, self._tuned), None
        tried: dict[int, float] = {}
        width = min(knobs.narrowest, knobs.widest)
        while True:
            knobs.set(knobs.width, width)
            recall = tried[width] = self._recall(index, self._tuned)
            # ranked again too few, or a kind that is too coarse
            stuck = width >= 64 and recall - tried.get(width // 2, 0.0) < _NOISE
            if recall >= self._aim or width >= knobs.widest or stuck:
                break
            width = min(2 * width, knobs.widest)
        top = max(tried.values())
        near = max(top - _NOISE, self._target) if top >= self._target else top - _NOISE
        goal = self._aim if recall >= self._aim else near
        width = min(each for each, reached in tried.items() if reached >= goal)
        low = max((each for each in tried if each < width), default=width)
        for _ in range(_BISECTIONS):
            middle = (low + width) // 2
            if middle == low:
                break
            knobs.set(knobs.width, middle)
            tried[middle] = self._recall(index, self._tuned)
            if tried[middle] >= goal:
                width = middle
            else:
                low = middle
        knobs.set(knobs.width, width)
        return tried[width], width

    def _recall(self, index: Any, chosen: NDArray[np.int64]) -> float:
        assert self._truth is not None
        queries = self._queries
        _, rows = index.search(np.ascontiguousarray(queries.vectors[chosen]), NEIGHBOURS + 1)
        found = without_own(rows, queries.own_rows[chosen])
        wanted = int((self._truth.rows[chosen] >= 0).sum())
        return int(self._truth.hits(self._blocks, queries, chosen, found).sum()) / wanted if wanted else 1.0


class Knobs:
    """What an index can be tuned by: the width of its search, and how many candidates are ranked again."""

    def __init__(self, index: Any) -> None:
        import faiss

        self._space, self._index = faiss.ParameterSpace(), index
        self.width: str | None = None
        self.narrowest, self.widest = 1, 0
        self._coarse = self._knows("quantizer_efSearch", _COARSE_WIDTH)  # lists that a graph finds
        self.refines = self._knows("k_factor_rf", 1)
        if (inverted := faiss.try_extract_index_ivf(index)) is not None:
            self.width, self.widest = "nprobe", int(inverted.nlist)
        elif self._knows("efSearch", 16):
            self.width, self.narrowest, self.widest = "efSearch", 16, _WIDEST_GRAPH

    def set(self, name: str, value: int | None) -> None:
        """Set one by its name; None leaves it."""
        if value is not None:
            self._space.set_index_parameter(self._index, "k_factor_rf" if name == "k_factor" else name, value)
        if value is not None and name == "nprobe" and self._coarse:
            self._space.set_index_parameter(self._index, "quantizer_efSearch", max(_COARSE_WIDTH, 2 * value))

    def _knows(self, name: str, value: int) -> bool:
        try:
            self._space.set_index_parameter(self._index, name, value)
        except RuntimeError:
            return False
        return True


@dataclass(frozen=True)
class Neighbours:
    """Exact neighbours of queries: rows int64 (q, 10), -1 where there are fewer.

    lowest: the score of the last, float32 (q,), -inf where there are fewer. tied: whether others may have it as well.
    """

    rows: NDArray[np.int64]
    lowest: Floats
    tied: NDArray[np.bool_]

    def hits(
        self, blocks: Blocks, queries: Queries, chosen: NDArray[np.int64], found: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which of the rows found, int64 (n, k), for the chosen queries are neighbours: bool (n, k).

        Those of the exact ten are, and where others have the score of the last of them, each that reaches it. Scores
        are computed from the vectors themselves, whatever the index made of them, one block in memory at a time.
        """
        hits: NDArray[np.bool_] = (found[:, :, None] == self.rows[chosen][:, None, :]).any(2) & (found >= 0)
        asked, place = np.nonzero(~hits & (found >= 0) & self.tied[chosen][:, None])
        rows, begin = found[asked, place], 0
        if not len(rows):
            return hits
        for block in blocks():
            here = np.flatnonzero((rows >= begin) & (rows < begin + len(block)))
            for part in np.split(here, range(_SCORED, len(here), _SCORED)):
                numbers = chosen[asked[part]]
                scores = np.einsum("ne,ne->n", queries.vectors[numbers], block[rows[part] - begin])
                hits[asked[part], place[part]] = scores >= self.lowest[numbers] - TIE_TOLERANCE
            begin += len(block)
        return hits


def neighbours(blocks: Blocks, queries: Queries) -> Neighbours:
    """Nearest neighbours by brute force, without the query's own row."""
    import faiss

    k = NEIGHBOURS + 2  # its own, and one more that tells whether the last is tied
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
    others = np.argsort(best_rows == queries.own_rows[:, None], 1, kind="stable")[:, : NEIGHBOURS + 1]  # its own last
    scores, rows = np.take_along_axis(best_scores, others, 1), np.take_along_axis(best_rows, others, 1)
    lowest = scores[:, NEIGHBOURS - 1]
    return Neighbours(rows[:, :NEIGHBOURS], lowest, scores[:, NEIGHBOURS] >= lowest - 2 * TIE_TOLERANCE)


def without_own(rows: NDArray[np.int64], own_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 (q, 11) -> (q, 10) without the own row of each."""
    kept = [row[row != own][:NEIGHBOURS] for row, own in zip(rows, own_rows, strict=True)]
    return np.stack([np.pad(row, (0, NEIGHBOURS - len(row)), constant_values=-1) for row in kept])


def latency(index: Any, vectors: Floats) -> dict[str, float]:
    """One query at a time on one core, as a service without load sees it; milliseconds."""
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
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
