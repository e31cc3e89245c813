"""hnswlib and ScaNN for `index_kinds.py --peers`: built as their documents advise, tuned by our own code.

    pip install hnswlib scann      one that is missing is skipped

Each class has the names that `index_jobs.engines.faiss.tuning` sets: the width of a search, and for ScaNN the number of
re-ranked candidates as a multiple of ten.
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


class Scann:
    settings = "3 sqrt(count) leaves, 2 dimensions a code, threshold 0.2"
    width, min_width, max_width, has_reranking = "leaves", 1, 4096, True

    def __init__(self, loaded: Any) -> None:
        self.loaded, self.leaves, self.candidates = loaded, 100, 50

    @classmethod
    def build(cls, vectors: Floats) -> "Scann":
        import scann

        leaves = round(3 * len(vectors) ** 0.5)
        builder = scann.scann_ops_pybind.builder(np.asarray(vectors), 10, "dot_product")
        tree = builder.tree(leaves, leaves // 10, training_sample_size=min(len(vectors), 250_000))
        return cls(tree.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build())

    @classmethod
    def open(cls, path: Path, dim: int) -> "Scann":
        import scann

        return cls(scann.scann_ops_pybind.load_searcher(str(path)))

    def save(self, path: Path) -> None:
        path.mkdir()
        self.loaded.serialize(str(path), relative_path=True)

    def set(self, name: str, value: int) -> None:
        if name == "k_factor":
            self.candidates = 10 * value
        else:
            self.leaves = value

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Rows]:
        chosen = {"leaves_to_search": self.leaves, "pre_reorder_num_neighbors": max(k, self.candidates)}
        if len(vectors) == 1:
            rows, scores = self.loaded.search(vectors[0], k, **chosen)
            return scores[None], rows[None].astype(np.int64)
        rows, scores = self.loaded.search_batched(vectors, k, **chosen)
        return np.array(scores), np.array(rows).astype(np.int64)


PEERS: dict[str, type[Hnswlib | Scann]] = {"hnswlib": Hnswlib, "scann": Scann}
