"""Synthetic vectors for index tests."""

from collections.abc import Iterator

import numpy as np

from dcar_core.util.arrays import Blocks, Floats

DIM = 32


def clustered(count: int, seed: int = 0) -> Floats:
    """Return unit vectors around 50 centres, like the images of a gallery."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(50, DIM))
    vectors = centres[generator.integers(50, size=count)] + 0.4 * generator.normal(size=(count, DIM))
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def blocks(vectors: Floats, size: int = 700) -> Blocks:
    def again() -> Iterator[Floats]:
        return (vectors[start : start + size] for start in range(0, len(vectors), size))

    return again
