"""A FAISS index in a file, and its searches among all rows or a selection of rows.

- The file is memory-mapped: processes on one machine share the pages, and it opens at
  once. It holds the CPU form. With a GPU kind, a copy on the GPU serves the searches
  among all rows, one at a time.
- Graphs and inverted lists are tuned for ten results. More results need a wider search,
  since a search returns no more rows than it visits. A narrow search (`is_narrow`) is
  as wide as one for few results, and may miss the last ones.
- A search among selected rows is wider, so that it visits as many of them as an
  unfiltered search visits rows; it drops the others of its results. If too few are
  left, most selected rows are far from the query: the search widens, and FAISS skips
  the other rows itself. A small selection, or one that needs too wide a search, is
  compared exactly.
"""

import math
import threading
from pathlib import Path
from typing import Any

import faiss as typed_faiss
import numpy as np

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import atomic_writer
from index_jobs.engines.protocol import (
    EXACT_UP_TO,
    ScoredRows,
    VectorIndex,
    merge_top_k,
    no_results,
)
from index_jobs.row_filter import RowFilter

faiss: Any = typed_faiss  # its type hints have the C++ signatures only

VECTORS = "index.faiss"
MAX_GPU_K = 2048  # results of a GPU search
# results that tuning covers: ten, and two that show whether there are more, or equal
# ones
_TUNED_FOR = 12
_NARROW = 16  # results that a narrow search is wide enough for
_VISITED = 4  # rows to visit for each result
# factor on the width of a graph's first search among selected rows
_GRAPH_RESERVE = 1.2
# cost of a vector reached through the graph, in vectors compared sequentially
_GRAPH_COST = 4
_SCAN_RATIO = 16  # rows skipped in lists that cost as much as one exact comparison
_SPARSE = 0.5  # selected rows are sparse near a query below this ratio of their share
_WIDENING = 4  # factor on the width where they are sparse
_BLOCK = 2048  # vectors that are decoded and compared at a time
# from this share on, going through all stored vectors is faster than decoding the
# selected ones
DECODED_SHARE = 0.001


class FaissIndex(VectorIndex):
    """An index with the search parameters that it has when this is created. Safe for
    concurrent searches.
    """

    def __init__(self, index: Any, *, on_gpu: bool = False) -> None:
        self._index = index
        # FAISS's GPU indexes are not safe for concurrent searches
        self._on_gpu = None
        self._turn = threading.Lock()
        if on_gpu:
            self._resources = faiss.StandardGpuResources()  # must outlive the copy
            self._on_gpu = faiss.index_cpu_to_gpu(self._resources, 0, index)
        self.count = int(index.ntotal)
        self.dim = int(index.d)
        innermost, self._factor = unwrap(index)
        self._has_lists = isinstance(innermost, faiss.IndexIVF)
        # nprobe or efSearch, and its largest useful value; 0 for kinds without either
        self._tuned = self._maximum = 0
        self._visited = 1 / self._factor  # rows that one more of the width visits
        if self._has_lists:
            self._tuned = int(innermost.nprobe)
            self._maximum = int(innermost.nlist)
            self._visited = self.count / innermost.nlist
        elif isinstance(innermost, faiss.IndexHNSW):
            self._tuned = int(innermost.hnsw.efSearch)
            self._maximum = self.count
        self._storage = index
        if isinstance(index, faiss.IndexRefine | faiss.IndexHNSW):
            if isinstance(index, faiss.IndexRefine):
                stored = index.refine_index
            else:
                stored = index.storage
            self._storage = faiss.downcast_index(stored)

    @classmethod
    def open(cls, path: Path, *, on_gpu: bool = False) -> "FaissIndex":
        """Memory-map an index where its kind allows, read it otherwise. Raise
        ArtifactError if the file is no index.

        on_gpu: search on a GPU, if there is one.
        """
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        try:
            try:
                index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError:
                index = faiss.read_index(str(path))
            return cls(index, on_gpu=on_gpu and gpu_count() > 0)
        except RuntimeError as error:
            raise ArtifactError(
                f"{path} cannot be read as a FAISS index: {faiss_reason(error)}"
            ) from error

    def search(
        self,
        vectors: Floats,
        k: int,
        rows: RowFilter | None = None,
        *,
        is_narrow: bool = False,
    ) -> ScoredRows:
        """As `VectorIndex.search`."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        if (
            rows is not None
            and (count := int(np.count_nonzero(rows.mask))) < self.count
        ):
            return self._search_selection(vectors, k, rows.mask, count)
        width = self._tuned
        if self._maximum and self.count and k > _TUNED_FOR:
            # most pages of one result list then have the same width
            power = 1 << (k - 1).bit_length()
            width = max(
                width,
                min(self._maximum, self._width_for(_NARROW if is_narrow else power)),
            )
        if self._on_gpu is not None and k <= MAX_GPU_K:
            with self._turn:
                return self._on_gpu.search(vectors, k)  # type: ignore[no-any-return]
        if width == self._tuned:
            scores, found = self._index.search(vectors, k)
        else:
            scores, found = self._search(vectors, k, width)
        while (
            width < self._maximum
            and k <= self.count
            and (short := found[:, -1] < 0).any()
        ):
            width = min(2 * width, self._maximum)
            scores[short], found[short] = self._search(vectors[short], k, width)
        return scores, found

    def _search_selection(
        self,
        vectors: Floats,
        k: int,
        mask: Mask,
        count: int,
    ) -> ScoredRows:
        """Search among `count` rows of a mask."""
        if count <= EXACT_UP_TO or not self._maximum:
            return self._search_exactly(vectors, k, mask)
        candidates = min(self.count, math.ceil(k / (_SPARSE * count / self.count)))
        width, limit = self._selection_width(k, count, candidates)
        if width > limit:
            return self._search_exactly(vectors, k, mask)
        scores, rows = self._search(vectors, candidates, width)
        scores, rows = merge_top_k([scores], [np.where(mask[rows], rows, -1)], k)
        for number in np.flatnonzero(rows[:, -1] < 0):
            found = self._search_wider(vectors[number, None], k, mask, width, limit)
            scores[number] = found[0][0, :k]
            rows[number] = found[1][0, :k]
        return scores, rows

    def _selection_width(
        self,
        k: int,
        count: int,
        candidates: int,
    ) -> tuple[int, float]:
        """Return the width of the first search among `count` selected rows, and the
        width beyond which an exact search is faster.
        """
        share = count / self.count
        returned = self._factor * candidates
        if self._has_lists:
            width = math.ceil(max(self._tuned, self._width_for(k)) / share)
            limit = _SCAN_RATIO * (count - returned) / self._visited
            return min(self._maximum, width), limit
        width = round(_GRAPH_RESERVE * max(k, self._tuned) / share)
        return max(width, round(returned)), count / _GRAPH_COST

    def _search_wider(
        self,
        vector: Floats,
        k: int,
        mask: Mask,
        width: int,
        limit: float,
    ) -> ScoredRows:
        """Search for one vector, (1, dim), from which the selected rows are many hops
        or lists away. FAISS skips the other rows, in ever wider searches.
        """
        results = k if self._has_lists else max(k, self._tuned)
        width *= _WIDENING**2
        while min(width, self._maximum) <= limit:
            found = self._search(
                vector,
                results,
                min(width, self._maximum),
                _selector(mask),
            )
            if found[1][0, -1] >= 0 or width >= self._maximum:
                return found
            width *= _WIDENING
        return self._search_exactly(vector, k, mask)

    def _width_for(self, k: int) -> int:
        return math.ceil(_VISITED * k / self._visited)

    def _search(
        self,
        vectors: Floats,
        k: int,
        width: int,
        selector: Any = None,
    ) -> ScoredRows:
        scores, rows = self._index.search(
            vectors,
            k,
            params=_parameters(self._index, selector, width),
        )
        return scores, rows

    def _search_exactly(self, vectors: Floats, k: int, mask: Mask) -> ScoredRows:
        """Compare every selected row."""
        selected = np.flatnonzero(mask)
        is_scanned = isinstance(
            self._storage, faiss.IndexFlat | faiss.IndexScalarQuantizer
        )
        if is_scanned and len(selected) > DECODED_SHARE * self.count:
            scores, rows = self._storage.search(
                vectors,
                k,
                params=faiss.SearchParameters(sel=_selector(mask)),
            )
            return merge_top_k([scores], [rows], k)
        scores, rows = no_results(len(vectors))
        for start in range(0, len(selected), _BLOCK):
            block: Rows = selected[start : start + _BLOCK]
            decoded = self._index.reconstruct_batch(block)
            found = faiss.knn(
                vectors,
                decoded,
                min(k, len(block)),
                metric=faiss.METRIC_INNER_PRODUCT,
            )
            scores, rows = merge_top_k([scores, found[0]], [rows, block[found[1]]], k)
        return merge_top_k([scores], [rows], k)

    def vectors(self, rows: Rows) -> Floats:
        """As `VectorIndex.vectors`."""
        try:
            vectors: Floats = self._index.reconstruct_batch(
                np.ascontiguousarray(rows, np.int64)
            )
        except RuntimeError as error:
            raise ArtifactError(
                f"this kind of index cannot reconstruct a vector: {faiss_reason(error)}"
            ) from error
        faiss.normalize_L2(vectors)
        return vectors


def gpu_count() -> int:
    """Return the number of GPUs that FAISS can use; 0 for its CPU build."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _selector(mask: Mask) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))


def unwrap(index: Any) -> tuple[Any, float]:
    """Return the index inside transforms and refinements, and the factor of results
    that these request of it.
    """
    index = faiss.downcast_index(index)
    factor = 1.0
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        is_refined = isinstance(index, faiss.IndexRefine)
        factor *= index.k_factor if is_refined else 1
        index = faiss.downcast_index(index.base_index if is_refined else index.index)
    return index, factor


def _parameters(index: Any, selector: Any, width: int) -> Any:
    """Return the search parameters of a kind and of the kinds inside it; width is
    nprobe or efSearch.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(
            index_params=_parameters(index.index, selector, width)
        )
    if isinstance(index, faiss.IndexRefine):
        base = _parameters(index.base_index, selector, width)
        return faiss.IndexRefineSearchParameters(
            k_factor=index.k_factor, base_index_params=base
        )
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=width)
    return faiss.SearchParametersHNSW(sel=selector, efSearch=width)


def write_faiss(index: Any, path: Path) -> None:
    """Write a FAISS index completely or not at all, through Python's own file, whose
    errors FAISS does not overlook.
    """
    with atomic_writer(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def faiss_reason(error: Exception) -> str:
    """Return the readable part of a FAISS message, which starts with the C++ function
    and the source line.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit("failed: ", 1)[-1]
