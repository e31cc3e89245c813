"""Searches among some of the rows, for every kind, and the columns that choose them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError
from index_jobs.engines.faiss import search as faiss_search
from index_jobs.engines.faiss.build import build_index, fill_index
from index_jobs.engines.faiss.gpu import MAX_K
from index_jobs.engines.faiss.index import FaissIndex, write_faiss
from index_jobs.engines.faiss.kinds import IndexChoice
from index_jobs.engines.protocol import merge_top_k
from index_jobs.rebuild import rebuild
from index_jobs.store.artifact import Artifact
from index_jobs.store.items import MAX_FIELDS, FieldTypes, typed_array
from index_jobs.store.versions import open_current

DIM, COUNT = 32, 6000


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(60, DIM))
    vectors = centres[generator.integers(60, size=COUNT)] + 0.5 * generator.normal(size=(COUNT, DIM))
    unit: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


@pytest.fixture(scope="module")
def built(vectors: NDArray[np.float32]) -> Callable[[str], Any]:
    """Build an index of a kind, once for all tests that only search it."""
    return cache(lambda kind: build_index(lambda: iter([vectors]), COUNT, DIM, [IndexChoice(kind, "test")]).index)


@pytest.mark.parametrize("kind", ["Flat", "SQ8"])
def test_few_removed_rows_are_skipped_by_exhaustive_kinds(
    kind: str, built: Callable[[str], Any], vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = FaissIndex(built(kind))
    mask = np.ones(COUNT, np.bool_)
    mask[::7] = False
    monkeypatch.setattr(faiss_search, "_SELECTOR_SHARE", 1.0)
    scores, rows = index.search(vectors[:50], 10, mask)
    monkeypatch.setattr(faiss_search, "_SELECTOR_SHARE", 0.25)
    monkeypatch.setattr(faiss_search, "_search_exactly", None)  # takes every allowed row out of the index
    again, same = index.search(vectors[:50], 10, mask)
    assert np.mean(rows == same) > 0.99
    np.testing.assert_allclose(again, scores, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "width", "recall"),
    [
        ("HNSW16", 16, 0.97),
        ("HNSW16,SQfp16", 16, 0.97),
        ("HNSW16,SQ8", 16, 0.95),
        ("HNSW16,SQ4,Refine(SQ8)", 16, 0.93),
        ("IVF128,Flat", 2, 0.9),
        ("PCA24,IVF128,SQ8", 2, 0.5),
        ("IVF128,PQ16x4fs,Refine(SQ8)", 2, 0.6),
    ],
)
def test_many_results_are_complete_and_near(kind: str, width: int, recall: float, vectors: NDArray[np.float32]) -> None:
    """An index tuned for ten results visits fewer than a hundred vectors."""
    whole = build_index(lambda: iter([vectors]), COUNT, DIM, [IndexChoice(kind, "test")]).index
    inner, *_ = faiss_search.unwrap(whole)
    graph = kind.startswith("HNSW")  # in which some rows may have no way to them
    if graph:
        inner.hnsw.efSearch = width
    else:
        inner.nprobe = width
    index, queries = FaissIndex(whole), vectors[:40] + 0.02
    nearest = np.argsort(-queries @ vectors.T, 1)
    for k in (11, 50, 200, 1000, *([] if graph else [COUNT])):
        scores, rows = index.search(queries, k)
        assert (np.diff(scores) <= 0).all()
        assert all(len(set(row)) == k for row in rows.tolist())
        assert (rows >= 0).all()
        found = np.mean([len(set(a) & set(b)) / k for a, b in zip(rows.tolist(), nearest[:, :k].tolist(), strict=True)])
        assert found >= recall, k
    assert (index.search(queries, COUNT + 1)[1][:, -1] == -1).all(), "there are no more"


@pytest.mark.parametrize("kind", ["HNSW16,SQfp16", "IVF32,Flat"])
def test_a_narrow_search_compares_no_more_vectors_than_one_for_few_results(
    kind: str, built: Callable[[str], Any], vectors: NDArray[np.float32]
) -> None:
    index, queries = FaissIndex(built(kind)), vectors[:20] + 0.02
    counters: Any = faiss.cvar
    stats = counters.hnsw_stats if kind.startswith("HNSW") else counters.indexIVF_stats

    def compared(k: int, *, is_narrow: bool = False) -> tuple[int, NDArray[np.int64]]:
        stats.reset()
        rows = index.search(queries, k, is_narrow=is_narrow)[1]
        return stats.ndis, rows

    few, best = compared(16)
    narrow, rows = compared(100, is_narrow=True)
    assert narrow == few < compared(400)[0]
    assert all(set(a) <= set(b) for a, b in zip(best.tolist(), rows.tolist(), strict=True))
    assert all(len(set(found) - {-1}) == 100 for found in rows.tolist())


def test_more_results_than_a_gpu_gives_come_from_the_processor(
    built: Callable[[str], Any], vectors: NDArray[np.float32]
) -> None:
    class Gpu:
        def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            assert k <= MAX_K
            return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)

    index = FaissIndex(built("Flat"))
    index._unfiltered = Gpu()
    assert index.search(vectors[:1], MAX_K)[1].max() == 0
    assert sorted(index.search(vectors[:1], MAX_K + 1)[1][0][:MAX_K]) != [0] * MAX_K


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lowest"),
    [
        ("Flat", 1.0),
        ("SQ8", 0.95),
        ("HNSW16", 0.97),
        ("HNSW16,SQfp16", 0.97),
        ("IVF32,Flat", 0.97),
        ("IVF32,SQ8", 0.93),
        ("IVF32,RaBitQ,Refine(SQ8)", 0.93),
        ("IVF32,PQ16x4fs,Refine(SQ8)", 0.93),
        ("IVF32,PQ16x4fs,Refine(SQfp16)", 0.93),
        ("PCA32,IVF32,Flat", 0.8),
        ("PQ16x4fs,RFlat", 0.97),  # takes no selector: searched exactly
    ],
)
@pytest.mark.parametrize("exact_up_to", [0, 20_000])
def test_filtered_search_finds_the_nearest_allowed_rows(
    kind: str,
    lowest: float,
    exact_up_to: int,
    built: Callable[[str], Any],
    vectors: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faiss_search, "EXACT_UP_TO", exact_up_to)
    index = FaissIndex(built(kind))
    generator = np.random.default_rng(1)
    queries = vectors[generator.integers(COUNT, size=60)]
    for share in (0.6, 0.05, 0.003):
        mask = generator.random(COUNT) < share
        scores, rows = index.search(queries, 10, mask)
        assert (scores.dtype, rows.dtype) == (np.dtype(np.float32), np.dtype(np.int64))
        assert rows.shape == (60, 10)
        assert mask[rows[rows >= 0]].all()
        assert (np.diff(scores[:, :10]) <= 1e-6).all()
        truth = np.argsort(np.where(mask, -(queries @ vectors.T), 9), axis=1)[:, :10]
        recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, truth, strict=True)])
        assert recall >= lowest, f"share {share}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HNSW16,SQfp16", "IVF128,Flat", "IVF128,PQ32x4fs,Refine(SQ8)", "PCA32,IVF128,SQ8"])
def test_allowed_rows_far_from_the_query_are_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allowed rows that lie away from the query, like another category, are found too."""
    monkeypatch.setattr(faiss_search, "EXACT_UP_TO", 100)
    generator = np.random.default_rng(2)
    centres = generator.normal(size=(120, DIM))
    centres[:60, 0] += 9
    centres[60:, 0] -= 9
    found = centres[np.repeat(np.arange(120), 100)] + 0.5 * generator.normal(size=(12_000, DIM))
    vectors = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    index = FaissIndex(build_index(lambda: iter([vectors]), len(vectors), DIM, [IndexChoice(kind, "test")]).index)
    far = np.arange(len(vectors)) >= 6000
    side = vectors[:, 1] > np.quantile(vectors[:, 1], 0.7)  # allowed rows start near some queries only
    queries = vectors[generator.integers(6000, size=60)]
    lowest = 0.85 if "PQ" in kind else 0.9
    for mask in (far, side):
        rows = index.search(queries, 10, mask)[1]
        assert (rows >= 0).all()
        assert mask[rows].all()
        truth = np.argsort(np.where(mask, -(queries @ vectors.T), 9), axis=1)[:, :10]
        assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, truth, strict=True)]) >= lowest


@pytest.mark.parametrize(
    "kind",
    [
        "SQ8",
        "SQfp16",
        "IVF32,PQ16x4fs,Refine(SQfp16)",
        "IVF32,PQ16x4fs,Refine(SQ8)",
        "HNSW8",
        "HNSW8,SQfp16",
        "HNSW8,SQ8",
    ],
)
def test_exact_searches_compare_the_stored_vectors(kind: str, vectors: NDArray[np.float32], tmp_path: Path) -> None:
    """Codes that are copied from a mapped file have the scores of the vectors that FAISS decodes one by one."""
    write_faiss(fill_index(IndexChoice(kind, "test"), DIM, lambda: iter([vectors]), COUNT), tmp_path / "index.faiss")
    index: Any = FaissIndex.open(tmp_path / "index.faiss")
    mask = np.zeros(COUNT, np.bool_)
    mask[5::4] = True
    scores, rows = index.search(vectors[:20], 10, mask)
    assert mask[rows].all()
    stored = index._index.reconstruct_batch(np.arange(COUNT))
    exact = np.where(mask, vectors[:20] @ stored.T, -1)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], atol=1e-5)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), atol=1e-5)


def test_selection_of_a_mask_is_cached(built: Callable[[str], Any], vectors: NDArray[np.float32]) -> None:
    index = FaissIndex(built("IVF32,Flat"))
    mask = np.arange(COUNT) >= 10
    mask.flags.writeable = False
    index.search(vectors[:1], 5, mask)
    kept = index._cached_selection
    assert kept is not None
    index.search(vectors[:1], 5, mask[:])  # a part's view of the same bits
    assert index._cached_selection is kept
    other = ~mask
    assert other[index.search(vectors[:1], 5, other)[1]].all()  # may change, so it is looked at anew
    assert index._cached_selection is kept
    other.flags.writeable = False
    assert other[index.search(vectors[:1], 5, other)[1]].all()
    assert index._cached_selection is not kept


@pytest.mark.parametrize("kind", ["Flat", "HNSW16,SQfp16", "IVF32,SQ8"])
def test_fewer_allowed_rows_than_k_are_padded(
    kind: str, built: Callable[[str], Any], vectors: NDArray[np.float32]
) -> None:
    index = FaissIndex(built(kind))
    few = np.zeros(COUNT, np.bool_)
    few[[7, 4000]] = True
    rows = index.search(vectors[:3], 5, few)[1]
    assert [sorted(found) for found in rows.tolist()] == [[-1, -1, -1, 7, 4000]] * 3
    assert (rows[:, 2:] == -1).all()
    assert (index.search(vectors[:2], 5, np.zeros(COUNT, np.bool_))[1] == -1).all()


def test_missing_results_sort_last_whatever_their_score() -> None:
    """faiss gives the lowest float, others nought, which is more than a cosine below it."""
    one = np.array([[-0.5, 0.0]], np.float32), np.array([[3, -1]])
    other = np.array([[-0.7, np.finfo(np.float32).min]], np.float32), np.array([[8, -1]])
    scores, rows = merge_top_k([one[0], other[0]], [one[1], other[1]], 3)
    assert rows.tolist() == [[3, 8, -1]]
    assert scores.tolist() == [[-0.5, np.float32(-0.7), -np.inf]]


@pytest.fixture(scope="module")
def artifact(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    index = tmp_path_factory.mktemp("selected") / "index"
    rebuild(tiny_gallery, tiny_checkpoint, index, progress=False)
    return open_current(index)


def test_column_selects_the_searched_rows(artifact: Artifact) -> None:
    assert artifact.fields == {
        "id": "string", "caption": "string", "category": "string", "color": "string", "file_name": "string",
    }  # fmt: skip
    red = pc.equal(artifact.column("color"), "red").to_numpy()
    rows = np.flatnonzero(red)
    vectors = artifact.vectors(np.arange(24))
    assert vectors.shape == (24, 32)
    found = artifact.search(vectors, 24, red)[1]
    assert all(set(line) == {*rows.tolist(), -1} for line in found.tolist())
    assert all(artifact.item(int(row)).metadata["color"] == "red" for row in rows)


def test_wrong_rows_and_fields_are_named(artifact: Artifact) -> None:
    with pytest.raises(
        DataError, match="no item has the field 'colour'; there are: caption, category, color, file_nam"
    ):
        artifact.column("colour")
    with pytest.raises(IndexError, match=r"row 24 is not in 0\.\.23"):
        artifact.vectors(np.array([1, 24]))


def test_columns_have_the_narrowest_type_that_holds_all_values() -> None:
    lines = [
        '{"price": 3, "year": 1999, "sold": true, "tags": ["a", "b"], "mixed": 1, "huge": 1, "size": {"w": 1}}',
        '{"price": 2.5, "year": null, "sold": false, "tags": [], "mixed": "x", "huge": 100000000000000000000}',
        "{}",
    ]
    types, rows = FieldTypes.infer(pa.chunked_array([lines[:1], lines[1:]])).types, [*map(json.loads, lines)]
    arrays = {name: typed_array([row.get(name) for row in rows], kind) for name, kind in types.items()}
    found = {name: (str(array.type), array.to_pylist()) for name, array in arrays.items()}
    assert found == {
        "huge": ("string", ["1", "100000000000000000000", None]),
        "mixed": ("string", ["1", "x", None]),
        "price": ("double", [3.0, 2.5, None]),
        "size": ("string", ['{"w": 1}', None, None]),
        "sold": ("bool", [True, False, None]),
        "tags": ("list<item: string>", [["a", "b"], [], None]),
        "year": ("int64", [1999, None, None]),
    }


def test_more_fields_than_columns_keeps_the_frequent_ones(caplog: pytest.LogCaptureFixture) -> None:
    rare = [f'{{"often": 1, "rare{number}": 2}}' for number in range(MAX_FIELDS + 5)]
    types = FieldTypes.infer(pa.chunked_array([rare])).types
    assert len(types) == MAX_FIELDS
    assert "often" in types
    assert f"{MAX_FIELDS + 6} metadata fields" in caplog.text


def test_a_list_that_holds_too_few_rows_is_searched_together_with_others() -> None:
    """Ten results of an index that was tuned for ten, from lists of some ten rows each."""
    vectors = np.random.default_rng(0).normal(size=(640, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    whole = fill_index(IndexChoice("IVF64,Flat", "test"), 16, lambda: iter([vectors]), 640)
    whole.nprobe = 1
    index = FaissIndex(whole)
    assert (whole.search(vectors, 10)[1] < 0).any(), "or the test shows nothing"
    scores, rows = index.search(vectors, 10)
    assert (rows >= 0).all()
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("kind", ["IVF64,Flat", "HNSW8"])
def test_many_results_of_a_filter_are_complete_and_near(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that was tuned for ten results holds fewer allowed rows in as many lists, or on as short a way."""
    monkeypatch.setattr(faiss_search, "EXACT_UP_TO", 0)
    vectors = np.random.default_rng(0).normal(size=(6400, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    whole: Any = fill_index(IndexChoice(kind, "test"), 16, lambda: iter([vectors]), 6400)
    if kind == "HNSW8":
        whole.hnsw.efSearch = 16
    else:
        whole.nprobe = 1
    mask = np.random.default_rng(1).random(6400) < 0.5
    rows = FaissIndex(whole).search(vectors[:20], 200, mask)[1]
    assert (rows >= 0).all()
    nearest = np.argsort(np.where(mask, -(vectors[:20] @ vectors.T), 9), axis=1)[:, :200]
    assert np.mean([len(np.intersect1d(a, b)) / 200 for a, b in zip(rows, nearest, strict=True)]) > 0.7


def test_filtered_graph_finds_more_of_the_nearest_rows_than_an_unfiltered_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_search, "EXACT_UP_TO", 0)
    vectors = np.random.default_rng(0).normal(size=(6400, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    whole: Any = fill_index(IndexChoice("HNSW8", "test"), 16, lambda: iter([vectors]), 6400)
    whole.hnsw.efSearch = 20
    index, queries = FaissIndex(whole), vectors[:500] + 0.1
    recalls = []
    for mask in (np.ones(6400, np.bool_), np.random.default_rng(1).random(6400) < 0.9):
        rows = index.search(queries, 10, mask)[1]
        nearest = np.argsort(np.where(mask, -(queries @ vectors.T), 9), axis=1)[:, :10]
        recalls.append(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, nearest, strict=True)]))
    assert recalls[1] > recalls[0] + 0.012
