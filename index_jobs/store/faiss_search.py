"""FAISS searches: among all rows, as wide as the number of results asks for, and among some.

- Graphs and lists are tuned for ten results. A graph gives no more than it keeps on its way, lists no more than they
  hold; so more results take a wider search.
- The rows that may be found are a bit each in an IDSelector, which faiss asks during its own search. A graph or lists
  must then be searched wider, since part of what they reach does not count: as wide as it takes to reach as many
  allowed rows as an unfiltered search reaches rows. How wide that is differs from query to query: what a filter
  allows may lie anywhere but near the query.
- Few rows, or a search that would have to grow too wide, are compared exactly. So are kinds that take no selector.
"""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Mask

EXACT_UP_TO = 20_000  # rows that take a few milliseconds to compare one by one
_TUNED_FOR = 12  # results: ten, and two that tell whether there are more, or equal ones
_VISITED = 4  # rows that are kept on the way, or lie in the lists that are looked at, for each result
_VISITS = 4  # what a vector reached through the graph costs, in vectors compared in a row
_SCANNED = 16  # rows passed over in lists cost what one costs that is compared exactly
_LIKELY, _FURTHER = 0.5, 4  # less than half as many allowed near a query as elsewhere: search four times as wide
_BLOCK = 65_536
_MOST_OF = 0.25  # from this share on, an index that looks at every row anyway is faster than taking rows out of it

Found = tuple[NDArray[np.float32], NDArray[np.int64]]


def as_mask(allowed: NDArray[np.bool_] | NDArray[np.int64], count: int) -> Mask:
    """Row numbers, or a truth value a row, to bool (count,).

    Raises:
        IndexError: a row is out of range.
        ValueError: not one truth value a row.
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


class Selection:
    """The rows that may be found, as a search needs them: worth keeping for the next search among the same."""

    def __init__(self, mask: Mask) -> None:
        self.mask, self.allowed = mask, int(np.count_nonzero(mask))

    @property
    def whole(self) -> bool:
        return self.allowed == len(self.mask)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.mask)

    @cached_property
    def selector(self) -> Any:
        import faiss

        library: Any = faiss  # whose type hints know the C++ signatures alone
        return library.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))


class Breadth:
    """How wide an index is searched among all rows, by the number of results.

    tuned, most: nprobe or efSearch as it was tuned, and the most that it can usefully be; zeros for kinds that have
    neither. reach: results up to which what was tuned will do, where there is anything to tune.
    """

    def __init__(self, index: Any) -> None:
        import faiss

        self._index = index
        inner, self._factor = _innermost(index)
        self._lists, self._rows = 0, int(index.ntotal)
        self.tuned = self.most = 0
        if isinstance(inner, faiss.IndexIVF):
            self._lists = int(inner.nlist)
            self.tuned, self.most = int(inner.nprobe), self._lists
        elif isinstance(inner, faiss.IndexHNSW):
            self.tuned, self.most = int(inner.hnsw.efSearch), self._rows
        self.reach = _TUNED_FOR
        while self.most and self.reach < self._rows and self._wanted(2 * self.reach) <= self.tuned:
            self.reach *= 2

    def _wanted(self, k: int) -> int:
        rows = _VISITED * k
        return -(-rows * self._lists // self._rows) if self._lists else round(rows * self._factor)

    def search(self, vectors: NDArray[np.float32], k: int, fast: Any) -> Found:
        """As `VectorIndex.search`. fast: the same index, perhaps on a GPU, asked where what was tuned will do."""
        wide = self.tuned
        if not self.most or not self._rows or k <= self.reach:
            scores, rows = fast.search(vectors, k)
        else:
            in_steps = 1 << (k - 1).bit_length()  # so that most pages of an answer are searched for alike
            wide = max(self.tuned, min(self.most, self._wanted(in_steps)))
            scores, rows = self._as_wide(vectors, k, wide)
        while wide < self.most and k <= self._rows and (short := rows[:, -1] < 0).any():
            wide = min(2 * wide, self.most)
            scores[short], rows[short] = self._as_wide(vectors[short], k, wide)
        return scores, rows

    def _as_wide(self, vectors: NDArray[np.float32], k: int, wide: int) -> Found:
        scores, rows = self._index.search(vectors, k, params=_parameters(self._index, None, wide))
        return scores, rows


def _innermost(index: Any) -> tuple[Any, float]:
    """The index inside transforms and refinements, and how many more results than wanted they ask of it."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _innermost(index.index)
    if isinstance(index, faiss.IndexRefine):
        inner, factor = _innermost(index.base_index)
        return inner, factor * index.k_factor
    return index, 1.0


def search_among(index: Any, vectors: NDArray[np.float32], k: int, among: Selection) -> Found:
    """As `VectorIndex.search`, among some of the rows."""
    import faiss

    if among.allowed == 0:
        return np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1, np.int64)
    inner, seen = _inside(index, vectors)
    looks_at_all = isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer)
    if among.allowed <= EXACT_UP_TO and not (looks_at_all and among.allowed > _MOST_OF * len(among.mask)):
        return _exact(index, vectors, k, among.rows)
    try:
        if isinstance(inner, faiss.IndexIVF):
            return _among_lists(index, inner, vectors, seen, k, among)
        if isinstance(inner, faiss.IndexHNSW):
            return _along_graph(index, inner, vectors, k, among)
        scores, rows = index.search(vectors, k, params=_parameters(index, among.selector))
    except RuntimeError:  # a kind that knows no selectors, such as PQ or NSG
        return _exact(index, vectors, k, among.rows)
    return scores, rows


def _inside(index: Any, vectors: NDArray[np.float32]) -> tuple[Any, NDArray[np.float32]]:
    """The innermost index, and the vectors as it sees them."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for place in range(chain.size()):
            vectors = faiss.downcast_VectorTransform(chain.at(place)).apply(vectors)
        return _inside(index.index, vectors)
    return _inside(index.base_index, vectors) if isinstance(index, faiss.IndexRefine) else (index, vectors)


def _parameters(index: Any, selector: Any, wide: int = 0) -> Any:
    """The parameters of a kind, and of the kinds inside it. wide: nprobe or efSearch."""
    import faiss

    library: Any = faiss
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return library.SearchParametersPreTransform(index_params=_parameters(index.index, selector, wide))
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(index.base_index, selector, wide)
        return library.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return library.SearchParametersIVF(sel=selector, nprobe=wide)
    if isinstance(index, faiss.IndexHNSW):
        return library.SearchParametersHNSW(sel=selector, efSearch=wide)
    return library.SearchParameters(sel=selector)


def _among_lists(
    index: Any, lists: Any, vectors: NDArray[np.float32], seen: NDArray[np.float32], k: int, among: Selection
) -> Found:
    visited = lists.nprobe * len(among.mask) / among.allowed * lists.ntotal / lists.nlist  # rows, if all is as likely
    if visited > _SCANNED * among.allowed:
        return _exact(index, vectors, k, among.rows)
    found = []
    for vector, as_seen in zip(vectors[:, None], seen[:, None], strict=True):
        probes = _probes(lists, as_seen, among)
        found.append(index.search(vector, k, params=_parameters(index, among.selector, probes)))
    return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])


def _probes(lists: Any, vector: NDArray[np.float32], among: Selection) -> int:
    """How many lists hold as many allowed rows as the tuned number of lists holds rows; vector: (1, E).

    Where few of a query's neighbours are allowed, the nearest that are lie further out, each in another list: it takes
    `_FURTHER` times as many.
    """
    import faiss

    kept, tuned, share = lists.invlists, int(lists.nprobe), among.allowed / len(among.mask)
    first = min(lists.nlist, 4 * round(tuned / share))
    allowed = wanted = done = 0
    for most in (first, lists.nlist):
        nearest = lists.quantizer.search(vector, most)[1][0].tolist()
        for number in nearest[done:]:
            size = kept.list_size(number) if number >= 0 else 0
            if size:
                allowed += int(np.count_nonzero(among.mask[faiss.rev_swig_ptr(kept.get_ids(number), size)]))
            done += 1
            wanted += size if done <= tuned else 0
            if done == tuned and allowed < _LIKELY * share * wanted:
                wanted *= _FURTHER
            if done >= tuned and allowed >= wanted:
                return done
    return int(lists.nlist)


def _along_graph(index: Any, graph: Any, vectors: NDArray[np.float32], k: int, among: Selection) -> Found:
    """As wide as the share of the query's neighbours that are allowed asks for, and wider until enough are met."""
    tuned = int(graph.hnsw.efSearch)
    share, count = among.allowed / len(among.mask), max(k, tuned)
    near = among.mask[index.search(vectors, count, params=_parameters(index, None, count))[1]].mean(1)  # (n,)
    found = []
    for vector, nearby in zip(vectors[:, None], near, strict=True):
        further = 1 if nearby >= _LIKELY * share else _FURTHER**2  # a graph's way there is long
        wide = round(further * tuned / share)
        while _VISITS * wide <= among.allowed:
            scores, rows = index.search(vector, count, params=_parameters(index, among.selector, wide))
            if rows[0, -1] >= 0:
                found.append((scores[:, :k], rows[:, :k]))
                break
            wide *= _FURTHER
        else:
            found.append(_exact(index, vector, k, among.rows))
    return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])


def _exact(index: Any, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.int64]) -> Found:
    import faiss

    scores = np.empty((len(vectors), 0), np.float32)
    rows = np.empty((len(vectors), 0), np.int64)
    for start in range(0, len(allowed), _BLOCK):
        part = allowed[start : start + _BLOCK]
        found, places = faiss.knn(
            vectors, index.reconstruct_batch(part), min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT
        )
        scores, rows = best_of([scores, found], [rows, part[places]], k)
    return scores, rows


def best_of(scores: list[NDArray[np.float32]], rows: list[NDArray[np.int64]], k: int) -> Found:
    """The k best of several results side by side, float32 and int64 (n, k); -inf and -1 where there are fewer."""
    n = len(scores[0])
    all_scores = np.concatenate([*scores, np.full((n, k), -np.inf, np.float32)], 1)
    all_rows = np.concatenate([*rows, np.full((n, k), -1, np.int64)], 1)
    all_scores[all_rows < 0] = -np.inf
    order = np.argsort(-all_scores, 1, kind="stable")[:, :k]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)
