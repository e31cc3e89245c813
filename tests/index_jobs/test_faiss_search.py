"""Searches among some of the rows, for every kind, and the columns that choose them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import faiss as typed_faiss
import numpy as np
import pyarrow as pa
import pytest

from dcar_core.util.arrays import Floats, Rows
from index_jobs.engines.faiss import index as faiss_index
from index_jobs.engines.faiss.build import fill_index
from index_jobs.engines.faiss.index import MAX_GPU_K, FaissIndex, write_faiss
from index_jobs.engines.protocol import merge_top_k
from index_jobs.index.items import MAX_FIELDS, FieldTypes, typed_array
from index_jobs.row_filter import RowFilter
from tests.support.vectors import blocks, build, choices_of, recall, unit

faiss: Any = typed_faiss
DIM, COUNT = 32, 6000


@pytest.fixture(scope="module")
def vectors() -> Floats:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(60, DIM))
    return unit(centres[generator.integers(60, size=COUNT)] + 0.5 * generator.normal(size=(COUNT, DIM)))


@pytest.fixture(scope="module")
def built(vectors: Floats, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Build an index of a kind, once for all tests that only search it."""

    @cache
    def build_once(kind: str) -> Any:
        file = tmp_path_factory.mktemp("built") / "index.faiss"
        build(file, vectors, kind)
        return faiss.read_index(str(file))

    return build_once


def fill(vectors: Floats, kind: str, **parameters: int) -> Any:
    """Return an index of a kind that is not tuned."""
    index = fill_index(choices_of(kind)[0], vectors.shape[1], blocks(vectors), len(vectors))
    inner, _ = faiss_index.unwrap(index)
    for name, value in parameters.items():
        setattr({"efSearch": getattr(inner, "hnsw", None), "k_factor": index}.get(name, inner), name, value)
    return index


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "width", "lowest"),
    [
        ("HNSW16,SQfp16", {"efSearch": 16}, 0.97),
        ("HNSW16,SQ4,Refine(SQ8)", {"efSearch": 16, "k_factor": 12}, 0.93),
        ("IVF128,Flat", {"nprobe": 2}, 0.9),
        ("PCA24,IVF128,SQ8", {"nprobe": 2}, 0.5),
        ("IVF128,PQ16x4fs,Refine(SQ8)", {"nprobe": 2, "k_factor": 12}, 0.6),
    ],
)
def test_many_results_are_complete_and_near(kind: str, width: dict[str, int], lowest: float, vectors: Floats) -> None:
    """An index tuned for ten results visits fewer than a hundred vectors."""
    index, queries = FaissIndex(fill(vectors, kind, **width)), vectors[:40] + 0.02
    is_graph = kind.startswith("HNSW")  # in which some rows may have no way to them
    for k in (11, 50, 200, 1000, *([] if is_graph else [COUNT])):
        scores, rows = index.search(queries, k)
        assert (np.diff(scores) <= 0).all()
        assert all(len(set(row)) == k for row in rows.tolist())
        assert (rows >= 0).all()
        assert recall(rows, queries, vectors) >= lowest, k
    assert (index.search(queries, COUNT + 1)[1][:, -1] == -1).all(), "there are no more"


@pytest.mark.parametrize("kind", ["HNSW16,SQfp16", "IVF32,Flat"])
def test_a_narrow_search_compares_no_more_vectors_than_one_for_few_results(
    kind: str, built: Callable[[str], Any], vectors: Floats
) -> None:
    index, queries = FaissIndex(built(kind)), vectors[:20] + 0.02
    stats = faiss.cvar.hnsw_stats if kind.startswith("HNSW") else faiss.cvar.indexIVF_stats

    def compared(k: int, *, is_narrow: bool = False) -> tuple[int, Rows]:
        stats.reset()
        rows = index.search(queries, k, is_narrow=is_narrow)[1]
        return stats.ndis, rows

    few, best = compared(16)
    narrow, rows = compared(100, is_narrow=True)
    assert narrow == few < compared(400)[0]
    assert all(set(a) <= set(b) for a, b in zip(best.tolist(), rows.tolist(), strict=True))
    assert all(len(set(found) - {-1}) == 100 for found in rows.tolist())


def test_more_results_than_a_gpu_gives_come_from_the_processor(
    built: Callable[[str], Any], vectors: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpu:
        def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
            assert k <= MAX_GPU_K
            return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *_: Gpu(), raising=False)
    index = FaissIndex(built("Flat"), on_gpu=True)
    assert index.search(vectors[:1], MAX_GPU_K)[1].max() == 0
    assert sorted(index.search(vectors[:1], MAX_GPU_K + 1)[1][0][:MAX_GPU_K]) != [0] * MAX_GPU_K


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lowest"),
    [
        ("Flat", 1.0),
        ("SQ8", 0.95),
        ("HNSW16,SQfp16", 0.97),
        ("IVF32,Flat", 0.97),
        ("IVF32,RaBitQ,Refine(SQ8)", 0.93),
        ("IVF32,PQ16x4fs,Refine(SQ8)", 0.93),
        ("IVF32,PQ16x4fs,Refine(SQfp16)", 0.93),
        ("PCA32,IVF32,Flat", 0.8),
        ("PQ16x4fs,RFlat", 0.97),  # takes no selector: searched exactly
    ],
)
@pytest.mark.parametrize("exact_up_to", [0, 20_000])
def test_filtered_search_finds_the_nearest_allowed_rows(
    kind: str, lowest: float, exact_up_to: int, built: Callable[[str], Any], vectors: Floats,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(faiss_index, "EXACT_UP_TO", exact_up_to)
    index = FaissIndex(built(kind))
    generator = np.random.default_rng(1)
    queries = vectors[generator.integers(COUNT, size=60)]
    for share in (0.6, 0.05, 0.003):
        mask = generator.random(COUNT) < share
        scores, rows = index.search(queries, 10, RowFilter.of_mask(mask))
        assert (scores.dtype, rows.dtype, rows.shape) == (np.dtype(np.float32), np.dtype(np.int64), (60, 10))
        assert mask[rows[rows >= 0]].all()
        assert (np.diff(scores[:, :10]) <= 1e-6).all()
        assert recall(rows, queries, vectors, mask) >= lowest, f"share {share}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HNSW16,SQfp16", "IVF128,Flat", "IVF128,PQ32x4fs,Refine(SQ8)", "PCA32,IVF128,SQ8"])
def test_allowed_rows_far_from_the_query_are_found(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Allowed rows that lie away from the query, like another category, are found too."""
    monkeypatch.setattr(faiss_index, "EXACT_UP_TO", 100)
    generator = np.random.default_rng(2)
    centres = generator.normal(size=(120, DIM))
    centres[:60, 0] += 9
    centres[60:, 0] -= 9
    vectors = unit(centres[np.repeat(np.arange(120), 100)] + 0.5 * generator.normal(size=(12_000, DIM)))
    build(tmp_path / "index", vectors, kind)
    index = FaissIndex.open(tmp_path / "index")
    far = np.arange(len(vectors)) >= 6000
    side = vectors[:, 1] > np.quantile(vectors[:, 1], 0.7)  # allowed rows start near some queries only
    queries = vectors[generator.integers(6000, size=60)]
    for mask in (far, side):
        rows = index.search(queries, 10, RowFilter.of_mask(mask))[1]
        assert (rows >= 0).all()
        assert mask[rows].all()
        assert recall(rows, queries, vectors, mask) >= (0.85 if "PQ" in kind else 0.9)


@pytest.mark.parametrize("kind", ["SQfp16", "IVF32,PQ16x4fs,Refine(SQ8)", "HNSW8", "HNSW8,SQ8", "IVF32,SQ8"])
@pytest.mark.parametrize("decoded_share", [0, 1])
def test_exact_searches_compare_the_stored_vectors(
    kind: str, decoded_share: float, vectors: Floats, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Codes that FAISS goes through have the scores of the vectors that it decodes one by one."""
    monkeypatch.setattr(faiss_index, "DECODED_SHARE", decoded_share)
    write_faiss(fill(vectors, kind), tmp_path / "index.faiss")
    index = FaissIndex.open(tmp_path / "index.faiss")
    mask = np.arange(COUNT) % 4 == 1
    scores, rows = index.search(vectors[:20], 10, RowFilter.of_mask(mask))
    assert mask[rows].all()
    stored = faiss.read_index(str(tmp_path / "index.faiss")).reconstruct_batch(np.arange(COUNT))
    exact = np.where(mask, vectors[:20] @ stored.T, -1)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], atol=1e-5)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["Flat", "HNSW16,SQfp16", "IVF32,Flat"])
def test_fewer_allowed_rows_than_k_are_padded(kind: str, built: Callable[[str], Any], vectors: Floats) -> None:
    index = FaissIndex(built(kind))
    for allowed in ([7, 4000], list[int]()):
        rows = index.search(vectors[:3], 5, RowFilter.of_mask(np.isin(np.arange(COUNT), allowed)))[1]
        assert [sorted(found[: len(allowed)]) for found in rows.tolist()] == [allowed] * 3
        assert (rows[:, len(allowed) :] == -1).all()


def test_missing_results_sort_last_whatever_their_score() -> None:
    """faiss gives the lowest float, others nought, which is more than a cosine below it."""
    one = np.array([[-0.5, 0.0]], np.float32), np.array([[3, -1]])
    other = np.array([[-0.7, np.finfo(np.float32).min]], np.float32), np.array([[8, -1]])
    scores, rows = merge_top_k([one[0], other[0]], [one[1], other[1]], 3)
    assert rows.tolist() == [[3, 8, -1]]
    assert scores.tolist() == [[-0.5, np.float32(-0.7), -np.inf]]


def test_columns_have_the_narrowest_type_that_holds_all_values(caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [
        {"price": 3, "year": 1999, "sold": True, "tags": ["a", "b"], "mixed": 1, "huge": 1, "size": {"w": 1}},
        {"price": 2.5, "year": None, "sold": False, "tags": [], "mixed": "x", "huge": 10**20},
        {},
    ]
    lines = [json.dumps(row) for row in rows]
    types = FieldTypes.infer(pa.chunked_array([lines[:1], lines[1:]])).types
    arrays = {name: typed_array([row.get(name) for row in rows], kind) for name, kind in types.items()}
    assert {name: (str(array.type), array.to_pylist()) for name, array in arrays.items()} == {
        "huge": ("string", ["1", "100000000000000000000", None]),
        "mixed": ("string", ["1", "x", None]),
        "price": ("double", [3.0, 2.5, None]),
        "size": ("string", ['{"w": 1}', None, None]),
        "sold": ("bool", [True, False, None]),
        "tags": ("list<item: string>", [["a", "b"], [], None]),
        "year": ("int64", [1999, None, None]),
    }
    rare = [f'{{"often": 1, "rare{number}": 2}}' for number in range(MAX_FIELDS + 5)]
    kept = FieldTypes.infer(pa.chunked_array([rare])).types
    assert (len(kept), "often" in kept) == (MAX_FIELDS, True)
    assert f"{MAX_FIELDS + 6} metadata fields" in caplog.text


@pytest.fixture(scope="module")
def unclustered() -> Floats:
    return unit(np.random.default_rng(0).normal(size=(6400, 16)))


@pytest.mark.parametrize(("kind", "width"), [("IVF64,Flat", {"nprobe": 1}), ("HNSW8", {"efSearch": 16})])
def test_many_results_of_a_filter_are_complete_and_near(
    kind: str, width: dict[str, int], unclustered: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that was tuned for ten results holds fewer allowed rows in as many lists, or on as short a way."""
    monkeypatch.setattr(faiss_index, "EXACT_UP_TO", 0)
    mask = np.random.default_rng(1).random(6400) < 0.5
    few = unclustered[:640]  # some ten rows in each list
    assert (FaissIndex(fill(few, kind, **width)).search(few, 10)[1] >= 0).all()
    index = FaissIndex(fill(unclustered, kind, **width))
    rows = index.search(unclustered[:20], 200, RowFilter.of_mask(mask))[1]
    assert (rows >= 0).all()
    assert recall(rows, unclustered[:20], unclustered, mask) > 0.7
