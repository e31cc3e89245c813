"""A start without PyTorch gives the model's vectors, and is used only for what it was
made of.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcar_core import Encoder
from dcar_core.encoder import exports
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import copy_checkpoint, save_checkpoint
from dcar_core.model.config import (
    AdapterConfig,
    ModelConfig,
    PromptConfig,
    ReweightConfig,
)
from dcar_core.model.dcar import DCAR
from tests.support.parts import needs
from tests.support.random_clip import checkpoint_on

pytestmark = needs("openvino")

TEXTS = [
    "a red square",
    "",
    (
        "crying cat 😿, it's a naïve long caption that goes on and on beyond the"
        " context of 32"
    ),
]
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that a query can have: deep prompts, adapters, predicted token
    weights.
    """
    path = tmp_path_factory.mktemp("cached") / "checkpoint"
    adapters = AdapterConfig(text=True, image=True)
    predicted = ReweightConfig(query="predicted")
    config = ModelConfig(
        prompt=PromptConfig(length=3, depth=2),
        adapter=adapters,
        reweight=predicted,
    )
    return checkpoint_on(exported_model, config, path)


@pytest.fixture(scope="module")
def kept(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that a first start has filled."""
    cache = tmp_path_factory.mktemp("kept")
    load(checkpoint, cache)
    return cache


@pytest.fixture
def cache(kept: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(kept, tmp_path / "cache")


def load(checkpoint: Path, cache: Path, runtime: str = "openvino") -> Encoder:
    return Encoder.load(checkpoint, device="cpu", runtime=runtime, cache=cache)


def entry_of(cache: Path) -> Path:
    (entry,) = cache.glob("exports/*/encoder-*")
    return entry


def is_from_cache(encoder: Encoder) -> bool:
    return encoder.backbone is None


def test_cached_adapter_gives_the_models_vectors(checkpoint: Path, cache: Path) -> None:
    whole = Encoder.load(checkpoint, device="cpu")
    quick = load(checkpoint, cache)
    assert quick.fingerprint == whole.fingerprint
    assert quick.preprocess == replace(whole.preprocess, resizer="pillow")
    np.testing.assert_allclose(
        quick.encode_text(TEXTS),
        whole.encode_text(TEXTS),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        quick.encode_pixels(PIXELS),
        whole.encode_pixels(PIXELS),
        atol=1e-5,
    )
    assert is_from_cache(quick), "encoding needs no model"
    assert load(checkpoint, cache).runtime is quick.runtime, (
        "encoders share an open export"
    )
    tokens = quick.model.backbone.tokenize(TEXTS, quick.model.prompt_tokens)
    assert not is_from_cache(quick), "the model is loaded on first use"
    with torch.inference_mode():
        np.testing.assert_array_equal(
            quick.model.encode_query(tokens), whole.model.encode_query(tokens)
        )


@pytest.mark.slow
def test_runtimes_and_copies_of_a_checkpoint_share_an_entry(
    checkpoint: Path,
    exported_model: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    assert is_from_cache(load(checkpoint, cache, "auto"))
    copy_checkpoint(checkpoint, tmp_path / "copy")
    quick = load(tmp_path / "copy", cache)
    assert is_from_cache(quick), "the same, elsewhere"
    quick.add_checkpoint_path(checkpoint)  # of another index, which outlives this one
    shutil.rmtree(tmp_path / "copy")
    assert isinstance(quick.model, DCAR)
    save_checkpoint(
        DCAR(load_backbone(BackboneSource(str(exported_model))), ModelConfig()),
        tmp_path / "other",
    )
    assert not is_from_cache(load(tmp_path / "other", cache))


@pytest.mark.slow
@pytest.mark.parametrize("is_damaged", [True, False])
def test_entry_is_not_used_after_any_change(
    is_damaged: bool,
    checkpoint: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = entry_of(cache)
    if is_damaged:
        content = bytearray(entry.read_bytes())
        # the lowest bit of the first number
        content[40 + int.from_bytes(content[32:40], "little")] ^= 1
        entry.write_bytes(content)
    else:
        monkeypatch.setattr(exports, "FORMAT", -1)
    assert not is_from_cache(load(checkpoint, cache))
    assert is_from_cache(load(checkpoint, cache)), "the whole start has written it anew"


def test_export_of_other_weights_is_not_used(checkpoint: Path, cache: Path) -> None:
    """By the vectors, if its checksum is right."""
    (manifest,) = (cache / "exports").glob("*/manifest.json")
    file = manifest.parent / "image.bin"
    values = np.fromfile(file, np.float32)
    values[: len(values) // 2] += 0.3
    values.tofile(file)
    content = json.loads(manifest.read_text())
    content["files"]["image.bin"] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    assert exports.restore(checkpoint, "openvino", None, cache) is None
