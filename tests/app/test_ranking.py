"""Ranking: the order of results, the width of the search, folding of near-duplicates, and levels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.search.plan import Plan
from app.search.query import Level, Match, Query
from app.search.rank import fold_matches, judge, rank


def row_by_row(vectors: np.ndarray, found: list[Match], fold: float) -> list[Match]:
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
    return [Match(found[place].row, found[place].score, near=members[place]) for place in shown]


@pytest.mark.parametrize("seed", range(30))
def test_folding_equals_folding_row_by_row(seed: int) -> None:
    """Vectors of small integers: sums are exact in any order, and many similarities are equal."""
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 5, 120, 700]))
    vectors = rng.integers(-2, 3, (rows, int(rng.integers(2, 7)))).astype(np.float32)
    artifact: Any = SimpleNamespace(vectors=lambda rows: vectors[rows])
    order = rng.permutation(rows).tolist()
    fold = float(rng.integers(1, 14))

    def found() -> list[Match]:
        return [Match(row, 1 - place / rows) for place, row in enumerate(order)]

    expected = row_by_row(vectors, found(), fold)
    for count in {1, 2, len(expected) // 2 + 1, len(expected), len(expected) + 1, 2 * rows}:
        assert fold_matches(artifact, found(), fold, count) == expected[:count], count
    assert fold_matches(artifact, [], fold, 3) == []


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
    assert sorted(rows) == list(range(300)) if plan is PLAIN else len(rows) < 300


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
    assert sorted(len(hit.near) for hit in hits)[-2:] == [39, 59]
    assert len(hits) == 300 - 98


def test_a_displayed_score_works_as_min_score() -> None:
    artifact, vector = copies()
    for number, hit in enumerate(rank(artifact, vector, PLAIN, 300)[:150], 1):
        kept = rank(artifact, vector, Plan(Query(), min_score=round(hit.score, 6)), 300)
        assert len(kept) >= number


def judged(
    scores: list[Any], known: float = 1.0, *, is_judged: bool = True, **cutoff: float
) -> tuple[Any, list[Level]]:
    """Return the cut-off and the levels of scores, perhaps with text scores; items have a share of the words."""
    lexical = SimpleNamespace(known_share=lambda _: known)
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(cutoff=cutoff), lexical=lexical)
    matches = [Match(row, *each) if isinstance(each, tuple) else Match(row, each) for row, each in enumerate(scores)]
    likely = judge(artifact, Plan(Query(query="weinende Katze"), is_judged=is_judged), matches)
    return likely, [each.level for each in matches]


@pytest.mark.parametrize(
    ("known", "scores", "expected"),
    [
        (1.0, [0.3, 0.2, 0.1999], ["likely", "likely", "unlikely"]),
        (1.0, [0.1], ["unlikely"]),
        (1.0, [(0.1, 0.6), (0.1, 0.59)], ["likely", "unlikely"]),
        (0.4, [0.3, 0.1], ["possible", "unlikely"]),  # words that no item has
        (0.4, [(0.3, 0.4), (0.3, 0.1)], ["likely", "possible"]),
        (0.4, [0.5, 0.3, 0.1], ["likely", "likely", "unlikely"]),  # a strong score outweighs unknown words
    ],
)
def test_levels_follow_from_cutoff_and_words(known: float, scores: list[Any], expected: list[Level]) -> None:
    assert judged(scores, known, min_score=0.2, strong_score=0.4)[1] == expected


def test_without_a_cutoff_nothing_is_judged() -> None:
    for cutoff, is_judged in (({}, True), ({"min_score": 0.2, "strong_score": 0.4}, False)):
        assert judged([0.3, -0.1], is_judged=is_judged, **cutoff) == (None, ["possible", "possible"])
