"""Search parameters by measurement: the fastest that reach a target recall on held-out queries.

- The width (nprobe, efSearch) is doubled until the recall reaches the target, then bisected to a 32nd. Kinds that
  re-rank candidates start with many (k_factor); with fewer, they need a wider search. The lowest latency wins.
- A compressing kind has a recall ceiling. Below the target, the narrowest search near it is chosen.
"""

from bisect import bisect_left
from typing import Any

from index_jobs.engines.faiss.index import FaissIndex, faiss, unwrap
from index_jobs.engines.measure import TIMED_QUERIES, Benchmark, measure_latency

_MAX_GRAPH_WIDTH = 4096
_FACTORS = (64, 32, 16, 12, 8, 6, 5, 4, 3, 2, 1)  # candidates to re-rank, in multiples of k
_SLOWER = 1.2  # fewer candidates are not tried after a latency of this multiple of the lowest
_STEPS = 32  # a width is exact to this fraction of itself
_NOISE = 0.0005  # differences in recall below this are not a gain
_COARSE_WIDTH = 64  # of a graph over lists; its default of 16 misses some of the nearest lists


class SearchParameters:
    """Tunable parameters of an index: the width of its search, and the number of re-ranked candidates.

    width: name of the width parameter, None for kinds without one.
    """

    def __init__(self, index: Any) -> None:
        self._index, (self._inner, _) = index, unwrap(index)
        self.has_reranking = isinstance(index, faiss.IndexRefine)
        self.width: str | None = None
        self.min_width, self.max_width = 1, 0
        if isinstance(self._inner, faiss.IndexIVF):
            self.width, self.max_width = "nprobe", int(self._inner.nlist)
            self.set("nprobe", int(self._inner.nprobe))
        elif isinstance(self._inner, faiss.IndexHNSW):
            self.width, self.min_width, self.max_width = "efSearch", 16, _MAX_GRAPH_WIDTH

    def set(self, name: str, value: int) -> None:
        """Set a parameter by its name."""
        owner = {"k_factor": self._index, "efSearch": getattr(self._inner, "hnsw", None), "nprobe": self._inner}[name]
        setattr(owner, name, value)
        if name == "nprobe":
            quantizer = faiss.downcast_index(self._inner.quantizer)
            if isinstance(quantizer, faiss.IndexHNSW):
                quantizer.hnsw.efSearch = max(_COARSE_WIDTH, 2 * value)


def tune(benchmark: Benchmark, index: Any, *, gpu: bool = False, tunable: Any = None) -> dict[str, Any]:
    """Set the search parameters of an index; return its measurements, as in the manifest.

    Args:
        index: a FAISS index on the CPU, or with `tunable` anything with a `search`.
        gpu: measure a copy of the tuned index on a GPU.
        tunable: the parameters of an index that is not of FAISS.
    """
    parameters = {} if benchmark.is_exact else _choose(benchmark, index, tunable or SearchParameters(index))
    tuned = round(benchmark.recall(index, benchmark.tuning_queries), 4)
    searched = FaissIndex(index, on_gpu=True) if gpu else index
    return benchmark.measure(searched, parameters) | {"tuning_recall_at_10": tuned}


def _choose(benchmark: Benchmark, index: Any, tunable: SearchParameters) -> dict[str, int]:
    """Set and return the fastest parameters that reach the aim."""
    target, aim = benchmark.target, benchmark.aim
    timed = benchmark.queries.vectors[benchmark.tuning_queries][: TIMED_QUERIES // 2]
    points = list[tuple[float, float, dict[str, int]]]()  # recall, latency, parameters
    width: int | None = None
    for factor in _FACTORS if tunable.has_reranking else (None,):
        if factor:
            tunable.set("k_factor", factor)
        recall, width = _narrowest(benchmark, index, tunable, width or tunable.min_width)
        if points and recall < min(points[0][0], aim) - _NOISE:
            break  # so few candidates lose neighbours at any width
        parameters = {name: n for name, n in ((tunable.width, width), ("k_factor", factor)) if name and n}
        latency = measure_latency(index, timed)["latency_ms_p50"]
        points.append((recall, latency, parameters))
        if latency > _SLOWER * min(point[1] for point in points):
            break
    highest = max(recall for recall, _, _ in points)
    required = highest if highest < target else max(target, min(aim, highest - 2 * _NOISE))
    best = min((point for point in points if point[0] >= required), key=lambda point: point[1])[2]
    for name, value in best.items():
        tunable.set(name, value)
    return best


def _narrowest(benchmark: Benchmark, index: Any, tunable: SearchParameters, lowest: int) -> tuple[float, int | None]:
    """Set the narrowest search, at least `lowest`, that reaches the aim or the ceiling; return its recall and width."""
    if not (name := tunable.width):
        return benchmark.recall(index, benchmark.tuning_queries), None
    aim, recalls = benchmark.aim, dict[int, float]()  # by width

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
