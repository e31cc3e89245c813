"""An index of random vectors for tests of the ranking."""

from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from app.search.served_version import Recent
from dcar_core.util.errors import DataError
from index_jobs.engines.faiss.index import FaissIndex
from index_jobs.index.items import take_rows
from index_jobs.index.lexical import LexicalIndex
from index_jobs.row_filter import RowFilter
from index_jobs.spec import IndexSpec


class IndexStub:
    """The parts of an index version that ranking uses, over a FAISS index of some kind."""

    def __init__(self, vectors: np.ndarray, kind: str = "Flat", lexical: LexicalIndex | None = None, **columns: Any):
        index: Any = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        if kind.startswith("IVF"):
            index.nprobe = index.nlist
            index.make_direct_map()
        if kind.startswith("HNSW"):
            index.hnsw.efSearch = len(vectors)
        faiss_index = FaissIndex(index)
        self.search, self.vectors = faiss_index.search, faiss_index.vectors
        self.rows, self.lexical = len(vectors), lexical
        self.live = np.ones(self.rows, np.bool_)
        self.live.flags.writeable = False
        self.live_rows = RowFilter.of_mask(self.live)
        self.manifest: Any = SimpleNamespace(removed=0, kind=kind, additions=[], spec=IndexSpec(), cutoff={})
        half = self.rows // 2
        self._columns = {
            name: pa.chunked_array([values[:half], values[half:]], pa.array(values).type)
            for name, values in columns.items()
        }
        self.sample_vectors = vectors[:50]

    def column(self, name: str, rows: Any = None) -> pa.ChunkedArray:
        if name not in self._columns:
            raise DataError(f"no item has the field {name!r}")
        column = self._columns[name]
        return column if rows is None else take_rows(pa.table({name: column}), rows)[name]


def served_of(opened: Any) -> Any:
    return SimpleNamespace(index=opened, columns=Recent[Any, Any](8))


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors
