"""What serving a method costs: its own weights, its bytes and the gallery's vectors."""

import pytest

from dcar_core.evaluation.serving_cost import serving_cost
from dcar_core.model.backbone import Backbone
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import method


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", ("shared", "unchanged")),
        ("coop", ("shared", "unchanged")),
        ("clip-adapter", ("shared", "matrix product")),
        ("dcar+", ("shared", "encode again")),
        ("block-adapters", ("shared", "encode again")),
        ("lora", ("own", "encode again")),
    ],
)
def test_the_cost_of_serving(name: str, expected: tuple[str, str], backbone: Backbone) -> None:
    cost = serving_cost(seeded_model(backbone, method(name), 0))
    assert (cost["backbone"], cost["gallery"]) == expected
    weights = sum(4 * p.numel() for p in backbone.clip.parameters())
    assert (cost["bytes"] == 0) == (name == "clip")
    assert (cost["bytes"] >= weights) == (name == "lora")
