"""Search parameters by measurement: the fastest that reach a target recall on held-out queries.

- The width (nprobe, efSearch) is doubled until the recall reaches the target, then bisected to a 32nd. Kinds that
  re-rank candidates (k_factor) start with many candidates; with fewer, they need a wider search. The lowest latency
  wins.
- A compressing kind has a recall ceiling. Below the target, the narrowest search near it is chosen.
"""

from typing import Any, Protocol

import faiss

from index_jobs.engines.measure import Benchmark

_MAX_GRAPH_WIDTH = 4096
_FACTORS = (64, 32, 16, 12, 8, 6, 5, 4, 3, 2, 1)  # candidates to re-rank, in multiples of k
_SLOWER = 1.2  # fewer candidates are not tried after a latency of this multiple of the lowest
_STEPS = 32  # a width is exact to this fraction of itself
_NOISE = 0.0005  # differences in recall below this are not a gain
RECALL_MARGIN = 0.25  # the aim exceeds the target by this part of 1 - target, for the sake of other queries
_COARSE_WIDTH = 64  # of a graph over lists; its default of 16 misses some of the nearest lists


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


def tune(benchmark: Benchmark, index: Any, searched: Any = None, tunable: Tunable | None = None) -> dict[str, Any]:
    """Set the search parameters of an index; return its measurements, as in the manifest.

    Args:
        index: a FAISS index on the CPU, or with `tunable` anything with a `search`.
        searched: returns the object to measure, such as a GPU copy of the tuned index; None for the index itself.
        tunable: the parameters of an index that is not of FAISS.
    """
    parameters = {} if benchmark.is_exact else _choose(benchmark, index, tunable or SearchParameters(index))
    tuned = round(benchmark.recall(index, benchmark.tuning_queries), 4)
    return benchmark.measure(searched(index) if searched else index, parameters) | {"tuning_recall_at_10": tuned}


def _choose(benchmark: Benchmark, index: Any, tunable: Tunable) -> dict[str, int]:
    """Set and return the fastest parameters that reach the aim."""
    target, aim = benchmark.target, _aim(benchmark)
    points = list[tuple[float, float, dict[str, int]]]()  # recall, latency, parameters
    width: int | None = None
    for factor in _FACTORS if tunable.has_reranking else (None,):
        tunable.set("k_factor", factor)
        recall, width = _narrowest(benchmark, index, tunable, width or tunable.min_width)
        if points and recall < min(points[0][0], aim) - _NOISE:
            break  # so few candidates lose neighbours at any width
        parameters = {name: n for name, n in ((tunable.width, width), ("k_factor", factor)) if name and n}
        latency = benchmark.tuning_latency(index)
        points.append((recall, latency, parameters))
        if latency > _SLOWER * min(point[1] for point in points):
            break
    highest = max(recall for recall, _, _ in points)
    required = highest if highest < target else max(target, min(aim, highest - 2 * _NOISE))
    best = min((point for point in points if point[0] >= required), key=lambda point: point[1])[2]
    for name, value in best.items():
        tunable.set(name, value)
    return best


def _aim(benchmark: Benchmark) -> float:
    return benchmark.target + RECALL_MARGIN * (1 - benchmark.target)


def _narrowest(benchmark: Benchmark, index: Any, tunable: Tunable, lowest: int) -> tuple[float, int | None]:
    """Set the narrowest search, at least `lowest`, that reaches the aim, or comes near the ceiling.

    Returns: its recall and width.
    """
    if not (name := tunable.width):
        return benchmark.recall(index, benchmark.tuning_queries), None
    aim, recalls = _aim(benchmark), dict[int, float]()  # by width

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
    while width - low > max(1, width // _STEPS):
        middle = (low + width) // 2
        if measure(middle) >= goal:
            width = middle
        else:
            low = middle
    tunable.set(name, width)
    return recalls[width], width
