"""The terms of each row, which give the score of chosen rows; tantivy would look them up among all rows.

- A term is its CRC-32. A row scores too high if one of its terms has the CRC of another term of the query, by a chance
  of one in some hundred millions.
- `term_starts.npy` is int64 (rows + 1,), `terms.npy` uint32: the terms of row r are `terms[starts[r] : starts[r + 1]]`.
- Scores are tantivy's BM25, in which lengths of more than 40 terms are rounded down.
"""

from array import array
from collections.abc import Collection, Iterable
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats, Rows
from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import atomic_writer

TERMS, STARTS = "terms.npy", "term_starts.npy"
_K1, _B = 1.2, 0.75  # tantivy's
# Numbers of terms that tantivy tells apart, which it calls field norms.
_LENGTHS = np.array([*range(40), *(24 + (m << e) for e in range(1, 28) for m in range(8, 16))])


class TermLists:
    """The opened lists of a version, memory-mapped."""

    def __init__(self, starts: Rows, terms: NDArray[np.uint32]) -> None:
        self._starts, self._terms = starts, terms
        self._mean_length = len(terms) / max(len(starts) - 1, 1)

    @classmethod
    def open(cls, path: Path) -> "TermLists | None":
        """Open the lists of a lexical index; None in older versions. Raise ArtifactError if they cannot be read."""
        if not (path / TERMS).exists():
            return None
        try:
            starts, terms = (np.load(path / name, mmap_mode="r", allow_pickle=False) for name in (STARTS, TERMS))
        except Exception as error:  # NumPy raises many types for a header that it did not write
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        kinds = (starts.dtype, starts.ndim, terms.dtype, terms.ndim)
        if (
            kinds != (np.int64, 1, np.uint32, 1)
            or not len(starts)
            or (starts[0], starts[-1]) != (0, len(terms))
            or (np.diff(starts) < 0).any()
        ):
            raise ArtifactError(f"{path} cannot be read: its lists of terms do not fit together")
        return cls(np.asarray(starts), np.asarray(terms))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def score(self, weights: Iterable[tuple[str, float]], rows: Rows) -> Floats:
        """Return the BM25 of each of these rows, float32 (m,).

        Args:
            weights: distinct terms with their inverse document frequencies.
        """
        starts = self._starts[rows]
        lengths = self._starts[rows + 1] - starts
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
        terms, owners = self._terms[positions], np.repeat(np.arange(len(rows)), lengths)
        sums = np.zeros(len(rows), np.float32)
        for term, weight in weights:
            sums[owners[terms == crc32(term.encode())]] += np.float32(weight)
        rounded = _LENGTHS[np.searchsorted(_LENGTHS, lengths, side="right") - 1]
        scores = sums * (1 + _K1) / (1 + _K1 * (1 - _B + _B * rounded / self._mean_length))
        return scores.astype(np.float32)


class TermListsWriter:
    """Collects the lists of rows, after some rows of an earlier version."""

    def __init__(self, earlier: TermLists | None = None, kept_rows: int = 0) -> None:
        starts = np.zeros(1, np.int64) if earlier is None else earlier._starts[: kept_rows + 1]
        self._terms = array("I", b"" if earlier is None else earlier._terms[: starts[-1]].tobytes())
        self._starts = array("q", starts.tobytes())

    def append(self, terms: Collection[str]) -> None:
        """Add the distinct terms of the next row."""
        self._terms.extend(crc32(term.encode()) for term in terms)
        self._starts.append(len(self._terms))

    def write(self, path: Path) -> set[str]:
        """Write the files into a lexical index's folder, and return their names. Raise OSError if the disk is full."""
        for name, values in ((STARTS, np.array(self._starts, np.int64)), (TERMS, np.array(self._terms, np.uint32))):
            with atomic_writer(path / name) as file:
                np.save(file, values, allow_pickle=False)
        return {STARTS, TERMS}
