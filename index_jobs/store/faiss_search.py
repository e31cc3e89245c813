"""Searches of a FAISS index among all rows, or among a selection of rows.

- Graphs and inverted lists are tuned for ten results. A graph returns no more rows than it keeps on its way, lists no
  more than they hold, so more results need a wider search.
- A selection is one bit for each row in an IDSelector that FAISS reads during its search. Since a part of the visited
  rows does not count, the search widens until it visits as many selected rows as an unfiltered search visits rows. The
  width differs between queries, because selected rows may lie far from a query.
- A small selection, or one that needs too wide a search, is compared exactly. So are kinds without selectors.
"""

from functools import cache, cached_property
from typing import Any

import numpy as np

from dcar_core.util.arrays import Floats, Mask, Rows

EXACT_UP_TO = 20_000  # rows that take a few milliseconds to compare one by one
_TUNED_FOR = 12  # results that tuning covers: ten, and two that show whether there are more, or equal ones
_VISITED = 4  # rows to visit for each result
_GRAPH_COST = 4  # cost of a vector reached through the graph, in vectors compared sequentially
_SCAN_RATIO = 16  # rows skipped in lists that cost as much as one exact comparison
_SPARSE = 0.5  # selected rows are sparse near a query below this ratio of their share
_WIDENING = 4  # factor on the width where they are sparse
_BLOCK = 2048  # rows that are decoded at a time and stay in the processor's cache
_SELECTOR_SHARE = 0.25  # from this share on, a kind that scans every row is faster with a selector than row by row

ScoredRows = tuple[Floats, Rows]  # scores (n, k), best first, and rows (n, k), -1 where there are fewer


def as_mask(allowed: Mask | Rows, count: int) -> Mask:
    """Return row numbers, or one truth value for each row, as bool (count,).

    Raises:
        IndexError: a row is out of range.
        ValueError: the number of truth values is not count.
    """
    if allowed.dtype == np.bool_:
        if allowed.shape != (count,):
            raise ValueError(f"allowed has {allowed.shape} truth values, but there are {count} rows")
        return allowed.astype(np.bool_, copy=False)
    if len(allowed) and (allowed.min() < 0 or allowed.max() >= count):
        raise IndexError(f"allowed rows must be in 0..{count - 1}, not {allowed.min()}..{allowed.max()}")
    mask = np.zeros(count, np.bool_)
    mask[allowed] = True
    return mask


def merge_top_k(scores: list[Floats], rows: list[Rows], k: int) -> ScoredRows:
    """Merge several results into the k best, float32 and int64 (n, k); -inf and -1 where there are fewer."""
    n = len(scores[0])
    all_scores = np.concatenate([*scores, np.full((n, k), -np.inf, np.float32)], 1)
    all_rows = np.concatenate([*rows, np.full((n, k), -1, np.int64)], 1)
    all_scores[all_rows < 0] = -np.inf
    order = np.argsort(-all_scores, 1, kind="stable")[:, :k]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)


class WideSearch:
    """Searches among all rows, as wide as the number of results needs.

    tuned, maximum: the tuned nprobe or efSearch and its largest useful value; 0 for kinds without either.
    tuned_reach: number of results up to which the tuned width suffices.
    """

    def __init__(self, index: Any) -> None:
        import faiss

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

    def search(self, vectors: Floats, k: int, tuned_index: Any) -> ScoredRows:
        """Search as `VectorIndex.search` does.

        Args:
            tuned_index: the same index, perhaps on a GPU, for searches that the tuned width suffices for.
        """
        width = self.tuned
        if not self.maximum or not self._row_count or k <= self.tuned_reach:
            scores, rows = tuned_index.search(vectors, k)
        else:
            power = 1 << (k - 1).bit_length()  # most pages of one result list are then searched alike
            width = max(self.tuned, min(self.maximum, self._width_for(power)))
            scores, rows = self._search_width(vectors, k, width)
        while width < self.maximum and k <= self._row_count and (short := rows[:, -1] < 0).any():
            width = min(2 * width, self.maximum)
            scores[short], rows[short] = self._search_width(vectors[short], k, width)
        return scores, rows

    def _search_width(self, vectors: Floats, k: int, width: int) -> ScoredRows:
        scores, rows = self._index.search(vectors, k, params=_parameters(self._index, None, width))
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
        import faiss

        library: Any = faiss  # the type hints have the C++ signatures only
        return library.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))


def search_selection(index: Any, vectors: Floats, k: int, selection: RowSelection) -> ScoredRows:
    """Search among selected rows, as `VectorIndex.search` does."""
    import faiss

    if selection.count == 0:
        return np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1, np.int64)
    innermost, _, transforms = unwrap(index)
    transformed = vectors
    for transform in transforms:
        transformed = transform.apply(transformed)
    scans_every_row = isinstance(innermost, faiss.IndexFlat | faiss.IndexScalarQuantizer)
    if selection.count <= EXACT_UP_TO and not (scans_every_row and selection.share > _SELECTOR_SHARE):
        return _search_exactly(index, vectors, k, selection.rows)
    try:
        if isinstance(innermost, faiss.IndexIVF):
            return _search_lists(index, innermost, vectors, transformed, k, selection)
        if isinstance(innermost, faiss.IndexHNSW):
            return _search_graph(index, innermost, vectors, k, selection)
        scores, rows = index.search(vectors, k, params=_parameters(index, selection.selector))
    except RuntimeError:  # a kind without selectors, such as PQ or NSG
        return _search_exactly(index, vectors, k, selection.rows)
    return scores, rows


def unwrap(index: Any) -> tuple[Any, float, list[Any]]:
    """Return the index inside transforms and refinements.

    The other values are the factor of results that refinements request of it, and the transforms of its vectors.
    """
    import faiss

    index, factor, transforms = faiss.downcast_index(index), 1.0, []
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        if isinstance(index, faiss.IndexRefine):
            factor, index = factor * index.k_factor, faiss.downcast_index(index.base_index)
        else:
            chain: Any = index.chain
            transforms += [faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())]
            index = faiss.downcast_index(index.index)
    return index, factor, transforms


def _parameters(index: Any, selector: Any, width: int = 0) -> Any:
    """Return the search parameters of a kind and of the kinds inside it; width is nprobe or efSearch."""
    import faiss

    library: Any = faiss
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return library.SearchParametersPreTransform(index_params=_parameters(index.index, selector, width))
    if isinstance(index, faiss.IndexRefine):
        base = _parameters(index.base_index, selector, width)
        return library.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=base)
    if isinstance(index, faiss.IndexIVF):
        return library.SearchParametersIVF(sel=selector, nprobe=width)
    if isinstance(index, faiss.IndexHNSW):
        return library.SearchParametersHNSW(sel=selector, efSearch=width)
    return library.SearchParameters(sel=selector)


def _search_lists(
    index: Any, lists: Any, vectors: Floats, transformed: Floats, k: int, selection: RowSelection
) -> ScoredRows:
    rows_to_visit = lists.nprobe / selection.share * lists.ntotal / lists.nlist  # if selected rows are evenly spread
    if rows_to_visit > _SCAN_RATIO * selection.count:
        return _search_exactly(index, vectors, k, selection.rows)
    results = []
    for vector, inner_vector in zip(vectors[:, None], transformed[:, None], strict=True):
        probes = _probes(lists, inner_vector, selection)
        results.append(index.search(vector, k, params=_parameters(index, selection.selector, probes)))
    return _stack(results)


def _probes(lists: Any, vector: Floats, selection: RowSelection) -> int:
    """Return how many lists hold as many selected rows as the tuned number of lists holds rows; vector: (1, E).

    Where few neighbours of a query are selected, the nearest selected rows are spread over distant lists, so the target
    grows by `_WIDENING`.
    """
    import faiss

    inverted, tuned, share = lists.invlists, int(lists.nprobe), selection.share
    first = min(lists.nlist, 4 * round(tuned / share))
    selected = target = visited = 0
    for limit in (first, lists.nlist):
        nearest = lists.quantizer.search(vector, limit)[1][0].tolist()
        for number in nearest[visited:]:
            size = inverted.list_size(number) if number >= 0 else 0
            if size:
                ids = faiss.rev_swig_ptr(inverted.get_ids(number), size)
                selected += int(np.count_nonzero(selection.mask[ids]))
            visited += 1
            target += size if visited <= tuned else 0
            if visited == tuned and selected < _SPARSE * share * target:
                target *= _WIDENING
            if visited >= tuned and selected >= target:
                return visited
    return int(lists.nlist)


def _search_graph(index: Any, graph: Any, vectors: Floats, k: int, selection: RowSelection) -> ScoredRows:
    """Widen the search by the share of each query's neighbours that are selected, until it finds enough of them."""
    tuned = int(graph.hnsw.efSearch)
    share, count = selection.share, max(k, tuned)
    neighbours = index.search(vectors, count, params=_parameters(index, None, count))[1]
    results = []
    for vector, share_nearby in zip(vectors[:, None], selection.mask[neighbours].mean(1), strict=True):
        widening = 1 if share_nearby >= _SPARSE * share else _WIDENING**2  # distant rows are many hops away
        width = round(widening * tuned / share)
        while _GRAPH_COST * width <= selection.count:
            scores, rows = index.search(vector, count, params=_parameters(index, selection.selector, width))
            if rows[0, -1] >= 0:
                results.append((scores[:, :k], rows[:, :k]))
                break
            width *= _WIDENING
        else:
            results.append(_search_exactly(index, vector, k, selection.rows))
    return _stack(results)


def _search_exactly(index: Any, vectors: Floats, k: int, selected: Rows) -> ScoredRows:
    import faiss

    scores = np.empty((len(vectors), 0), np.float32)
    rows = np.empty((len(vectors), 0), np.int64)
    for start in range(0, len(selected), _BLOCK):
        block = selected[start : start + _BLOCK]
        block_scores, places = faiss.knn(
            vectors, _decode(index, block), min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        )
        scores, rows = merge_top_k([scores, block_scores], [rows, block[places]], k)
    return scores, rows


def _decode(index: Any, rows: Rows) -> Floats:
    """Return the vectors of rows. Scalar codes are decoded all at once, which is faster than row by row."""
    import faiss

    storage = faiss.downcast_index(index.refine_index) if isinstance(index, faiss.IndexRefine) else index
    if not isinstance(storage, faiss.IndexScalarQuantizer):
        return np.asarray(index.reconstruct_batch(rows))
    library: Any = faiss  # the type hints have the C++ signatures only
    size = int(storage.code_size)
    codes = library.rev_swig_ptr(storage.codes.data(), storage.ntotal * size).reshape(-1, size)[rows]
    if storage.sq.qtype == library.ScalarQuantizer.QT_fp16:
        return np.asarray(np.take(_halves(), codes.view(np.uint16)))
    return np.asarray(storage.sa_decode(codes))


@cache
def _halves() -> Floats:
    """Return every 16-bit float as a float32, by its bits: a look-up is faster than NumPy's conversion."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _stack(results: list[ScoredRows]) -> ScoredRows:
    return np.concatenate([scores for scores, _ in results]), np.concatenate([rows for _, rows in results])
