"""Vectors to a FAISS index: the kind by count and memory, search parameters by measurement.

- `auto` is exact up to 100,000 vectors, where exact search takes milliseconds; then a graph (HNSW) while it fits half
  of the memory; then inverted lists with 8-bit vectors. The reason is a sentence in the manifest.
- nprobe or efSearch is doubled until recall@10 against exact search reaches the target on held-out queries: texts where
  the gallery has captions, since that is how people search, else its own pictures without themselves.
- Shards stream through; beyond the index itself, memory does not grow with the gallery.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.errors import DataError

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Blocks = Callable[[], Iterator[Floats]]  # the vectors, float32 (m, E) at a time, as often as asked

FLAT_UP_TO = 100_000
TARGET_RECALL = 0.99
MAX_QUERIES = 500
NEIGHBOURS = 10
_EF_CONSTRUCTION = 80
_REFINE_FACTOR = 8  # kinds that end in RFlat rank so many times k candidates again, exactly
_TIMED_QUERIES = 200
_HNSW_BYTES = 4 * 2 * 32 + 16  # of links for each vector, beyond the vector


@dataclass(frozen=True)
class Choice:
    """A FAISS index_factory string, and why it was taken."""

    factory: str
    reason: str


@dataclass(frozen=True)
class Queries:
    """Held-out queries: vectors float32 (q, E), where they come from, and for each the row to leave out, or -1."""

    vectors: Floats
    source: str
    own_rows: NDArray[np.int64]


@dataclass(frozen=True)
class Built:
    """A FAISS index and what was measured on it, as it goes into the manifest."""

    index: Any
    measured: dict[str, Any]


def choose(kind: str, count: int, dim: int, memory: int | None = None) -> Choice:
    """The index for a count of vectors: "auto", "flat", "hnsw", "ivf", or any index_factory string.

    Args:
        memory: bytes of main memory, None to ask the machine.

    Raises:
        DataError: FAISS does not know the kind.
    """
    memory = memory or _memory()
    hnsw_bytes = count * (4 * dim + _HNSW_BYTES)
    lists = _lists(count)
    named = {"flat": "Flat", "hnsw": "HNSW32", "ivf": f"IVF{lists},Flat"}
    if kind == "auto":
        if count <= FLAT_UP_TO:
            return Choice(
                "Flat", f"{count:,} vectors are at most {FLAT_UP_TO:,}, where exact search takes milliseconds"
            )
        size = f"{count:,} vectors of {dim} with their graph take {_gib(hnsw_bytes)}"
        if hnsw_bytes <= memory // 2:
            return Choice("HNSW32", f"{size}, at most half of the {_gib(memory)} of memory; a graph is fastest")
        return Choice(
            f"IVF{lists},SQ8",
            f"{size}, more than half of the {_gib(memory)} of memory; inverted lists with 8-bit vectors take a quarter",
        )
    choice = Choice(named.get(kind.lower(), kind), f"asked for: {kind}")
    _create(choice, dim)
    return choice


def build(blocks: Blocks, count: int, dim: int, choice: Choice, queries: Queries | None = None) -> Built:
    """Build and tune an index; row numbers are the vectors' order.

    Args:
        blocks: count vectors of length dim, L2-normalised.
        queries: held-out queries; None takes vectors of the gallery without themselves.

    Raises:
        DataError: the kind needs more vectors than there are.
    """
    import faiss

    index = _create(choice, dim)
    if not index.is_trained:
        try:
            index.train(_sample(blocks, count, 64 * max(_lists(count), 1024)))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].rsplit("failed: ", 1)[-1]
            raise DataError(
                f"an index of kind {choice.factory} cannot be built of {count:,} vectors: {reason}"
            ) from error
    start = time.perf_counter()
    for block in blocks():
        index.add(np.ascontiguousarray(block))
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.make_direct_map()  # a vector by its row, for searches by a clicked item
    logger.info("%s: %d vectors added in %.1f s", choice.factory, count, time.perf_counter() - start)
    queries = queries or _own_queries(blocks, count)
    return Built(index, _measure(index, blocks, queries, exact=choice.factory == "Flat"))


def _create(choice: Choice, dim: int) -> Any:
    import faiss

    try:
        index = faiss.index_factory(dim, choice.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise DataError(
            f"FAISS cannot make an index of kind {choice.factory!r} for vectors of {dim}; use auto, flat, hnsw, ivf or "
            f"an index_factory string such as 'IVF1024,SQ8'"
        ) from error
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.cp.min_points_per_centroid = 1  # a small gallery is no cause for warnings on stderr
    if hasattr(index, "k_factor"):
        index.k_factor = _REFINE_FACTOR
    if hasattr(index, "hnsw"):
        index.hnsw.efConstruction = _EF_CONSTRUCTION
    return index


def _lists(count: int) -> int:
    """4 sqrt(n) inverted lists, as FAISS advises, each with at least the 39 vectors that training wants."""
    return max(1, min(int(4 * math.sqrt(count)), count // 39))


def _sample(blocks: Blocks, count: int, size: int) -> Floats:
    """At most `size` vectors, evenly spread."""
    step = max(1, -(-count // size))
    parts, start = [], 0
    for block in blocks():
        parts.append(np.array(block[-start % step :: step]))
        start += len(block)
    return np.concatenate(parts)


def _own_queries(blocks: Blocks, count: int) -> Queries:
    step = max(1, -(-count // MAX_QUERIES))
    vectors = _sample(blocks, count, MAX_QUERIES)
    return Queries(vectors, "pictures", np.arange(0, count, step)[: len(vectors)])


def _measure(index: Any, blocks: Blocks, queries: Queries, *, exact: bool) -> dict[str, Any]:
    """Set the search parameter for the target recall; recall, latency and where they come from."""
    import faiss

    vectors = queries.vectors
    result: dict[str, Any] = {"queries": len(vectors), "query_source": queries.source}
    if exact:
        result |= {"recall_at_10": 1.0, "parameter": None, "value": None}
    else:
        truth = _exact(blocks, queries)
        space = faiss.ParameterSpace()
        name, limit = _parameter(index, space)
        value = 16 if name == "efSearch" else 1
        while True:
            if name:
                space.set_index_parameter(index, name, value)
            recall = _recall(index, queries, truth)
            if recall >= TARGET_RECALL or not name or value >= limit:
                break
            value = min(2 * value, limit)
        result |= {"recall_at_10": round(recall, 4), "parameter": name, "value": value if name else None}
        if recall < TARGET_RECALL:
            logger.warning("recall@10 is %.3f, below the target of %.2f; take another kind", recall, TARGET_RECALL)
    return result | _latency(index, vectors[:_TIMED_QUERIES])


def _parameter(index: Any, space: Any) -> tuple[str | None, int]:
    """The search parameter that this kind has, and its largest value worth trying."""
    import faiss

    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        return "nprobe", int(inverted.nlist)
    try:
        space.set_index_parameter(index, "efSearch", 16)
    except RuntimeError:
        return None, 0
    return "efSearch", 4096


def _exact(blocks: Blocks, queries: Queries) -> NDArray[np.int64]:
    """Nearest neighbours by brute force, rows int64 (q, 10), without the query's own; -1 where there are fewer."""
    import faiss

    k = NEIGHBOURS + 1
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
        best_scores = np.concatenate([best_scores, scores], 1)
        best_rows = np.concatenate([best_rows, rows + start], 1)
        order = np.argsort(-best_scores, 1, kind="stable")[:, :k]
        best_scores = np.take_along_axis(best_scores, order, 1)
        best_rows = np.take_along_axis(best_rows, order, 1)
        start += len(block)
    return _without_own(best_rows, queries)


def _without_own(rows: NDArray[np.int64], queries: Queries) -> NDArray[np.int64]:
    kept = [row[row != own][:NEIGHBOURS] for row, own in zip(rows, queries.own_rows, strict=True)]
    return np.stack([np.pad(row, (0, NEIGHBOURS - len(row)), constant_values=-1) for row in kept])


def _recall(index: Any, queries: Queries, truth: NDArray[np.int64]) -> float:
    _, rows = index.search(queries.vectors, NEIGHBOURS + 1)
    found = _without_own(rows, queries)
    hits = sum(len(np.intersect1d(a[a >= 0], b)) for a, b in zip(truth, found, strict=True))
    wanted = int((truth >= 0).sum())
    return hits / wanted if wanted else 1.0


def _latency(index: Any, vectors: Floats) -> dict[str, float]:
    """One query at a time, as a service without load sees it."""
    times = []
    for vector in vectors:
        start = time.perf_counter()
        index.search(vector[None], NEIGHBOURS)
        times.append(1000 * (time.perf_counter() - start))
    p50, p99 = np.percentile(times, [50, 99])
    return {"latency_ms_p50": round(float(p50), 3), "latency_ms_p99": round(float(p99), 3)}


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
