"""Choice of the index kind: a FAISS index_factory string by count, dimensions, memory and device.

- `auto` lists the kinds for the gallery, fastest at the target recall first, without those that exceed the memory. The
  first one is built; while the measured recall stays below the target, the next one is. See `build`.
- The order follows measured latencies of one query on one core; `benchmarks/index_kinds.py` prints them. A graph is
  fastest on real embeddings, and 16-bit vectors do not lower its recall. Among many near-duplicates its recall is too
  low.
- Up to 20,000 vectors, exact search takes two milliseconds and needs no training, so nothing else is considered.
- Memory estimates are bytes for each vector; the benchmark prints measured ones.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faiss

from dcar_core.util.errors import DataError, MissingExtraError

FLAT_UP_TO = 20_000
_GRAPH_UP_TO = 5_000_000  # beyond, only lists: at ten million a graph took 50 minutes and missed the target
_GRAPH_BYTES = 4 * 2 * 24 + 16  # links of a vector in a graph of degree 24
_ENTRY_BYTES = 16  # number of a vector, in its list and in the map from row to list
_COARSE_GRAPH_FROM = 16_384  # from this number of lists on, a graph finds the nearest ones

GPU_NAMED = ("gpu-flat", "gpu-ivf", "gpu-cagra")


@dataclass(frozen=True)
class IndexChoice:
    """A FAISS index_factory string and the reason for it.

    gpu: built and searched on a GPU. bytes: estimated size, 0 if unknown.
    """

    factory: str
    reason: str
    gpu: bool = False
    bytes: int = 0

    @property
    def has_lists(self) -> bool:
        """True for inverted lists; a search visits some of them."""
        return "IVF" in self.factory


@dataclass(frozen=True)
class _Kind:
    factory: Callable[[int, int], str]  # from count and dimensions
    bytes: Callable[[int], float]  # of a vector, from its dimensions
    description: str


_KINDS = {
    "flat": _Kind(lambda n, d: "Flat", lambda d: 4 * d, "exact"),
    "hnsw": _Kind(lambda n, d: "HNSW24,SQfp16", lambda d: 2 * d + _GRAPH_BYTES, "a graph over 16-bit vectors"),
    "ivf-pq-fp16": _Kind(
        lambda n, d: f"{_ivf(n)},PQ{_half(d)}x4fs,Refine(SQfp16)",
        lambda d: 2 * d + _half(d) / 2 + _ENTRY_BYTES,
        "inverted lists of long product codes, re-ranked by 16-bit vectors",
    ),
    "ivf-pq": _Kind(
        lambda n, d: f"{_ivf(n)},PQ{_code_parts(d)}x4fs,Refine(SQ8)",
        lambda d: d + _code_parts(d) / 2 + _ENTRY_BYTES,
        "inverted lists of product codes, re-ranked by 8-bit vectors",
    ),
    "ivf": _Kind(lambda n, d: f"{_ivf(n)},Flat", lambda d: 4 * d + _ENTRY_BYTES, "inverted lists of full vectors"),
    "pq": _Kind(
        lambda n, d: f"{_ivf(n)},PQ{_code_parts(d)}",
        lambda d: _code_parts(d) + _ENTRY_BYTES,
        "the only kind that fits; its recall is low",
    ),
}
_FASTEST_FIRST = ("hnsw", "ivf-pq-fp16", "ivf-pq", "ivf")
NAMED = ("auto", *_KINDS)


def choose_kinds(
    kind: str, count: int, dim: int, *, memory: int | None = None, gpu_memory: int = 0
) -> list[IndexChoice]:
    """Return the index to build, and for "auto" the alternatives if its recall is too low.

    Args:
        kind: one of NAMED or GPU_NAMED, or any index_factory string.
        memory: bytes that the index may take; None for half of the memory of the machine or container.
        gpu_memory: bytes of the GPU that the index may take; 0 without a GPU.

    Raises:
        DataError: FAISS does not know the kind.
        MissingExtraError: a GPU kind without a GPU, or without FAISS's GPU build.
    """
    if kind == "auto":
        return _choose_automatically(count, dim, machine_memory() // 2 if memory is None else memory, gpu_memory)
    reason = f"requested: {kind}"
    if kind in GPU_NAMED:
        if not gpu_memory:
            raise MissingExtraError(f"the kind {kind}, with a CUDA device and FAISS built for it,", "gpu")
        factory = {"gpu-flat": "Flat", "gpu-ivf": f"{_ivf(count)},Flat", "gpu-cagra": "CAGRA"}[kind]
        return [IndexChoice(factory, reason, gpu=True)]
    choice = _choice(kind.lower(), count, dim, reason) if kind.lower() in _KINDS else IndexChoice(kind, reason)
    create_index(choice.factory, dim)
    return [choice]


def _choose_automatically(count: int, dim: int, memory: int, gpu_memory: int) -> list[IndexChoice]:
    if gpu_memory and (size := 4 * dim * count) <= gpu_memory:
        reason = f"{_size(count, dim)} take {_gib(size)}, which the GPU searches exactly"
        return [IndexChoice("Flat", reason, gpu=True, bytes=size)]
    if count <= FLAT_UP_TO:
        reason = f"{count:,} vectors are at most {FLAT_UP_TO:,}, where exact search takes two milliseconds"
        return [_choice("flat", count, dim, reason)]
    choices, too_large = list[IndexChoice](), list[str]()
    for name in (*_FASTEST_FIRST, "pq"):
        if (name == "hnsw" and count > _GRAPH_UP_TO) or (name == "pq" and choices):
            continue
        choice = _choice(name, count, dim, "")
        if choice.bytes > memory:
            too_large.append(f"{choice.factory} would take {_gib(choice.bytes)}")
            continue
        fits = f"{_size(count, dim)} take {_gib(choice.bytes)} of the {_gib(memory)} allowed"
        choices.append(_choice(name, count, dim, "; ".join([f"{fits}: {_KINDS[name].description}", *too_large])))
    if not choices:
        raise DataError(
            f"{_size(count, dim)} fit no kind of index in {_gib(memory)}: {too_large[-1]}; raise --memory, or split "
            f"the gallery"
        )
    return choices


def _choice(name: str, count: int, dim: int, reason: str) -> IndexChoice:
    kind = _KINDS[name]
    return IndexChoice(kind.factory(count, dim), reason, bytes=int(count * kind.bytes(dim)))


def create_index(factory: str, dim: int) -> object:
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


def _half(dim: int) -> int:
    """Return the number of parts of a long product code: one for every two dimensions, or for every one if odd."""
    return dim // 2 if dim % 2 == 0 else dim


def _code_parts(dim: int) -> int:
    """Return the number of parts of a product code: the largest divisor up to 64, or up to an eighth of `dim`."""
    return max(parts for parts in range(1, max(64, dim // 8) + 1) if dim % parts == 0)


def _ivf(count: int) -> str:
    number = list_count(count)
    return f"IVF{number}_HNSW32" if number >= _COARSE_GRAPH_FROM else f"IVF{number}"


def _size(count: int, dim: int) -> str:
    return f"{count:,} vectors of {dim}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
