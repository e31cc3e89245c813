"""Recommended models and other families go the whole way: train, checkpoint, index,
serve, search, explain, restart.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core.data import Annotations
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.catalogue import RECOMMENDED
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

RECOMMENDED_TOWERS = [row.towers or row.name for row in RECOMMENDED]
# other kinds of towers
OTHERS = (
    "ViTamin-S",
    "coca_ViT-B-32",
    "xlm-roberta-base-ViT-B-32",
    "RN50",
    "convnext_base",
)
# Most of the long ones have the kinds of towers and vocabularies of another one.
NEEDS = {
    "ViT-B-32-quickgelu": "time",
    "ViT-L-14": "time",
    "ViT-L-16-SigLIP-256": "time",
    "ViT-B-16-SigLIP2": "time",
    "ViT-SO400M-16-SigLIP2-256": "time",
    "ViT-B-16-SigLIP": "time",
    "MobileCLIP2-S2": "time",
    "ViT-B-32-SigLIP2-256": "time",
    "PE-Core-L-14-336": "time",
    "ViT-H-14-worldwide-quickgelu": "time",
    "xlm-roberta-base-ViT-B-32": "hf",
}
QUERY = {"query": "a red square", "k": 2}


@pytest.fixture(autouse=True)
def _small_models() -> Iterator[None]:
    with small_timm_models():
        yield


def trained(name: str, data: Path, path: Path) -> Path:
    """A checkpoint of the shrunk model after two steps, by the method that has every
    part its towers take.
    """
    backbone = load_backbone(
        BackboneSource(str(write_tiny_model(name, path / "model")))
    )
    model = seeded_model(
        backbone,
        find_method(
            "dcar+" if backbone.level == "full" else default_method(backbone)
        ).config,
        0,
    )
    training = Annotations(data).load("train")[0]
    validation = Annotations(data).load("val")[0]
    found = train(model, training, validation, TrainConfig(epochs=1, batch_size=6))
    assert len(found.history) == 1
    save_checkpoint(model, path / "checkpoint")
    return path / "checkpoint"


async def scores_of(http: ServiceClient) -> list[float]:
    """Search by text, by image and with explanations; return the scores."""
    client = Client(http)
    deep = await client.text(**QUERY, explain=True)
    assert all(result["explanation"]["words"] for result in deep["results"])
    bodies = [await client.text(**QUERY), await client.image(png(), k=2)]
    explained = sorted(result["score"] for result in deep["results"])
    return [
        *explained,
        *(result["score"] for body in bodies for result in body["results"]),
    ]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs(NEEDS[name]) if name in NEEDS else uses_parts)
        for name in (*RECOMMENDED_TOWERS, *OTHERS)
    ],
)
async def test_a_family_goes_the_whole_way(
    name: str,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    with_export = PARTS["openvino"].is_present and name in (
        *RECOMMENDED_TOWERS,
        "xlm-roberta-base-ViT-B-32",
    )
    checkpoint = trained(name, tiny_data, tmp_path)
    index = tmp_path / "index"
    rebuild(tiny_data / "circle", checkpoint, index, workers=0, progress=False)
    runtimes = ["torch", *["openvino"] * with_export]
    settings: dict[str, Any] = {
        "runtime_cache": tmp_path / "cache",
        "deadline_ms": 100_000,
    }
    scores = []
    for runtime in runtimes:
        async with opened(index, runtime=runtime, **settings) as http:
            assert http.encoder.runtime.name == runtime
            scores.append(await scores_of(http))
    if with_export:
        async with opened(index, runtime=runtimes[-1], **settings) as http:
            await Client(http).text(**QUERY)
            assert http.encoder.backbone is None, (
                "a later start on an export needs no model"
            )
            scores.append(await scores_of(http))
    for each in scores[1:]:
        np.testing.assert_allclose(each, scores[0], atol=2e-3)
