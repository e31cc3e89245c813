"""FAISS searches among some of the rows.

- The rows that may be found are a bit each in an IDSelector, which faiss asks during its own search. A graph or lists
  must then be searched wider, since part of what they reach may not count: by the inverse of the allowed share.
- Few rows, or a search that would have to grow too wide, are compared exactly. So are kinds that take no selector.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT_UP_TO = 20_000  # rows that take a few milliseconds to compare one by one
_VISITS = 4  # what a vector reached through the graph costs, in vectors compared in a row
_BLOCK = 65_536

Found = tuple[NDArray[np.float32], NDArray[np.int64]]


def as_mask(allowed: NDArray[np.bool_] | NDArray[np.int64], count: int) -> NDArray[np.bool_]:
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


def search_among(index: Any, vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_]) -> Found:
    """As `VectorIndex.search`, among the rows where mask is true."""
    import faiss

    allowed = int(mask.sum())
    if allowed == 0:
        return np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1, np.int64)
    if allowed <= EXACT_UP_TO or _too_wide(index, allowed):
        return _exact(index, vectors, k, np.flatnonzero(mask))
    library: Any = faiss  # whose type hints know the C++ signatures alone
    selector = library.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    try:
        scores, rows = index.search(vectors, k, params=_parameters(index, selector, allowed / len(mask)))
    except RuntimeError:  # a kind that knows no selectors, such as PQ or NSG
        return _exact(index, vectors, k, np.flatnonzero(mask))
    return scores, rows


def _parameters(index: Any, selector: Any, share: float) -> Any:
    """The parameters of a kind, and of the kinds inside it, with what was tuned made wider by the share of rows."""
    import faiss

    library: Any = faiss
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return library.SearchParametersPreTransform(index_params=_parameters(index.index, selector, share))
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(index.base_index, selector, share)
        return library.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return library.SearchParametersIVF(sel=selector, nprobe=min(index.nlist, round(index.nprobe / share)))
    if isinstance(index, faiss.IndexHNSW):
        return library.SearchParametersHNSW(sel=selector, efSearch=round(index.hnsw.efSearch / share))
    return library.SearchParameters(sel=selector)


def _too_wide(index: Any, allowed: int) -> bool:
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _too_wide(index.index, allowed)
    if isinstance(index, faiss.IndexRefine):
        return _too_wide(index.base_index, allowed)
    reached: float = index.hnsw.efSearch * index.ntotal / allowed if isinstance(index, faiss.IndexHNSW) else 0
    return _VISITS * reached > allowed


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
