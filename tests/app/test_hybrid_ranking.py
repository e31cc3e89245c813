"""Hybrid ranking against plain computations over all rows."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from app.search.engine import rank_rows
from app.search.plan import Plan
from app.search.query import Query
from app.search.rank import rank
from index_jobs.row_filter import RowFilter
from index_jobs.store.lexical.fusion import text_bonus
from index_jobs.store.lexical.lexical_index import LexicalIndex, write_lexical
from tests.support.ranking import ArtifactStub, first_of_each, snapshot_of, unit

WORDS = ["ghost", "spook", "fish", "cake", "red", "blue", "truck", "car", "face", "smile"]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, np.ndarray, LexicalIndex]:
    rng, generator = np.random.default_rng(0), random.Random(0)
    texts = [" ".join(generator.choices(WORDS, range(1, 11), k=generator.randint(1, 5))) for _ in range(400)]
    path = tmp_path_factory.mktemp("lexical") / "lexical"
    write_lexical(path, texts)
    lexical = LexicalIndex(path)
    vectors = unit(rng, 400, 24)
    vectors[100:140] = vectors[0]  # ties
    return snapshot_of(ArtifactStub(vectors, lexical=lexical)), vectors, lexical


@pytest.mark.parametrize("weight", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("query", ["ghost", "red fish cake", "face smile car", "gohst", "nothing here"])
def test_hybrid_order_equals_the_sum_over_all_rows(catalogue: Any, query: str, weight: float) -> None:
    snapshot, vectors, lexical = catalogue
    vector = unit(np.random.default_rng(len(query)), 24)
    plan = Plan(Query(query=query), words_weight=weight)
    text_scores = lexical.score(query, np.arange(400))
    scores = vectors @ vector + np.float32(text_bonus(snapshot.artifact.sample_vectors, vector, weight)) * text_scores
    for mask in (None, np.random.default_rng(1).random(400) < 0.7):
        allowed = None if mask is None else RowFilter.of_mask(mask)
        rows = np.arange(400) if mask is None else np.flatnonzero(mask)
        expected = sorted(zip((-scores[rows]).round(5).tolist(), rows.tolist(), strict=True))
        ranked = rank(snapshot.artifact, vector, plan, 400, allowed)
        np.testing.assert_allclose([scores[each.row] for each in ranked], [-score for score, _ in expected], atol=2e-5)
        assert sorted(each.row for each in ranked) == sorted(rows.tolist())
        for each in ranked:
            assert each.text_score == pytest.approx(text_scores[each.row], abs=1e-6)
            assert each.score == pytest.approx(float(vectors[each.row] @ vector), abs=1e-5)
        for count in (1, 7, 40, 150):
            page = rank(snapshot.artifact, vector, plan, count, allowed)
            assert [each.row for each in page] == [each.row for each in ranked[:count]]


def test_common_words_are_ranked_among_the_nearest_rows(catalogue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.search.rank._TEXT_ROWS", 20)
    monkeypatch.setattr("app.search.rank._COMMON_TEXT_ROWS", 20)
    snapshot, vectors, lexical = catalogue
    vector = unit(np.random.default_rng(9), 24)
    plan = Plan(Query(query="smile"), words_weight=0.7)
    text_scores = lexical.score("smile", np.arange(400))
    assert np.count_nonzero(text_scores) > 100
    ranked = rank(snapshot.artifact, vector, plan, 60)
    scores = vectors @ vector + np.float32(text_bonus(snapshot.artifact.sample_vectors, vector, 0.7)) * text_scores
    assert all(np.diff([scores[each.row] for each in ranked]) <= 1e-5)
    for each in ranked:
        assert each.text_score == pytest.approx(text_scores[each.row], abs=1e-6)
    nearest = np.argsort(-(vectors @ vector), kind="stable")[:40]
    assert {row for row in nearest.tolist() if text_scores[row] > 0} <= {each.row for each in ranked}
    for count in (1, 10, 40):
        assert [each.row for each in rank(snapshot.artifact, vector, plan, count)] == [
            each.row for each in ranked[:count]
        ]


def test_min_score_of_a_hybrid_search_is_a_cosine(catalogue: Any) -> None:
    snapshot, _, _ = catalogue
    vector = unit(np.random.default_rng(3), 24)
    plan = Plan(Query(query="ghost"), words_weight=0.5)
    ranked = rank(snapshot.artifact, vector, replace(plan, min_score=0.2), 400)
    everything = rank(snapshot.artifact, vector, plan, 400)
    assert [each.row for each in ranked] == [each.row for each in everything if round(each.score, 6) >= 0.2]
    assert 0 < len(ranked) < 400


def test_hybrid_results_are_folded_in_their_order(catalogue: Any) -> None:
    snapshot, vectors, _ = catalogue
    vector, plan = vectors[0], Plan(Query(query="red fish cake"), words_weight=0.7)
    everything = [each.row for each in rank(snapshot.artifact, vector, plan, 400)]
    assert everything != [each.row for each in rank(snapshot.artifact, vector, Plan(Query()), 400)]
    same = {0, *range(100, 140)}
    best = next(row for row in everything if row in same)
    folded = rank(snapshot.artifact, vector, replace(plan, query=Query(query="red fish cake", fold=0.999)), 30)
    assert [each.row for each in folded] == [row for row in everything if row not in same - {best}][:30]
    assert {each.row: {*each.near} for each in folded if each.near} == {best: same - {best}}


@pytest.mark.parametrize("query", ["ghost", "red fish cake", "face smile car"])
@pytest.mark.parametrize("excluded", [frozenset[int](), frozenset({5, 6})], ids=["all", "like some items"])
def test_hybrid_products_equal_those_of_all_rows(catalogue: Any, query: str, excluded: frozenset[int]) -> None:
    snapshot, vectors, lexical = catalogue
    products = [f"p{row % 37}" for row in range(400)]
    grouped = snapshot_of(ArtifactStub(vectors, lexical=lexical, product=products))
    words = Plan(Query(query=query), words_weight=0.7)
    for mask in (None, np.random.default_rng(2).random(400) < 0.5):
        allowed = None if mask is None else RowFilter.of_mask(mask)
        everything = [each.row for each in rank(snapshot.artifact, vectors[5], words, 400, allowed)]
        others = [row for row in everything if products[row] not in {products[each] for each in excluded}]
        expected = first_of_each(others, products)
        for end in (3, 20, 40):
            plan = replace(words, query=Query(query=query, k=end), excluded_rows=excluded, group_by="product")
            assert [each.row for each in rank_rows(grouped, plan, vectors[5], allowed)] == expected[: end + 1]
