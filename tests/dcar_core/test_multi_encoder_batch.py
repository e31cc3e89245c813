"""Rows of several encoders in one pass over their backbone are what each encoder makes of them alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import AdapterConfig, ModelConfig, PromptConfig
from dcar_core.model.dcar import DCAR
from dcar_core.runtimes.encoder_state import Runtime
from dcar_core.serving.encoder import Encoder, ImageRow, TextRow, encode_image_rows, encode_text_rows

TEXTS = ("a red square", "circle", "a rather long caption, with a comma in it", "x", "a blue cross on white")
SAME = {"a": ModelConfig(), "b": ModelConfig().with_query_weights("predicted")}
ADAPTED = {"c": replace(ModelConfig(), adapter=AdapterConfig(text=True, image=True))}
BLOCKS = {name: replace(ModelConfig(), adapter=AdapterConfig(image=True, blocks=4)) for name in "de"}
SHAPES = {
    "deep": ModelConfig(prompt=PromptConfig(depth=2)),
    "short": ModelConfig(prompt=PromptConfig(length=2)),
    "coop": ModelConfig(prompt=PromptConfig(image=False)),
    "clip": ModelConfig(prompt=PromptConfig(length=0)),
}


@pytest.fixture(scope="module")
def encoders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    """Different in all that may differ, on one backbone."""
    root = tmp_path_factory.mktemp("mixed")
    backbone = load_backbone(BackboneSource(str(tiny_model)))
    configs = SAME | ADAPTED | SHAPES | BLOCKS
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = DCAR(backbone, config)
        with torch.no_grad():
            for _, parameter in model.trainables():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_checkpoint(model, root / name)
    loaded = {name: Encoder.load(root / name, device="cpu", backbone=backbone) for name in configs}
    assert len({id(encoder.model.backbone) for encoder in loaded.values()}) == 1
    return loaded


def counted(runtime: Runtime, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the runtime's passes from now on."""
    sizes, run = list[int](), getattr(runtime, name)

    def noted(first: np.ndarray, *rest: object) -> np.ndarray:
        sizes.append(len(first))
        return run(first, *rest)

    monkeypatch.setattr(runtime, name, noted)
    return sizes


@pytest.mark.parametrize(("names", "passes"), [("a", 1), ("ab", 1), ("abcde", 1), (["a", "b", *SHAPES], 3)])
def test_mixed_text_rows_equal_each_encoder_alone(
    encoders: dict[str, Encoder], names: list[str], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcar_core.runtimes.encoder_state.PASS_COST", 10_000)  # so length alone does not split a batch
    rows = [TextRow(encoders[name], text) for text in TEXTS for name in names]
    with monkeypatch.context() as patch:
        sizes = counted(rows[0].encoder.runtime, "text", patch)
        mixed = encode_text_rows(rows)
    assert len(sizes) == passes
    assert sum(sizes) == len(rows)
    for row, vector in zip(rows, mixed, strict=True):
        np.testing.assert_allclose(vector, row.encoder.encode_text([row.text])[0], atol=2e-6)


@pytest.mark.parametrize(
    ("names", "passes"), [("a", 1), ("ab", 1), ("abc", 1), ("de", 1), ("ade", 2), (["a", "c", *SHAPES], 4)]
)
def test_mixed_image_rows_equal_each_encoder_alone(
    encoders: dict[str, Encoder], names: list[str], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    rows = [ImageRow(encoders[name], each) for each in pixels for name in names]
    with monkeypatch.context() as patch:
        sizes = counted(rows[0].encoder.runtime, "image", patch)
        mixed = encode_image_rows(rows)
    assert len(sizes) == passes
    for row, vector in zip(rows, mixed, strict=True):
        np.testing.assert_allclose(vector, row.encoder.encode_pixels(row.pixels[None])[0], atol=2e-6)


def test_encoders_differ_enough_to_reveal_a_mix_up(encoders: dict[str, Encoder]) -> None:
    vectors = np.concatenate([encoder.encode_text(["a red square"]) for encoder in encoders.values()])
    assert (vectors @ vectors.T - np.eye(len(vectors))).max() < 0.999
