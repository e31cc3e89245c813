"""Ranking on vectors made for it: ties, folding, wide searches, groups, facets and
sorts of many rows.
"""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from app.search.hits import Hits, best_of_groups, best_rows, find_hits, fold_rows
from app.search.query import Plan
from app.search.results import facets_of
from app.search.served_version import Recent, group_field, list_rows
from dcar_core.util.errors import DataError
from index_jobs.engines.faiss.index import FaissIndex
from index_jobs.index.items import take_rows
from index_jobs.index.lexical import LexicalIndex, text_bonus, write_lexical
from index_jobs.row_filter import RowFilter
from index_jobs.spec import IndexSpec
from tests.support.oracle import first_of_each, fold_row_by_row

PLAIN = Plan()


class IndexStub:
    """The parts of an index version that ranking uses, over a FAISS index of some
    kind.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        kind: str = "Flat",
        lexical: LexicalIndex | None = None,
        **columns: Any,
    ):
        index: Any = faiss.index_factory(
            vectors.shape[1],
            kind,
            faiss.METRIC_INNER_PRODUCT,
        )
        index.train(vectors)
        index.add(vectors)
        if kind.startswith("IVF"):
            index.nprobe = index.nlist
            index.make_direct_map()
        if kind.startswith("HNSW"):
            index.hnsw.efSearch = len(vectors)
        faiss_index = FaissIndex(index)
        self.search = faiss_index.search
        self.vectors = faiss_index.vectors
        self.rows = len(vectors)
        self.lexical = lexical
        self.live = np.ones(self.rows, np.bool_)
        self.live.flags.writeable = False
        self.live_rows = RowFilter.of_mask(self.live)
        self.manifest: Any = SimpleNamespace(
            removed=0,
            kind=kind,
            additions=[],
            spec=IndexSpec(),
            cutoff={},
        )
        half = self.rows // 2
        self._columns = {
            name: pa.chunked_array(
                [values[:half], values[half:]], pa.array(values).type
            )
            for name, values in columns.items()
        }
        self.sample_vectors = vectors[:50]

    def column(self, name: str, rows: Any = None) -> pa.ChunkedArray:
        if name not in self._columns:
            raise DataError(f"no item has the field {name!r}")
        column = self._columns[name]
        if rows is None:
            return column
        return take_rows(pa.table({name: column}), rows)[name]


def served_of(opened: Any) -> Any:
    return SimpleNamespace(index=opened, columns=Recent[Any, Any](8))


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors


# a flag of BLAS; the values are compared
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("seed", range(20))
def test_folding_equals_folding_row_by_row(seed: int) -> None:
    """Vectors of small integers: sums are exact in any order, and many similarities are
    equal.
    """
    rng = np.random.default_rng(seed)
    rows = int(rng.choice([1, 5, 120, 700]))
    vectors = rng.integers(-2, 3, (rows, int(rng.integers(2, 7)))).astype(np.float32)
    opened: Any = SimpleNamespace(vectors=lambda rows: vectors[rows])
    order = rng.permutation(rows).tolist()
    fold = float(rng.integers(1, 14))
    expected = [*fold_row_by_row(vectors, order, fold).items()]
    for count in {
        1,
        2,
        len(expected) // 2 + 1,
        len(expected),
        len(expected) + 1,
        2 * rows,
    }:
        hits = fold_rows(opened, in_order(order), fold, count)
        assert [
            *zip(hits.rows.tolist(), map(list, hits.folded), strict=True)
        ] == expected[:count], count
    assert fold_rows(opened, in_order([]), fold, 3).folded == []


def in_order(rows: list[int]) -> Hits:
    return Hits(np.array(rows, np.int64), *np.zeros((3, len(rows)), np.float32))


def ranked(
    opened: Any,
    vector: np.ndarray,
    plan: Plan,
    count: int,
    allowed: RowFilter | None = None,
) -> list[int]:
    rows: list[int] = best_rows(opened, plan, vector, count, allowed).rows.tolist()
    return rows


class Exact:
    """Exact search. The order and choice among equal scores depend on k, as in
    FAISS.
    """

    def __init__(self, vectors: np.ndarray) -> None:
        self.all = vectors
        self.rows = len(vectors)
        self.asked = 0

    def search(
        self,
        vector: np.ndarray,
        k: int,
        allowed: Any = None,
        *,
        is_narrow: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked = k
        # row by row: equal vectors get equal scores
        scores = (self.all * vector).sum(1)
        shuffled = np.random.default_rng(k).permutation(self.rows)
        rows = shuffled[np.argsort(-scores[shuffled], kind="stable")][:k]
        return scores[rows][None], rows[None]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self.all[rows]


@pytest.fixture
def copies() -> tuple[Any, np.ndarray]:
    """An index of 300 rows, 100 of them copies of two, and a query vector."""
    vectors = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    vectors[::5] = vectors[0]
    vectors[1:200:5] = vectors[1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = vectors[0] + vectors[1] + vectors[2]
    return Exact(vectors), expected / np.linalg.norm(expected)


PLANS = [
    PLAIN,
    Plan(excluded=(0, 1, 2, 50)),
    Plan(fold=0.9),
    Plan(min_score=0.0),
]


@pytest.mark.parametrize("plan", PLANS, ids=["plain", "excluded", "fold", "min_score"])
def test_a_longer_list_begins_with_the_shorter_one(
    copies: tuple[Any, np.ndarray], plan: Plan
) -> None:
    """Pages then have every item once, however many scores are equal."""
    opened, vector = copies
    rows = ranked(opened, vector, plan, 300)
    assert len(rows) == len(set(rows))
    for count in range(1, 120):
        assert ranked(opened, vector, plan, count) == rows[:count]
    assert sorted(rows) == list(range(300)) if plan is PLAIN else len(rows) < 300


def test_only_tied_scores_widen_the_search(copies: tuple[Any, np.ndarray]) -> None:
    opened, vector = copies
    # 11, 22, 44: the sixty copies of one image
    for count, widest in ((10, 88), (150, 151)):
        ranked(opened, vector, PLAIN, count)
        assert opened.asked == widest


def test_common_words_are_ranked_among_the_nearest_rows(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    words = rng.choice(
        ["smile", "ghost", "cake"],
        2000,
        p=[0.5, 0.3, 0.2],
    )
    write_lexical(tmp_path / "lexical", words.tolist())
    lexical = LexicalIndex(tmp_path / "lexical")
    vectors = unit(rng, 2000, 24)
    vector = unit(rng, 24)
    opened: Any = IndexStub(vectors, lexical=lexical)
    plan = Plan(text="smile", words_weight=0.7)
    cosines = vectors @ vector
    texts = lexical.score("smile", np.arange(2000))
    scores = (
        cosines + np.float32(text_bonus(opened.sample_vectors, vector, 0.7)) * texts
    )
    for mask in (np.ones(2000, np.bool_), rng.random(2000) < 0.7):
        allowed = None if mask.all() else RowFilter.of_mask(mask)
        best = ranked(opened, vector, plan, 60, allowed)
        assert all(np.diff(scores[best]) <= 1e-5)
        nearest = [row for row in np.argsort(-cosines).tolist() if mask[row]][:60]
        assert {row for row in nearest if words[row] == "smile"} <= {*best}
        for count in (1, 10, 40):
            assert ranked(opened, vector, plan, count, allowed) == best[:count]


@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "HNSW16,SQfp16"])
def test_groups_equal_those_of_all_rows_on_every_page(kind: str) -> None:
    rng = np.random.default_rng(0)
    count = 600
    values = [
        f"p{number}" if number else None
        for number in (rng.zipf(1.5, count) % 90).tolist()
    ]
    vectors = unit(rng, count, 16)
    columns: dict[str, Any] = {"product": values, "huge": ["huge"] * 570 + values[:30]}
    served = served_of(IndexStub(vectors, kind, **columns))
    half = RowFilter.of_mask(rng.random(count) < 0.5)
    for name, allowed in itertools.product(columns, (None, half)):
        groups = group_field(served, name)
        expected = first_of_each(
            ranked(served.index, vectors[0], PLAIN, count, allowed), columns[name]
        )
        for size in (
            1,
            5,
            24,
            len(expected),
            len(expected) + 5,
        ):
            found = best_of_groups(
                served.index,
                Plan(end=size - 1, allowed=allowed),
                vectors[0],
                groups,
            )
            assert found.rows.tolist() == expected[:size]


@pytest.mark.parametrize(
    "names",
    [["a"], ["a", "b", None]],
    ids=["all", "half"],
)
def test_search_for_other_products_is_as_narrow_as_without_items(
    names: list[str | None],
) -> None:
    """A group of the items to resemble may be most of the gallery."""
    rng = np.random.default_rng(0)
    count = 3000
    widths = list[int]()
    vectors = unit(rng, count, 16)
    values = rng.choice(np.array(names, object), count).tolist()
    values[7] = "a"
    opened: Any = IndexStub(vectors, product=values)
    search = opened.search

    def recording(queries: np.ndarray, k: int, *given: Any, **options: Any) -> Any:
        widths.append(k)
        return search(queries, k, *given, **options)

    opened.search = recording
    plan = Plan(end=9, excluded=(7,), group_by="product")
    found = [values[row] for row in find_hits(served_of(opened), plan, vectors[7]).rows]
    assert len(found) == (0 if names == ["a"] else 10)
    assert "a" not in found
    assert max(widths) < 100


def test_cache_keeps_the_entries_that_were_used_last() -> None:
    cache = Recent[int, int](3)
    for number in (1, 2, 3, 1, 4, 1, 5):
        assert cache.find(number, lambda number=number: 10 * number) == 10 * number  # type: ignore[misc]
    assert list(cache.items()) == [
        (4, 40),
        (1, 10),
        (5, 50),
    ]
    with pytest.raises(ZeroDivisionError):
        cache.find(6, lambda: 1 // 0)
    assert len(cache) == 3


def test_facets_of_graphs_are_approximate_in_additions_too() -> None:
    rng = np.random.default_rng(0)
    opened = IndexStub(unit(rng, 60, 8), name=["cat", "dog"] * 30)
    for kinds in (
        ["Flat"],
        ["Flat", "Flat"],
        ["HNSW24"],
        ["Flat", "HNSW24"],
    ):
        first, *added = [SimpleNamespace(kind=kind) for kind in kinds]
        opened.manifest = SimpleNamespace(kind=first.kind, additions=added)
        plan = Plan(facets=("name",), min_score=0.0)
        _, is_exact = facets_of(
            served_of(opened),
            plan,
            unit(rng, 8),
            Hits(),
        )
        assert is_exact == ("HNSW24" not in kinds), kinds


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("price", [3, 0, 4, 1, 2]),
        ("-price", [0, 4, 3, 1, 2]),
    ],
)
def test_numbers_that_are_none_are_sorted_last(sort: str, expected: list[int]) -> None:
    served = served_of(
        IndexStub(np.ones((5, 2), np.float32), price=[2.0, math.nan, None, -1.0, 2.0])
    )
    assert list_rows(served, None, sort, "").tolist() == expected
