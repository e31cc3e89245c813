"""A job that one runtime began: `auto` goes on with that one, a runtime that is named encodes anew."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.serving.runtime_selection import preferred_runtimes
from index_jobs.encoding.encoding_state import shard_store
from index_jobs.encoding.replicas import runtime_in_use
from index_jobs.gallery.scan import scan
from index_jobs.jobs.summary import RebuildSummary
from index_jobs.rebuild import rebuild
from index_jobs.spec import BuildOptions
from index_jobs.store.versions import open_current


@pytest.fixture
def faster(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The runtime other than torch that `auto` takes here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if importlib.util.find_spec("openvino"):
        shutil.copytree(request.getfixturevalue("exports"), tmp_path / "cache" / "dcar" / "exports")
    first = preferred_runtimes(Encoder.load(tiny_checkpoint, device="cpu").loaded.backbone)[0]
    if first == "torch":
        pytest.skip("this processor and what is installed leave torch alone")
    return first


@pytest.mark.slow
def test_auto_resumes_with_the_runtime_of_the_first_run(
    faster: str, tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def run(**options: Any) -> RebuildSummary:
        return rebuild(tiny_gallery, tiny_checkpoint, tmp_path / "index", device="cpu", progress=False, **options)

    def published() -> tuple[str, np.ndarray]:
        artifact = open_current(tmp_path / "index")
        return artifact.manifest.runtime, artifact.vectors(np.arange(24))

    assert run(runtime="torch").encoded == 24
    name, vectors = published()
    assert name == "torch"
    assert (run(runtime="auto").encoded, published()[0]) == (0, "torch")
    assert run(runtime="auto").reused
    assert (run(runtime="auto", kind="IVF2,Flat").encoded, published()[0]) == (0, "torch")
    assert run(runtime=faster, kind="IVF2,Flat").encoded == 24
    name, others = published()
    assert name == faster
    assert (vectors != others).any(1).all()
    np.testing.assert_allclose(vectors, others, atol=0.02)
    assert run(runtime="auto", kind="flat").encoded == 0


def test_begun_runtimes_are_preferred_then_faster_ones(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    gallery, encoder = scan(tiny_gallery), Encoder.load(tiny_checkpoint, device="cpu")

    def begin(runtime: str) -> None:
        store = shard_store(gallery, encoder, runtime, tmp_path, BuildOptions(batch_size=4, shard_rows=8))
        hashes, sizes = np.zeros(8, np.uint64), np.zeros((8, 2), np.int32)
        store.save(0, np.zeros((8, encoder.dim), np.float32), [], hashes, hashes, sizes)

    def chosen(fastest: str, batch: int = 4) -> str:
        return runtime_in_use(gallery, encoder, fastest, tmp_path, BuildOptions(batch_size=batch, shard_rows=8))

    assert chosen("openvino") == "openvino"
    begin("torch-bf16")
    assert chosen("openvino") == "torch-bf16"
    assert chosen("openvino", batch=8) == "openvino"  # other batches are another job
    begin("openvino")
    assert chosen("openvino") == "openvino"
