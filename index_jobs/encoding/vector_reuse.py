"""Pictures that have a vector already: those that another gallery of the same encoder has too.

A gallery that has changed is another one, with shards of its own. What it has in common with the one before, told by
where a picture lies, its size and its time of change, is copied from there instead of being encoded again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index_jobs.encoding.shards import Shard
from index_jobs.gallery.storage import ImageLocation


@dataclass(frozen=True)
class ReusedVectors:
    """Known pictures of some places: which of them, int64 (m,), their vectors, float32 (m, E), and pixels' hashes."""

    which: NDArray[np.int64]
    vectors: NDArray[np.float32]
    digests: NDArray[np.uint64]


class ReusableVectors:
    """The vectors of other galleries' shards, by the marks of their pictures."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = list(shards)
        marks = [shard.marks for shard in self._shards]
        self._starts = np.cumsum([0, *map(len, marks)])
        joined = np.concatenate(marks) if marks else np.empty(0, np.uint64)
        self._marks, self._at = np.unique(joined, return_index=True)

    def __len__(self) -> int:
        return len(self._marks)

    def positions(self, places: Sequence[ImageLocation]) -> NDArray[np.int64]:
        """int64 (n,): where each picture's vector is, for `take`; -1 for one that has none."""
        if not len(self):
            return np.full(len(places), -1, np.int64)
        wanted = np.fromiter((place.mark for place in places), np.uint64, len(places))
        near = np.searchsorted(self._marks, wanted).clip(max=len(self._marks) - 1)
        return np.where(self._marks[near] == wanted, self._at[near], -1)

    def take(self, positions: NDArray[np.int64], dim: int) -> ReusedVectors:
        """What is known of places, from their `positions`."""
        which = np.flatnonzero(positions >= 0)
        vectors = np.empty((len(which), dim), np.float32)
        digests = np.empty(len(which), np.uint64)
        shard_of = np.searchsorted(self._starts, positions[which], side="right") - 1
        for number in np.unique(shard_of):
            shard, here = self._shards[number], shard_of == number
            rows = positions[which[here]] - self._starts[number]
            vectors[here], digests[here] = shard.vectors()[rows], shard.digests[rows]
        return ReusedVectors(which, vectors, digests)
