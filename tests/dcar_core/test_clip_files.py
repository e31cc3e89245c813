"""CLIP's own family without PyTorch: the vectors, hashes and refusals of the model that
open_clip loads.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dcar_core import Encoder
from dcar_core.encoder.encoder import add_portable_export
from dcar_core.model.backbone import load_backbone
from dcar_core.model.checkpoint import CONFIG, PORTABLE, copy_checkpoint
from dcar_core.model.clip_files import read_clip_files
from dcar_core.model.config import (
    MODEL_CONFIG,
    UNTOUCHED,
    AdapterConfig,
    BackboneSource,
    ModelConfig,
    PromptConfig,
    ReweightConfig,
)
from dcar_core.util.errors import CheckpointError, ModelError
from dcar_core.util.machine import WEIGHTS_FILE, missing_bf16
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.processes import without_pytorch
from tests.support.random_clip import checkpoint_on, write_model

pytestmark = needs("openvino")

ADAPTERS = AdapterConfig(text=True, image=True, blocks=6)
DEEP = ModelConfig(
    prompt=PromptConfig(length=3, depth=2),
    adapter=ADAPTERS,
    reweight=ReweightConfig(query="predicted"),
)
IMAGES = ModelConfig(prompt=PromptConfig(text=False))
TEXTS = [
    "a red square",
    "",
    (
        "crying cat 😿, it's a naïve long caption that goes on and on beyond the"
        " context of 32"
    ),
]
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({}, DEEP),
        ({"quick_gelu": True}, DEEP),
        ({}, IMAGES),
        ({}, UNTOUCHED),
    ],
    ids=["deep", "quick", "images", "plain"],
)
def test_vectors_and_hashes_equal_those_of_pytorch(
    settings: Any,
    config: ModelConfig,
    tmp_path: Path,
) -> None:
    checkpoint = checkpoint_on(
        write_model(tmp_path / "base", **settings),
        config,
        tmp_path / "checkpoint",
    )
    whole = Encoder.load(checkpoint, device="cpu", runtime="torch")
    for name in ["openvino", *(["openvino-bf16"] if missing_bf16() is None else [])]:
        quick = Encoder.load(checkpoint, device="cpu", runtime=name)
        assert quick.backbone is None
        assert quick.fingerprint == whole.fingerprint
        assert quick.image_key == whole.image_key
        least = 0.99999 if name == "openvino" else 0.999
        assert (quick.encode_text(TEXTS) * whole.encode_text(TEXTS)).sum(
            1
        ).min() > least
        assert (quick.encode_pixels(PIXELS) * whole.encode_pixels(PIXELS)).sum(
            1
        ).min() > least
    assert quick.model.backbone.content_hash() == whole.model.backbone.content_hash()


def test_half_precision_in_the_file_has_the_hash_of_float32(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "half"))
    weights = load_file(model / WEIGHTS_FILE)
    save_file(
        {name: value.astype(np.float16) for name, value in weights.items()},
        model / WEIGHTS_FILE,
    )
    clip = read_clip_files(BackboneSource(str(model)))
    assert clip is not None
    assert (
        clip.content_hash() == load_backbone(BackboneSource(str(model))).content_hash()
    )
    whole, quick = (
        Encoder.load(model, device="cpu", runtime=name)
        for name in ("torch", "openvino")
    )
    np.testing.assert_allclose(
        quick.encode_text(TEXTS),
        whole.encode_text(TEXTS),
        atol=1e-5,
    )


def test_bundled_models_encode_without_pytorch(tmp_path: Path) -> None:
    """Even where the model is gone, if the checkpoint brings it along."""
    source = ROOT / "examples" / "emoji"
    copy_checkpoint(source / "twemoji" / "checkpoint", tmp_path / "copy")
    add_portable_export(tmp_path / "copy", None)
    content = json.loads((tmp_path / "copy" / CONFIG).read_text())
    content["backbone"]["model"] = str(tmp_path / "gone")
    (tmp_path / "copy" / CONFIG).write_text(json.dumps(content))
    places = [source / "base", source / "twemoji" / "checkpoint", tmp_path / "copy"]
    expected = [Encoder.load(place, device="cpu", runtime="torch") for place in places]
    code = (
        "import sys; from dcar_core import Encoder\nfor place in sys.argv[1:]: "
        + "encoder = Encoder.load(place); print(encoder.fingerprint,"
        " *encoder.encode_text(['crying cat'])[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, places)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | without_pytorch(tmp_path),
    )
    for line, encoder in zip(done.stdout.splitlines(), expected, strict=True):
        fingerprint, *vector = line.split()
        assert fingerprint == encoder.fingerprint
        assert (
            np.array(vector, np.float32) @ encoder.encode_text(["crying cat"])[0]
            > 0.9999
        )


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"layers": 10**9}),
        ("vision_cfg", {"head_width": 0}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"heads": 3}),
        ("text_cfg", {"context_length": 16}),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "../bpe.txt.gz"}}),
    ],
)
def test_other_families_are_open_clip_s(
    part: str,
    values: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / MODEL_CONFIG).read_text())
    config["model_cfg"][part] |= values
    (model / MODEL_CONFIG).write_text(json.dumps(config))
    assert read_clip_files(BackboneSource(str(model))) is None


def test_damaged_files_are_refused(
    tiny_model: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    copy_checkpoint(tiny_checkpoint, tmp_path / "checkpoint")
    portable = Path(shutil.copytree(tiny_model, tmp_path / "checkpoint" / PORTABLE))
    content = bytearray((portable / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (portable / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="was trained on another backbone"):
        Encoder.load(tmp_path / "checkpoint", device="cpu", runtime="openvino")
    for broken in (
        content[:-1],
        b"\xff" * 8,
        b"\x02" + bytes(7) + b"[]",
        b"",
    ):
        (portable / WEIGHTS_FILE).write_bytes(broken)
        with pytest.raises(ModelError, match=r"portable cannot be read: "):
            Encoder.load(portable, device="cpu", runtime="openvino")
