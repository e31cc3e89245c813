"""Ranking: the order of results, the width of the search, and folding of near-duplicates in blocks."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.search.plan import Plan
from app.search.query import Query
from app.search.ranking.rank import _FOLD_BLOCK, RankedRow, _fold, rank


def row_by_row(vectors: np.ndarray, found: list[RankedRow], fold: float) -> list[RankedRow]:
    """Fold each row into the most similar row that is shown, or show it."""
    shown: list[int] = []
    members: dict[int, list[int]] = {}
    for place, hit in enumerate(found):
        alike = vectors[[found[each].row for each in shown]] @ vectors[hit.row]
        if len(shown) and alike.max() >= fold:
            members[shown[int(alike.argmax())]].append(hit.row)
        else:
            shown.append(place)
            members[place] = []
    return [RankedRow(found[place].row, found[place].score, tuple(members[place])) for place in shown]


def artifact_of(vectors: np.ndarray) -> Any:
    return SimpleNamespace(vectors=lambda rows: vectors[rows])


@pytest.mark.parametrize("seed", range(60))
@np.errstate(invalid="ignore")  # BLAS may report NaN
def test_folding_in_blocks_equals_folding_row_by_row(seed: int) -> None:
    """Vectors of small integers: sums are exact in any order, and many similarities are equal."""
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 5, _FOLD_BLOCK, _FOLD_BLOCK + 1, 700]))
    vectors = rng.integers(-2, 3, (rows, int(rng.integers(2, 7)))).astype(np.float32)
    vectors[rng.random(rows) < 0.02] = np.nan
    found = [RankedRow(int(row), 1 - place / rows) for place, row in enumerate(rng.permutation(rows))]
    fold = float(rng.integers(1, 14))
    expected = row_by_row(vectors, found, fold)
    for count in {1, 2, len(expected) // 2 + 1, len(expected), len(expected) + 1, 2 * rows}:
        assert _fold(artifact_of(vectors), found, fold, count) == expected[:count], count
    assert _fold(artifact_of(vectors), [], fold, 3) == []


@pytest.mark.slow
def test_folding_in_blocks_is_faster_than_row_by_row() -> None:
    rng = np.random.default_rng(0)
    different = rng.standard_normal((600, 512)).astype(np.float32)
    vectors = different[rng.integers(0, 600, 2500)] + rng.standard_normal((2500, 512)).astype(np.float32) / 100
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = [RankedRow(row, 0.5) for row in range(2500)]
    times, hits = [], []
    for fold in (
        lambda: row_by_row(vectors, found, 0.95),
        lambda: _fold(artifact_of(vectors), found, 0.95, 626),
    ):
        took = []
        for _ in range(3):  # take the fastest: the machine may be busy
            started = time.perf_counter()
            result = fold()  # type: ignore[no-untyped-call]
            took.append(time.perf_counter() - started)
        hits.append(result)
        times.append(min(took))
    assert hits[0] == hits[1]
    assert times[1] < times[0] / 3


class Exact:
    """Exact search. The order and choice among equal scores depend on k, as in FAISS."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors, self.rows, self.asked = vectors, len(vectors), 0

    def search(
        self, vector: np.ndarray, k: int, allowed: Any = None, *, is_narrow: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked = k
        scores = (self._vectors * vector).sum(1)  # row by row: equal vectors get equal scores
        shuffled = np.random.default_rng(k).permutation(self.rows)
        rows = shuffled[np.argsort(-scores[shuffled], kind="stable")][:k]
        return scores[rows][None], rows[None]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self._vectors[rows]


def copies() -> tuple[Any, np.ndarray]:
    """Return an artifact of 300 rows, 100 of them copies of two, and a query vector."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 64)).astype(np.float32)
    vectors[::5], vectors[1:200:5] = vectors[0], vectors[1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = vectors[0] + vectors[1] + vectors[2]
    return Exact(vectors), expected / np.linalg.norm(expected)


PLAIN = Plan(Query())
PLANS = [PLAIN, Plan(Query(), excluded_rows={0, 1, 2, 50}), Plan(Query(fold=0.9)), Plan(Query(), min_score=0.0)]


@pytest.mark.parametrize("plan", PLANS, ids=["plain", "excluded", "fold", "min_score"])
def test_a_longer_list_begins_with_the_shorter_one(plan: Plan) -> None:
    """Pages then have every item once, however many scores are equal."""
    artifact, vector = copies()
    rows = [hit.row for hit in rank(artifact, vector, plan, 300)]
    assert len(rows) == len(set(rows))
    for count in range(1, 120):
        assert [hit.row for hit in rank(artifact, vector, plan, count)] == rows[:count]
    assert plan is PLAIN or len(rows) < 300
    if plan is PLAIN:
        assert sorted(rows) == list(range(300))


def test_only_tied_scores_widen_the_search() -> None:
    artifact, vector = copies()
    rank(artifact, vector, PLAIN, 10)
    assert artifact.asked == 88, "11, 22, 44: the sixty copies of one image"
    rank(artifact, vector, PLAIN, 150)
    assert artifact.asked == 151


def test_identical_vectors_fold_at_a_threshold_of_one() -> None:
    """The product of a float32 vector with itself may be slightly below 1."""
    artifact, vector = copies()
    assert not np.all((artifact.vectors(np.arange(300)) ** 2).sum(1) >= 1)
    hits = rank(artifact, vector, Plan(Query(fold=1.0)), 300)
    assert sorted(len(hit.folded) for hit in hits)[-2:] == [39, 59]
    assert len(hits) == 300 - 98


def test_a_displayed_score_works_as_min_score() -> None:
    artifact, vector = copies()
    for number, hit in enumerate(rank(artifact, vector, PLAIN, 300)[:150], 1):
        kept = rank(artifact, vector, Plan(Query(), min_score=round(hit.score, 6)), 300)
        assert len(kept) >= number
