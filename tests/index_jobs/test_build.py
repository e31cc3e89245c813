"""Built indexes: the choice of their kind, recall by measurement, rivals and tuning."""

from pathlib import Path
from typing import Any
from weakref import WeakSet

import faiss as typed_faiss
import numpy as np
import pytest

from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ArtifactError, DataError, MissingExtraError
from index_jobs.engines.faiss import kinds
from index_jobs.engines.faiss.build import build_index
from index_jobs.engines.faiss.index import FaissIndex, free_gpu_memory
from index_jobs.engines.faiss.kinds import IndexChoice, choose_kinds, create_index, machine_memory
from index_jobs.engines.protocol import HeldOutQueries
from index_jobs.row_filter import RowFilter
from tests.support.vectors import DIM, blocks, build, clustered, recall

faiss: Any = typed_faiss


@pytest.fixture(scope="module")
def gallery() -> Floats:
    return clustered(5000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "index.faiss"


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
def test_kind_finds_what_exact_search_finds(kind: str, lowest: float, gallery: Floats, file: Path) -> None:
    built = build_index(file, blocks(gallery), len(gallery), DIM, choose_kinds(kind, len(gallery), DIM))
    index = FaissIndex.open(file)
    assert (index.count, index.dim) == gallery.shape
    queries = clustered(100, seed=0)[:100]
    scores, rows = index.search(queries, 10)
    assert (scores.dtype, rows.dtype, rows.shape) == (np.dtype(np.float32), np.dtype(np.int64), (100, 10))
    assert recall(rows, queries, gallery) >= lowest
    if lowest > 0.9:
        assert built.measured["recall_at_10"] >= lowest
        assert index.vectors(np.array([4321]))[0] @ gallery[4321] > 0.999
    assert np.linalg.norm(index.vectors(np.array([7]))) == pytest.approx(1, abs=1e-5)
    assert built.measured["queries"] == 500
    assert 0 < built.measured["latency_ms_p50"] <= built.measured["latency_ms_p99"]


def test_tuned_parameters_are_kept_in_the_file_and_reach_the_target(gallery: Floats, file: Path) -> None:
    built = build(file, gallery, "IVF64,Flat")
    assert built.measured["recall_at_10"] >= 0.98  # 0.99 on the queries that tuned it
    assert built.measured["parameters"]["nprobe"] > 1  # one list is not enough, or the test shows nothing
    assert faiss.read_index(str(file)).nprobe == built.measured["parameters"]["nprobe"]
    reranked = build(file, gallery, "IVF16,RaBitQ,Refine(SQ8)").measured
    assert reranked["parameters"].keys() == {"nprobe", "k_factor"}
    assert reranked["recall_at_10"] > 0.95  # 8 bits of 32 dimensions
    assert faiss.read_index(str(file)).k_factor == reranked["parameters"]["k_factor"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_fewer_vectors_than_neighbours_are_indexed(kind: str, count: int, file: Path) -> None:
    vectors = clustered(count)
    built = build_index(file, blocks(vectors), count, DIM, choose_kinds(kind, count, DIM))
    assert built.measured["recall_at_10"] == 1.0
    rows = FaissIndex.open(file).search(vectors[:1], 5)[1][0]
    assert rows[0] == 0
    assert sorted(rows[:count]) == list(range(count))
    assert (rows[count:] == -1).all()


def test_auto_tries_the_next_kind_when_recall_is_too_low(
    gallery: Floats, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert build(file, gallery, "PQ4x4").measured["recall_at_10"] < 0.9
    assert "below the target of 0.99; choose another kind" in caplog.text
    built = build(file, gallery, "PQ4x4", "IVF16,Flat", "Flat")
    assert built.kind == "IVF16,Flat"
    assert built.reason.startswith("test; PQ4x4 reached a recall of 0.")
    assert built.measured["recall_at_10"] >= 0.98
    assert "trying another kind" in caplog.text


def test_lists_found_by_a_graph_are_searched(gallery: Floats, file: Path) -> None:
    """FAISS's own width of that graph's search, 16, would lose lists that hold neighbours."""
    built = build(file, gallery, "IVF512_HNSW32,Flat")
    index = faiss.read_index(str(file))
    inverted = faiss.extract_index_ivf(index)
    assert inverted.nprobe == built.measured["parameters"]["nprobe"]
    assert faiss.downcast_index(inverted.quantizer).hnsw.efSearch >= max(64, 2 * inverted.nprobe)
    exactly = build(file, gallery, "IVF512,Flat")
    assert built.measured["recall_at_10"] >= 0.98
    assert built.measured["parameters"]["nprobe"] <= 2 * exactly.measured["parameters"]["nprobe"]


def test_recall_is_measured_on_queries_not_used_for_tuning(gallery: Floats, file: Path) -> None:
    """HeldOutQueries that tune must not measure: half of these are outliers."""
    queries = clustered(100, seed=9)
    queries[::2] = clustered(5000)[:50]
    asked = HeldOutQueries(queries, "captions", np.full(100, -1))
    measured = build(file, gallery, "IVF64,Flat", queries=asked).measured
    assert measured["queries"] == 50
    index = faiss.read_index(str(file))
    assert index.nprobe == measured["parameters"]["nprobe"]
    found = index.search(queries[1::2], 11)[1][:, :10]
    assert measured["recall_at_10"] == pytest.approx(recall(found, queries[1::2], gallery), abs=0.0001)


def test_unreachable_target_does_not_search_everything(gallery: Floats, file: Path) -> None:
    """Four bits a dimension miss some neighbours however many lists are gone through."""
    built = build(file, gallery, "IVF256,SQ4")
    assert built.measured["recall_at_10"] < 0.98
    assert built.measured["parameters"]["nprobe"] < 128
    queries = gallery[1:400:2] + 0.02 * np.random.default_rng(5).normal(size=(200, DIM)).astype(np.float32)
    index = faiss.read_index(str(file))
    narrow = recall(index.search(queries, 10)[1], queries, gallery)
    index.nprobe = 256
    assert narrow > recall(index.search(queries, 10)[1], queries, gallery) - 0.005


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gpu-flat", "gpu-ivf", "gpu-cagra"])
def test_gpu_results_equal_those_of_the_cpu(kind: str, gallery: Floats, file: Path) -> None:
    if not free_gpu_memory():
        pytest.skip("no CUDA device, or FAISS's CPU build: pip install 'dcar[gpu]' in faiss-cpu's place")
    if kind == "gpu-cagra" and "CUVS" not in faiss.get_compile_options():
        pytest.skip("FAISS was built without cuVS")
    choices = choose_kinds(kind, len(gallery), DIM, gpu_memory=free_gpu_memory())
    built = build_index(file, blocks(gallery), len(gallery), DIM, choices)
    assert built.measured["recall_at_10"] >= 0.98
    on_cpu, on_gpu = (FaissIndex.open(file, gpu=where) for where in (False, True))
    queries = clustered(100, seed=5)
    (scores, rows), (gpu_scores, gpu_rows) = (index.search(queries, 10) for index in (on_cpu, on_gpu))
    same = rows == gpu_rows
    assert same.mean() > 0.95
    np.testing.assert_allclose(scores[same], gpu_scores[same], atol=1e-3)
    mask = np.arange(len(gallery)) % 3 == 0
    assert mask[on_gpu.search(queries, 10, RowFilter.of_mask(mask))[1]].all()


@pytest.mark.parametrize(
    ("kind", "count", "said"),
    [
        ("PQ8", 100, r"PQ8 cannot be built of 100 vectors: .*256"),
        ("IDMap,Flat", 5000, r"IDMap,Flat cannot be built of 5,000 vectors: add does not make sense"),
    ],
)
def test_kind_that_cannot_hold_the_vectors_is_an_error(
    kind: str, count: int, said: str, gallery: Floats, file: Path
) -> None:
    with pytest.raises(DataError, match=said):
        build(file, gallery[:count], kind)


@pytest.mark.parametrize("keep", [0, 20, -10])
def test_broken_file_is_named(gallery: Floats, file: Path, keep: int) -> None:
    build(file, gallery, "Flat")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"index\.faiss cannot be read as a FAISS index"):
        FaissIndex.open(file)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"index\.faiss is missing"):
        FaissIndex.open(file)


def test_one_index_is_in_memory_at_a_time(gallery: Floats, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one, here the second, stays in the file."""
    indexes, alive = WeakSet[Any](), []

    def create(factory: str, dim: int) -> object:
        alive.append(len(indexes))
        index = create_index(factory, dim)
        indexes.add(index)
        return index

    monkeypatch.setattr("index_jobs.engines.faiss.build.create_index", create)
    built = build(file, gallery, "PQ4x4", "IVF16,SQ4", "PQ2x4", "IVF16,PQ4x4")
    assert alive == [0, 0, 0, 0]
    assert list(file.parent.iterdir()) == [file]
    assert built.kind == "IVF16,SQ4"
    index = faiss.read_index(str(file))
    assert index.nprobe == built.measured["parameters"]["nprobe"]
    queries = gallery[:200] + 0.02
    assert recall(index.search(queries, 10)[1], queries, gallery) > 0.5


GIB = 2**30


def auto(count: int, memory: float, gpu_memory: int = 0) -> list[IndexChoice]:
    return choose_kinds("auto", count, 512, memory=int(memory * GIB), gpu_memory=gpu_memory)


def test_auto_gives_its_reason() -> None:
    (small,) = auto(4_000, 1)
    assert small.factory == "Flat"
    assert "4,000 vectors are at most 20,000" in small.reason
    middle = auto(1_000_000, 8)
    assert [choice.factory for choice in middle] == [
        "HNSW24,SQfp16",
        "IVF4000,PQ256x4fs,Refine(SQfp16)",
        "IVF4000,PQ64x4fs,Refine(SQ8)",
        "IVF4000,Flat",
    ]
    assert "take 1.1 GiB of the 8.0 GiB allowed" in middle[0].reason
    (tight,) = auto(1_000_000, 0.6)
    assert tight.factory == "IVF4000,PQ64x4fs,Refine(SQ8)"
    assert "HNSW24,SQfp16 would take 1.1 GiB" in tight.reason
    (codes,) = auto(1_000_000, 0.1)
    assert codes.factory == "IVF4000,PQ64"
    assert "the only kind that fits; its recall is low; HNSW24,SQfp16 would take 1.1 GiB" in codes.reason
    for count, lists in ((10_000_000, "IVF12649"), (100_000_000, "IVF40000_HNSW32")):
        large = auto(count, 256)
        assert large[0].factory == f"{lists},PQ256x4fs,Refine(SQfp16)"
        assert not any(choice.factory.startswith("HNSW") for choice in large), "it takes an hour"
    (gpu,) = auto(1_000_000, 8, gpu_memory=40 * GIB)
    assert (gpu.factory, gpu.gpu) == ("Flat", True)
    assert auto(1_000_000, 8, gpu_memory=GIB) == middle, "what the GPU has no memory for"
    with pytest.raises(DataError, match=r"1,000,000 vectors of 512 fit no kind of index in 0\.0 GiB: .*raise --memory"):
        auto(1_000_000, 0.01)


def test_memory_is_half_of_the_machine_or_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(kinds, "Path", lambda _: limit)
    machine = machine_memory()  # no limit is set
    for text, memory in (("max", machine), (str(2 * machine), machine), (str(GIB), GIB)):
        limit.write_text(f"{text}\n")
        assert machine_memory() == memory
    assert choose_kinds("auto", 1_000_000, 512) == auto(1_000_000, 0.5)


@pytest.mark.parametrize(
    ("dim", "parts"), [(512, 64), (256, 64), (768, 96), (1024, 128), (640, 80), (48, 48), (49, 49)]
)
def test_product_codes_divide_any_dimensions(dim: int, parts: int) -> None:
    factories = [choice.factory for choice in choose_kinds("auto", 50_000, dim, memory=GIB)]
    assert factories[2] == f"IVF894,PQ{parts}x4fs,Refine(SQ8)"
    for factory in factories:
        create_index(factory, dim)


def test_gpu_kind_without_a_gpu_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"gpu-flat.*pip install 'dcar\[gpu\]'"):
        choose_kinds("gpu-flat", 1000, DIM, gpu_memory=0)


@pytest.mark.parametrize("kind", ["nonsense", "IVFx,Flat", "PQ7", "", "gpu-nonsense"])
def test_unknown_kind_is_refused_with_the_known_ones(kind: str) -> None:
    with pytest.raises(DataError, match=r"use auto, flat, hnsw, .* or an index_factory string"):
        choose_kinds(kind, 1000, DIM)
