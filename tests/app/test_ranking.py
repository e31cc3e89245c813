"""Ranking on vectors made for it: ties, folding, wide searches, groups, facets and sorts of many rows."""

import math
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from app.search.engine import rank_rows
from app.search.facets import count_facets, count_values
from app.search.plan import Plan
from app.search.query import Match, Query
from app.search.rank import fold_matches, rank
from app.search.rows import first_rows, group_field, rank_groups
from app.search.snapshots import Recent
from app.search.sorting import sort_rows
from index_jobs.index.lexical.fusion import text_bonus
from index_jobs.index.lexical.lexical_index import LexicalIndex, write_lexical
from index_jobs.row_filter import RowFilter
from tests.support.oracle import first_of_each, fold_row_by_row
from tests.support.ranking import ArtifactStub, snapshot_of, unit

PLAIN = Plan(Query())


@pytest.mark.parametrize("seed", range(20))
def test_folding_equals_folding_row_by_row(seed: int) -> None:
    """Vectors of small integers: sums are exact in any order, and many similarities are equal."""
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 5, 120, 700]))
    vectors = rng.integers(-2, 3, (rows, int(rng.integers(2, 7)))).astype(np.float32)
    artifact: Any = SimpleNamespace(vectors=lambda rows: vectors[rows])
    order, fold = rng.permutation(rows).tolist(), float(rng.integers(1, 14))
    expected = [*fold_row_by_row(vectors, order, fold).items()]
    for count in {1, 2, len(expected) // 2 + 1, len(expected), len(expected) + 1, 2 * rows}:
        folded = fold_matches(artifact, [Match(row, 1 - place / rows) for place, row in enumerate(order)], fold, count)
        assert [(each.row, each.near) for each in folded] == expected[:count], count
    assert fold_matches(artifact, [], fold, 3) == []


class Exact:
    """Exact search. The order and choice among equal scores depend on k, as in FAISS."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.all, self.rows, self.asked = vectors, len(vectors), 0

    def search(
        self, vector: np.ndarray, k: int, allowed: Any = None, *, is_narrow: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked = k
        scores = (self.all * vector).sum(1)  # row by row: equal vectors get equal scores
        shuffled = np.random.default_rng(k).permutation(self.rows)
        rows = shuffled[np.argsort(-scores[shuffled], kind="stable")][:k]
        return scores[rows][None], rows[None]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self.all[rows]


@pytest.fixture
def copies() -> tuple[Any, np.ndarray]:
    """An artifact of 300 rows, 100 of them copies of two, and a query vector."""
    vectors = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    vectors[::5], vectors[1:200:5] = vectors[0], vectors[1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = vectors[0] + vectors[1] + vectors[2]
    return Exact(vectors), expected / np.linalg.norm(expected)


PLANS = [PLAIN, Plan(Query(), excluded_rows={0, 1, 2, 50}), Plan(Query(fold=0.9)), Plan(Query(), min_score=0.0)]


@pytest.mark.parametrize("plan", PLANS, ids=["plain", "excluded", "fold", "min_score"])
def test_a_longer_list_begins_with_the_shorter_one(copies: tuple[Any, np.ndarray], plan: Plan) -> None:
    """Pages then have every item once, however many scores are equal."""
    artifact, vector = copies
    rows = [hit.row for hit in rank(artifact, vector, plan, 300)]
    assert len(rows) == len(set(rows))
    for count in range(1, 120):
        assert [hit.row for hit in rank(artifact, vector, plan, count)] == rows[:count]
    assert sorted(rows) == list(range(300)) if plan is PLAIN else len(rows) < 300


def test_only_tied_scores_widen_the_search(copies: tuple[Any, np.ndarray]) -> None:
    artifact, vector = copies
    for count, widest in ((10, 88), (150, 151)):  # 11, 22, 44: the sixty copies of one image
        rank(artifact, vector, PLAIN, count)
        assert artifact.asked == widest


def test_identical_vectors_fold_at_a_threshold_of_one(copies: tuple[Any, np.ndarray]) -> None:
    """The product of a float32 vector with itself may be slightly below 1."""
    artifact, vector = copies
    assert not np.all((artifact.all**2).sum(1) >= 1)
    hits = rank(artifact, vector, Plan(Query(fold=1.0)), 300)
    assert sorted(len(hit.near) for hit in hits)[-2:] == [39, 59]
    assert len(hits) == 300 - 98


def test_a_displayed_score_works_as_min_score(copies: tuple[Any, np.ndarray]) -> None:
    for number, hit in enumerate(rank(*copies, PLAIN, 300)[:150], 1):
        assert len(rank(*copies, Plan(Query(), min_score=round(hit.score, 6)), 300)) >= number


def test_common_words_are_ranked_among_the_nearest_rows(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    words = rng.choice(["smile", "ghost", "cake"], 2000, p=[0.5, 0.3, 0.2])
    write_lexical(tmp_path / "lexical", words.tolist())
    lexical, vectors, vector = LexicalIndex(tmp_path / "lexical"), unit(rng, 2000, 24), unit(rng, 24)
    artifact: Any = ArtifactStub(vectors, lexical=lexical)
    plan = Plan(Query(query="smile"), words_weight=0.7)
    cosines, texts = vectors @ vector, lexical.score("smile", np.arange(2000))
    scores = cosines + np.float32(text_bonus(artifact.sample_vectors, vector, 0.7)) * texts
    for mask in (np.ones(2000, np.bool_), rng.random(2000) < 0.7):
        allowed = None if mask.all() else RowFilter.of_mask(mask)
        ranked = [each.row for each in rank(artifact, vector, plan, 60, allowed)]
        assert all(np.diff(scores[ranked]) <= 1e-5)
        nearest = [row for row in np.argsort(-cosines).tolist() if mask[row]][:60]
        assert {row for row in nearest if words[row] == "smile"} <= {*ranked}
        for count in (1, 10, 40):
            assert [each.row for each in rank(artifact, vector, plan, count, allowed)] == ranked[:count]


@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "HNSW16,SQfp16"])
def test_groups_equal_those_of_all_rows_on_every_page(kind: str) -> None:
    rng, count = np.random.default_rng(0), 600
    values = [f"p{number}" if number else None for number in (rng.zipf(1.5, count) % 90).tolist()]
    vectors = unit(rng, count, 16)
    snapshot = snapshot_of(ArtifactStub(vectors, kind, product=values))
    groups, search = group_field(snapshot, "product"), partial(rank, snapshot.artifact, vectors[0], PLAIN)
    for allowed in (None, RowFilter.of_mask(rng.random(count) < 0.5)):
        expected = first_of_each([each.row for each in search(count, allowed)], values)
        for size in (1, 5, 24, len(expected), len(expected) + 5):
            assert [each.row for each in rank_groups(search, size, groups, allowed)] == expected[:size]


@pytest.mark.parametrize("names", [["a"], ["a", "b", None]], ids=["all", "half"])
def test_search_for_other_products_is_as_narrow_as_without_items(names: list[str | None]) -> None:
    """A group of the items to resemble may be most of the gallery."""
    rng, count, widths = np.random.default_rng(0), 3000, list[int]()
    vectors, values = unit(rng, count, 16), rng.choice(np.array(names, object), count).tolist()
    values[7] = "a"
    artifact: Any = ArtifactStub(vectors, product=values)
    search = artifact.search

    def recording(queries: np.ndarray, k: int, *given: Any, **options: Any) -> Any:
        widths.append(k)
        return search(queries, k, *given, **options)

    artifact.search = recording
    plan = Plan(Query(k=9), excluded_rows={7}, group_by="product")
    found = [values[each.row] for each in rank_rows(snapshot_of(artifact), plan, vectors[7], None)]
    assert len(found) == (0 if names == ["a"] else 10)
    assert "a" not in found
    assert max(widths) < 100


def test_one_huge_group_does_not_hide_the_others() -> None:
    vectors = unit(np.random.default_rng(0), 3000, 16)
    vectors[:2950] = vectors[0] + 0.01 * vectors[:2950]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = ["huge"] * 2950 + [f"p{number}" for number in range(50)]
    plan = Plan(Query(k=9), group_by="product")
    found = rank_rows(snapshot_of(ArtifactStub(vectors, product=values)), plan, vectors[0], None)
    assert len({values[each.row] for each in found}) == 10


@pytest.mark.parametrize("name", ["product", "caption"])
def test_groups_of_long_values_are_those_of_short_ones_and_take_little_memory(name: str) -> None:
    rng, count, size = np.random.default_rng(0), 300, 4000
    missing = None if name == "product" else ""
    short = [f"p{number}" if number else missing for number in (rng.zipf(1.5, count) % 90).tolist()]
    long = [value and value.ljust(size, "x") for value in short]
    columns = [dict[str, Any]({name: values}) for values in (short, long)]
    artifacts = [ArtifactStub(unit(rng, count, 16), **each) for each in columns]
    before, pool = pa.default_memory_pool(), pa.system_memory_pool()
    at_first = pool.max_memory()
    try:
        pa.set_memory_pool(pool)
        expected, groups = (group_field(snapshot_of(artifact), name) for artifact in artifacts)
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < at_first + 20 * size
    every = np.arange(count)
    assert first_rows(groups, every).tolist() == first_rows(expected, every).tolist()
    for allowed in (None, RowFilter.of_mask(rng.random(count) < 0.5)):
        found, others = groups.shown([*every], allowed), expected.shown([*every], allowed)
        assert [each["count"] for each in found] == [each["count"] for each in others]
        assert [each["value"] for each in found] == [value or None for value in long]


def test_cache_keeps_the_entries_that_were_used_last() -> None:
    cache = Recent[int, int](3)
    for number in (1, 2, 3, 1, 4, 1, 5):
        assert cache.find(number, lambda number=number: 10 * number) == 10 * number  # type: ignore[misc]
    assert list(cache.items()) == [(4, 40), (1, 10), (5, 50)]
    with pytest.raises(ZeroDivisionError):
        cache.find(6, lambda: 1 // 0)
    assert len(cache) == 3


def test_threads_may_fill_and_trim_a_cache_at_once() -> None:
    cache, interval = Recent[int, int](8), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def fill(worker: int) -> None:
        for number in range(20_000):
            cache.keep(8 * number + worker, number)

    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(fill, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(cache) <= 8


def test_a_facet_of_different_texts_needs_little_memory() -> None:
    count = 50_000
    names = [f"item {number:06d}" for number in range(count)]
    artifact: Any = ArtifactStub(np.ones((count, 1), np.float32), name=names)
    column, mask = artifact.column("name"), np.ones(count, np.bool_)
    artifact.column = lambda *_: column
    tracemalloc.start()
    try:
        facet = count_values(artifact, "name", mask)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [entry["value"] for entry in facet] == names[:100]
    assert peak < 100 * count, "bytes; the texts alone have as many as Python objects"


def test_facets_of_graphs_are_approximate_in_additions_too() -> None:
    rng = np.random.default_rng(0)
    artifact = ArtifactStub(unit(rng, 60, 8), name=["cat", "dog"] * 30)
    for kinds in (["Flat"], ["Flat", "Flat"], ["HNSW24"], ["Flat", "HNSW24"]):
        first, *added = [SimpleNamespace(kind=kind) for kind in kinds]
        artifact.manifest = SimpleNamespace(kind=first.kind, additions=added)
        _, is_exact = count_facets(snapshot_of(artifact), ["name"], None, "", unit(rng, 8), 0.0)
        assert is_exact == ("HNSW24" not in kinds), kinds


@pytest.mark.parametrize(("sort", "expected"), [("price", [3, 0, 4, 1, 2]), ("-price", [0, 4, 3, 1, 2])])
def test_numbers_that_are_none_are_sorted_last(sort: str, expected: list[int]) -> None:
    snapshot = snapshot_of(ArtifactStub(np.ones((5, 2), np.float32), price=[2.0, math.nan, None, -1.0, 2.0]))
    snapshot.orders = Recent(8)
    assert sort_rows(snapshot, sort, None).tolist() == expected
