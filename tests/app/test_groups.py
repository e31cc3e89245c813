"""Groups of rows ranked by their best item, against plain computations over all rows."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from app.search.engine import rank_rows
from app.search.errors import InvalidQueryError
from app.search.facets import count_values
from app.search.plan import Plan
from app.search.query import Query
from app.search.rank import rank
from app.search.rows import first_rows, group_field, rank_groups
from app.search.snapshots import Recent
from index_jobs.row_filter import RowFilter
from tests.support.ranking import ArtifactStub, first_of_each, snapshot_of, unit

PLAIN = Plan(Query())


def products_of(rng: np.random.Generator, count: int, most: int) -> list[str | None]:
    return [None if number < 0 else f"p{number}" for number in (rng.zipf(1.5, count) % most - 1).tolist()]


@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "HNSW16,SQfp16"])
@pytest.mark.parametrize("seed", range(4))
def test_groups_equal_those_of_all_rows_on_every_page(kind: str, seed: int) -> None:
    rng, count = np.random.default_rng(seed), 600
    values, vectors = products_of(rng, count, 90), unit(rng, count, 16)
    snapshot = snapshot_of(ArtifactStub(vectors, kind, product=values))
    groups, search = group_field(snapshot, "product"), partial(rank, snapshot.artifact, vectors[0], PLAIN)
    for mask in (None, rng.random(count) < 0.5):
        allowed = None if mask is None else RowFilter.of_mask(mask)
        expected = first_of_each([each.row for each in search(count, allowed)], values)
        for size in (1, 5, 24, len(expected), len(expected) + 5):
            assert [each.row for each in rank_groups(search, size, groups, allowed)] == expected[:size]
        inside = np.arange(count) if mask is None else np.flatnonzero(mask)
        assert first_rows(groups, inside).tolist() == first_of_each(inside.tolist(), values)
        sizes = Counter(values[row] for row in inside)
        rows = expected[:24]
        assert groups.shown(rows, allowed) == [
            {"value": values[row], "count": 1 if values[row] is None else sizes[values[row]]} for row in rows
        ]


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


def test_cache_keeps_the_entries_that_were_used_last() -> None:
    cache = Recent[int, int](3)
    for number in (1, 2, 3, 1, 4, 1, 5):
        assert cache.find(number, lambda number=number: 10 * number) == 10 * number  # type: ignore[misc]
    assert list(cache.items()) == [(4, 40), (1, 10), (5, 50)]
    with pytest.raises(ZeroDivisionError):
        cache.find(6, lambda: 1 // 0)
    assert len(cache) == 3


def test_threads_may_fill_and_trim_a_cache_at_once() -> None:
    cache = Recent[int, int](8)
    interval = sys.getswitchinterval()
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


@pytest.mark.parametrize("name", ["product", "caption"])
def test_groups_of_long_values_are_those_of_short_ones_and_take_little_memory(name: str) -> None:
    rng, count, size = np.random.default_rng(0), 300, 4000
    short = [value if name == "product" else value or "" for value in products_of(rng, count, 90)]
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
    for mask in (None, rng.random(count) < 0.5):
        allowed = None if mask is None else RowFilter.of_mask(mask)
        found, others = groups.shown([*every], allowed), expected.shown([*every], allowed)
        assert [each["count"] for each in found] == [each["count"] for each in others]
        assert [each["value"] for each in found] == [value or None for value in long]


def test_one_huge_group_does_not_hide_the_others() -> None:
    vectors = unit(np.random.default_rng(0), 3000, 16)
    vectors[:2950] = vectors[0] + 0.01 * vectors[:2950]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = ["huge"] * 2950 + [f"p{number}" for number in range(50)]
    plan = Plan(Query(k=9), group_by="product")
    found = rank_rows(snapshot_of(ArtifactStub(vectors, product=values)), plan, vectors[0], None)
    assert len({values[each.row] for each in found}) == 10


def test_a_field_that_cannot_group_is_named() -> None:
    snapshot = snapshot_of(
        ArtifactStub(unit(np.random.default_rng(0), 60, 8), tags=[["a", "b"]] * 60, text=["x" * 5000] * 60)
    )
    with pytest.raises(InvalidQueryError, match="several values"):
        group_field(snapshot, "tags")
    with pytest.raises(InvalidQueryError, match="over 4,096 bytes"):
        group_field(snapshot, "text")
    with pytest.raises(InvalidQueryError, match="no item has"):
        group_field(snapshot, "brand")
    with pytest.raises(InvalidQueryError, match="no item has"):
        count_values(snapshot.artifact, "brand", np.ones(60, np.bool_))
