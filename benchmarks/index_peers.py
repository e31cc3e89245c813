"""hnswlib for `index_kinds.py --peers`: built as its documents advise, tuned by our own code.

The class has the names that `index_jobs.engines.measure.tune` sets.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.util.arrays import Floats, Rows

CONSTRUCTION = 200  # width of a search for the links of a new vector in a graph
DEGREE = 24


class Hnswlib:
    settings = f"M {DEGREE}, {CONSTRUCTION} in construction"
    width, min_width, max_width, has_reranking = "ef", 10, 4096, False

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded

    @classmethod
    def build(cls, vectors: Floats) -> "Hnswlib":
        import hnswlib

        loaded = hnswlib.Index("ip", vectors.shape[1])
        loaded.init_index(len(vectors), ef_construction=CONSTRUCTION, M=DEGREE)
        loaded.add_items(vectors)
        return cls(loaded)

    @classmethod
    def open(cls, path: Path, dim: int) -> "Hnswlib":
        import hnswlib

        loaded = hnswlib.Index("ip", dim)
        loaded.load_index(str(path))
        return cls(loaded)

    def save(self, path: Path) -> None:
        self.loaded.save_index(str(path))

    def set(self, name: str, value: int) -> None:
        self.loaded.set_ef(value)

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Rows]:
        rows, distances = self.loaded.knn_query(vectors, k)
        return 1 - distances, rows.astype(np.int64)


PEERS = {"hnswlib": Hnswlib}
