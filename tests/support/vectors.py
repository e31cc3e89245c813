"""Synthetic vectors for index tests, indexes of them, and the recall of searches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dcar_core.util.arrays import Blocks, Floats, Mask, Rows
from index_jobs.engines.faiss.build import IndexChoice, build_index
from index_jobs.engines.protocol import CreatedIndex, HeldOutQueries

DIM = 32


def unit(vectors: Any) -> Floats:
    normalized: Floats = (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ).astype(np.float32)
    return normalized


def clustered(count: int, seed: int = 0) -> Floats:
    """Return unit vectors around 50 centres, like the images of a gallery."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(50, DIM))
    return unit(
        centres[generator.integers(50, size=count)]
        + 0.4 * generator.normal(size=(count, DIM))
    )


def blocks(vectors: Floats, size: int = 700) -> Blocks:
    def again() -> Iterator[Floats]:
        return (vectors[start : start + size] for start in range(0, len(vectors), size))

    return again


def held_out(vectors: Floats) -> HeldOutQueries:
    """Return up to a thousand of the vectors as queries."""
    return HeldOutQueries(vectors[:: -(-len(vectors) // 1000)], "vectors")


def build(
    file: Path,
    vectors: Floats,
    *kinds: str | IndexChoice,
    **options: Any,
) -> CreatedIndex:
    """Build, tune and write an index of one of these factory strings or choices."""
    choices = [
        IndexChoice(kind, "test") if isinstance(kind, str) else kind for kind in kinds
    ]
    queries = options.pop("queries", held_out(vectors))
    return build_index(
        file,
        blocks(vectors),
        len(vectors),
        vectors.shape[1],
        choices,
        queries,
        **options,
    )


def recall(
    rows: Rows,
    queries: Floats,
    vectors: Floats,
    mask: Mask | None = None,
) -> float:
    """Return the share of the nearest rows, among those of a mask, that were found."""
    scores = queries @ vectors.T
    truth = np.argsort(
        -scores if mask is None else np.where(mask, -scores, 9),
        axis=1,
        kind="stable",
    )
    k = rows.shape[1]
    return float(
        np.mean(
            [
                len(np.intersect1d(a, b[:k])) / k
                for a, b in zip(rows, truth, strict=True)
            ]
        )
    )
