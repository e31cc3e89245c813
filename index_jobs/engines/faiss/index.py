"""A FAISS index on disk. It is memory-mapped: processes on one machine share the pages, and it opens at once."""

from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import atomic_writer
from index_jobs.checks import check_file_once
from index_jobs.engines.faiss.gpu import MAX_K, GpuSearch, free_gpu_memory
from index_jobs.engines.faiss.search import RowSelection, WideSearch, search_selection, unwrap
from index_jobs.engines.protocol import ScoredRows

_WRITE_BYTES = 1 << 20


class FaissIndex:
    """A FAISS index on disk. Safe for concurrent searches."""

    def __init__(self, index: Any, *, on_gpu: bool = False) -> None:
        """Wrap an index on the CPU. With on_gpu, a copy on the GPU serves the searches among all rows."""
        self._index = index
        self._unfiltered = GpuSearch(index) if on_gpu else index
        self.count, self.dim = int(index.ntotal), int(index.d)
        self._cached_selection: RowSelection | None = None

    @classmethod
    def open(cls, path: Path, *, gpu: bool = False) -> "FaissIndex":
        """Memory-map an index where its kind allows, read it otherwise.

        Args:
            gpu: search on a GPU if there is one.

        Raises:
            ArtifactError: the file is missing, truncated or no index.
        """
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        try:
            try:
                index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError:
                index = faiss.read_index(str(path))
            check_file_once(path, lambda: _check_contents(index))
            return cls(index, on_gpu=gpu and free_gpu_memory() > 0)
        except RuntimeError as error:
            raise ArtifactError(f"{path} cannot be read as a FAISS index: {_reason(error)}") from error

    def search(self, vectors: Floats, k: int, mask: Mask | None = None, *, is_narrow: bool = False) -> ScoredRows:
        """As `VectorIndex.search`."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        selection = None if mask is None else self._select(mask)
        if selection is None or selection.is_everything:
            tuned_index = self._unfiltered if k <= MAX_K else self._index
            return self._wide_search.search(vectors, k, tuned_index, is_narrow=is_narrow)
        return search_selection(self._index, vectors, k, selection)

    @cached_property
    def _wide_search(self) -> WideSearch:
        return WideSearch(self._index)

    def _select(self, mask: Mask) -> RowSelection:
        """Return the selection of a mask; that of a read-only mask, such as the live rows, is cached."""
        cached = self._cached_selection
        if mask.flags.writeable:
            return RowSelection(mask)
        if cached is None or (mask.ctypes.data, len(mask)) != (cached.mask.ctypes.data, len(cached.mask)):
            self._cached_selection = cached = RowSelection(mask)
        return cached

    def vectors(self, rows: Rows) -> Floats:
        """As `VectorIndex.vectors`."""
        try:
            vectors: Floats = self._index.reconstruct_batch(np.ascontiguousarray(rows, np.int64))
        except RuntimeError as error:
            raise ArtifactError(f"this kind of index cannot reconstruct a vector: {_reason(error)}") from error
        faiss.normalize_L2(vectors)
        return vectors


def _check_contents(index: Any) -> None:
    """Raise ValueError for a wrong metric, size or row number, which FAISS trusts; it checks links of graphs itself."""
    count, (innermost, _, _) = int(index.ntotal), unwrap(index)
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or index.d < 1 or not 0 <= count == innermost.ntotal:
        raise ValueError(f"{count} vectors of {index.d} with metric {index.metric_type} are not an index of this kind")
    if isinstance(innermost, faiss.IndexIDMap):
        _require_rows(faiss.vector_to_array(innermost.id_map), count)
    if isinstance(innermost, faiss.IndexIVF):
        lists: Any = innermost.invlists
        sizes = np.zeros(innermost.nlist, np.int64)
        for number in range(innermost.nlist):
            sizes[number] = size = lists.list_size(number)
            if size:
                _require_rows(faiss.rev_swig_ptr(lists.get_ids(number), size), count)
        entries = faiss.vector_to_array(innermost.direct_map.array)
        numbers, positions = entries >> 32, entries & 0xFFFFFFFF
        _require_rows(numbers, innermost.nlist)
        if sizes.sum() != count or (positions >= sizes[numbers]).any():
            raise ValueError("its lists do not hold its vectors")


def _require_rows(rows: Any, count: int) -> None:
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        raise ValueError(f"a row number is not in 0..{count - 1}")


def write_faiss(index: Any, path: Path) -> None:
    """Write a FAISS index completely or not at all.

    FAISS overlooks errors on closing a file, as on a full disk, so it writes through Python's own file.
    """
    library: Any = faiss  # the type hints lack the two writers
    write_error: OSError | None = None
    with atomic_writer(path) as file:

        def write(data: bytes) -> int:
            nonlocal write_error
            try:
                return file.write(data)
            except OSError as error:  # FAISS would lose it
                write_error = error
                return 0

        writer = library.BufferedIOWriter(library.PyCallbackIOWriter(write), _WRITE_BYTES)
        try:
            faiss.write_index(index, writer)
            del writer  # flushes
        except RuntimeError as error:
            raise write_error or OSError(_reason(error)) from error
        if write_error:
            raise write_error


def _reason(error: Exception) -> str:
    """Return the readable part of a FAISS message, which starts with the C++ function and the source line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit("failed: ", 1)[-1]
