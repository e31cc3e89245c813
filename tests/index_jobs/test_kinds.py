"""The choice of an index kind, by count, dimensions and memory."""

from pathlib import Path

import pytest

from dcar_core.util.errors import DataError, MissingExtraError
from index_jobs.engines.faiss import kinds
from index_jobs.engines.faiss.kinds import IndexChoice, choose_kinds, create_index, machine_memory
from tests.support.vectors import DIM

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
