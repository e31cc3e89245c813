"""What a vector engine does, in six verbs: plan, create, open and sync, and of an opened index search and vectors.

- The metric is the inner product of normalized vectors, which is the cosine similarity.
- Rows are numbered from 0 in the order of the vectors, so items, filters, additions and removals work alike with
  every engine.
- What an engine keeps of a version is in the version's folder: the vectors, or the name of what stores them elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dcar_core.util.arrays import Blocks, Floats, Mask, Rows
from index_jobs.spec import IndexSpec

ScoredRows = tuple[Floats, Rows]  # scores (n, k), best first, and rows (n, k), -1 where there are fewer


@dataclass(frozen=True)
class HeldOutQueries:
    """Held-out queries: vectors float32 (q, E), their source, and for each the row to leave out, or -1."""

    vectors: Floats
    source: str
    own_rows: Rows


@dataclass(frozen=True, kw_only=True)
class NewIndex:
    """An index to create.

    folder: of the staged version; also for temporary files. version: its number.
    blocks: count vectors of length dim, L2-normalized. queries: to measure with; None for vectors of the gallery.
    device: as of `BuildOptions`.
    """

    folder: Path
    version: int
    blocks: Blocks
    count: int
    dim: int
    queries: HeldOutQueries | None
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class CreatedIndex:
    """What was created, as in the manifest: its kind, the reason for it, and measurements.

    gpu: it is searched on a GPU if there is one.
    """

    kind: str
    reason: str
    measured: dict[str, Any]
    gpu: bool = False


class VectorIndex(Protocol):
    """Vectors by row number. Safe for concurrent searches."""

    @property
    def count(self) -> int: ...
    @property
    def dim(self) -> int: ...
    def search(self, vectors: Floats, k: int, mask: Mask | None = None, *, is_narrow: bool = False) -> ScoredRows:
        """Return the k best rows for each query.

        Args:
            vectors: float32 (n, E).
            mask: bool (count,), the rows that may be found; None for all.
            is_narrow: without a mask, search no wider than for a few results; more of the last ones are missed.

        Returns:
            scores float32 (n, k), best first, and rows int64 (n, k), -1 where there are fewer than k.
        """
        ...

    def vectors(self, rows: Rows) -> Floats:
        """Return the vectors of rows int64 (m,): float32 (m, E), normalized; approximate for a compressing kind."""
        ...


class Engine(Protocol):
    """Stores the vectors of versions and searches them."""

    def plan(self, spec: IndexSpec, count: int, dim: int, device: str) -> int:
        """Check that an index can be created, and return the least bytes that its file takes; 0 if unknown.

        Called before anything is encoded.

        Raises:
            DataError: the engine has no such kind, or none that fits the memory.
            StoreUnavailableError: the store does not respond.
            MissingExtraError: a library or a device is missing.
        """
        ...

    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        """Store the vectors, and measure the recall and latency of searches."""
        ...

    def open(self, folder: Path, *, gpu: bool = False) -> VectorIndex:
        """Open the index of a version's folder. Raise ArtifactError if it is missing or damaged."""
        ...

    def sync(self, index: Path, version: int) -> None:
        """Follow a publication, a rollback or the removal of versions, once `version` is current.

        A store outside of the folder drops what no version names. A failure is logged: CURRENT decides what is served.
        """
        ...


def merge_top_k(scores: Sequence[Floats], rows: Sequence[Rows], k: int) -> ScoredRows:
    """Merge several results into the k best, float32 and int64 (n, k); -inf and -1 where there are fewer."""
    n = len(scores[0])
    all_scores = np.concatenate([*scores, np.full((n, k), -np.inf, np.float32)], 1)
    all_rows = np.concatenate([*rows, np.full((n, k), -1, np.int64)], 1)
    all_scores[all_rows < 0] = -np.inf
    order = np.argsort(-all_scores, 1, kind="stable")[:, :k]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)
