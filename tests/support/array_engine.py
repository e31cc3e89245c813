"""A third party's vector engine: one array, compared as a whole.
`tests/index_jobs/test_engines.py` installs it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import DataError
from index_jobs.engines.measure import Benchmark
from index_jobs.engines.protocol import (
    CreatedIndex,
    Engine,
    Files,
    NewIndex,
    ScoredRows,
    VectorIndex,
    merge_top_k,
)
from index_jobs.row_filter import RowFilter
from index_jobs.spec import IndexSpec


class ArrayIndex(VectorIndex):
    def __init__(self, array: Floats) -> None:
        self._array = array
        (self.count, self.dim) = array.shape

    def search(
        self,
        vectors: Floats,
        k: int,
        rows: RowFilter | None = None,
        *,
        is_narrow: bool = False,
    ) -> ScoredRows:
        if rows is None:
            numbers = np.arange(self.count)
        else:
            numbers = np.where(rows.mask, np.arange(self.count), -1)
        return merge_top_k(
            [vectors @ self._array.T],
            [np.tile(numbers, (len(vectors), 1))],
            k,
        )

    def vectors(self, rows: Rows) -> Floats:
        return np.asarray(self._array[rows])


class ArrayEngine(Engine):
    synced: list[tuple[str, str, int]] = []  # noqa: RUF012  URI, name of the index and version of each call

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def plan(self, spec: IndexSpec, count: int, dim: int) -> int:
        if spec.kind != "auto":
            raise DataError(f"an array has no kind {spec.kind!r}")
        return 4 * count * dim

    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        index = ArrayIndex(
            np.concatenate([np.asarray(block) for block in new.blocks()])
        )
        np.save(new.folder / "vectors.npy", index.vectors(np.arange(index.count)))
        benchmark = Benchmark(new.blocks, new.queries, target=spec.target_recall)
        return CreatedIndex(
            kind="array",
            reason="requested",
            measured=benchmark.measure(index),
        )

    def open(self, files: Files, kind: str = "") -> ArrayIndex:
        return ArrayIndex(np.load(files["vectors.npy"], allow_pickle=False))

    def sync(
        self,
        name: str,
        version: int,
        versions: Mapping[int, Sequence[Files]],
    ) -> None:
        self.synced.append((self._uri, name, version))
