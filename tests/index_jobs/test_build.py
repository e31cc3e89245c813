"""Index kinds: choice, recall by measurement, and every kind through its file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dcar_core.errors import ArtifactError, DataError
from index_jobs.build import Blocks, Choice, Queries, build, choose
from index_jobs.vectors import FaissIndex, write_faiss

Floats = NDArray[np.float32]
DIM = 32


def clustered(count: int, seed: int = 0) -> Floats:
    """Vectors around 50 centres, as the pictures of a gallery are."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(50, DIM))
    vectors = centres[generator.integers(50, size=count)] + 0.4 * generator.normal(size=(count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def blocks(vectors: Floats, size: int = 700) -> Blocks:
    def again() -> Iterator[Floats]:
        return (vectors[start : start + size] for start in range(0, len(vectors), size))

    return again


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
    ],
)
def test_kind_finds_what_exact_search_finds(kind: str, lowest: float, gallery: Floats, tmp_path: Path) -> None:
    built = build(blocks(gallery), len(gallery), DIM, choose(kind, len(gallery), DIM))
    write_faiss(built.index, tmp_path / "index.faiss")
    index = FaissIndex.open(tmp_path / "index.faiss")
    assert (index.count, index.dim) == gallery.shape
    queries = clustered(100, seed=0)[:100]
    scores, rows = index.search(queries, 10)
    assert (scores.dtype, rows.dtype, rows.shape) == (np.float32, np.int64, (100, 10))
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

    built = build(blocks(gallery), len(gallery), DIM, Choice("IVF64,Flat", "test"))
    assert built.measured["parameter"] == "nprobe"
    assert built.measured["recall_at_10"] >= 0.99
    assert built.measured["value"] > 1  # one list is not enough, or the test shows nothing
    write_faiss(built.index, tmp_path / "index.faiss")
    assert faiss.read_index(str(tmp_path / "index.faiss")).nprobe == built.measured["value"]


def test_measured_recall_is_that_of_the_queries_given(gallery: Floats) -> None:
    queries = clustered(80, seed=9)
    asked = Queries(queries, "captions", np.full(80, -1))
    built = build(blocks(gallery), len(gallery), DIM, Choice("HNSW8", "test"), asked)
    found = built.index.search(queries, 11)[1][:, :10]
    truth = exact(queries, gallery, 10)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)])
    assert built.measured["recall_at_10"] == pytest.approx(recall, abs=0.002)
    assert built.measured["query_source"] == "captions"


def test_kind_below_the_target_says_so(gallery: Floats, caplog: pytest.LogCaptureFixture) -> None:
    built = build(blocks(gallery), len(gallery), DIM, Choice("PQ4x4", "test"))
    assert built.measured["recall_at_10"] < 0.9
    assert "below the target of 0.99; take another kind" in caplog.text


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_fewer_vectors_than_neighbours(kind: str, count: int, tmp_path: Path) -> None:
    vectors = clustered(count)
    built = build(blocks(vectors), count, DIM, choose(kind, count, DIM))
    assert built.measured["recall_at_10"] == 1.0
    write_faiss(built.index, tmp_path / "index.faiss")
    rows = FaissIndex.open(tmp_path / "index.faiss").search(vectors[:1], 5)[1][0]
    assert rows[0] == 0
    assert sorted(rows[:count]) == list(range(count))
    assert (rows[count:] == -1).all()


def test_auto_says_why() -> None:
    small = choose("auto", 4_000, 512, memory=2**30)
    assert small.factory == "Flat"
    assert "4,000 vectors are at most 100,000" in small.reason
    middle = choose("auto", 1_000_000, 512, memory=16 * 2**30)
    assert middle.factory == "HNSW32"
    assert "2.2 GiB" in middle.reason
    large = choose("auto", 10_000_000, 512, memory=16 * 2**30)
    assert large.factory == "IVF12649,SQ8"
    assert "more than half of the 16.0 GiB" in large.reason


@pytest.mark.parametrize("kind", ["nonsense", "IVFx,Flat", "PQ7", ""])
def test_unknown_kind_is_refused_with_the_known_ones(kind: str) -> None:
    with pytest.raises(DataError, match="use auto, flat, hnsw, ivf or an index_factory string"):
        choose(kind, 1000, DIM)


def test_kind_that_needs_more_vectors_says_so(gallery: Floats) -> None:
    with pytest.raises(DataError, match=r"PQ8 cannot be built of 100 vectors: .*256"):
        build(blocks(gallery[:100]), 100, DIM, Choice("PQ8", "test"))


@pytest.mark.parametrize("keep", [0, 20, -10])
def test_broken_file_is_named(gallery: Floats, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "index.faiss"
    built = build(blocks(gallery), len(gallery), DIM, choose("flat", len(gallery), DIM))
    write_faiss(built.index, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"index\.faiss cannot be read as a FAISS index"):
        FaissIndex.open(path)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"index\.faiss is missing"):
        FaissIndex.open(path)
