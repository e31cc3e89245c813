"""Build a FAISS index: train it on a sample, fill it block by block, and tune it by measurement.

- Shards are streamed: beyond the index itself, memory does not grow with the gallery.
- Of several choices, the first that reaches the target recall is kept; if none does, the best one, with a warning.
- An index that reaches the target only by a wide search is slow, for example where texts lie far from their images. The
  first choice of the other family is then built as well: lists after a graph, or a graph after lists. The faster one is
  kept.
- One index is in memory at a time. The best so far is in a file while another is built.
"""

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dcar_core.util.arrays import Blocks
from dcar_core.util.errors import DataError, MissingExtraError
from index_jobs.engines.faiss import gpu
from index_jobs.engines.faiss.index import write_faiss
from index_jobs.engines.faiss.kinds import IndexChoice, create_index, list_count
from index_jobs.engines.faiss.tuning import SearchParameters, tune
from index_jobs.engines.measure import Benchmark, gallery_queries, sample_vectors
from index_jobs.engines.protocol import HeldOutQueries
from index_jobs.spec import IndexSpec

logger = logging.getLogger(__name__)

_LARGE_GRAPH = 500_000  # vectors from which on a graph is built with a wider search, which finds sparse regions
_CONSTRUCTION_WIDTH, _LARGE_CONSTRUCTION_WIDTH = 100, 200
_GPU_TRAINING_VECTORS = 64 * 4096
_MANY_LISTS = 0.1  # share of the lists in every search
_WIDE_GRAPH = 200  # candidates of a search in a graph


@dataclass(frozen=True)
class BuiltIndex:
    """A FAISS index, its choice, and its measurements for the manifest.

    index: None while it is in a file. lists: number of inverted lists, 0 for kinds without.
    """

    index: Any
    choice: IndexChoice
    measured: dict[str, Any]
    lists: int

    @property
    def recall(self) -> float:
        """Recall of all held-out queries. Half of them may miss the target by chance."""
        return float(self.measured["recall_at_10"] + self.measured["tuning_recall_at_10"]) / 2

    @property
    def searches_widely(self) -> bool:
        parameters = self.measured["parameters"]
        if self.lists:
            return bool(parameters["nprobe"] > _MANY_LISTS * self.lists)
        return bool(parameters.get("efSearch", 0) > _WIDE_GRAPH)

    def is_better_than(self, other: "BuiltIndex", target: float) -> bool:
        """Compare latency if both reach the target, recall otherwise."""
        if min(self.recall, other.recall) >= target:
            return bool(self.measured["latency_ms_p50"] < other.measured["latency_ms_p50"])
        return self.recall > other.recall


def build_index(
    blocks: Blocks,
    count: int,
    dim: int,
    choices: Sequence[IndexChoice],
    queries: HeldOutQueries | None = None,
    *,
    target: float = IndexSpec.target_recall,
    folder: Path | None = None,
) -> BuiltIndex:
    """Build and tune an index; row numbers are the order of the vectors.

    Args:
        blocks: count vectors of length dim, L2-normalized.
        choices: what to build, and what to build next while the recall stays below the target.
        queries: held-out queries; None for vectors of the gallery, each without itself.
        target: recall at 10 against exact search.
        folder: for the best index while another is built; None for the system's temporary directory.

    Raises:
        DataError: the kind needs more vectors than there are.
    """
    is_exact = [choice.factory for choice in choices] == ["Flat"]
    benchmark = Benchmark(blocks, queries or gallery_queries(blocks, count), target=target, exact=is_exact)
    best: BuiltIndex | None = None
    tried = list[BuiltIndex]()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = Path(temporary) / "best.faiss"
        for choice in choices:
            if best is not None and best.recall >= target and not _may_be_faster(choice, best, tried):
                continue
            if best is not None and best.index is not None:
                write_faiss(best.index, file)
                best = replace(best, index=None)
            built = _build_and_tune(blocks, count, dim, choice, benchmark)
            tried.append(replace(built, index=None))
            if best is None or built.is_better_than(best, target):
                best = built
            del built  # free the memory of an index that is not kept
            if best.recall < target:
                logger.warning(
                    "%s: recall@10 is %.3f, below the target of %.2f; %s",
                    choice.factory, tried[-1].recall, target,
                    "choose another kind" if choice is choices[-1] else "trying another kind",
                )  # fmt: skip
        assert best is not None
        if best.index is None:
            best = replace(best, index=faiss.read_index(str(file)))
    reasons = [best.choice.reason, *(_reason(other, target) for other in tried if other.choice is not best.choice)]
    return replace(best, choice=replace(best.choice, reason="; ".join(reasons)))


def _may_be_faster(choice: IndexChoice, best: BuiltIndex, tried: Sequence[BuiltIndex]) -> bool:
    """Return True if the best so far, which reaches the target, searches widely, and no kind of this family was tried.

    The families are lists and graphs. If one kind needs a wide search, so would the others of its family.
    """
    return best.searches_widely and not any(other.choice.has_lists == choice.has_lists for other in tried)


def _reason(built: BuiltIndex, target: float) -> str:
    if built.recall < target:
        return f"{built.choice.factory} reached a recall of {built.recall:.3f} only"
    return f"{built.choice.factory} takes {built.measured['latency_ms_p50']:.2f} ms"


def _build_and_tune(blocks: Blocks, count: int, dim: int, choice: IndexChoice, benchmark: Benchmark) -> BuiltIndex:
    start = time.perf_counter()
    index = (fill_on_gpu if choice.gpu else fill_index)(choice, dim, blocks, count)
    seconds = time.perf_counter() - start
    logger.info("%s: %d vectors in %.1f s", choice.factory, count, seconds)
    measured = tune(benchmark, index, gpu.GpuSearch if choice.gpu else None)
    inverted = None if choice.gpu else faiss.try_extract_index_ivf(index)
    lists = 0 if inverted is None else int(inverted.nlist)
    return BuiltIndex(index, choice, measured | {"build_seconds": round(seconds, 1)}, lists)


def fill_index(choice: IndexChoice, dim: int, blocks: Blocks, count: int) -> Any:
    """Train and fill an index on the CPU."""
    index: Any = create_index(choice.factory, dim)
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.cp.min_points_per_centroid = 1  # no warnings on stderr for a small gallery
    if hasattr(index, "hnsw"):
        index.hnsw.efConstruction = _LARGE_CONSTRUCTION_WIDTH if count >= _LARGE_GRAPH else _CONSTRUCTION_WIDTH
    SearchParameters(index)  # sets the width of a graph over lists, which adding vectors needs too
    try:
        if not index.is_trained:
            index.train(sample_vectors(blocks, count, 64 * max(list_count(count), 1024)))
        for block in blocks():
            index.add(np.ascontiguousarray(block))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rsplit("failed: ", 1)[-1].rsplit(": ", 1)[-1]
        raise DataError(f"an index of kind {choice.factory} cannot be built of {count:,} vectors: {reason}") from error
    if inverted is not None:
        inverted.make_direct_map()  # vectors by row, for searches by an item
    return index


def fill_on_gpu(choice: IndexChoice, dim: int, blocks: Blocks, count: int) -> Any:
    """Train and fill an index on the GPU, and return its CPU form."""
    library: Any = faiss  # the type hints lack some of the GPU
    resources = library.StandardGpuResources()
    if choice.factory == "CAGRA":
        if "CUVS" not in library.get_compile_options():
            raise MissingExtraError("CAGRA, with a FAISS built with NVIDIA cuVS such as conda's faiss-gpu-cuvs,", "gpu")
        index = library.GpuIndexCagra(resources, dim, library.METRIC_INNER_PRODUCT, library.GpuIndexCagraConfig())
        index.train(np.concatenate([np.asarray(block) for block in blocks()]))  # builds the graph of all vectors
        return library.index_gpu_to_cpu(index)
    index = library.index_cpu_to_gpu(resources, 0, create_index(choice.factory, dim))
    if not index.is_trained:
        index.train(sample_vectors(blocks, count, _GPU_TRAINING_VECTORS))
    for block in blocks():
        index.add(np.ascontiguousarray(block))
    index = library.index_gpu_to_cpu(index)
    if (inverted := library.try_extract_index_ivf(index)) is not None:
        inverted.make_direct_map()
    return index
