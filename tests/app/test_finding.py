"""Near-duplicates folded by the block: the same as row by row, in a fraction of the time."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.finding import _BLOCK, Hit, _folded


def row_by_row(vectors: np.ndarray, found: list[Hit], fold: float) -> list[Hit]:
    """What folding means: each row goes to the most like it of those that are shown, or is shown."""
    shown: list[int] = []
    members: dict[int, list[int]] = {}
    for place, hit in enumerate(found):
        alike = vectors[[found[each].row for each in shown]] @ vectors[hit.row]
        if len(shown) and alike.max() >= fold:
            members[shown[int(alike.argmax())]].append(hit.row)
        else:
            shown.append(place)
            members[place] = []
    return [Hit(found[place].row, found[place].score, tuple(members[place])) for place in shown]


def snapshot_of(vectors: np.ndarray) -> Any:
    return SimpleNamespace(artifact=SimpleNamespace(vectors=lambda rows: vectors[rows]))


@pytest.mark.parametrize("seed", range(60))
def test_blocks_fold_as_single_rows_do(seed: int) -> None:
    """Vectors of small whole numbers: sums are exact in any order, and many rows are equally like several others."""
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 5, _BLOCK, _BLOCK + 1, 700]))
    vectors = rng.integers(-2, 3, (rows, int(rng.integers(2, 7)))).astype(np.float32)
    vectors[rng.random(rows) < 0.02] = np.nan
    found = [Hit(int(row), 1 - place / rows) for place, row in enumerate(rng.permutation(rows))]
    fold = float(rng.integers(1, 14))
    wanted = row_by_row(vectors, found, fold)
    for count in {1, 2, len(wanted) // 2 + 1, len(wanted), len(wanted) + 1, 2 * rows}:
        assert _folded(snapshot_of(vectors), found, fold, count) == wanted[:count], count
    assert _folded(snapshot_of(vectors), [], fold, 3) == []


def test_folding_many_rows_takes_little_time() -> None:
    rng = np.random.default_rng(0)
    different = rng.standard_normal((900, 512)).astype(np.float32)
    vectors = different[rng.integers(0, 900, 4000)] + rng.standard_normal((4000, 512)).astype(np.float32) / 100
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = [Hit(row, 0.5) for row in range(4000)]
    times, hits = [], []
    for fold in (
        lambda: row_by_row(vectors, found, 0.95),
        lambda: _folded(snapshot_of(vectors), found, 0.95, 1001),
    ):
        began = time.perf_counter()
        hits.append(fold())
        times.append(time.perf_counter() - began)
    assert hits[0] == hits[1]
    assert times[1] < times[0] / 3
