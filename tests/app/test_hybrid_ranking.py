"""Hybrid ranking, groups and facets against plain computations over all rows."""

import random
import sys
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from app.search.errors import InvalidQueryError, UnsupportedQueryError
from app.search.planning import Plan, rank_rows
from app.search.query import Query, SearchOptions
from app.search.ranking.facets import count_values
from app.search.ranking.groups import group_field, rank_groups
from app.search.ranking.hybrid import HybridQuery
from app.search.ranking.rank import RankQuery, rank
from app.search.snapshots import drop_oldest
from dcar_core.util.errors import DataError
from index_jobs.store.faiss_index import FaissIndex
from index_jobs.store.lexical.fusion import text_bonus
from index_jobs.store.lexical.lexical_index import LexicalIndex, write_lexical

WORDS = ["ghost", "spook", "fish", "cake", "red", "blue", "truck", "car", "face", "smile"]


class Rows:
    """What ranking needs of an artifact, over a FAISS index of some kind."""

    def __init__(self, vectors: np.ndarray, kind: str = "Flat", lexical: LexicalIndex | None = None, **columns: Any):
        index: Any = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        if kind.startswith("IVF"):
            index.nprobe = index.nlist
            index.make_direct_map()
        if kind.startswith("HNSW"):
            index.hnsw.efSearch = len(vectors)
        self._faiss, self.rows, self.lexical = FaissIndex(index), len(vectors), lexical
        self.live = np.ones(self.rows, np.bool_)
        self.live.flags.writeable = False
        self.manifest = SimpleNamespace(removed=0, group_field="field0")
        self._columns = columns
        self.sample_vectors = vectors[:50]

    def search(self, vectors: np.ndarray, k: int, allowed: Any = None, *, is_narrow: bool = False) -> Any:
        return self._faiss.search(vectors, k, allowed, is_narrow=is_narrow)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self._faiss.vectors(rows)

    def column(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns:
            raise DataError(f"no item has the field {name!r}")
        half = self.rows // 2
        values = self._columns[name]
        kind = pa.array(values).type
        return pa.chunked_array([pa.array(values[:half], kind), pa.array(values[half:], kind)])


def snapshot_of(artifact: Rows) -> Any:
    return SimpleNamespace(artifact=artifact, groups={})


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, np.ndarray, LexicalIndex]:
    rng, generator = np.random.default_rng(0), random.Random(0)
    texts = [" ".join(generator.choices(WORDS, range(1, 11), k=generator.randint(1, 5))) for _ in range(400)]
    path = tmp_path_factory.mktemp("lexical") / "lexical"
    write_lexical(path, texts)
    lexical = LexicalIndex(path)
    vectors = unit(rng, 400, 24)
    vectors[100:140] = vectors[0]  # ties
    return snapshot_of(Rows(vectors, lexical=lexical)), vectors, lexical


@pytest.mark.parametrize("weight", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("query", ["ghost", "red fish cake", "face smile car", "gohst", "nothing here"])
def test_hybrid_order_equals_the_sum_over_all_rows(catalogue: Any, query: str, weight: float) -> None:
    snapshot, vectors, lexical = catalogue
    vector = unit(np.random.default_rng(len(query)), 24)
    allowed = np.random.default_rng(1).random(400) < 0.7
    hybrid = HybridQuery(query, weight)
    text_scores = lexical.score(query, np.arange(400))
    scores = vectors @ vector + np.float32(text_bonus(snapshot.artifact.sample_vectors, vector, weight)) * text_scores
    for mask in (None, allowed):
        rows = np.arange(400) if mask is None else np.flatnonzero(mask)
        expected = sorted(zip((-scores[rows]).round(5).tolist(), rows.tolist(), strict=True))
        ranked = rank(snapshot.artifact, RankQuery(vector, hybrid=hybrid), 400, mask)
        np.testing.assert_allclose([scores[each.row] for each in ranked], [-score for score, _ in expected], atol=2e-5)
        assert sorted(each.row for each in ranked) == sorted(rows.tolist())
        for each in ranked:
            assert each.text_score == pytest.approx(text_scores[each.row], abs=1e-6)
            assert each.score == pytest.approx(float(vectors[each.row] @ vector), abs=1e-5)
        for count in (1, 7, 40, 150):
            page = rank(snapshot.artifact, RankQuery(vector, hybrid=hybrid), count, mask)
            assert [each.row for each in page] == [each.row for each in ranked[:count]]


def test_common_words_are_ranked_among_the_nearest_rows(catalogue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.search.ranking.hybrid._TEXT_ROWS", 20)
    monkeypatch.setattr("app.search.ranking.hybrid._COMMON_TEXT_ROWS", 20)
    snapshot, vectors, lexical = catalogue
    vector = unit(np.random.default_rng(9), 24)
    query = RankQuery(vector, HybridQuery("smile", 0.7))
    text_scores = lexical.score("smile", np.arange(400))
    assert np.count_nonzero(text_scores) > 100
    ranked = rank(snapshot.artifact, query, 60)
    scores = vectors @ vector + np.float32(text_bonus(snapshot.artifact.sample_vectors, vector, 0.7)) * text_scores
    assert all(np.diff([scores[each.row] for each in ranked]) <= 1e-5)
    for each in ranked:
        assert each.text_score == pytest.approx(text_scores[each.row], abs=1e-6)
    nearest = np.argsort(-(vectors @ vector), kind="stable")[:40]
    assert {row for row in nearest.tolist() if text_scores[row] > 0} <= {each.row for each in ranked}
    for count in (1, 10, 40):
        assert [each.row for each in rank(snapshot.artifact, query, count)] == [each.row for each in ranked[:count]]


def test_min_score_of_a_hybrid_search_is_a_cosine(catalogue: Any) -> None:
    snapshot, _, _ = catalogue
    vector = unit(np.random.default_rng(3), 24)
    ranked = rank(snapshot.artifact, RankQuery(vector, hybrid=HybridQuery("ghost", 0.5), min_score=0.2), 400)
    everything = rank(snapshot.artifact, RankQuery(vector, hybrid=HybridQuery("ghost", 0.5)), 400)
    assert [each.row for each in ranked] == [each.row for each in everything if round(each.score, 6) >= 0.2]
    assert 0 < len(ranked) < 400


def test_hybrid_results_are_grouped_and_folded_in_their_order(catalogue: Any) -> None:
    snapshot, vectors, _ = catalogue
    query = RankQuery(vectors[0], hybrid=HybridQuery("red fish cake", 0.7))
    everything = [each.row for each in rank(snapshot.artifact, query, 400)]
    assert everything != [each.row for each in rank(snapshot.artifact, replace(query, hybrid=None), 400)]

    products = [f"p{row % 37}" for row in range(400)]
    first: dict[str, int] = {}
    for row in everything:
        first.setdefault(products[row], row)
    groups = group_field(snapshot_of(Rows(vectors, product=products)), "product")
    for count in (5, 37):
        grouped = rank_groups(partial(rank, snapshot.artifact, query), count, groups, None)
        assert [each.row for each in grouped] == list(first.values())[:count]

    same = {0, *range(100, 140)}
    best = next(row for row in everything if row in same)
    folded = rank(snapshot.artifact, replace(query, fold=0.999), 30)
    assert [each.row for each in folded] == [row for row in everything if row not in same - {best}][:30]
    assert {each.row: {*each.folded} for each in folded if each.folded} == {best: same - {best}}


def test_an_index_without_words_says_how_to_get_them() -> None:
    snapshot = snapshot_of(Rows(unit(np.random.default_rng(0), 60, 8)))
    with pytest.raises(UnsupportedQueryError, match="rebuild"):
        rank(snapshot.artifact, RankQuery(unit(np.random.default_rng(1), 8), hybrid=HybridQuery("ghost", 0.5)), 5)


@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "HNSW16,SQfp16"])
@pytest.mark.parametrize("seed", range(4))
def test_groups_equal_those_of_all_rows_on_every_page(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 600
    values = [None if number < 0 else f"p{number}" for number in (rng.zipf(1.5, count) % 90 - 1).tolist()]
    vectors = unit(rng, count, 16)
    snapshot = snapshot_of(Rows(vectors, kind, product=values))
    groups = group_field(snapshot, "product")
    vector = vectors[0]
    for mask in (None, rng.random(count) < 0.5):
        everything = rank(snapshot.artifact, RankQuery(vector), count, mask)
        first: dict[Any, int] = {}
        for each in everything:
            first.setdefault(each.row if values[each.row] is None else values[each.row], each.row)
        expected = list(first.values())

        def search(size: int, remaining: Any) -> Any:
            return rank(snapshot.artifact, RankQuery(vector), size, remaining)

        for size in (1, 5, 24, len(expected), len(expected) + 5):
            found = rank_groups(search, size, groups, mask)
            assert [each.row for each in found] == expected[:size]
        allowed = np.ones(count, np.bool_) if mask is None else mask
        plain = Counter(value for value, inside in zip(values, allowed.tolist(), strict=True) if inside)
        rows = expected[:24]
        assert groups.sizes(rows, allowed) == [1 if values[row] is None else plain[values[row]] for row in rows]
        assert [groups.value(row) for row in rows] == [values[row] for row in rows]


@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "HNSW16,Flat"])
@pytest.mark.parametrize("seed", range(2))
def test_products_like_some_items_equal_those_of_all_rows(kind: str, seed: int) -> None:
    rng, count = np.random.default_rng(seed), 500
    values = [None if number < 0 else f"p{number}" for number in (rng.zipf(1.5, count) % 60 - 1).tolist()]
    products = [row if value is None else value for row, value in enumerate(values)]
    vectors = unit(rng, count, 16)
    snapshot = snapshot_of(Rows(vectors, kind, product=values))
    for mask in (None, rng.random(count) < 0.5):
        allowed = np.arange(count) if mask is None else np.flatnonzero(mask)
        first_of: dict[Any, int] = {}
        for row in allowed.tolist():
            first_of.setdefault(products[row], row)
        assert group_field(snapshot, "product").first_rows(allowed).tolist() == list(first_of.values())
        for liked in rng.choice(count, (4, 2), replace=False).tolist():
            vector = vectors[liked].mean(0)
            vector /= np.linalg.norm(vector)
            scores = vectors @ vector
            expected: dict[Any, float] = {}
            for row in sorted(allowed.tolist(), key=lambda row: -scores[row]):
                if products[row] not in {products[each] for each in liked}:
                    expected.setdefault(products[row], float(scores[row]))
            query = Query(SearchOptions())
            plan = Plan(query, liked[:1], liked[1:], None, end=9, rerank_depth=0, hybrid=None, group_by="product")
            found = rank_rows(snapshot, plan, vector, mask)
            assert [products[each.row] for each in found] == list(expected)[:10]
            np.testing.assert_allclose([each.score for each in found], list(expected.values())[:10], atol=1e-5)


@pytest.mark.parametrize("query", ["ghost", "red fish cake", "face smile car"])
def test_hybrid_products_like_some_items_equal_those_of_all_rows(catalogue: Any, query: str) -> None:
    snapshot, vectors, lexical = catalogue
    products = [f"p{row % 9}" for row in range(400)]
    grouped = snapshot_of(Rows(vectors, lexical=lexical, product=products))
    hybrid = HybridQuery(query, 0.7)
    for mask in (None, np.random.default_rng(2).random(400) < 0.5):
        everything = rank(snapshot.artifact, RankQuery(vectors[5], hybrid), 400, mask)
        expected: dict[str, int] = {}
        for row in (each.row for each in everything):
            if products[row] not in ("p5", "p6"):
                expected.setdefault(products[row], row)
        for end in (3, 20):
            plan = Plan(Query(SearchOptions()), [5], [6], None, end, 0, hybrid, group_by="product")
            found = rank_rows(grouped, plan, vectors[5], mask)
            assert [each.row for each in found] == list(expected.values())[: end + 1]


@pytest.mark.parametrize("names", [["a"], ["a", "b", None]], ids=["all", "half"])
def test_search_for_other_products_is_as_narrow_as_without_items(names: list[str | None]) -> None:
    """A group of the items to resemble may be most of the gallery."""
    rng, count = np.random.default_rng(0), 3000
    vectors = unit(rng, count, 16)
    values = rng.choice(np.array(names, object), count).tolist()
    values[7] = "a"
    artifact: Any = Rows(vectors, product=values)
    search, widths = artifact.search, list[int]()

    def recording(queries: np.ndarray, k: int, *given: Any, **options: Any) -> Any:
        widths.append(k)
        return search(queries, k, *given, **options)

    artifact.search = recording
    plan = Plan(Query(SearchOptions()), [7], [], None, end=9, rerank_depth=0, hybrid=None, group_by="product")
    found = rank_rows(snapshot_of(artifact), plan, vectors[7], None)
    assert [values[each.row] for each in found if values[each.row] == "a"] == []
    assert len(found) == (0 if names == ["a"] else 10)
    assert max(widths) < 100


def test_groups_of_recent_fields_and_of_the_own_field_of_the_index_are_kept() -> None:
    fields: dict[str, Any] = {f"field{number}": ["a", "b"] for number in range(20)}
    snapshot = snapshot_of(Rows(unit(np.random.default_rng(0), 2, 4), **fields))
    for name in fields:
        assert group_field(snapshot, name) is group_field(snapshot, name)
        assert len(snapshot.groups) <= 9
    assert list(snapshot.groups) == ["field0", *(f"field{number}" for number in range(12, 20))]


def test_threads_may_fill_and_trim_a_cache_at_once() -> None:
    cache: dict[int, int] = {}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def fill(worker: int) -> None:
        for number in range(20_000):
            cache[8 * number + worker] = number
            drop_oldest(cache, 8)

    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(fill, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(cache) <= 8


def test_one_huge_group_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng, 3000, 16)
    vectors[:2950] = vectors[0] + 0.01 * vectors[:2950]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = ["huge"] * 2950 + [f"p{number}" for number in range(50)]
    snapshot = snapshot_of(Rows(vectors, product=values))
    groups = group_field(snapshot, "product")
    found = rank_groups(lambda size, mask: rank(snapshot.artifact, RankQuery(vectors[0]), size, mask), 10, groups, None)
    assert len({groups.value(each.row) for each in found}) == 10


def test_facets_equal_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    count = 500
    names = [None if number == 0 else f"c{number}" for number in rng.integers(0, 6, count).tolist()]
    tags = [[f"t{tag}" for tag in rng.integers(0, 9, rng.integers(0, 4)).tolist()] for _ in range(count)]
    flags = (rng.random(count) < 0.3).tolist()
    products = [f"p{number}" for number in rng.integers(0, 40, count).tolist()]
    snapshot = snapshot_of(Rows(unit(rng, count, 8), name=names, tags=tags, flag=flags, product=products))
    groups = group_field(snapshot, "product")
    mask = rng.random(count) < 0.6
    rows = np.flatnonzero(mask).tolist()
    for name, values in (("name", [[each] for each in names]), ("tags", tags), ("flag", [[each] for each in flags])):
        for grouped in (None, groups):
            pairs = (
                {(value, row if grouped is None else products[row]) for row in rows for value in values[row]}
                - {(None, row) for row in rows}
                - {(None, product) for product in products}
            )
            expected = Counter(value for value, _ in pairs)
            facet = count_values(snapshot.artifact, name, mask, grouped)
            assert {entry["value"]: entry["count"] for entry in facet} == dict(expected)
            assert [entry["count"] for entry in facet] == sorted(expected.values(), reverse=True)


def test_facets_are_in_the_order_of_all_values_sorted() -> None:
    """Frequent ones first; of equally frequent ones, the first in the order of their texts."""
    rng = np.random.default_rng(0)
    count = 900
    letters = ["é", "z", "Z", "10", "9", " ", "\uffff", "\U0001f600", "'", '"']
    texts = ["".join(rng.choice(letters, rng.integers(1, 4)).tolist()) for _ in range(count)]
    columns: dict[str, Any] = {
        "text": [None if text == "z" else text for text in texts],
        "tags": [sorted({text, text[:1], text[::-1]}) for text in texts],
        "flag": (rng.random(count) < 0.5).tolist(),
        "whole": rng.choice([7, 8, 10, 100, -1], count).tolist(),
        "number": rng.choice([2.0, 10.0, 1e300, np.inf, -0.5], count).tolist(),
        "alike": [True, False] * (count // 2),
    }
    snapshot, mask = snapshot_of(Rows(unit(rng, count, 4), **columns)), rng.random(count) < 0.9
    for name, values in columns.items():
        counter = Counter[Any]()
        for row in np.flatnonzero(mask).tolist():
            counter.update(values[row] if name == "tags" else [values[row]])
        del counter[None]
        for limit in (100, 101):
            expected = sorted(counter.items(), key=lambda pair: (-pair[1], str(pair[0])))[:limit]
            facet = count_values(snapshot.artifact, name, mask, limit=limit)
            assert [(entry["value"], entry["count"]) for entry in facet] == expected, name
    assert len(set(texts)) > 300, "ties at the end of the list"


def test_a_facet_of_different_texts_needs_little_memory() -> None:
    count = 50_000
    artifact: Any = Rows(np.ones((count, 1), np.float32), name=[f"item {number:06d}" for number in range(count)])
    column, mask = artifact.column("name"), np.ones(count, np.bool_)
    artifact.column = lambda _: column
    tracemalloc.start()
    try:
        facet = count_values(artifact, "name", mask)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [entry["value"] for entry in facet] == [f"item {number:06d}" for number in range(100)]
    assert peak < 100 * count, "bytes; the texts alone have as many as Python objects"


def test_a_field_of_many_values_is_counted_by_its_most_frequent_ones() -> None:
    values = [f"c{number}" for number in range(150) for _ in range(150 - number)]
    snapshot = snapshot_of(Rows(unit(np.random.default_rng(0), len(values), 4), name=values))
    facet = count_values(snapshot.artifact, "name", np.ones(len(values), np.bool_))
    assert facet == [{"value": f"c{number}", "count": 150 - number} for number in range(100)]


def test_an_empty_category_is_no_value() -> None:
    rng = np.random.default_rng(0)
    categories = ["", "cat", "cat", ""] * 15
    snapshot = snapshot_of(Rows(unit(rng, 60, 8), category=categories))
    everything = np.ones(60, np.bool_)
    assert count_values(snapshot.artifact, "category", everything) == [{"value": "cat", "count": 30}]
    groups = group_field(snapshot, "category")
    query = RankQuery(unit(rng, 8))
    found = rank_groups(lambda size, mask: rank(snapshot.artifact, query, size, mask), 60, groups, None)
    assert len(found) == 31, "each item without a category stands alone"


def test_numbers_are_counted_in_ranges_that_filters_accept() -> None:
    rng = np.random.default_rng(0)
    prices = [None if price < 0 else price for price in rng.normal(20, 9, 400).round(2).tolist()]
    years = rng.integers(1990, 1995, 400).tolist()
    snapshot = snapshot_of(Rows(unit(rng, 400, 8), price=prices, year=years))
    everything = np.ones(400, np.bool_)
    facet = count_values(snapshot.artifact, "price", everything)
    assert 2 <= len(facet) <= 10
    for entry in facet:
        low = entry["value"]["gte"]
        within = [
            price for price in prices
            if price is not None and price >= low
            and (price < entry["value"]["lt"] if "lt" in entry["value"] else price <= entry["value"]["lte"])
        ]  # fmt: skip
        assert len(within) == entry["count"]
    assert sum(entry["count"] for entry in facet) == sum(price is not None for price in prices)
    assert {entry["value"]: entry["count"] for entry in count_values(snapshot.artifact, "year", everything)} == Counter(
        years
    )


def test_a_field_that_cannot_group_is_named() -> None:
    rng = np.random.default_rng(0)
    snapshot = snapshot_of(Rows(unit(rng, 60, 8), tags=[["a", "b"]] * 60))
    with pytest.raises(InvalidQueryError, match="several values"):
        group_field(snapshot, "tags")
    with pytest.raises(InvalidQueryError, match="no item has"):
        group_field(snapshot, "brand")
    with pytest.raises(InvalidQueryError, match="no item has"):
        count_values(snapshot.artifact, "brand", np.ones(60, np.bool_))
