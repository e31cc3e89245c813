"""Which index, and why: a FAISS index_factory string chosen by count, dimensions, memory and device.

- `auto` lists what could serve the gallery, fastest at the target recall first, drops what does not fit the memory, and
  takes the first. A build whose measured recall stays below the target goes on with the next of the list; see `build`.
- The order is that of measured latencies, one query on one core; `benchmarks/index_kinds.py` prints them. Which of the
  first two is the faster depends on the vectors, so both are built and measured where memory allows: rivals.
- Up to 20,000 vectors exact search takes two milliseconds and needs no training, so nothing else is considered.
- Every estimate of memory is bytes a vector; the benchmark prints measured ones.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dcar_core.util.errors import DataError, MissingExtraError

FLAT_UP_TO = 20_000
_GRAPH_UP_TO = 10_000_000  # beyond, `auto` builds no graph: it takes most of a day
_RIVALS_UP_TO = 10_000_000  # beyond, filling a second index takes hours
_GRAPH = 4 * 2 * 32 + 16  # bytes of a vector's links in a graph of degree 32
_ENTRY = 16  # bytes of a vector's number, in its list and in the map from row to list
_COARSE_GRAPH_FROM = 16_384  # so many lists are themselves found by a graph

NAMED = ("auto", "flat", "hnsw", "hnsw-sq8", "ivf", "ivf-sq8", "ivf-pq", "ivf-rabitq", "pq")
GPU_NAMED = ("gpu-flat", "gpu-ivf", "gpu-cagra")


@dataclass(frozen=True)
class Choice:
    """A FAISS index_factory string, why it was taken, and whether it is built and searched on a GPU.

    rival: to be measured even where the choice before it serves well, and taken where it is faster.
    """

    factory: str
    reason: str
    gpu: bool = False
    bytes: int = 0  # estimated; 0 where nothing is known
    rival: bool = False

    @property
    def lists(self) -> bool:
        """Whether a search goes through some of many lists."""
        return "IVF" in self.factory


@dataclass(frozen=True)
class _Kind:
    factory: Callable[[int, int], str]  # of count and dimensions
    bytes: Callable[[int], float]  # a vector of so many dimensions
    trait: str


_KINDS = {
    "flat": _Kind(lambda n, d: "Flat", lambda d: 4 * d, "exact"),
    "hnsw": _Kind(lambda n, d: "HNSW32", lambda d: 4 * d + _GRAPH, "a graph over whole vectors"),
    "hnsw-sq8": _Kind(lambda n, d: "HNSW32,SQ8", lambda d: d + _GRAPH, "a graph over 8-bit vectors"),
    "ivf": _Kind(lambda n, d: f"{_ivf(n)},Flat", lambda d: 4 * d + _ENTRY, "inverted lists of whole vectors"),
    "ivf-sq8": _Kind(lambda n, d: f"{_ivf(n)},SQ8", lambda d: d + _ENTRY, "inverted lists of 8-bit vectors"),
    "ivf-pq": _Kind(
        lambda n, d: f"{_ivf(n)},PQ{_parts(d)}x4fs,Refine(SQ8)",
        lambda d: d + _parts(d) / 2 + _ENTRY,
        "inverted lists of product codes, ranked again by 8-bit vectors",
    ),
    "ivf-rabitq": _Kind(
        lambda n, d: f"{_ivf(n)},RaBitQ,Refine(SQ8)",
        lambda d: d + d / 8 + 8 + _ENTRY,
        "inverted lists of bits, ranked again by 8-bit vectors",
    ),
    "pq": _Kind(
        lambda n, d: f"{_ivf(n)},PQ{_parts(d)}",
        lambda d: _parts(d) + _ENTRY,
        "the only kind that fits; its recall is low",
    ),
}
_FASTEST_FIRST = ("ivf-pq", "ivf-rabitq", "ivf", "ivf-sq8", "hnsw", "hnsw-sq8", "pq")
_GRAPHS = ("hnsw", "hnsw-sq8")
_RIVAL = "ivf-rabitq"  # of the one before it


def choose(kind: str, count: int, dim: int, *, memory: int | None = None, gpu_memory: int = 0) -> list[Choice]:
    """The index for a count of vectors, and for "auto" what to take instead when its recall is too low.

    Args:
        kind: one of NAMED or GPU_NAMED, or any index_factory string.
        memory: bytes that the index may take, None for half of what the machine or its container has.
        gpu_memory: bytes of the GPU that the index may take, 0 where there is none.

    Raises:
        DataError: FAISS does not know the kind.
        MissingExtraError: a GPU kind without a GPU, or without FAISS's GPU build.
    """
    if kind == "auto":
        return _auto(count, dim, machine_memory() // 2 if memory is None else memory, gpu_memory)
    reason = f"asked for: {kind}"
    if kind in GPU_NAMED:
        if not gpu_memory:
            raise MissingExtraError(f"the kind {kind}, with a CUDA device and FAISS built for it,", "gpu")
        factory = {"gpu-flat": "Flat", "gpu-ivf": f"{_ivf(count)},Flat", "gpu-cagra": "CAGRA"}[kind]
        return [Choice(factory, reason, gpu=True)]
    known = _KINDS.get(kind.lower())
    if known:
        choice = Choice(known.factory(count, dim), reason, bytes=int(count * known.bytes(dim)))
    else:
        choice = Choice(kind, reason)
    create(choice.factory, dim)
    return [choice]


def _auto(count: int, dim: int, memory: int, gpu_memory: int) -> list[Choice]:
    if gpu_memory and (size := 4 * dim * count) <= gpu_memory:
        reason = f"{_size(count, dim)} take {_gib(size)}, which the GPU searches exactly"
        return [Choice("Flat", reason, gpu=True, bytes=size)]
    if count <= FLAT_UP_TO:
        reason = f"{count:,} vectors are at most {FLAT_UP_TO:,}, where exact search takes two milliseconds"
        return [Choice("Flat", reason, bytes=4 * dim * count)]
    choices = list[Choice]()
    too_large = []
    for name in _FASTEST_FIRST:
        if (name in _GRAPHS and count > _GRAPH_UP_TO) or (name == "pq" and choices):
            continue
        known = _KINDS[name]
        size = int(count * known.bytes(dim))
        if size > memory:
            too_large.append(f"{known.factory(count, dim)} would take {_gib(size)}")
            continue
        rest = f"; {', '.join(too_large)}" if too_large else ""
        reason = f"{_size(count, dim)} take {_gib(size)} of the {_gib(memory)} allowed: {known.trait}{rest}"
        # Both are in memory until it is known which of them is kept.
        fits = bool(choices) and size + choices[-1].bytes <= memory
        rival = name == _RIVAL and fits and count <= _RIVALS_UP_TO
        choices.append(Choice(known.factory(count, dim), reason, bytes=size, rival=rival))
    if not choices:
        raise DataError(
            f"{_size(count, dim)} fit no kind of index in {_gib(memory)}: {too_large[-1]}; raise --memory, or split "
            f"the gallery"
        )
    return choices


def create(factory: str, dim: int) -> object:
    """An empty FAISS index for inner products.

    Raises:
        DataError: FAISS does not know the kind.
    """
    import faiss

    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise DataError(
            f"FAISS cannot make an index of kind {factory!r} for vectors of {dim}; use {', '.join(NAMED)}, "
            f"{', '.join(GPU_NAMED)}, or an index_factory string such as 'IVF1024,SQ8'"
        ) from error


def lists(count: int) -> int:
    """4 sqrt(n) inverted lists, as FAISS advises, each with at least the 39 vectors that training wants."""
    return max(1, min(int(4 * math.sqrt(count)), count // 39))


def _parts(dim: int) -> int:
    """Into how many parts a product code divides a vector: 64, or one for eight dimensions, where that divides it."""
    return max(parts for parts in range(1, max(64, dim // 8) + 1) if dim % parts == 0)


def _ivf(count: int) -> str:
    number = lists(count)
    return f"IVF{number}_HNSW32" if number >= _COARSE_GRAPH_FROM else f"IVF{number}"


def machine_memory() -> int:
    """Bytes of main memory, of the container where it is limited."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            return min(whole, int(text))
    return whole


def _size(count: int, dim: int) -> str:
    return f"{count:,} vectors of {dim}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
