"""Built indexes: recall by measurement, rivals, tuning, and every kind through its file."""

from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
from numpy.typing import NDArray

from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ArtifactError, DataError
from index_jobs.engines.faiss import gpu as gpu_search
from index_jobs.engines.faiss.build import build_index, fill_index
from index_jobs.engines.faiss.index import FaissIndex, write_faiss
from index_jobs.engines.faiss.kinds import IndexChoice, choose_kinds, create_index
from index_jobs.engines.measure import measure_latency
from index_jobs.engines.protocol import HeldOutQueries
from tests.support.vectors import DIM, blocks, clustered


@pytest.fixture(scope="module")
def gallery() -> Floats:
    return clustered(5000)


def exact(queries: Floats, vectors: Floats, k: int) -> NDArray[np.int64]:
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(
    ("kind", "lowest"),
    [
        ("flat", 1.0),
        ("hnsw", 0.98),
        ("ivf", 0.98),
        ("IVF16,SQ8", 0.95),
        ("SQ8", 0.95),
        ("PCA30,IVF16,Flat", 0.6),
        ("PQ16x4fs,RFlat", 0.7),
        ("ivf-pq-fp16", 0.98),
    ],
)
@pytest.mark.slow
def test_kind_finds_what_exact_search_finds(kind: str, lowest: float, gallery: Floats, tmp_path: Path) -> None:
    built = build_index(blocks(gallery), len(gallery), DIM, choose_kinds(kind, len(gallery), DIM))
    write_faiss(built.index, tmp_path / "index.faiss")
    index = FaissIndex.open(tmp_path / "index.faiss")
    assert (index.count, index.dim) == gallery.shape
    queries = clustered(100, seed=0)[:100]
    scores, rows = index.search(queries, 10)
    assert (scores.dtype, rows.dtype) == (np.dtype(np.float32), np.dtype(np.int64))
    assert rows.shape == (100, 10)
    truth = exact(queries, gallery, 10)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, truth, strict=True)])
    assert recall >= lowest
    if lowest > 0.9:
        assert built.measured["recall_at_10"] >= lowest
        assert index.vectors(np.array([4321]))[0] @ gallery[4321] > 0.999
    assert np.linalg.norm(index.vectors(np.array([7]))) == pytest.approx(1, abs=1e-5)
    assert built.measured["queries"] == 500
    assert 0 < built.measured["latency_ms_p50"] <= built.measured["latency_ms_p99"]


def test_tuned_parameter_is_kept_in_the_file_and_reaches_the_target(gallery: Floats, tmp_path: Path) -> None:
    import faiss

    built = build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("IVF64,Flat", "test")])
    assert built.measured["recall_at_10"] >= 0.98  # 0.99 on the queries that tuned it
    assert built.measured["parameters"]["nprobe"] > 1  # one list is not enough, or the test shows nothing
    write_faiss(built.index, tmp_path / "index.faiss")
    written: Any = faiss.read_index(str(tmp_path / "index.faiss"))
    assert written.nprobe == built.measured["parameters"]["nprobe"]


def test_kind_below_the_target_is_reported(gallery: Floats, caplog: pytest.LogCaptureFixture) -> None:
    built = build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("PQ4x4", "test")])
    assert built.measured["recall_at_10"] < 0.9
    assert "below the target of 0.99; choose another kind" in caplog.text


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_fewer_vectors_than_neighbours_are_indexed(kind: str, count: int, tmp_path: Path) -> None:
    vectors = clustered(count)
    built = build_index(blocks(vectors), count, DIM, choose_kinds(kind, count, DIM))
    assert built.measured["recall_at_10"] == 1.0
    write_faiss(built.index, tmp_path / "index.faiss")
    rows = FaissIndex.open(tmp_path / "index.faiss").search(vectors[:1], 5)[1][0]
    assert rows[0] == 0
    assert sorted(rows[:count]) == list(range(count))
    assert (rows[count:] == -1).all()


def test_auto_tries_the_next_kind_when_recall_is_too_low(gallery: Floats, caplog: pytest.LogCaptureFixture) -> None:
    choices = [
        IndexChoice("PQ4x4", "small"),
        IndexChoice("IVF16,Flat", "exact in its lists"),
        IndexChoice("Flat", "never built"),
    ]
    built = build_index(blocks(gallery), len(gallery), DIM, choices)
    assert built.choice.factory == "IVF16,Flat"
    assert built.choice.reason.startswith("exact in its lists; PQ4x4 reached a recall of 0.")
    assert built.measured["recall_at_10"] >= 0.98
    assert "trying another kind" in caplog.text


@pytest.mark.slow
def test_auto_takes_the_faster_kind_where_lists_fit_badly(caplog: pytest.LogCaptureFixture) -> None:
    """Vectors without clusters, and few lists of them: a search goes through most of the lists, a graph does not."""
    vectors = np.random.default_rng(0).normal(size=(8000, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    choices = [
        IndexChoice("IVF32,Flat", "lists"),
        IndexChoice("IVF32,SQ8", "never built"),
        IndexChoice("HNSW32", "a graph"),
    ]
    with caplog.at_level("INFO", logger="index_jobs"):
        built = build_index(blocks(vectors), len(vectors), DIM, choices)
    assert "IVF32,Flat: 8000 vectors" in caplog.text
    assert "HNSW32: 8000 vectors" in caplog.text
    assert "IVF32,SQ8" not in caplog.text
    assert built.measured["recall_at_10"] >= 0.99
    told = {"HNSW32": "a graph; IVF32,Flat takes 0.", "IVF32,Flat": "lists; HNSW32 takes 0."}
    assert built.choice.reason.startswith(told[built.choice.factory])
    other = next(choice for choice in choices if choice.factory in told and choice is not built.choice)
    slower = build_index(blocks(vectors), len(vectors), DIM, [other])
    assert built.measured["latency_ms_p50"] < 1.5 * slower.measured["latency_ms_p50"]


def test_lists_are_tried_where_a_graph_is_searched_widely(
    gallery: Floats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first kind with lists, and no other."""
    choices = [IndexChoice(kind, "test") for kind in ("HNSW8", "IVF16,Flat", "IVF16,SQ8", "HNSW8,SQ8")]
    for widest, built in ((1000, ["HNSW8"]), (1, ["HNSW8", "IVF16,Flat"])):
        monkeypatch.setattr("index_jobs.engines.faiss.build._WIDE_GRAPH", widest)
        caplog.clear()
        with caplog.at_level("INFO", logger="index_jobs"):
            assert build_index(blocks(gallery), len(gallery), DIM, choices).recall >= 0.99
        assert [choice.factory for choice in choices if f"{choice.factory}: 5000 vectors" in caplog.text] == built


def test_a_large_graph_is_built_with_a_wider_search(gallery: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose_kinds("hnsw", len(gallery), DIM)[0]
    for large, width in ((len(gallery) + 1, 100), (len(gallery), 200)):
        monkeypatch.setattr("index_jobs.engines.faiss.build._LARGE_GRAPH", large)
        assert fill_index(choice, DIM, blocks(gallery), len(gallery)).hnsw.efConstruction == width


def test_latency_is_that_of_one_core(gallery: Floats) -> None:
    import faiss

    threads = []

    class Watched:
        def search(self, vectors: Floats, k: int) -> None:
            threads.append(faiss.omp_get_max_threads())

    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        measure_latency(Watched(), gallery[:2])
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
    assert threads == [1, 1]


def test_lists_found_by_a_graph_are_searched(gallery: Floats, tmp_path: Path) -> None:
    """FAISS's own width of that graph's search, 16, would lose lists that hold neighbours."""
    import faiss

    built = build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("IVF512_HNSW32,Flat", "test")])
    write_faiss(built.index, tmp_path / "index.faiss")
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    inverted = faiss.extract_index_ivf(index)
    quantizer: Any = faiss.downcast_index(inverted.quantizer)
    assert inverted.nprobe == built.measured["parameters"]["nprobe"]
    assert quantizer.hnsw.efSearch >= max(64, 2 * inverted.nprobe)
    exactly = build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("IVF512,Flat", "test")])
    assert built.measured["recall_at_10"] >= 0.98
    assert built.measured["parameters"]["nprobe"] <= 2 * exactly.measured["parameters"]["nprobe"]


def test_recall_is_measured_on_queries_not_used_for_tuning(gallery: Floats) -> None:
    """HeldOutQueries that tune must not measure: half of these are outliers."""
    queries = clustered(100, seed=9)
    queries[::2] = clustered(5000)[:50]
    asked = HeldOutQueries(queries, "captions", np.full(100, -1))
    measured = build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("IVF64,Flat", "test")], asked).measured
    assert measured["queries"] == 50
    index = build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("IVF64,Flat", "test")], asked).index
    assert index.nprobe == measured["parameters"]["nprobe"]
    found, truth = index.search(queries[1::2], 11)[1][:, :10], exact(queries[1::2], gallery, 10)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)])
    assert measured["recall_at_10"] == pytest.approx(recall, abs=0.0001)


def test_unreachable_target_does_not_search_everything(gallery: Floats) -> None:
    """Four bits a dimension miss some neighbours however many lists are gone through."""
    built = build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("IVF256,SQ4", "test")])
    assert built.measured["recall_at_10"] < 0.98
    assert built.measured["parameters"]["nprobe"] < 128
    queries = gallery[1:400:2] + 0.02 * np.random.default_rng(5).normal(size=(200, DIM)).astype(np.float32)
    truth = exact(queries, gallery, 10)

    def recall() -> float:
        found = built.index.search(queries, 10)[1]
        return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)]))

    narrow = recall()
    built.index.nprobe = 256
    assert narrow > recall() - 0.005


@pytest.mark.slow
def test_number_of_reranked_candidates_is_tuned(gallery: Floats, tmp_path: Path) -> None:
    import faiss

    built = build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("IVF16,RaBitQ,Refine(SQ8)", "test")])
    assert built.measured["parameters"].keys() == {"nprobe", "k_factor"}
    assert built.measured["recall_at_10"] > 0.95  # 8 bits of 32 dimensions
    write_faiss(built.index, tmp_path / "index.faiss")
    written: Any = faiss.read_index(str(tmp_path / "index.faiss"))
    assert written.k_factor == built.measured["parameters"]["k_factor"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gpu-flat", "gpu-ivf", "gpu-cagra"])
def test_gpu_results_equal_those_of_the_cpu(kind: str, gallery: Floats, tmp_path: Path) -> None:
    import faiss

    if not gpu_search.free_gpu_memory():
        pytest.skip("no CUDA device, or FAISS's CPU build: pip install 'dcar[gpu]' in faiss-cpu's place")
    if kind == "gpu-cagra" and "CUVS" not in faiss.get_compile_options():
        pytest.skip("FAISS was built without cuVS")
    choices = choose_kinds(kind, len(gallery), DIM, gpu_memory=gpu_search.free_gpu_memory())
    built = build_index(blocks(gallery), len(gallery), DIM, choices)
    assert built.measured["recall_at_10"] >= 0.98
    write_faiss(built.index, tmp_path / "index.faiss")
    on_cpu, on_gpu = (FaissIndex.open(tmp_path / "index.faiss", gpu=where) for where in (False, True))
    queries = clustered(100, seed=5)
    for (scores, rows), (gpu_scores, gpu_rows) in [(on_cpu.search(queries, 10), on_gpu.search(queries, 10))]:
        same = rows == gpu_rows
        assert same.mean() > 0.95
        np.testing.assert_allclose(scores[same], gpu_scores[same], atol=1e-3)
    mask = np.arange(len(gallery)) % 3 == 0
    assert mask[on_gpu.search(queries, 10, mask)[1]].all()


def test_kind_that_needs_more_vectors_is_an_error(gallery: Floats) -> None:
    with pytest.raises(DataError, match=r"PQ8 cannot be built of 100 vectors: .*256"):
        build_index(blocks(gallery[:100]), 100, DIM, [IndexChoice("PQ8", "test")])


@pytest.mark.parametrize("keep", [0, 20, -10])
def test_broken_file_is_named(gallery: Floats, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "index.faiss"
    built = build_index(blocks(gallery), len(gallery), DIM, choose_kinds("flat", len(gallery), DIM))
    write_faiss(built.index, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"index\.faiss cannot be read as a FAISS index"):
        FaissIndex.open(path)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"index\.faiss is missing"):
        FaissIndex.open(path)


def test_kind_without_row_storage_is_an_error(gallery: Floats) -> None:
    with pytest.raises(DataError, match=r"IDMap,Flat cannot be built of 5,000 vectors: add does not make sense"):
        build_index(blocks(gallery), len(gallery), DIM, [IndexChoice("IDMap,Flat", "test")])


def test_one_index_is_in_memory_at_a_time(gallery: Floats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one, here the second, waits in a file, which is gone at the end."""
    import faiss

    indexes = WeakSet[Any]()
    alive, waiting = [], []

    def create(factory: str, dim: int) -> object:
        alive.append(len(indexes))
        waiting.append(len(list(tmp_path.glob("*/*.faiss"))))
        index = create_index(factory, dim)
        indexes.add(index)
        return index

    monkeypatch.setattr("index_jobs.engines.faiss.build.create_index", create)
    choices = [IndexChoice(kind, "test") for kind in ("PQ4x4", "IVF16,SQ4", "PQ2x4", "IVF16,PQ4x4")]
    built = build_index(blocks(gallery), len(gallery), DIM, choices, folder=tmp_path)
    assert (alive, waiting) == ([0, 0, 0, 0], [0, 1, 1, 1])
    assert list(tmp_path.iterdir()) == []
    assert built.choice.factory == "IVF16,SQ4"
    assert faiss.extract_index_ivf(built.index).nprobe == built.measured["parameters"]["nprobe"]
    queries = gallery[:200] + 0.02
    found, truth = built.index.search(queries, 10)[1], exact(queries, gallery, 10)
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)]) > 0.5
