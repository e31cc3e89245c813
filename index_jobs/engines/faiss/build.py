"""The engine `faiss`: choose a kind, train it on a sample, fill it block by block, tune
it, and write its file.

- The kind `auto` lists kinds for the gallery, fastest at the target recall first,
  without those that exceed the memory. The first one that reaches the target is kept;
  if none does, the best one, with a warning.
- The order follows measured latencies; `benchmarks/index_kinds.py` prints them and
  measured sizes. A graph is fastest on real embeddings, but misses the target among
  many near-duplicates.
- Shards are streamed: beyond the index itself, memory does not grow with the gallery.
  One index is in memory at a time.
"""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    gpu_count,
    unwrap,
    write_faiss,
)
from index_jobs.engines.measure import Benchmark, sample_vectors, tune
from index_jobs.engines.protocol import (
    EXACT_UP_TO,
    CreatedIndex,
    Engine,
    Files,
    HeldOutQueries,
    NewIndex,
)
from index_jobs.spec import IndexSpec

logger = logging.getLogger(__name__)

# vectors from which on a graph is built with a wider search, which finds sparse regions
_LARGE_GRAPH = 500_000
_MAX_GRAPH_WIDTH = 4096
# of a graph over lists; its default of 16 misses some of the nearest lists
_COARSE_WIDTH = 64
_CONSTRUCTION_WIDTH = 100
_LARGE_CONSTRUCTION_WIDTH = 200
# beyond, only lists: at ten million a graph took 50 minutes and missed the target
_GRAPH_UP_TO = 5_000_000
_GRAPH_BYTES = 4 * 2 * 24 + 16  # links of a vector in a graph of degree 24
_ENTRY_BYTES = 16  # number of a vector, in its list and in the map from row to list
# from this number of lists on, a graph finds the nearest ones
_COARSE_GRAPH_FROM = 16_384

NAMED = (
    "auto",
    "flat",
    "hnsw",
    "ivf-pq-fp16",
    "ivf-pq",
    "ivf",
    "pq",
    "gpu-flat",
    "gpu-ivf",
)
_GPU = "gpu-"  # begins the names of kinds that are searched on a GPU


@dataclass(frozen=True)
class IndexChoice:
    """A FAISS index_factory string and the reason for it."""

    factory: str
    reason: str
    bytes: int = 0  # estimated size, 0 if unknown
    on_gpu: bool = False  # is built on a GPU


class FaissEngine(Engine):
    """Vectors in a file of the version; see `Engine`."""

    def __init__(self, uri: str = "") -> None:
        if uri:
            raise DataError(
                "the engine faiss writes a file into the index, so it takes no"
                f" location such as {uri!r}"
            )

    def plan(self, spec: IndexSpec, count: int, dim: int) -> int:
        """Return the estimated bytes of the first kind that would be built."""
        return choose_kinds(spec.kind, count, dim, memory=spec.memory)[0].bytes

    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        """Build and tune the file."""
        file = new.folder / VECTORS
        choices = choose_kinds(spec.kind, new.count, new.dim, memory=spec.memory)
        return build_index(
            file,
            new.blocks,
            new.count,
            new.dim,
            choices,
            new.queries,
            target=spec.target_recall,
        )

    def open(self, files: Files, kind: str = "") -> FaissIndex:
        """Memory-map the file."""
        return FaissIndex.open(
            files.get(VECTORS, Path(VECTORS)), on_gpu=kind.startswith(_GPU)
        )


class SearchParameters:
    """Parameters of an index for `tune`: the width of its search, and the number of
    re-ranked candidates.
    """

    def __init__(self, index: Any) -> None:
        self._index, (self._inner, _) = index, unwrap(index)
        self.has_reranking = isinstance(index, faiss.IndexRefine)
        self.width: str | None = None
        self.min_width = 1
        self.max_width = 0
        if isinstance(self._inner, faiss.IndexIVF):
            self.width = "nprobe"
            self.max_width = int(self._inner.nlist)
            self.set("nprobe", int(self._inner.nprobe))
        elif isinstance(self._inner, faiss.IndexHNSW):
            self.width = "efSearch"
            self.min_width = 16
            self.max_width = _MAX_GRAPH_WIDTH

    def set(self, name: str, value: int) -> None:
        """Set a parameter by its name."""
        owner = {
            "k_factor": self._index,
            "efSearch": getattr(self._inner, "hnsw", None),
            "nprobe": self._inner,
        }[name]
        setattr(owner, name, value)
        if name == "nprobe":
            quantizer = faiss.downcast_index(self._inner.quantizer)
            if isinstance(quantizer, faiss.IndexHNSW):
                quantizer.hnsw.efSearch = max(_COARSE_WIDTH, 2 * value)


def build_index(
    file: Path,
    blocks: Blocks,
    count: int,
    dim: int,
    choices: Sequence[IndexChoice],
    queries: HeldOutQueries,
    *,
    target: float = IndexSpec.target_recall,
) -> CreatedIndex:
    """Build and tune an index, and write it; row numbers are the order of the vectors.

    blocks: count vectors (dim,), L2-normalized. choices: what to build, and what next
    while the recall is below the target. Raise DataError if the kind needs more vectors
    than there are.
    """
    is_exact = [choice.factory for choice in choices] == ["Flat"]
    benchmark = Benchmark(blocks, queries, target=target, exact=is_exact)
    tried = list[CreatedIndex]()
    for choice in choices:
        start = time.perf_counter()
        index = fill_index(choice, dim, blocks, count)
        seconds = time.perf_counter() - start
        logger.info("%s: %d vectors in %.1f s", choice.factory, count, seconds)
        measured = tune(benchmark, index, SearchParameters(index)) | {
            "build_seconds": round(seconds, 1)
        }
        built = CreatedIndex(
            kind=choice.factory,
            reason=choice.reason,
            measured=measured,
        )
        recall = _recall(built)
        if all(recall > _recall(other) for other in tried):
            write_faiss(index, file)
        tried.append(built)
        del index  # before another is built
        if recall >= target:
            break
        logger.warning(
            "%s: recall@10 is %.3f, below the target of %.2f; %s",
            choice.factory,
            recall,
            target,
            "choose another kind" if choice is choices[-1] else "trying another kind",
        )
    best = max(tried, key=_recall)
    missed = (each for each in tried if each is not best)
    reasons = (
        f"{each.kind} reached a recall of {_recall(each):.3f} only" for each in missed
    )
    measured = best.measured | {"bytes": file.stat().st_size}
    return replace(best, reason="; ".join([best.reason, *reasons]), measured=measured)


def _recall(built: CreatedIndex) -> float:
    """Return the recall of all held-out queries. Half of them may miss the target by
    chance.
    """
    return (
        float(built.measured["recall_at_10"] + built.measured["tuning_recall_at_10"])
        / 2
    )


def fill_index(choice: IndexChoice, dim: int, blocks: Blocks, count: int) -> Any:
    """Train and fill an index, on a GPU if the choice says so, and return its CPU
    form.
    """
    index = create_index(choice.factory, dim)
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        # no warnings on stderr for a small gallery
        inverted.cp.min_points_per_centroid = 1
    if hasattr(index, "hnsw"):
        index.hnsw.efConstruction = (
            _LARGE_CONSTRUCTION_WIDTH if count >= _LARGE_GRAPH else _CONSTRUCTION_WIDTH
        )
    # sets the width of a graph over lists, which adding vectors needs too
    SearchParameters(index)
    if choice.on_gpu:
        resources = faiss.StandardGpuResources()
        index = faiss.index_cpu_to_gpu(resources, 0, index)
    try:
        if not index.is_trained:
            index.train(
                sample_vectors(blocks, count, 64 * max(list_count(count), 1024))
            )
        for block in blocks():
            index.add(np.ascontiguousarray(block))
    except RuntimeError as error:
        reason = faiss_reason(error).rsplit(": ", 1)[-1]
        raise DataError(
            f"an index of kind {choice.factory} cannot be built of {count:,} vectors:"
            f" {reason}"
        ) from error
    if choice.on_gpu:
        index = faiss.index_gpu_to_cpu(index)
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.make_direct_map()  # vectors by row, for searches by an item
    return index


def choose_kinds(
    kind: str,
    count: int,
    dim: int,
    *,
    memory: int | None = None,
) -> list[IndexChoice]:
    """Return the index to build, and for "auto" the alternatives if its recall is too
    low.

    kind: one of NAMED, or any index_factory string. memory: bytes that the index may
    take; None for half of the memory of the machine or container. Raise DataError if
    FAISS does not know the kind, none fits the memory, or a GPU kind has no GPU.
    """
    if kind == "auto":
        return _choose_automatically(
            count,
            dim,
            machine_memory() // 2 if memory is None else memory,
        )
    named = _kinds(count, dim).get(kind.lower().removeprefix(_GPU))
    reason = f"requested: {kind}"
    if named:
        choice = replace(named, reason=reason, on_gpu=kind.startswith(_GPU))
    else:
        choice = IndexChoice(kind, reason)
    if choice.on_gpu and not gpu_count():
        raise DataError(
            f"{kind} needs an NVIDIA GPU and FAISS's build for it: pip install"
            " faiss-gpu"
        )
    create_index(choice.factory, dim)
    return [choice]


def _kinds(count: int, dim: int) -> dict[str, IndexChoice]:
    """Return the kinds of NAMED after "auto"; the reason of each describes it."""
    ivf = _ivf(count)
    entry = _ENTRY_BYTES
    long_code = dim // 2 if dim % 2 == 0 else dim  # parts: one for every two dimensions
    code = max(parts for parts in range(1, max(64, dim // 8) + 1) if dim % parts == 0)
    kinds = {  # factory, bytes of a vector, description
        "flat": ("Flat", 4 * dim, "exact"),
        "hnsw": (
            "HNSW24,SQfp16",
            2 * dim + _GRAPH_BYTES,
            "a graph over 16-bit vectors",
        ),
        "ivf-pq-fp16": (
            f"{ivf},PQ{long_code}x4fs,Refine(SQfp16)",
            2 * dim + long_code / 2 + entry,
            "inverted lists of long product codes, re-ranked by 16-bit vectors",
        ),
        "ivf-pq": (
            f"{ivf},PQ{code}x4fs,Refine(SQ8)",
            dim + code / 2 + entry,
            "inverted lists of product codes, re-ranked by 8-bit vectors",
        ),
        "ivf": (f"{ivf},Flat", 4 * dim + entry, "inverted lists of full vectors"),
        "pq": (
            f"{ivf},PQ{code}",
            code + entry,
            "the only kind that fits; its recall is low",
        ),
    }
    return {
        name: IndexChoice(factory, text, bytes=int(count * size))
        for name, (factory, size, text) in kinds.items()
    }


def _choose_automatically(count: int, dim: int, memory: int) -> list[IndexChoice]:
    kinds = _kinds(count, dim)
    vectors = f"{count:,} vectors of {dim}"
    flat = kinds.pop("flat")
    if count <= EXACT_UP_TO:
        reason = (
            f"{count:,} vectors are at most {EXACT_UP_TO:,}, where exact search takes"
            " two milliseconds"
        )
        return [replace(flat, reason=reason)]
    choices = list[IndexChoice]()
    too_large = list[str]()
    for name, choice in kinds.items():
        if (name == "hnsw" and count > _GRAPH_UP_TO) or (name == "pq" and choices):
            continue
        if choice.bytes > memory:
            too_large.append(f"{choice.factory} would take {_gib(choice.bytes)}")
            continue
        fits = (
            f"{vectors} take {_gib(choice.bytes)} of the {_gib(memory)} allowed:"
            f" {choice.reason}"
        )
        choices.append(replace(choice, reason="; ".join([fits, *too_large])))
    if not choices:
        raise DataError(
            f"{vectors} fit no kind of index in {_gib(memory)}: {too_large[-1]}; raise"
            " --memory, or split the gallery"
        )
    return choices


def create_index(factory: str, dim: int) -> Any:
    """Return an empty FAISS index for inner products."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise DataError(
            f"FAISS cannot make an index of kind {factory!r} for vectors of {dim}; use"
            f" {', '.join(NAMED)}, or an index_factory string such as 'IVF1024,SQ8'"
        ) from error


def list_count(count: int) -> int:
    """Return 4 sqrt(n) inverted lists, as FAISS advises, each with at least the 39
    vectors that training needs.
    """
    return max(1, min(int(4 * math.sqrt(count)), count // 39))


def machine_memory() -> int:
    """Return the bytes of main memory, or the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ):
        try:
            text = Path(limit).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def _ivf(count: int) -> str:
    number = list_count(count)
    return f"IVF{number}_HNSW32" if number >= _COARSE_GRAPH_FROM else f"IVF{number}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
