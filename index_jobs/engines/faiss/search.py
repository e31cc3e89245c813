"""Searches of a FAISS index among all rows, or among a selection of rows.

- Graphs and inverted lists are tuned for ten results. More results need a wider search, since a search returns no more
  rows than it visits. A narrow search (`is_narrow`) is as wide as one for few results, and may miss some of the last
  ones.
- A search among selected rows is wider, so that it visits as many selected rows as an unfiltered search visits rows. It
  requests twice the results that evenly spread rows would need, and drops those that are not selected.
- If these contain too few selected rows, most selected rows are far from the query. The search of this query then
  widens further, and FAISS skips the other rows itself, by an IDSelector with one bit for each row.
- A small selection, or one that needs too wide a search, is compared exactly. So are kinds without selectors.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from dcar_core.util.arrays import Floats, Mask, Rows
from index_jobs.engines.protocol import ScoredRows, merge_top_k

EXACT_UP_TO = 20_000  # rows that take a few milliseconds to compare one by one
_TUNED_FOR = 12  # results that tuning covers: ten, and two that show whether there are more, or equal ones
_NARROW = 16  # results that a narrow search is wide enough for
_VISITED = 4  # rows to visit for each result
_GRAPH_RESERVE = 1.2  # factor on the width of a graph's first search among selected rows
_GRAPH_COST = 4  # cost of a vector reached through the graph, in vectors compared sequentially
_SCAN_RATIO = 16  # rows skipped in lists that cost as much as one exact comparison
_SPARSE = 0.5  # selected rows are sparse near a query below this ratio of their share
_WIDENING = 4  # factor on the width where they are sparse
_BLOCK = 2048  # vectors that are compared at a time
_BLOCK_BYTES = 3 << 18  # of codes that are compared at a time and stay in the processor's cache
_SELECTOR_SHARE = 0.25  # from this share on, a kind that scans every row is faster with a selector than row by row


def _faiss() -> Any:
    """Import FAISS at its first use. Its type hints have the C++ signatures only."""
    import faiss

    return faiss


class WideSearch:
    """Searches among all rows, as wide as the number of results needs.

    tuned, maximum: the tuned nprobe or efSearch and its largest useful value; 0 for kinds without either.
    tuned_reach: number of results up to which the tuned width suffices.
    """

    def __init__(self, index: Any) -> None:
        faiss = _faiss()
        self._index = index
        innermost, self._factor, _ = unwrap(index)
        self._list_count, self._row_count = 0, int(index.ntotal)
        self.tuned = self.maximum = 0
        if isinstance(innermost, faiss.IndexIVF):
            self._list_count = int(innermost.nlist)
            self.tuned, self.maximum = int(innermost.nprobe), self._list_count
        elif isinstance(innermost, faiss.IndexHNSW):
            self.tuned, self.maximum = int(innermost.hnsw.efSearch), self._row_count
        self.tuned_reach = _TUNED_FOR
        while (
            self.maximum and self.tuned_reach < self._row_count and self._width_for(2 * self.tuned_reach) <= self.tuned
        ):
            self.tuned_reach *= 2

    def _width_for(self, k: int) -> int:
        rows = _VISITED * k
        return -(-rows * self._list_count // self._row_count) if self._list_count else round(rows * self._factor)

    def search(self, vectors: Floats, k: int, tuned_index: Any, *, is_narrow: bool = False) -> ScoredRows:
        """Search as `VectorIndex.search` does.

        Args:
            tuned_index: the same index, perhaps on a GPU, for searches that the tuned width suffices for.
        """
        width = self.tuned
        if not self.maximum or not self._row_count or k <= self.tuned_reach:
            scores, rows = tuned_index.search(vectors, k)
        else:
            power = 1 << (k - 1).bit_length()  # most pages of one result list then have the same width
            width = max(self.tuned, min(self.maximum, self._width_for(_NARROW if is_narrow else power)))
            scores, rows = _search(self._index, vectors, k, width)
        while width < self.maximum and k <= self._row_count and (short := rows[:, -1] < 0).any():
            width = min(2 * width, self.maximum)
            scores[short], rows[short] = _search(self._index, vectors[short], k, width)
        return scores, rows


class RowSelection:
    """The rows that a search may find; can be reused for other searches among the same rows."""

    def __init__(self, mask: Mask) -> None:
        self.mask, self.count = mask, int(np.count_nonzero(mask))

    @property
    def is_everything(self) -> bool:
        return self.count == len(self.mask)

    @property
    def share(self) -> float:
        return self.count / len(self.mask)

    @cached_property
    def rows(self) -> Rows:
        return np.flatnonzero(self.mask)

    @cached_property
    def selector(self) -> Any:
        return _faiss().IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))


def search_selection(index: Any, vectors: Floats, k: int, selection: RowSelection) -> ScoredRows:
    """Search among selected rows, as `VectorIndex.search` does."""
    faiss = _faiss()
    if selection.count == 0:
        return np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1, np.int64)
    innermost, factor, transforms = unwrap(index)
    scans_every_row = isinstance(innermost, faiss.IndexFlat | faiss.IndexScalarQuantizer)
    if selection.count <= EXACT_UP_TO and not (scans_every_row and selection.share > _SELECTOR_SHARE):
        return _search_exactly(index, vectors, k, selection.rows)
    try:
        if isinstance(innermost, faiss.IndexIVF):
            return _search_lists(index, vectors, k, selection, innermost, factor, transforms)
        if isinstance(innermost, faiss.IndexHNSW):
            return _search_graph(index, vectors, k, selection, int(innermost.hnsw.efSearch), factor)
        return _search(index, vectors, k, selector=selection.selector)
    except RuntimeError:  # a kind without selectors, such as PQ or NSG
        return _search_exactly(index, vectors, k, selection.rows)


def unwrap(index: Any) -> tuple[Any, float, list[Any]]:
    """Return the index inside transforms and refinements.

    The other values are the factor of results that refinements request of it, and the transforms of its vectors.
    """
    faiss = _faiss()
    index, factor, transforms = faiss.downcast_index(index), 1.0, []
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        if isinstance(index, faiss.IndexRefine):
            factor, index = factor * index.k_factor, faiss.downcast_index(index.base_index)
        else:
            chain = index.chain
            transforms += [faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size())]
            index = faiss.downcast_index(index.index)
    return index, factor, transforms


def _search(index: Any, vectors: Floats, k: int, width: int = 0, selector: Any = None) -> ScoredRows:
    scores, rows = index.search(vectors, k, params=_parameters(index, selector, width))
    return scores, rows


def _parameters(index: Any, selector: Any, width: int) -> Any:
    """Return the search parameters of a kind and of the kinds inside it; width is nprobe or efSearch."""
    faiss = _faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(index.index, selector, width))
    if isinstance(index, faiss.IndexRefine):
        base = _parameters(index.base_index, selector, width)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=base)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=width)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=width)
    return faiss.SearchParameters(sel=selector)


def _search_lists(
    index: Any, vectors: Floats, k: int, selection: RowSelection, lists: Any, factor: float, transforms: list[Any]
) -> ScoredRows:
    wanted, list_size = _results_with_selected(k, selection), lists.ntotal / lists.nlist
    tuned = max(int(lists.nprobe), math.ceil(_VISITED * k / list_size))
    width = min(lists.nlist, math.ceil(tuned / selection.share))
    if width * list_size > _SCAN_RATIO * (selection.count - factor * wanted):
        return _search_exactly(index, vectors, k, selection.rows)
    scores, rows = _oversample(index, vectors, k, selection, wanted, width)
    for number in np.flatnonzero(rows[:, -1] < 0):
        vector = transformed = vectors[number, None]
        for transform in transforms:
            transformed = transform.apply(transformed)
        probes = _probes(lists, transformed, selection, tuned)
        scores[number], rows[number] = _search(index, vector, k, probes, selection.selector)
    return scores, rows


def _results_with_selected(k: int, selection: RowSelection) -> int:
    """Return how many results have k selected ones among them, unless selected rows are sparse near the query."""
    return min(len(selection.mask), math.ceil(k / (_SPARSE * selection.share)))


def _oversample(index: Any, vectors: Floats, k: int, selection: RowSelection, wanted: int, width: int) -> ScoredRows:
    scores, rows = _search(index, vectors, wanted, width)
    return merge_top_k([scores], [np.where(selection.mask[rows], rows, -1)], k)


def _probes(lists: Any, vector: Floats, selection: RowSelection, tuned: int) -> int:
    """Return how many lists to search: those with four times as many selected rows as the tuned lists have rows.

    The factor is needed because the nearest selected rows are spread over distant lists. vector: (1, E).
    """
    faiss = _faiss()
    inverted = lists.invlists
    first = min(lists.nlist, 4 * round(tuned / selection.share))
    selected = target = visited = 0
    for limit in (first, lists.nlist):
        nearest = lists.quantizer.search(vector, limit)[1][0].tolist()
        for number in nearest[visited:]:
            size = inverted.list_size(number) if number >= 0 else 0
            if size:
                ids = faiss.rev_swig_ptr(inverted.get_ids(number), size)
                selected += int(np.count_nonzero(selection.mask[ids]))
            visited += 1
            target += _WIDENING * size if visited <= tuned else 0
            if visited >= tuned and selected >= target:
                return visited
    return int(lists.nlist)


def _search_graph(
    index: Any, vectors: Floats, k: int, selection: RowSelection, tuned: int, factor: float
) -> ScoredRows:
    """Widen the search for each query with few selected neighbours until it finds enough of them."""
    wanted, count = _results_with_selected(k, selection), max(k, tuned)
    width = max(round(count / selection.share), round(factor * wanted))
    first = max(width, round(_GRAPH_RESERVE * count / selection.share))
    if _GRAPH_COST * first > selection.count:
        return _search_exactly(index, vectors, k, selection.rows)
    scores, rows = _oversample(index, vectors, k, selection, wanted, first)
    for number in np.flatnonzero(rows[:, -1] < 0):
        vector, wider = vectors[number, None], _WIDENING**2 * width  # distant rows are many hops away
        while _GRAPH_COST * wider <= selection.count:
            found = _search(index, vector, count, wider, selection.selector)
            if found[1][0, -1] >= 0:
                break
            wider *= _WIDENING
        else:
            found = _search_exactly(index, vector, k, selection.rows)
        scores[number], rows[number] = found[0][0, :k], found[1][0, :k]
    return scores, rows


def _search_exactly(index: Any, vectors: Floats, k: int, selected: Rows) -> ScoredRows:
    """Compare every selected row, block by block."""
    compare, size = _block_comparison(index, vectors, k)
    scores = np.empty((len(vectors), 0), np.float32)
    rows = np.empty((len(vectors), 0), np.int64)
    for start in range(0, len(selected), size):
        block = selected[start : start + size]
        block_scores, positions = compare(block)
        scores, rows = merge_top_k([scores, block_scores], [rows, block[positions]], k)
    return scores, rows


def _block_comparison(index: Any, vectors: Floats, k: int) -> tuple[Callable[[Rows], ScoredRows], int]:
    """Return what finds the k best of a block of rows, as positions in it, and the size of a block.

    Scalar codes are copied and compared, which is faster than decoding them.
    """
    faiss = _faiss()
    storage = index
    if isinstance(index, faiss.IndexRefine | faiss.IndexHNSW):
        storage = faiss.downcast_index(index.refine_index if isinstance(index, faiss.IndexRefine) else index.storage)
    if not isinstance(storage, faiss.IndexScalarQuantizer):
        return lambda block: faiss.knn(
            vectors, index.reconstruct_batch(block), min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        ), _BLOCK
    code_size = int(storage.code_size)
    codes = faiss.rev_swig_ptr(storage.codes.data(), storage.ntotal * code_size).reshape(-1, code_size)
    part = faiss.IndexScalarQuantizer(storage.d, storage.sq.qtype, storage.metric_type)
    part.sq, part.is_trained = storage.sq, True
    size = max(1, _BLOCK_BYTES // code_size)
    buffer = np.empty((size, code_size), np.uint8)

    def compare_codes(block: Rows) -> ScoredRows:
        part.reset()  # keeps its memory
        part.add_sa_codes(np.take(codes, block, 0, buffer[: len(block)], "clip"))
        scores, positions = part.search(vectors, min(k, len(block)))
        return scores, positions

    return compare_codes, size
