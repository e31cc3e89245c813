"""Vectors and items of a version in one or several segments that are searched as one.

- A built version is one segment. Later additions are segments of their own, and removed items are a list of rows, so an
  update shares all other files with the previous version.
- Rows are numbered through all segments. A removed row keeps its number and is never found, by a search or by its id.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dcar_core.util.arrays import Floats, Mask, Rows
from dcar_core.util.errors import ArtifactError, DataError
from dcar_core.util.files import atomic_writer
from index_jobs.engines.protocol import ScoredRows, VectorIndex, merge_top_k

if TYPE_CHECKING:
    import pyarrow as pa

    from index_jobs.store.items import Items


@dataclass(frozen=True)
class Segment:
    """Vectors, their items, the base of the items' relative image locations, and the folders of absolute ones."""

    vectors: VectorIndex
    items: "Items"
    root: str
    roots: Sequence[str]


class Segments:
    """All rows of a version. Safe for concurrent readers.

    rows: their number, removed ones included; row numbers are 0..rows - 1.
    """

    def __init__(self, segments: Sequence[Segment], removed: Rows) -> None:
        self.segments, self._removed = segments, removed
        self._starts = [0, *accumulate(segment.vectors.count for segment in segments)]
        self.rows = self._starts[-1]

    @cached_property
    def live(self) -> Mask:
        """bool (rows,), read-only: false where the item was removed."""
        mask = np.ones(self.rows, np.bool_)
        mask[self._removed] = False
        mask.flags.writeable = False
        return mask

    def search(self, vectors: Floats, k: int, mask: Mask | None, *, is_narrow: bool = False) -> ScoredRows:
        """Search the rows that were not removed, as `VectorIndex.search` does."""
        if len(self._removed):
            mask = self.live if mask is None else mask & self.live
        if len(self.segments) == 1:
            return self.segments[0].vectors.search(vectors, k, mask, is_narrow=is_narrow)
        scores, rows = [np.empty((len(vectors), 0), np.float32)], [np.empty((len(vectors), 0), np.int64)]
        for segment, (start, stop) in zip(self.segments, pairwise(self._starts), strict=True):
            segment_mask = None if mask is None else mask[start:stop]
            segment_scores, positions = segment.vectors.search(vectors, k, segment_mask, is_narrow=is_narrow)
            scores.append(segment_scores)
            rows.append(np.where(positions >= 0, positions + start, -1))
        return merge_top_k(scores, rows, k)

    def vectors(self, rows: Rows) -> Floats:
        """Return the vectors of rows int64 (m,): float32 (m, E), normalized; approximate for a compressing kind.

        Raises:
            IndexError: the row does not exist.
            ArtifactError: this kind of index cannot reconstruct vectors.
        """
        for row in rows[(rows < 0) | (rows >= self.rows)][:1]:
            self.locate(int(row))  # raises
        if len(self.segments) == 1:
            return self.segments[0].vectors.vectors(rows)
        vectors = np.empty((len(rows), self.segments[0].vectors.dim), np.float32)
        for segment, (start, stop) in zip(self.segments, pairwise(self._starts), strict=True):
            inside = (rows >= start) & (rows < stop)
            if inside.any():
                vectors[inside] = segment.vectors.vectors(rows[inside] - start)
        return vectors

    def locate(self, row: int) -> tuple[Segment, int]:
        """Return the segment of a row, and its number there. Raise IndexError if the row is unknown or removed."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} is not in 0..{self.rows - 1}")
        if len(self._removed) and not self.live[row]:
            raise IndexError(f"row {row} was removed")
        number = bisect_right(self._starts, row) - 1
        return self.segments[number], row - self._starts[number]

    def row_of(self, item_id: str) -> int | None:
        """Return the live row of an id, or None; newer segments first, since an item may have been replaced."""
        for segment, start in zip(reversed(self.segments), reversed(self._starts[:-1]), strict=True):
            row = segment.items.row_of(item_id)
            if row is not None and (not len(self._removed) or self.live[row + start]):
                return int(row + start)
        return None

    @cached_property
    def fields(self) -> dict[str, str]:
        """Arrow types of the fields that `column` accepts: id, caption, category and the metadata fields."""
        names = dict.fromkeys(name for segment in self.segments for name in segment.items.fields)
        return {name: str(_common_type(self._types(name))) for name in names}

    def column(self, name: str) -> "pa.ChunkedArray":
        """Return one field of every row, null where an item lacks it. Raise DataError if no segment has the field."""
        import pyarrow as pa

        from index_jobs.store.columns import cast_column

        types = self._types(name)
        if not types:
            raise DataError(f"no item has the field {name!r}; there are: {', '.join(sorted(self.fields))}")
        target = _common_type(types)
        chunks = []
        for segment in self.segments:
            if name not in segment.items.fields:
                chunks.append(pa.nulls(len(segment.items), target))
                continue
            column = segment.items.column(name)
            chunks += (column if column.type == target else cast_column(column, target)).chunks
        return pa.chunked_array(chunks, target)

    def _types(self, name: str) -> "list[pa.DataType]":
        return [segment.items.column(name).type for segment in self.segments if name in segment.items.fields]


def _common_type(types: "list[pa.DataType]") -> "pa.DataType":
    from index_jobs.store.columns import common_type

    return reduce(common_type, types)


def write_removed(path: Path, rows: Rows) -> None:
    with atomic_writer(path) as file:
        np.save(file, rows.astype(np.int64), allow_pickle=False)


def read_removed(path: Path) -> Rows:
    """Read the removed rows of a version, int64 (n,)."""
    try:
        rows: Rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    return rows.reshape(-1).astype(np.int64)
