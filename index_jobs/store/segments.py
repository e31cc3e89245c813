"""A version's vectors and items, in one or several parts that are searched as one.

- A version that was built is one part. What was added to it later lies in parts of its own, what was removed in a list
  of rows; so an update shares all other files with the version before.
- Rows are numbered through all parts. A removed row keeps its number and is never found, by a search or by its id.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.errors import ArtifactError, DataError
from dcar_core.util.files import atomic_writer
from index_jobs.store.faiss_search import Found, best_of

if TYPE_CHECKING:
    import pyarrow as pa

    from index_jobs.store.faiss_index import VectorIndex
    from index_jobs.store.items import Items


@dataclass(frozen=True)
class Part:
    """Vectors, their items, and what the items' relative locations start from."""

    vectors: "VectorIndex"
    items: "Items"
    root: str


class Parts:
    """All rows of a version. Safe for concurrent readers."""

    def __init__(self, parts: Sequence[Part], removed: NDArray[np.int64]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(part.vectors.count for part in parts)]
        self.rows = self._starts[-1]
        self._removed = removed

    @cached_property
    def live(self) -> NDArray[np.bool_]:
        """bool (rows,): false where the item was removed."""
        mask = np.ones(self.rows, np.bool_)
        mask[self._removed] = False
        mask.flags.writeable = False
        return mask

    def search(self, vectors: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None) -> Found:
        """As `VectorIndex.search`, over the rows that were not removed."""
        if len(self._removed):
            mask = self.live if mask is None else mask & self.live
        if len(self._parts) == 1:
            return self._parts[0].vectors.search(vectors, k, mask)
        scores, rows = [], []
        for part, (start, stop) in zip(self._parts, pairwise(self._starts), strict=True):
            found, places = part.vectors.search(vectors, k, None if mask is None else mask[start:stop])
            scores.append(found)
            rows.append(np.where(places >= 0, places + start, -1))
        return best_of(scores, rows, k)

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """int64 (m,) -> float32 (m, E)."""
        for row in rows[(rows < 0) | (rows >= self.rows)][:1]:
            self.locate(int(row))
        found = np.empty((len(rows), self._parts[0].vectors.dim), np.float32)
        for part, (start, stop) in zip(self._parts, pairwise(self._starts), strict=True):
            here = (rows >= start) & (rows < stop)
            if here.any():
                found[here] = part.vectors.vectors(rows[here] - start)
        return found

    def locate(self, row: int) -> tuple[Part, int]:
        """The part of a row, and the row's number in it.

        Raises:
            IndexError: no such row, or it was removed.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} is not in 0..{self.rows - 1}")
        if len(self._removed) and not self.live[row]:
            raise IndexError(f"row {row} was removed")
        number = bisect_right(self._starts, row) - 1
        return self._parts[number], row - self._starts[number]

    def row_of(self, item_id: str) -> int | None:
        """The row of an id that was not removed; the newest first, since an item may have been replaced."""
        for part, start in zip(reversed(self._parts), reversed(self._starts[:-1]), strict=True):
            row = part.items.row_of(item_id)
            if row is not None and (not len(self._removed) or self.live[row + start]):
                return int(row + start)
        return None

    @cached_property
    def fields(self) -> dict[str, str]:
        """The names that `column` knows, with their Arrow types."""
        names = dict.fromkeys(name for part in self._parts for name in part.items.fields)
        return {name: str(_kind(self._kinds(name))) for name in names}

    def column(self, name: str) -> "pa.ChunkedArray":
        """One field of every row, null where a part knows it not.

        Raises:
            DataError: no part knows it.
        """
        import pyarrow as pa

        from index_jobs.store.columns import converted

        known = self._kinds(name)
        if not known:
            raise DataError(f"no item has the field {name!r}; there are: {', '.join(sorted(self.fields))}")
        kind = _kind(known)
        chunks = []
        for part in self._parts:
            if name not in part.items.fields:
                chunks.append(pa.nulls(len(part.items), kind))
                continue
            column = part.items.column(name)
            chunks += (column if column.type == kind else converted(column, kind)).chunks
        return pa.chunked_array(chunks, kind)

    def _kinds(self, name: str) -> "list[pa.DataType]":
        return [part.items.column(name).type for part in self._parts if name in part.items.fields]


def _kind(kinds: "list[pa.DataType]") -> "pa.DataType":
    from index_jobs.store.columns import common

    kind = kinds[0]
    for other in kinds[1:]:
        kind = kind if kind == other else common(kind, other)
    return kind


def write_removed(path: Path, rows: NDArray[np.int64]) -> None:
    """The removed rows of a version.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    with atomic_writer(path) as file:
        np.save(file, rows.astype(np.int64), allow_pickle=False)


def read_removed(path: Path) -> NDArray[np.int64]:
    """int64 (n,).

    Raises:
        ArtifactError: the file holds no row numbers.
    """
    try:
        rows: NDArray[np.int64] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    return rows.reshape(-1).astype(np.int64)
