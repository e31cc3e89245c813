"""Products ranked by their best item, against plain computations over all rows."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from app.search.engine import rank_rows
from app.search.errors import InvalidQueryError
from app.search.plan import Plan
from app.search.query import Query
from app.search.ranking.facets import count_values
from app.search.ranking.groups import group_field, rank_groups
from app.search.ranking.rank import rank
from app.search.snapshots import drop_oldest
from tests.support.ranking import ArtifactStub, snapshot_of, unit


@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "HNSW16,SQfp16"])
@pytest.mark.parametrize("seed", range(4))
def test_groups_equal_those_of_all_rows_on_every_page(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 600
    values = [None if number < 0 else f"p{number}" for number in (rng.zipf(1.5, count) % 90 - 1).tolist()]
    vectors = unit(rng, count, 16)
    snapshot = snapshot_of(ArtifactStub(vectors, kind, product=values))
    groups = group_field(snapshot, "product")
    vector = vectors[0]
    for mask in (None, rng.random(count) < 0.5):
        everything = rank(snapshot.artifact, vector, Plan(Query()), count, mask)
        first: dict[Any, int] = {}
        for each in everything:
            first.setdefault(each.row if values[each.row] is None else values[each.row], each.row)
        expected = list(first.values())

        def search(size: int, remaining: Any) -> Any:
            return rank(snapshot.artifact, vector, Plan(Query()), size, remaining)

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
    snapshot = snapshot_of(ArtifactStub(vectors, kind, product=values))
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
            plan = Plan(Query(k=9), excluded_rows={*liked}, group_by="product")
            found = rank_rows(snapshot, plan, vector, mask)
            assert [products[each.row] for each in found] == list(expected)[:10]
            np.testing.assert_allclose([each.score for each in found], list(expected.values())[:10], atol=1e-5)


@pytest.mark.parametrize("names", [["a"], ["a", "b", None]], ids=["all", "half"])
def test_search_for_other_products_is_as_narrow_as_without_items(names: list[str | None]) -> None:
    """A group of the items to resemble may be most of the gallery."""
    rng, count = np.random.default_rng(0), 3000
    vectors = unit(rng, count, 16)
    values = rng.choice(np.array(names, object), count).tolist()
    values[7] = "a"
    artifact: Any = ArtifactStub(vectors, product=values)
    search, widths = artifact.search, list[int]()

    def recording(queries: np.ndarray, k: int, *given: Any, **options: Any) -> Any:
        widths.append(k)
        return search(queries, k, *given, **options)

    artifact.search = recording
    plan = Plan(Query(k=9), excluded_rows={7}, group_by="product")
    found = rank_rows(snapshot_of(artifact), plan, vectors[7], None)
    assert [values[each.row] for each in found if values[each.row] == "a"] == []
    assert len(found) == (0 if names == ["a"] else 10)
    assert max(widths) < 100


def test_groups_of_recent_fields_and_of_the_own_field_of_the_index_are_kept() -> None:
    fields: dict[str, Any] = {f"field{number}": ["a", "b"] for number in range(20)}
    snapshot = snapshot_of(ArtifactStub(unit(np.random.default_rng(0), 2, 4), **fields))
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
    snapshot = snapshot_of(ArtifactStub(vectors, product=values))
    groups = group_field(snapshot, "product")
    found = rank_groups(
        lambda size, mask: rank(snapshot.artifact, vectors[0], Plan(Query()), size, mask), 10, groups, None
    )
    assert len({groups.value(each.row) for each in found}) == 10


def test_a_field_that_cannot_group_is_named() -> None:
    rng = np.random.default_rng(0)
    snapshot = snapshot_of(ArtifactStub(unit(rng, 60, 8), tags=[["a", "b"]] * 60))
    with pytest.raises(InvalidQueryError, match="several values"):
        group_field(snapshot, "tags")
    with pytest.raises(InvalidQueryError, match="no item has"):
        group_field(snapshot, "brand")
    with pytest.raises(InvalidQueryError, match="no item has"):
        count_values(snapshot.artifact, "brand", np.ones(60, np.bool_))
