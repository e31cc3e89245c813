"""Index files with wrong offsets and row numbers, in versions whose checksums are right."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError
from dcar_core.util.files import sha256_of, write_json
from index_jobs.rebuild import rebuild
from index_jobs.store.faiss_index import FaissIndex, write_faiss
from index_jobs.store.items import Items
from index_jobs.store.manifest import FileInfo, Manifest
from index_jobs.store.versions import open_current


def patch(version: Path, name: str, old: bytes, new: bytes) -> None:
    """Replace bytes of a version's file, and compute its checksums anew."""
    path = version / name
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.unlink()
    path.write_bytes(data.replace(old, new, 1))
    manifest = Manifest.read(version / "manifest.json")
    files = manifest.files | {name: FileInfo(path.stat().st_size, sha256_of(path))}
    write_json(version / "manifest.json", replace(manifest, files=files).to_dict())


def int32(*values: int) -> bytes:
    return np.array(values, np.int32).tobytes()


def int64(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


OFFSETS = tuple(range(0, 100, 20))  # of ids with 20 characters


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (int32(*OFFSETS), int32(*OFFSETS[:2], 2**30, *OFFSETS[3:])),
        (int32(*OFFSETS), int32(*OFFSETS[:2], -400, *OFFSETS[3:])),
    ],
)
def test_a_wrong_text_offset_is_an_error_not_a_crash(index: Path, old: bytes, new: bytes) -> None:
    patch(index / "versions" / "1", "items.arrow", old, new)
    # in a process of its own, since it would crash without the check
    code = f"""
from pathlib import Path
from index_jobs.store.versions import open_current
artifact = open_current(Path({str(index)!r}))
print([artifact.item(row) for row in range(24)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "items.arrow is damaged" in done.stderr


def test_a_row_number_that_does_not_exist_is_an_error(index: Path) -> None:
    artifact = open_current(index)
    by_id = [artifact.segments[0].items.cell(row, "by_id") for row in range(3)]
    patch(index / "versions" / "1", "items.arrow", int64(*by_id), int64(by_id[0], 5_000_000, by_id[2]))
    with pytest.raises(ArtifactError, match=r"items.arrow is damaged: a row number is not in 0..23"):
        open_current(index)


def graph_link(index: Any) -> tuple[bytes, bytes]:
    graph: Any = faiss.downcast_index(index)
    links = faiss.vector_to_array(graph.hnsw.neighbors)[:8].tolist()
    return int32(*links), int32(links[0], 2**30, *links[2:])


def list_row(index: Any) -> tuple[bytes, bytes]:
    inverted: Any = faiss.downcast_index(index)
    lists = inverted.invlists
    size = lists.list_size(0)
    rows = faiss.rev_swig_ptr(lists.get_ids(0), size).tolist()
    return int64(*rows), int64(*rows[:-1], 10**12)


@pytest.mark.parametrize(("kind", "change"), [("HNSW16", graph_link), ("IVF4,Flat", list_row)])
def test_a_wrong_row_number_of_faiss_is_an_error(
    kind: str, change: Callable[[Any], tuple[bytes, bytes]], tmp_path: Path
) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    index = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    path = tmp_path / "index.faiss"
    write_faiss(index, path)
    assert FaissIndex.open(path).count == 300
    old, new = change(index)
    data = path.read_bytes()
    assert data.count(old) == 1
    (tmp_path / "hostile.faiss").write_bytes(data.replace(old, new))
    with pytest.raises(ArtifactError, match=r"a row number is not in 0..299|out of range"):
        FaissIndex.open(tmp_path / "hostile.faiss")


def test_another_metric_is_an_error(tmp_path: Path) -> None:
    write_faiss(faiss.index_factory(16, "Flat", faiss.METRIC_L2), tmp_path / "index.faiss")
    with pytest.raises(ArtifactError, match="metric 1"):
        FaissIndex.open(tmp_path / "index.faiss")


def test_files_that_versions_share_are_checked_once(
    gallery: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = list[Items]()
    monkeypatch.setattr(Items, "_check", lambda items: checks.append(items))
    rebuild(gallery, tiny_checkpoint, tmp_path / "index", progress=False)
    before = len(checks)
    for _ in range(3):
        open_current(tmp_path / "index")
    assert len(checks) == before == 1
