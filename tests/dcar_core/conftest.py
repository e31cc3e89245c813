"""Photos, training pairs and a loaded backbone for the tests of dcar_core."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcar_core.data import Annotations, Dataset
from dcar_core.model.backbone import RANDOM, Backbone, BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(BackboneSource(str(tiny_model)))


@pytest.fixture(scope="module")
def retrained(tiny_model: Path) -> Backbone:
    """Return the same backbone with other weights."""
    other = load_backbone(BackboneSource(str(tiny_model)))
    with torch.no_grad():
        other.visual.proj.mul_(1.001)
    return other


@pytest.fixture(scope="module")
def uneven(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Towers with widths of their own and four blocks, as many as get prompts."""
    path = tmp_path_factory.mktemp("uneven")
    config = json.loads((tiny_model / MODEL_CONFIG).read_text())
    config["model_cfg"]["vision_cfg"] |= {"width": 96, "layers": 4}
    config["model_cfg"]["text_cfg"] |= {"layers": 4}
    (path / MODEL_CONFIG).write_text(json.dumps(config))
    return load_backbone(BackboneSource(str(path), RANDOM))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the model's directory, to break things in."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def training(tiny_data: Path) -> Dataset:
    return Annotations(tiny_data).load("train")[0]


@pytest.fixture
def pairs(training: Dataset, tiny_data: Path) -> tuple[Dataset, Dataset]:
    """Return the splits for training and validation."""
    return training, Annotations(tiny_data).load("val")[0]


@pytest.fixture
def described_twice(training: Dataset) -> Dataset:
    """Return images with several captions of different lengths, interleaved."""
    again = [
        replace(s, caption=f"{s.caption} on a white page, seen from the front")
        for s in training.samples[3::-1]
    ]
    return replace(
        training,
        samples=[
            *training.samples[:6],
            *again,
            replace(training.samples[2], caption="one"),
        ],
    )
