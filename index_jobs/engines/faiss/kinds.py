"""Choice of the index kind: a FAISS index_factory string by count, dimensions, memory and device.

- `auto` lists the kinds for the gallery, fastest at the target recall first, without those that exceed the memory. The
  first one is built; while the measured recall stays below the target, the next one is. See `build`.
- The order follows measured latencies; `benchmarks/index_kinds.py` prints them and measured sizes. A graph is fastest
  on real embeddings, but misses the target among many near-duplicates.
- Up to 20,000 vectors, exact search takes two milliseconds and needs no training, so nothing else is considered.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss

from dcar_core.util.errors import DataError, MissingExtraError

FLAT_UP_TO = 20_000
_GRAPH_UP_TO = 5_000_000  # beyond, only lists: at ten million a graph took 50 minutes and missed the target
_GRAPH_BYTES = 4 * 2 * 24 + 16  # links of a vector in a graph of degree 24
_ENTRY_BYTES = 16  # number of a vector, in its list and in the map from row to list
_COARSE_GRAPH_FROM = 16_384  # from this number of lists on, a graph finds the nearest ones

NAMED = ("auto", "flat", "hnsw", "ivf-pq-fp16", "ivf-pq", "ivf", "pq")  # after flat, fastest first
GPU_NAMED = ("gpu-flat", "gpu-ivf")


@dataclass(frozen=True)
class IndexChoice:
    """A FAISS index_factory string and the reason for it."""

    factory: str
    reason: str
    gpu: bool = False  # built and searched on a GPU
    bytes: int = 0  # estimated size, 0 if unknown


def choose_kinds(
    kind: str, count: int, dim: int, *, memory: int | None = None, gpu_memory: int = 0
) -> list[IndexChoice]:
    """Return the index to build, and for "auto" the alternatives if its recall is too low.

    Args:
        kind: one of NAMED or GPU_NAMED, or any index_factory string.
        memory: bytes that the index may take; None for half of the memory of the machine or container.
        gpu_memory: bytes of the GPU that the index may take; 0 without a GPU.

    Raises:
        DataError, MissingExtraError: FAISS does not know the kind, or it is a GPU kind and there is none to build it.
    """
    if kind == "auto":
        return _choose_automatically(count, dim, machine_memory() // 2 if memory is None else memory, gpu_memory)
    reason = f"requested: {kind}"
    if kind in GPU_NAMED:
        if not gpu_memory:
            raise MissingExtraError(f"the kind {kind}, with a CUDA device and FAISS built for it,", "gpu")
        factory = {"gpu-flat": "Flat", "gpu-ivf": f"{_ivf(count)},Flat"}[kind]
        return [IndexChoice(factory, reason, gpu=True)]
    named = _kinds(count, dim).get(kind.lower())
    choice = replace(named, reason=reason) if named else IndexChoice(kind, reason)
    create_index(choice.factory, dim)
    return [choice]


def _kinds(count: int, dim: int) -> dict[str, IndexChoice]:
    """Return the kinds of NAMED after "auto"; the reason of each describes it."""
    ivf, entry = _ivf(count), _ENTRY_BYTES
    long_code = dim // 2 if dim % 2 == 0 else dim  # parts: one for every two dimensions
    code = max(parts for parts in range(1, max(64, dim // 8) + 1) if dim % parts == 0)
    kinds = {  # factory, bytes of a vector, description
        "flat": ("Flat", 4 * dim, "exact"),
        "hnsw": ("HNSW24,SQfp16", 2 * dim + _GRAPH_BYTES, "a graph over 16-bit vectors"),
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
        "pq": (f"{ivf},PQ{code}", code + entry, "the only kind that fits; its recall is low"),
    }
    return {name: IndexChoice(factory, text, bytes=int(count * size)) for name, (factory, size, text) in kinds.items()}


def _choose_automatically(count: int, dim: int, memory: int, gpu_memory: int) -> list[IndexChoice]:
    kinds, vectors = _kinds(count, dim), f"{count:,} vectors of {dim}"
    flat = kinds.pop("flat")
    if gpu_memory and flat.bytes <= gpu_memory:
        return [replace(flat, reason=f"{vectors} take {_gib(flat.bytes)}, which the GPU searches exactly", gpu=True)]
    if count <= FLAT_UP_TO:
        reason = f"{count:,} vectors are at most {FLAT_UP_TO:,}, where exact search takes two milliseconds"
        return [replace(flat, reason=reason)]
    choices, too_large = list[IndexChoice](), list[str]()
    for name, choice in kinds.items():
        if (name == "hnsw" and count > _GRAPH_UP_TO) or (name == "pq" and choices):
            continue
        if choice.bytes > memory:
            too_large.append(f"{choice.factory} would take {_gib(choice.bytes)}")
            continue
        fits = f"{vectors} take {_gib(choice.bytes)} of the {_gib(memory)} allowed: {choice.reason}"
        choices.append(replace(choice, reason="; ".join([fits, *too_large])))
    if not choices:
        raise DataError(
            f"{vectors} fit no kind of index in {_gib(memory)}: {too_large[-1]}; raise --memory, or split the gallery"
        )
    return choices


def create_index(factory: str, dim: int) -> Any:
    """Return an empty FAISS index for inner products."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise DataError(
            f"FAISS cannot make an index of kind {factory!r} for vectors of {dim}; use {', '.join(NAMED)}, "
            f"{', '.join(GPU_NAMED)}, or an index_factory string such as 'IVF1024,SQ8'"
        ) from error


def list_count(count: int) -> int:
    """Return 4 sqrt(n) inverted lists, as FAISS advises, each with at least the 39 vectors that training needs."""
    return max(1, min(int(4 * math.sqrt(count)), count // 39))


def machine_memory() -> int:
    """Return the bytes of main memory, or the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
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
