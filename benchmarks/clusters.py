"""Synthetic vectors around centres of unequal size, wide in directions of their own,
for random models.
"""

import numpy as np

from dcar_core.util.arrays import Floats

SPREAD = 24  # directions in which a cluster is wide


class Clusters:
    """sqrt(count) clusters of unequal size; the largest is many times the smallest."""

    def __init__(self, count: int, dim: int) -> None:
        fixed = np.random.default_rng(0)
        number = max(20, int(np.sqrt(count)))
        self.centres = fixed.normal(size=(number, dim)).astype(np.float32)
        self.basis = fixed.normal(size=(256, dim)).astype(np.float32)
        self.own = fixed.integers(256, size=(number, SPREAD))
        self.shares = np.arange(1, number + 1) ** -0.7
        self.shares /= self.shares.sum()

    def draw(self, size: int, seed: int) -> Floats:
        """Return float32 (size, dim), L2-normalized."""
        draw = np.random.default_rng([7, seed])
        which = draw.choice(len(self.centres), size, p=self.shares)
        wide = 0.25 * draw.normal(size=(size, SPREAD)).astype(np.float32)
        vectors = self.centres[which] + 0.12 * draw.normal(
            size=(size, self.centres.shape[1])
        ).astype(np.float32)
        for place in range(SPREAD):
            vectors += wide[:, place : place + 1] * self.basis[self.own[which, place]]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors
