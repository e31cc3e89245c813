"""Weights stay in their file: the same values, in memory only where they are read."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dcar_core import Encoder
from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.util.memory import WEIGHTS_FILE, release_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(file: Path) -> int:
    """Bytes of the file that are mapped and in memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            counts = line.endswith(str(file.resolve()))
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def lies_in(file: Path, backbone: Backbone) -> bool:
    places = [
        tuple(int(part, 16) for part in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file.resolve()))
    ]
    return all(
        any(start <= weight.data_ptr() < end for start, end in places) for weight in backbone.clip.state_dict().values()
    )


def test_weights_are_mapped_from_their_file(model: Path) -> None:
    backbone = load_backbone(BackboneSource(str(model)))
    assert lies_in(model / WEIGHTS_FILE, backbone)
    assert not any(weight.requires_grad for weight in backbone.parameters())
    written = load_file(str(model / WEIGHTS_FILE))
    assert all(torch.equal(weight, written[name]) for name, weight in backbone.clip.state_dict().items())


def test_half_precision_weights_are_not_mapped(model: Path) -> None:
    file = model / WEIGHTS_FILE
    save_file({name: weight.half() for name, weight in load_file(str(file)).items()}, str(file))
    backbone = load_backbone(BackboneSource(str(model)))
    assert not lies_in(file, backbone)
    assert {weight.dtype for weight in backbone.parameters()} == {torch.float32}


@pytest.mark.slow
def test_released_pages_are_read_again_on_use(model: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(model, cache=tmp_path / "cache")
    texts, pixels = ["a red square"], np.zeros((1, 3, 32, 32), np.uint8)
    before = encoder.encode_text(texts), encoder.encode_pixels(pixels)
    assert resident(model / WEIGHTS_FILE) > 0
    encoder.release()
    assert resident(model / WEIGHTS_FILE) == 0
    for wanted, found in zip(before, (encoder.encode_text(texts), encoder.encode_pixels(pixels)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert resident(model / WEIGHTS_FILE) > 0


def test_written_pages_are_kept(model: Path) -> None:
    backbone = load_backbone(BackboneSource(str(model)))
    scale = backbone.clip.state_dict()["logit_scale"]
    scale.fill_(3.0)
    release_pages([model])
    assert scale.item() == 3.0
