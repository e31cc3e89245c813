"""Reuse of vectors that the same encoder has computed for earlier galleries.

A changed gallery is a new one with shards of its own. Images that it shares with an earlier gallery, recognised by
location (of a gallery at a URL with its root), size and time of change, are copied from there instead of being encoded
again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats
from index_jobs.encoding.shards import Shard, Sizes
from index_jobs.gallery.storage import ImageLocation


@dataclass(frozen=True)
class ReusedVectors:
    """Vectors of some of a list of images.

    indices: int64 (m,) into the list. vectors: float32 (m, E). pixel_hashes: uint64 (m,). sizes: of the images.
    """

    indices: NDArray[np.int64]
    vectors: Floats
    pixel_hashes: NDArray[np.uint64]
    sizes: Sizes


class ReusableVectors:
    """The vectors of other galleries' shards by the location hashes of their images."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = list(shards)
        hashes = [shard.location_hashes for shard in self._shards]
        self._starts = np.cumsum([0, *map(len, hashes)])
        joined = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._hashes, self._positions = np.unique(joined, return_index=True)

    def __len__(self) -> int:
        return len(self._hashes)

    def positions(self, locations: Sequence[ImageLocation]) -> NDArray[np.int64]:
        """Return int64 (n,): the position of each image's vector, for `take`; -1 where there is none."""
        if not len(self):
            return np.full(len(locations), -1, np.int64)
        wanted = np.fromiter((location.location_hash for location in locations), np.uint64, len(locations))
        near = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        return np.where(self._hashes[near] == wanted, self._positions[near], -1)

    def take(self, positions: NDArray[np.int64], dim: int) -> ReusedVectors:
        """Return the vectors at `positions`; -1 is left out."""
        indices = np.flatnonzero(positions >= 0)
        vectors = np.empty((len(indices), dim), np.float32)
        pixel_hashes, sizes = np.empty(len(indices), np.uint64), np.empty((len(indices), 2), np.int32)
        shard_numbers = np.searchsorted(self._starts, positions[indices], side="right") - 1
        for number in np.unique(shard_numbers):
            shard, here = self._shards[number], shard_numbers == number
            rows = positions[indices[here]] - self._starts[number]
            vectors[here], pixel_hashes[here] = shard.vectors()[rows], shard.pixel_hashes[rows]
            sizes[here] = shard.sizes[rows]
        return ReusedVectors(indices, vectors, pixel_hashes, sizes)
