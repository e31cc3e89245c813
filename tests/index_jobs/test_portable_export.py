"""A version carries what serves it without PyTorch; the next versions share it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.encoder import exports
from dcar_core.model.checkpoint import PORTABLE
from dcar_core.util.errors import RuntimeUnavailableError
from index_jobs.index.versions import open_current, open_version
from index_jobs.jobs.retrain import retrain
from index_jobs.jobs.update import remove
from tests.support.galleries import write_pairs
from tests.support.parts import needs
from tests.support.versions import Build, file_of

pytestmark = needs("openvino")

RETRAIN_WITHOUT_OPEN_CLIP = """
import sys
from pathlib import Path
from index_jobs.jobs.retrain import retrain

assert retrain(Path(sys.argv[1]), [Path(sys.argv[2])], device="cpu", margin=1).published
assert "open_clip" not in sys.modules, "it takes seconds to import"
"""


def weights(index: Path, version: int) -> Path:
    return file_of(index, f"checkpoint/{PORTABLE}/image.bin", version)


@pytest.fixture
def index(build: Build, exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DCAR_RUNTIME_CACHE", str(exports.parent))
    build(runtime="openvino")
    return tmp_path / "index"


def test_versions_of_a_model_share_one_export(index: Path, build: Build, exports: Path) -> None:
    build(runtime="openvino", force=True)
    remove(index, [open_current(index).item(0).id])
    assert all(weights(index, number).samefile(weights(index, 1)) for number in (2, 3))
    assert "checkpoint/portable/encoder" in open_current(index).manifest.files
    third = open_version(index, 3)
    build(checkpoint=third.checkpoint, runtime="openvino", force=True)
    assert weights(index, 4).samefile(weights(index, 3)), "a checkpoint brings its own"


@pytest.fixture
def pairs(tiny_gallery: Path, tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", tiny_gallery)


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()  # it has other names
    file.write_bytes(bytes(100) + content[100:])


def require_own_export(index: Path, cache: Path) -> None:
    published = open_current(index)
    quick = Encoder.load(published.checkpoint, device="cpu", runtime="openvino", cache=cache)
    assert quick.backbone is None
    texts = ["photo of a red square", "a tile"]
    whole = Encoder.load(published.checkpoint, device="cpu")
    np.testing.assert_allclose(quick.encode_text(texts), whole.encode_text(texts), atol=1e-5)


def test_a_retrained_version_carries_an_export_of_its_own(index: Path, pairs: Path, tmp_path: Path) -> None:
    """Of the same image tower."""
    subprocess.run([sys.executable, "-c", RETRAIN_WITHOUT_OPEN_CLIP, index, pairs], check=True)
    assert weights(index, 2).samefile(weights(index, 1))
    require_own_export(index, tmp_path / "cache")


@pytest.mark.parametrize("is_damaged", [True, False])
def test_a_retrained_version_without_a_usable_export_has_a_new_one_or_none(
    index: Path, pairs: Path, tmp_path: Path, is_damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Encoder.load

    def fail(*given: Any, runtime: str = "torch", **options: Any) -> Encoder:
        if runtime != "torch":
            raise RuntimeUnavailableError("its vectors are not float32's here")
        return load(*given, runtime=runtime, **options)

    if is_damaged:
        damage(weights(index, 1))
    else:
        monkeypatch.setattr(Encoder, "load", fail)
    assert retrain(index, [pairs], device="cpu", margin=1).published
    if is_damaged:
        require_own_export(index, tmp_path / "cache")
    else:
        assert not [name for name in open_version(index, 2).manifest.files if PORTABLE in name]


def test_an_export_that_cannot_be_used_is_passed_over_with_a_reason(
    index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> Encoder:
        published = open_current(index)
        return Encoder.load(published.checkpoint, device="cpu", runtime="auto", cache=tmp_path / "cache")

    assert start().backbone is None
    monkeypatch.setattr(exports, "FORMAT", -1)
    assert start().backbone is not None
    assert "cannot be used: another release made it; build the index again" in caplog.text
    monkeypatch.undo()
    damage(weights(index, 1))
    assert start().backbone is not None
    assert "is corrupted: image.bin changed" in caplog.text
