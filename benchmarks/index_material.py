"""Vectors and queries for `index_kinds.py`, made once and kept in files.

- Clusters: vectors around centres of unequal size, each wide in directions of its own, so the cluster alone does not
  give the neighbours. Queries are drawn from the same clusters.
- Files: your own vectors and queries. Beyond the vectors of the file, copies follow, each moved by a part of the
  difference between two other vectors, which keeps the directions in which real vectors differ.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.engines.measure import find_neighbours
from index_jobs.engines.protocol import HeldOutQueries

BLOCK = 20_000
SPREAD = 24  # directions in which a cluster is wide
MOVED = 0.3  # of the difference between two vectors
FILTERED_QUERIES = 200


class Clusters:
    """sqrt(count) clusters of unequal size; the largest is many times the smallest."""

    def __init__(self, count: int, dim: int) -> None:
        fixed = np.random.default_rng(0)
        number = max(20, int(np.sqrt(count)))
        self.centres = fixed.normal(size=(number, dim)).astype(np.float32)
        self.basis = fixed.normal(size=(256, dim)).astype(np.float32)
        self.own = fixed.integers(256, size=(number, SPREAD))
        self.shares = np.arange(1, number + 1) ** -0.7
        self.shares /= self.shares.sum()

    def draw(self, size: int, seed: int) -> Floats:
        """Return float32 (size, dim), L2-normalized."""
        draw = np.random.default_rng([7, seed])
        which = draw.choice(len(self.centres), size, p=self.shares)
        wide = 0.25 * draw.normal(size=(size, SPREAD)).astype(np.float32)
        vectors = self.centres[which] + 0.12 * draw.normal(size=(size, self.centres.shape[1])).astype(np.float32)
        for place in range(SPREAD):
            vectors += wide[:, place : place + 1] * self.basis[self.own[which, place]]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


@dataclass(frozen=True)
class Material:
    """Files of vectors, queries to tune with, and queries to measure with their exact neighbours; made once.

    name: "clusters" or the name of the file. files: vectors and queries of its own, or None.
    """

    out: Path
    name: str
    count: int
    dim: int
    queries: int
    files: tuple[Path, Path] | None = None

    @property
    def mark(self) -> str:
        return f"{self.name}-{self.count}x{self.dim}"

    @property
    def truth(self) -> Path:
        return self.out / f"truth-{self.mark}.npz"

    def filtered(self, percent: int) -> Path:
        return self.out / f"truth-{self.mark}-{percent}.npy"

    def index(self, kind: str) -> Path:
        return self.out / f"{kind}-{self.mark}.faiss"

    def prepare(self) -> tuple[Floats, HeldOutQueries]:
        """Return the vectors, memory-mapped, and queries to tune with."""
        path = self.out / f"vectors-{self.mark}.npy"
        if not (path.exists() and self.truth.exists()):
            drawn, queries = self._draw()
            drawing = self.out / f"drawing-{os.getpid()}.npy"  # its own, should another run be at the same
            written = np.lib.format.open_memmap(drawing, "w+", np.float32, (self.count, self.dim))
            start = 0
            for block in drawn:
                written[start : start + len(block)] = block
                start += len(block)
            written.flush()
            drawing.rename(path)
            vectors: Floats = np.load(path, mmap_mode="r")
            truth = find_neighbours(lambda: blocks(vectors), queries[1::2])[1]
            np.savez(self.truth, tuning=queries[::2], queries=queries[1::2], truth=truth)
        with np.load(self.truth) as file:
            return np.load(path, mmap_mode="r"), held_out(file["tuning"])

    def prepare_filter(self, vectors: Floats, percent: int) -> None:
        """Write the exact neighbours among a part of the rows."""
        allowed = allowed_rows(self.count, percent)

        def selected() -> Iterator[Floats]:
            for start, block in zip(range(0, self.count, BLOCK), blocks(vectors), strict=True):
                yield block[allowed[start : start + BLOCK]]

        with np.load(self.truth) as file:
            rows = find_neighbours(selected, file["queries"][:FILTERED_QUERIES])[1]
        np.save(self.filtered(percent), np.where(rows < 0, -1, np.flatnonzero(allowed)[rows]))

    def _draw(self) -> tuple[Iterator[Floats], Floats]:
        if self.files:
            vectors, queries = (np.load(path, mmap_mode="r") for path in self.files)
            return grown(vectors, self.count), np.array(queries[: 2 * self.queries])
        clusters = Clusters(self.count, self.dim)
        starts = range(0, self.count, BLOCK)
        drawn = (clusters.draw(min(BLOCK, self.count - start), seed=start) for start in starts)
        return drawn, clusters.draw(2 * self.queries, seed=2**31 - 1)


def grown(vectors: Floats, count: int) -> Iterator[Floats]:
    """Yield blocks of `count` vectors: those given, then moved copies of them."""
    for start in range(0, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count))
        block = np.array(vectors[rows % len(vectors)])
        first, second = np.random.default_rng([13, start]).integers(len(vectors), size=(2, len(rows)))
        copies = rows >= len(vectors)
        block[copies] += MOVED * (vectors[first[copies]] - vectors[second[copies]])
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        yield block


def held_out(vectors: Floats) -> HeldOutQueries:
    return HeldOutQueries(vectors, "new")


def allowed_rows(count: int, percent: int) -> Mask:
    """Return bool (count,): a random part of the rows."""
    return np.random.default_rng([17, percent]).random(count) < percent / 100


def blocks(vectors: Floats) -> Iterator[Floats]:
    return (vectors[start : start + BLOCK] for start in range(0, len(vectors), BLOCK))


def count_hits(found: Rows, exact: Rows) -> float:
    """Return the recall of rows (q, 10); -1 stands for none."""
    hits = sum(len(np.intersect1d(a, b[b >= 0])) for a, b in zip(found, exact, strict=True))
    return hits / int((exact >= 0).sum())


def read_whole(file: Path) -> None:
    """Read a file, so that its pages are in memory when it is mapped."""
    with file.open("rb") as opened:
        while opened.read(1 << 24):
            pass
