"""Families of models go the whole way: train, checkpoint, index, serve, search, explain, restart."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.data import Annotations
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import default_method, find_method
from dcar_core.training.train import train
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.parts import PARTS, needs, uses_parts
from tests.support.searches import Client
from tests.support.service import ServiceClient, opened
from tests.support.tiny_models import small_timm_models, write_tiny_model

FAMILIES = {  # one for each kind of towers
    "ViT": "ViT-B-32", "SigLIP2": "ViT-B-16-SigLIP2", "ViTamin": "ViTamin-S", "PE-Core": "PE-Core-T-16-384",
    "CoCa": "coca_ViT-B-32", "XLM-R": "xlm-roberta-base-ViT-B-32", "MobileCLIP-S": "MobileCLIP2-S0",
    "ResNet": "RN50", "ConvNeXt": "convnext_base",
}  # fmt: skip
WITH_OPENVINO = ("SigLIP2", "XLM-R")  # whose conversion takes seconds
QUERY = {"query": "a red square", "k": 2}


@pytest.fixture(autouse=True)
def _small_models() -> Iterator[None]:
    with small_timm_models():
        yield


def trained(family: str, data: Path, path: Path) -> Path:
    """A checkpoint of the family's shrunk model after two steps, by the method that has every part its towers take."""
    name = FAMILIES[family]
    backbone = load_backbone(BackboneSource(str(write_tiny_model(name, path / "model"))))
    model = seeded_model(
        backbone, find_method("dcar+" if backbone.level == "full" else default_method(backbone)).config, 0
    )
    training, validation = Annotations(data).load("train")[0], Annotations(data).load("val")[0]
    found = train(model, training, validation, TrainConfig(epochs=1, batch_size=6))
    assert len(found.history) == 1
    save_checkpoint(model, path / "checkpoint")
    return path / "checkpoint"


def live(http: ServiceClient) -> Encoder:
    encoder: Encoder = http.app.state.collections[None].current.encoder
    return encoder


async def scores_of(http: ServiceClient) -> list[float]:
    """Search by text, by image and with explanations; return the scores."""
    client = Client(http)
    deep = await client.text(**QUERY, explain=True)
    assert all(result["explanation"]["words"] for result in deep["results"])
    bodies = [await client.text(**QUERY), await client.image(png(), k=2)]
    explained = sorted(result["score"] for result in deep["results"])
    return [*explained, *(result["score"] for body in bodies for result in body["results"])]


@uses_parts
@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=needs("hf")) if name.startswith("xlm") else each for each, name in FAMILIES.items()],
)
async def test_a_family_goes_the_whole_way(family: str, tiny_data: Path, tmp_path: Path) -> None:
    checkpoint = trained(family, tiny_data, tmp_path)
    index = tmp_path / "index"
    rebuild(tiny_data / "circle", checkpoint, index, workers=0, progress=False)
    runtimes = ["torch", *(["openvino"] if PARTS["openvino"].is_present and family in WITH_OPENVINO else [])]
    scores = []
    for runtime in runtimes:
        async with opened(index, runtime=runtime, runtime_cache=tmp_path / "cache") as http:
            assert live(http).runtime.name == runtime
            scores.append(await scores_of(http))
    if family in WITH_OPENVINO or family == "MobileCLIP-S":
        async with opened(index, runtime=runtimes[-1], runtime_cache=tmp_path / "cache") as http:
            await Client(http).text(**QUERY)
            assert len(runtimes) == 1 or live(http).backbone is None, "a later start on an export needs no model"
            scores.append(await scores_of(http))
    for each in scores[1:]:
        np.testing.assert_allclose(each, scores[0], atol=2e-3)
