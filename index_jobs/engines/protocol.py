"""Vector engines by name, and what one does: plan, create, open and sync, and of an
opened index search and vectors.

- The metric is the inner product of normalized vectors, which is the cosine similarity.
- Rows are numbered from 0 in the order of the vectors, so items, filters, additions and
  removals work with any engine.
- What an engine keeps of a version is in its files: vectors, or in NAME.json the name
  of what stores them elsewhere.
- An engine other than FAISS is a plug-in: a distribution with an entry point `NAME =
  "module:Class"` in the group `dcar.engines`. Its class extends `Engine`, and what it
  opens `VectorIndex`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pyarrow as pa

from dcar_core.util.arrays import Blocks, Floats, Rows
from dcar_core.util.errors import DataError
from index_jobs.row_filter import RowFilter
from index_jobs.spec import IndexSpec

ENTRY_POINTS = "dcar.engines"  # the group
_BUILT_IN = {
    "faiss": "index_jobs.engines.faiss.build:FaissEngine",
}

# rows that exact search compares in a few milliseconds, so that no engine needs a graph
# or lists for them
EXACT_UP_TO = 20_000

Files = Mapping[str, Path]  # by name, those of an engine among them
# scores float32 (n, k), best first, and rows int64 (n, k), -1 where there are fewer
ScoredRows = tuple[Floats, Rows]


@dataclass(frozen=True)
class HeldOutQueries:
    """Queries to measure with, and what they are, such as captions."""

    vectors: Floats  # float32 (q, E)
    source: str


@dataclass(frozen=True, kw_only=True)
class NewIndex:
    """An index to create, of L2-normalized vectors."""

    name: str  # of the index, as of `Engine.sync`
    folder: Path  # where files of the version or addition are written
    version: int
    blocks: Blocks
    # the fields of each row, memory-mapped; for engines that evaluate filters
    fields: pa.Table
    count: int
    dim: int
    queries: HeldOutQueries


@dataclass(frozen=True, kw_only=True)
class CreatedIndex:
    """What was created, as in the manifest."""

    kind: str
    reason: str
    measured: dict[str, Any]


class VectorIndex(ABC):
    """Vectors by row number. Safe for concurrent searches."""

    count: int
    dim: int

    @abstractmethod
    def search(
        self,
        vectors: Floats,
        k: int,
        rows: RowFilter | None = None,
        *,
        is_narrow: bool = False,
    ) -> ScoredRows:
        """Return the k best rows for each query, float32 (n, E).

        rows: those that may be found, by their mask or by conditions; None for all.
        is_narrow: without `rows`, search no wider than for a few results; more of the
        last ones are missed.
        """

    @abstractmethod
    def vectors(self, rows: Rows) -> Floats:
        """Return the vectors of rows int64 (m,): float32 (m, E), normalized;
        approximate for a compressing kind.
        """


class Engine(ABC):
    """Stores the vectors of versions and searches them. It is made with the URI of its
    name, "" without.

    An engine with a URI has its own copy of the fields of items, as they were when the
    vectors were stored.
    """

    @abstractmethod
    def plan(self, spec: IndexSpec, count: int, dim: int) -> int:
        """Check that an index can be created, before anything is encoded. Return the
        least bytes of its file, or 0.

        Raise DataError without such a kind, or one that fits the memory,
        StoreUnavailableError, or MissingExtraError.
        """

    @abstractmethod
    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        """Store the vectors, and measure the recall and latency of searches."""

    @abstractmethod
    def open(self, files: Files, kind: str = "") -> VectorIndex:
        """Open the index of a version or addition, for which a build asked by the name
        of a kind.

        Raise ArtifactError if it is missing or damaged.
        """

    def sync(  # noqa: B027
        self, name: str, version: int, versions: Mapping[int, Sequence[Files]]
    ) -> None:
        """Follow a publication or a rollback, once `version` is current, and drop what
        no version up to it names.

        A failure is logged: CURRENT decides what is served. name: of the index, on
        every machine that publishes it. versions: by number, the files of what was
        built, and of each addition.
        """


def load_engine(text: str) -> Engine:
    """Return the engine that a spec's `engine` names: NAME or NAME=URI. Raise DataError
    if there is none.
    """
    name, _, uri = text.partition("=")
    if name in _BUILT_IN:
        engine: Engine = resolve_name(_BUILT_IN[name])(uri)
        return engine
    plug_ins = entry_points(group=ENTRY_POINTS)
    if name not in plug_ins.names:
        raise DataError(
            f"unknown engine {name!r}; installed are:"
            f" {', '.join([*_BUILT_IN, *sorted(plug_ins.names)])}. Others are plug-ins,"
            " which `pip install` adds to this environment; see"
            " docs/explanation/index-kinds.md"
        )
    plugged: Engine = plug_ins[name].load()(uri)
    return plugged


def no_results(count: int) -> ScoredRows:
    """Return the results of `count` queries before any search, (count, 0)."""
    return np.empty((count, 0), np.float32), np.empty((count, 0), np.int64)


def merge_top_k(scores: Sequence[Floats], rows: Sequence[Rows], k: int) -> ScoredRows:
    """Merge several results into the k best, float32 and int64 (n, k); -inf and -1
    where there are fewer.
    """
    n = len(scores[0])
    all_scores = np.concatenate([*scores, np.full((n, k), -np.inf, np.float32)], 1)
    all_rows = np.concatenate([*rows, np.full((n, k), -1, np.int64)], 1)
    all_scores[all_rows < 0] = -np.inf
    order = np.argsort(-all_scores, 1, kind="stable")[:, :k]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(
        all_rows,
        order,
        1,
    )
