"""A vector engine of a hundred lines less than any other: one array, compared as a whole. Tests add it by a line."""

from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import DataError
from index_jobs.engines.measure import Benchmark, gallery_queries
from index_jobs.engines.protocol import CreatedIndex, NewIndex, ScoredRows
from index_jobs.selection import Allowed, to_mask
from index_jobs.spec import IndexSpec
from index_jobs.store.names import index_name

REGISTRY_LINE = {"array": "tests.support.array_engine:ArrayEngine"}


class ArrayIndex:
    """All vectors in memory."""

    def __init__(self, array: Floats) -> None:
        self._array = array
        self.count, self.dim = array.shape

    def search(self, vectors: Floats, k: int, mask: Allowed | None = None, *, is_narrow: bool = False) -> ScoredRows:
        scores = vectors @ self._array.T
        if mask is not None:
            scores[:, ~to_mask(mask)] = -np.inf
        scores = np.pad(scores, ((0, 0), (0, k)), constant_values=-np.inf)
        rows = np.argsort(-scores, 1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, rows, 1)
        return scores, np.where(np.isinf(scores), -1, rows)

    def vectors(self, rows: Rows) -> Floats:
        found: Floats = self._array[rows]
        return found


class ArrayEngine:
    """Keeps `vectors.npy` in the version's folder. synced: the versions that `sync` was called with, by index."""

    synced: list[tuple[str, Path, int]] = []  # noqa: RUF012  shared on purpose

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def plan(self, spec: IndexSpec, count: int, dim: int, device: str) -> int:
        if spec.kind != "auto":
            raise DataError(f"an array has no kind {spec.kind!r}")
        return 4 * count * dim

    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        array = np.concatenate([np.asarray(block) for block in new.blocks()])
        np.save(new.folder / "vectors.npy", array)
        queries = new.queries or gallery_queries(new.blocks, new.count)
        measured: dict[str, Any] = Benchmark(new.blocks, queries, target=spec.target_recall).measure(ArrayIndex(array))
        return CreatedIndex(kind="array", reason="requested", measured=measured)

    def open(self, folder: Path, *, gpu: bool = False) -> ArrayIndex:
        return ArrayIndex(np.load(folder / "vectors.npy", allow_pickle=False))

    def sync(self, index: Path, name: str, version: int) -> None:
        assert name == index_name(index)
        self.synced.append((self._uri, index, version))
