"""The engine `faiss`: train an index on a sample, fill it block by block, tune it by measurement, and write its file.

- Shards are streamed: beyond the index itself, memory does not grow with the gallery.
- Of several choices, the first that reaches the target recall is kept; if none does, the best one, with a warning.
- One index is in memory at a time. The best so far is in the file.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.util.arrays import Blocks
from dcar_core.util.errors import DataError
from index_jobs.engines.faiss.index import (
    VECTORS,
    FaissIndex,
    faiss,
    faiss_reason,
    free_gpu_memory,
    unwrap,
    write_faiss,
)
from index_jobs.engines.faiss.kinds import IndexChoice, choose_kinds, create_index, list_count
from index_jobs.engines.measure import Benchmark, gallery_queries, sample_vectors, tune
from index_jobs.engines.protocol import CreatedIndex, Engine, Files, HeldOutQueries, NewIndex
from index_jobs.spec import IndexSpec

logger = logging.getLogger(__name__)

_LARGE_GRAPH = 500_000  # vectors from which on a graph is built with a wider search, which finds sparse regions
_MAX_GRAPH_WIDTH = 4096
_COARSE_WIDTH = 64  # of a graph over lists; its default of 16 misses some of the nearest lists
_CONSTRUCTION_WIDTH, _LARGE_CONSTRUCTION_WIDTH = 100, 200


class FaissEngine(Engine):
    """Vectors in a file of the version; see `Engine`."""

    def __init__(self, uri: str = "") -> None:
        if uri:
            raise DataError(f"the engine faiss writes a file into the index, so it takes no location such as {uri!r}")

    def plan(self, spec: IndexSpec, count: int, dim: int, device: str) -> int:
        """Return the estimated bytes of the first kind that would be built."""
        return _choices(spec, count, dim, device)[0].bytes

    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        """Build and tune the file."""
        file, choices = new.folder / VECTORS, _choices(spec, new.count, new.dim, new.device)
        return build_index(file, new.blocks, new.count, new.dim, choices, new.queries, target=spec.target_recall)

    def open(self, files: Files, *, gpu: bool = False) -> FaissIndex:
        """Memory-map the file."""
        return FaissIndex.open(files.get(VECTORS, Path(VECTORS)), gpu=gpu)


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


def _choices(spec: IndexSpec, count: int, dim: int, device: str) -> list[IndexChoice]:
    needs_gpu = spec.kind.startswith("gpu-") or (spec.kind == "auto" and device.startswith("cuda"))
    gpu_memory = free_gpu_memory() if needs_gpu else 0
    return choose_kinds(spec.kind, count, dim, memory=spec.memory, gpu_memory=gpu_memory)


def build_index(
    file: Path,
    blocks: Blocks,
    count: int,
    dim: int,
    choices: Sequence[IndexChoice],
    queries: HeldOutQueries | None = None,
    *,
    target: float = IndexSpec.target_recall,
) -> CreatedIndex:
    """Build and tune an index, and write it; row numbers are the order of the vectors.

    Args:
        blocks: count vectors of length dim, L2-normalized.
        choices: what to build, and what to build next while the recall stays below the target.
        queries: held-out queries; None for vectors of the gallery, each without itself.
        target: recall at 10 against exact search.

    Raises:
        DataError: the kind needs more vectors than there are.
    """
    is_exact = [choice.factory for choice in choices] == ["Flat"]
    benchmark = Benchmark(blocks, queries or gallery_queries(blocks, count), target=target, exact=is_exact)
    tried = list[CreatedIndex]()
    for choice in choices:
        start = time.perf_counter()
        index = fill_index(choice, dim, blocks, count)
        seconds = time.perf_counter() - start
        logger.info("%s: %d vectors in %.1f s", choice.factory, count, seconds)
        measured = tune(benchmark, index, SearchParameters(index)) | {"build_seconds": round(seconds, 1)}
        built = CreatedIndex(kind=choice.factory, reason=choice.reason, measured=measured, gpu=choice.gpu)
        recall = _recall(built)
        if all(recall > _recall(other) for other in tried):
            write_faiss(index, file)
        tried.append(built)
        del index  # before another is built
        if recall >= target:
            break
        logger.warning(
            "%s: recall@10 is %.3f, below the target of %.2f; %s",
            choice.factory, recall, target,
            "choose another kind" if choice is choices[-1] else "trying another kind",
        )  # fmt: skip
    best = max(tried, key=_recall)
    missed = (each for each in tried if each is not best)
    reasons = (f"{each.kind} reached a recall of {_recall(each):.3f} only" for each in missed)
    measured = best.measured | {"bytes": file.stat().st_size}
    return replace(best, reason="; ".join([best.reason, *reasons]), measured=measured)


def _recall(built: CreatedIndex) -> float:
    """Return the recall of all held-out queries. Half of them may miss the target by chance."""
    return float(built.measured["recall_at_10"] + built.measured["tuning_recall_at_10"]) / 2


def fill_index(choice: IndexChoice, dim: int, blocks: Blocks, count: int) -> Any:
    """Train and fill an index, on the GPU if the choice says so, and return its CPU form."""
    resources = faiss.StandardGpuResources() if choice.gpu else None
    index = create_index(choice.factory, dim)
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.cp.min_points_per_centroid = 1  # no warnings on stderr for a small gallery
    if hasattr(index, "hnsw"):
        index.hnsw.efConstruction = _LARGE_CONSTRUCTION_WIDTH if count >= _LARGE_GRAPH else _CONSTRUCTION_WIDTH
    SearchParameters(index)  # sets the width of a graph over lists, which adding vectors needs too
    if choice.gpu:
        index = faiss.index_cpu_to_gpu(resources, 0, index)
    try:
        if not index.is_trained:
            index.train(sample_vectors(blocks, count, 64 * max(list_count(count), 1024)))
        for block in blocks():
            index.add(np.ascontiguousarray(block))
    except RuntimeError as error:
        reason = faiss_reason(error).rsplit(": ", 1)[-1]
        raise DataError(f"an index of kind {choice.factory} cannot be built of {count:,} vectors: {reason}") from error
    if choice.gpu:
        index = faiss.index_gpu_to_cpu(index)
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.make_direct_map()  # vectors by row, for searches by an item
    return index
