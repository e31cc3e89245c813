"""Vectors to a FAISS index: trained on a sample, filled block by block, tuned by measurement.

- Shards stream through; beyond the index itself, memory does not grow with the gallery.
- Of several choices the first that reaches the target recall is kept; when none does, the best, with a warning.
- A rival of it is built as well, and the faster is kept. The lists, whose training takes most of the time, are shared.
- One that must go through much of its lists is slow, as where texts lie far from the pictures they ask for. Then a
  graph is built as well, where one is among the choices, and the faster is kept.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dcar_core.util.arrays import Blocks
from dcar_core.util.errors import DataError
from index_jobs.building import gpu_build
from index_jobs.building.kinds import Choice, create, lists
from index_jobs.building.tuning import TARGET_RECALL, Knobs, Queries, Tuning, own_queries, sample
from index_jobs.store import gpu_search

logger = logging.getLogger(__name__)

_EF_CONSTRUCTION = 80
_MUCH = 0.1  # of the lists in every search


@dataclass(frozen=True)
class Built:
    """A FAISS index, the choice that it is, and what was measured on it, as it goes into the manifest."""

    index: Any
    choice: Choice
    measured: dict[str, Any]

    @property
    def recall(self) -> float:
        return float(self.measured["recall_at_10"])

    @property
    def laborious(self) -> bool:
        """Whether a search goes through much of the lists."""
        import faiss

        inverted = None if self.choice.gpu else faiss.try_extract_index_ivf(self.index)
        return inverted is not None and self.measured["parameters"]["nprobe"] > _MUCH * inverted.nlist

    def beats(self, other: "Built", target: float) -> bool:
        """Faster where both reach the target, else of higher recall."""
        if min(self.recall, other.recall) >= target:
            return bool(self.measured["latency_ms_p50"] < other.measured["latency_ms_p50"])
        return self.recall > other.recall


def build(
    blocks: Blocks,
    count: int,
    dim: int,
    choices: Sequence[Choice],
    queries: Queries | None = None,
    *,
    target: float = TARGET_RECALL,
) -> Built:
    """Build and tune an index; row numbers are the vectors' order.

    Args:
        blocks: count vectors of length dim, L2-normalised.
        choices: what to build, and what instead when the recall stays below the target.
        queries: held-out queries; None takes vectors of the gallery without themselves.
        target: recall at 10 against exact search.

    Raises:
        DataError: the kind needs more vectors than there are.
    """
    tuning = Tuning(
        blocks, queries or own_queries(blocks, count), target=target, exact=[c.factory for c in choices] == ["Flat"]
    )
    best: Built | None = None
    tried = list[Built]()
    for choice in choices:
        if best is not None and best.recall >= target and not _may_be_faster(choice, best):
            continue
        built = _build(blocks, count, dim, choice, tuning, best)
        tried.append(replace(built, index=None))
        if best is None or built.beats(best, target):
            best = built
        if best.recall < target:
            logger.warning(
                "%s: recall@10 is %.3f, below the target of %.2f; %s",
                choice.factory, built.recall, target,
                "take another kind" if choice is choices[-1] else "another kind is tried",
            )  # fmt: skip
    assert best is not None
    reasons = [best.choice.reason, *(_told(one, target) for one in tried if one.choice is not best.choice)]
    return replace(best, choice=replace(best.choice, reason="; ".join(reasons)))


def _may_be_faster(choice: Choice, best: Built) -> bool:
    """Than what reaches the target. Where that goes through much of its lists, other lists would have to as well."""
    return not choice.lists if best.laborious else choice.rival


def _told(built: Built, target: float) -> str:
    if built.recall < target:
        return f"{built.choice.factory} reached a recall of {built.recall:.3f} only"
    return f"{built.choice.factory} takes {built.measured['latency_ms_p50']:.2f} ms"


def _build(blocks: Blocks, count: int, dim: int, choice: Choice, tuning: Tuning, other: Built | None) -> Built:
    start = time.perf_counter()
    if choice.gpu:
        index = gpu_build.fill(choice, dim, blocks, count)
    else:
        index = fill(choice, dim, blocks, count, None if other is None else other.index)
    seconds = time.perf_counter() - start
    logger.info("%s: %d vectors in %.1f s", choice.factory, count, seconds)
    measured = tuning.run(index, gpu_search.GpuSearch if choice.gpu else None) | {"build_seconds": round(seconds, 1)}
    return Built(index, choice, measured)


def fill(choice: Choice, dim: int, blocks: Blocks, count: int, other: Any = None) -> Any:
    """Train and fill an index on the CPU. other: an index of the same vectors, whose lists are used where they fit."""
    import faiss

    index: Any = create(choice.factory, dim)
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.cp.min_points_per_centroid = 1  # a small gallery is no cause for warnings on stderr
        known = None if other is None else faiss.try_extract_index_ivf(other)
        if known is not None and known.nlist == inverted.nlist:
            inverted.quantizer.add(known.quantizer.reconstruct_n(0, known.nlist))  # training leaves them as they are
    if hasattr(index, "hnsw"):
        index.hnsw.efConstruction = _EF_CONSTRUCTION
    Knobs(index)  # sets the width in which a graph looks for lists, which adding vectors needs as well
    try:
        if not index.is_trained:
            index.train(sample(blocks, count, 64 * max(lists(count), 1024)))
        for block in blocks():
            index.add(np.ascontiguousarray(block))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rsplit("failed: ", 1)[-1].rsplit(": ", 1)[-1]
        raise DataError(f"an index of kind {choice.factory} cannot be built of {count:,} vectors: {reason}") from error
    if inverted is not None:
        inverted.make_direct_map()  # a vector by its row, for searches by a clicked item
    return index
