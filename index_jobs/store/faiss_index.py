"""The search side of an index: a small protocol, and FAISS behind it.

- `VectorIndex` is all that an artifact needs, so that another engine can stand in FAISS's place.
- FAISS files are memory-mapped, so processes on one machine share the pages, and an index opens at once.
- Metric is the inner product of normalised vectors, the cosine similarity.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import atomic_writer
from index_jobs.store.faiss_search import Breadth, Found, Selection, search_among
from index_jobs.store.gpu_search import MOST_K, GpuSearch
from index_jobs.store.gpu_search import memory as gpu_memory

_WRITE_BYTES = 1 << 20


class VectorIndex(Protocol):
    """Vectors by row number."""

    @property
    def count(self) -> int: ...
    @property
    def dim(self) -> int: ...
    def search(self, vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None = None) -> Found:
        """float32 (n, E) -> scores float32 (n, k), rows int64 (n, k), best first; -1 where there are fewer than k.

        mask, bool (count,), says which rows may be found.
        """
        ...

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """int64 (m,) -> float32 (m, E), normalised; approximate where the kind compresses."""
        ...


class FaissIndex:
    """A FAISS index on disk. Safe for concurrent searches."""

    def __init__(self, index: Any, *, on_gpu: bool = False) -> None:
        """Take an index on the CPU; with on_gpu, a copy on the GPU answers the searches among all rows."""
        self._index = index
        self._all = GpuSearch(index) if on_gpu else index
        self.count, self.dim = int(index.ntotal), int(index.d)
        self._last: Selection | None = None

    @classmethod
    def open(cls, path: Path, *, gpu: bool = False) -> "FaissIndex":
        """Memory-map an index where its kind allows, read it otherwise.

        Args:
            gpu: search on a GPU when there is one.

        Raises:
            ArtifactError: the file is missing, truncated or no index.
        """
        import faiss

        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        try:
            try:
                index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError:
                index = faiss.read_index(str(path))
            return cls(index, on_gpu=gpu and gpu_memory() > 0)
        except RuntimeError as error:
            raise ArtifactError(f"{path} cannot be read as a FAISS index: {_reason(error)}") from error

    def search(self, vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None = None) -> Found:
        vectors = np.ascontiguousarray(vectors, np.float32)
        among = None if mask is None else self._selection(mask)
        if among is None or among.whole:
            return self._breadth.search(vectors, k, self._all if k <= MOST_K else self._index)
        return search_among(self._index, vectors, k, among)

    @cached_property
    def _breadth(self) -> Breadth:
        return Breadth(self._index)

    def _selection(self, mask: NDArray[np.bool_]) -> Selection:
        """Of a mask that cannot change, as that of the rows that are left after removals, the one made last time."""
        last = self._last
        if mask.flags.writeable:
            return Selection(mask)
        if last is None or (mask.ctypes.data, len(mask)) != (last.mask.ctypes.data, len(last.mask)):
            self._last = last = Selection(mask)
        return last

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        try:
            found: NDArray[np.float32] = self._index.reconstruct_batch(np.ascontiguousarray(rows, np.int64))
        except RuntimeError as error:
            raise ArtifactError(f"this kind of index cannot give a vector back: {_reason(error)}") from error
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found


def write_faiss(index: Any, path: Path) -> None:
    """Write a FAISS index whole or not at all.

    Through Python's own file, since faiss overlooks what fails when a file is closed, as on a full disk.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    import faiss

    library: Any = faiss  # whose type hints know neither of the two writers
    problem: OSError | None = None
    with atomic_writer(path) as file:

        def write(data: bytes) -> int:
            nonlocal problem
            try:
                return file.write(data)
            except OSError as error:  # must not cross faiss, which would lose it
                problem = error
                return 0

        writer = library.BufferedIOWriter(library.PyCallbackIOWriter(write), _WRITE_BYTES)
        try:
            faiss.write_index(index, writer)
            del writer  # flushes
        except RuntimeError as error:
            raise problem or OSError(_reason(error)) from error
        if problem:
            raise problem


def _reason(error: Exception) -> str:
    """faiss's messages start with the C++ function and the source line; the last part is for people."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit("failed: ", 1)[-1]
