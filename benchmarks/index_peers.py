"""hnswlib, usearch and ScaNN for `index_kinds.py --peers`: built as their documents advise, tuned by our own code.

    pip install hnswlib usearch scann      any of them; one that is missing is skipped

Each class has the names that `index_jobs.engines.faiss.tuning` sets: the width of a search, and for ScaNN the number of
re-ranked candidates as a multiple of ten.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.util.arrays import Floats, Rows

CONSTRUCTION = 200  # width of a search for the links of a new vector in a graph
DEGREE = 24


class Peer:
    """A library beside FAISS. loaded: its index."""

    module = ""
    settings = f"M {DEGREE}, {CONSTRUCTION} in construction"
    width, min_width, max_width, has_reranking = "ef", 10, 4096, False

    def __init__(self, loaded: Any) -> None:
        self.loaded = loaded

    @classmethod
    def build(cls, vectors: Floats) -> "Peer":
        raise NotImplementedError

    @classmethod
    def open(cls, path: Path, dim: int) -> "Peer":
        raise NotImplementedError

    def set(self, name: str, value: int) -> None:
        """Set a search parameter by its name."""

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Rows]:
        raise NotImplementedError

    def save(self, path: Path) -> None:
        self.loaded.save(str(path))


class Hnswlib(Peer):
    module = "hnswlib"

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


class Usearch(Peer):
    module = "usearch"

    @classmethod
    def build(cls, vectors: Floats) -> "Usearch":
        peer = cls._empty(vectors.shape[1])
        peer.loaded.add(np.arange(len(vectors)), np.ascontiguousarray(vectors))
        return peer

    @classmethod
    def open(cls, path: Path, dim: int) -> "Usearch":
        peer = cls._empty(dim)
        peer.loaded.load(str(path))
        return peer

    @classmethod
    def _empty(cls, dim: int) -> "Usearch":
        from usearch.index import Index

        return cls(Index(ndim=dim, metric="ip", dtype="f32", connectivity=DEGREE, expansion_add=CONSTRUCTION))

    def set(self, name: str, value: int) -> None:
        self.loaded.expansion_search = value

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Rows]:
        found = self.loaded.search(vectors, k)
        keys, distances = found.keys.reshape(len(vectors), -1), found.distances.reshape(len(vectors), -1)
        return 1 - distances, keys.astype(np.int64)


class Scann(Peer):
    module = "scann"
    settings = "3 sqrt(count) leaves, 2 dimensions a code, threshold 0.2"
    width, min_width, has_reranking = "leaves", 1, True

    def __init__(self, loaded: Any) -> None:
        super().__init__(loaded)
        self.leaves, self.candidates = 100, 50

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


PEERS: dict[str, type[Peer]] = {peer.module: peer for peer in (Hnswlib, Usearch, Scann)}
