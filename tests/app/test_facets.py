"""Facets against plain counts of all rows."""

import tracemalloc
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from app.search.engine import rank_rows
from app.search.facets import count_facets, count_values
from app.search.plan import Plan
from app.search.query import Query
from app.search.rows import group_field
from index_jobs.store.filters import match_column
from tests.support.ranking import ArtifactStub, snapshot_of, unit


def test_facets_equal_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    count = 500
    names = [None if number == 0 else f"c{number}" for number in rng.integers(0, 6, count).tolist()]
    tags = [[f"t{tag}" for tag in rng.integers(0, 9, rng.integers(0, 4)).tolist()] for _ in range(count)]
    flags = (rng.random(count) < 0.3).tolist()
    products = [f"p{number}" for number in rng.integers(0, 40, count).tolist()]
    snapshot = snapshot_of(ArtifactStub(unit(rng, count, 8), name=names, tags=tags, flag=flags, product=products))
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


def test_numbers_are_counted_in_ranges_that_filters_accept() -> None:
    rng, count = np.random.default_rng(0), 400
    prices = [None if price < 0 else price for price in rng.normal(20, 9, count).round(2).tolist()]
    years = rng.integers(1990, 1995, count).tolist()
    products = [f"p{number}" for number in rng.integers(0, 5, count).tolist()]
    snapshot = snapshot_of(ArtifactStub(unit(rng, count, 8), price=prices, year=years, product=products))
    mask = rng.random(count) < 0.6
    for groups, owners in ((None, list(range(count))), (group_field(snapshot, "product"), products)):
        facet = count_values(snapshot.artifact, "price", mask, groups)
        assert len(facet) == 10
        for entry in facet:
            matched = match_column(snapshot.artifact.column("price"), entry["value"], "price") & mask
            assert entry["count"] == len({owners[row] for row in np.flatnonzero(matched)}) > 0
    assert sum(entry["count"] for entry in count_values(snapshot.artifact, "price", mask)) == sum(
        price is not None for price, inside in zip(prices, mask.tolist(), strict=True) if inside
    )
    counted = count_values(snapshot.artifact, "year", np.ones(count, np.bool_))
    assert {entry["value"]: entry["count"] for entry in counted} == Counter(years)


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
    snapshot, mask = snapshot_of(ArtifactStub(unit(rng, count, 4), **columns)), rng.random(count) < 0.9
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
    artifact: Any = ArtifactStub(
        np.ones((count, 1), np.float32), name=[f"item {number:06d}" for number in range(count)]
    )
    column, mask = artifact.column("name"), np.ones(count, np.bool_)
    artifact.column = lambda *_: column
    tracemalloc.start()
    try:
        facet = count_values(artifact, "name", mask)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [entry["value"] for entry in facet] == [f"item {number:06d}" for number in range(100)]
    assert peak < 100 * count, "bytes; the texts alone have as many as Python objects"


def test_an_empty_category_is_no_value() -> None:
    rng = np.random.default_rng(0)
    categories = ["", "cat", "cat", ""] * 15
    snapshot = snapshot_of(ArtifactStub(unit(rng, 60, 8), category=categories))
    everything = np.ones(60, np.bool_)
    assert count_values(snapshot.artifact, "category", everything) == [{"value": "cat", "count": 30}]
    found = rank_rows(snapshot, Plan(Query(k=60), group_by="category"), unit(rng, 8), None)
    assert len(found) == 31, "each item without a category stands alone"


def test_facets_of_graphs_are_approximate_in_additions_too() -> None:
    rng = np.random.default_rng(0)
    artifact = ArtifactStub(unit(rng, 60, 8), name=["cat", "dog"] * 30)
    for kinds in (["Flat"], ["Flat", "Flat"], ["HNSW24"], ["Flat", "HNSW24"]):
        first, *added = [SimpleNamespace(kind=kind) for kind in kinds]
        artifact.manifest = SimpleNamespace(kind=first.kind, additions=added)
        _, is_exact = count_facets(snapshot_of(artifact), ["name"], None, "", unit(rng, 8), 0.0)
        assert is_exact == ("HNSW24" not in kinds), kinds
