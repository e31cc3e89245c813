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
from index_jobs.engines.faiss.build import build_index, fill_index
from index_jobs.engines.faiss.index import FaissIndex, free_gpu_memory
from index_jobs.engines.faiss.kinds import IndexChoice, choose_kinds, create_index, machine_memory
from index_jobs.engines.faiss.tuning import SearchParameters, tune
from index_jobs.engines.measure import NEIGHBOURS, Benchmark, find_neighbours, gallery_queries
from index_jobs.engines.protocol import HeldOutQueries
from index_jobs.row_filter import RowFilter
from tests.support.vectors import DIM, blocks, build, choices_of, clustered, recall, unit

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


def test_one_index_is_in_memory_at_a_time(gallery: Floats, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one, here the second, stays in the file."""
    indexes, alive = WeakSet[Any](), []

    def create(factory: str, dim: int) -> object:
        alive.append(len(indexes))
        indexes.add(index := create_index(factory, dim))
        return index

    monkeypatch.setattr("index_jobs.engines.faiss.build.create_index", create)
    built = build(file, gallery, "PQ4x4", "IVF16,SQ4", "PQ2x4", "IVF16,PQ4x4")
    assert (alive, built.kind, [*file.parent.iterdir()]) == ([0, 0, 0, 0], "IVF16,SQ4", [file])
    assert faiss.read_index(str(file)).nprobe == built.measured["parameters"]["nprobe"]


GIB = 2**30


def auto(count: int, memory: float, gpu_memory: int = 0) -> list[IndexChoice]:
    return choose_kinds("auto", count, 512, memory=int(memory * GIB), gpu_memory=gpu_memory)


def test_auto_gives_its_reason() -> None:
    (small,) = auto(4_000, 1)
    middle = auto(1_000_000, 8)
    (tight,), (codes,) = auto(1_000_000, 0.6), auto(1_000_000, 0.1)
    (gpu,) = auto(1_000_000, 8, gpu_memory=40 * GIB)
    assert [choice.factory for choice in (small, *middle, tight, codes, gpu)] == [
        "Flat",
        *("HNSW24,SQfp16", "IVF4000,PQ256x4fs,Refine(SQfp16)", "IVF4000,PQ64x4fs,Refine(SQ8)", "IVF4000,Flat"),
        "IVF4000,PQ64x4fs,Refine(SQ8)",
        "IVF4000,PQ64",
        "Flat",
    ]
    assert (small.gpu, gpu.gpu) == (False, True)
    for choice, reason in (
        (small, "4,000 vectors are at most 20,000"),
        (middle[0], "take 1.1 GiB of the 8.0 GiB allowed"),
        (tight, "HNSW24,SQfp16 would take 1.1 GiB"),
        (codes, "the only kind that fits; its recall is low; HNSW24,SQfp16 would take 1.1 GiB"),
    ):
        assert reason in choice.reason
    assert auto(1_000_000, 8, gpu_memory=GIB) == middle, "what the GPU has no memory for"
    for count, lists in ((10_000_000, "IVF12649"), (100_000_000, "IVF40000_HNSW32")):
        large = auto(count, 256)
        assert large[0].factory == f"{lists},PQ256x4fs,Refine(SQfp16)"
        assert not any(choice.factory.startswith("HNSW") for choice in large), "it takes an hour"
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


KNOWN = r"use auto, flat, hnsw, .* or an index_factory string"


@pytest.mark.parametrize(
    ("kind", "count", "error", "says"),
    [
        ("PQ8", 100, DataError, r"PQ8 cannot be built of 100 vectors: .*256"),
        ("IDMap,Flat", 5000, DataError, r"IDMap,Flat cannot be built of 5,000 vectors: add does not make sense"),
        *((kind, 1000, DataError, KNOWN) for kind in ("nonsense", "IVFx,Flat", "PQ7", "", "gpu-nonsense")),
        ("gpu-flat", 1000, MissingExtraError, r"gpu-flat.*pip install 'dcar\[gpu\]'"),
    ],
)
def test_kind_that_cannot_be_built_says_why(
    kind: str, count: int, error: type[Exception], says: str, gallery: Floats, file: Path
) -> None:
    with pytest.raises(error, match=says):
        build_index(file, blocks(gallery[:count]), count, DIM, choose_kinds(kind, count, DIM, gpu_memory=0))


@pytest.mark.parametrize("keep", [0, 20, -10, None])
def test_broken_file_is_named(gallery: Floats, file: Path, keep: int | None) -> None:
    build(file, gallery, "Flat")
    file.unlink() if keep is None else file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"index\.faiss (cannot be read as a FAISS index|is missing)"):
        FaissIndex.open(file)


class Found:
    """An index that gives these rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def search(self, vectors: Floats, k: int) -> tuple[Floats, np.ndarray]:
        rows = np.pad(self.rows[:, :k], ((0, 0), (0, max(0, k - self.rows.shape[1]))), constant_values=-1)
        return np.zeros((len(vectors), k), np.float32)[: len(rows)], rows[: len(vectors)]


def placeholders(count: int, share: float) -> Floats:
    """Return a gallery with this share of copies of one image."""
    vectors = clustered(count)
    vectors[np.random.default_rng(1).random(count) < share] = vectors[0]
    return vectors


def asked_of(vectors: Floats, found: Any) -> float:
    queries = HeldOutQueries(clustered(len(found), seed=3), "captions", np.full(len(found), -1))
    return float(Benchmark(blocks(vectors), queries, target=0.99).measure(Found(found))["recall_at_10"])


def test_results_beyond_the_tenth_score_are_misses_and_duplicates_of_neighbours_are_not() -> None:
    """Where each vector is there twice, the tenth score has five pairs, in two blocks, and the next pair is lower."""
    once = clustered(2000)
    order = np.argsort(-(clustered(30, seed=3) @ once.T), axis=1, kind="stable")
    for rows, share in ((order[:, :10], 1), (order[:, 3:13], 0.7), (order[:, 10:20], 0), (np.full((30, 11), -1), 0)):
        assert asked_of(once, rows) == share
    twice, thrice = np.concatenate([once] * 2), np.concatenate([once] * 3)
    assert asked_of(twice, np.concatenate([order[:, :5], order[:, :5] + 2000], 1)) == 1.0
    assert asked_of(twice, order[:, :10]) == 0.5
    assert asked_of(twice, np.concatenate([order[:, :5], order[:, 5:10] + 2000], 1)) == 0.5
    three = np.concatenate([order[:, :3] + start for start in (0, 2000, 4000)], 1)
    for start in (0, 2000, 4000):  # nine of three, and any of the three that share the tenth score
        assert asked_of(thrice, np.concatenate([three, order[:, 3:4] + start], 1)) == 1.0
    assert asked_of(thrice, np.concatenate([three, order[:, 4:5]], 1)) == 0.9


def test_ties_are_detected_and_neighbours_are_exact() -> None:
    once, vectors = clustered(500), placeholders(1500, 0.3)
    queries = HeldOutQueries(clustered(50, seed=3), "captions", np.full(50, -1))
    alone = find_neighbours(blocks(once), queries)
    assert not alone.tied.any()
    scores = queries.vectors @ once.T
    np.testing.assert_array_equal(alone.rows, np.argsort(-scores, axis=1, kind="stable")[:, :NEIGHBOURS])
    np.testing.assert_allclose(alone.lowest, -np.sort(-scores, axis=1)[:, NEIGHBOURS - 1], atol=1e-6)
    assert find_neighbours(blocks(np.concatenate([once, once, once])), queries).tied.all()
    own = gallery_queries(blocks(vectors), len(vectors))
    found = find_neighbours(blocks(vectors), own).rows
    assert (found != own.own_rows[:, None]).all(), "a query of the gallery is not its own neighbour"
    assert (found >= 0).all()


def test_hits_by_score_are_the_same_in_bounded_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Many hits by score in one memory-mapped block, a few at a time, give what all at once give."""
    vectors = placeholders(3000, 0.5)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    queries = HeldOutQueries(np.repeat(vectors[:1], 60, 0), "captions", np.full(60, -1))
    same = np.flatnonzero((vectors == vectors[0]).all(1))
    found = np.random.default_rng(0).permuted(np.tile(same, (60, 1)), axis=1)[:, :10]
    monkeypatch.setattr("index_jobs.engines.measure.SCORED_VECTORS", 7)
    truth = find_neighbours(blocks(mapped), queries)
    assert truth.hits(blocks(mapped), queries, np.arange(60), found).all()
    other = np.flatnonzero((vectors != vectors[0]).any(1))[:10]
    assert not truth.hits(blocks(mapped), queries, np.arange(60), np.tile(other, (60, 1))).any()


@pytest.mark.parametrize("kind", ["IVF300,Flat", "HNSW4", "IVF100,PQ16x4fs,RFlat"])
@pytest.mark.slow
def test_tuned_width_is_just_above_the_aim(kind: str) -> None:
    """A sixteenth less misses the aim, whatever number of candidates is re-ranked."""
    vectors = unit(np.random.default_rng(0).normal(size=(3000, 32)))
    index = fill_index(choices_of(kind)[0], 32, blocks(vectors), len(vectors))
    benchmark = Benchmark(blocks(vectors), gallery_queries(blocks(vectors), len(vectors)), target=0.95)
    (name, width), *_ = tune(benchmark, index)["parameters"].items()
    assert benchmark.recall(index, benchmark.tuning_queries) >= 0.9625
    SearchParameters(index).set(name, width * 15 // 16 - 1)
    assert benchmark.recall(index, benchmark.tuning_queries) < 0.9625
