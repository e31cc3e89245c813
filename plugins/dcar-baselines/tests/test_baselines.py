"""MMA and MMRL against open_clip's own encoders with hooks on their blocks, and as
methods of `dcar`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from app.cli import app
from dcar_baselines.mma import SCALE
from dcar_core import Encoder
from dcar_core.data import Annotations
from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.objective import accumulate_gradients
from dcar_core.training.prepared_split import prepare_split
from dcar_core.util.errors import ModelError
from tests.support.random_clip import write_model

METHODS = ("mma", "mmrl")
TEXTS = ["a red square", "a blue cross on a white page, seen from the front"]


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(BackboneSource(str(tiny_model)))


def moved_model(backbone: Backbone, name: str) -> DCAR:
    """Return a model whose every trainable differs from its start by much."""
    model = seeded_model(backbone, find_method(name).config, 0)
    with torch.no_grad():
        for _, parameter in model.trainables():
            parameter.add_(torch.randn_like(parameter))
    return model


def blocks(backbone: Backbone) -> dict[str, Any]:
    """Return open_clip's own blocks by tower."""
    clip: Any = backbone.clip
    return {
        "text": clip.transformer.resblocks,
        "image": clip.visual.transformer.resblocks,
    }


def add_adapter(
    own: dict[str, Any],
    tower: str,
    block: Any,
    x: Tensor,
    output: Tensor,
) -> Tensor:
    """Return the output of a block with MMA's formula for the first adapter."""
    x = block.ln_1(x)
    for name in (f"{tower}.0.down", "shared.0"):
        x = F.relu(F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"]))
    return output + SCALE * F.linear(
        x,
        own[f"{tower}.0.up.weight"],
        own[f"{tower}.0.up.bias"],
    )


def own_features(backbone: Backbone, tokens: Tensor, pixels: Tensor) -> list[Tensor]:
    """Return normalized features of texts and images by open_clip's own encoders."""
    clip: Any = backbone.clip
    whole = F.pad(tokens, (0, backbone.context_length - tokens.shape[1]))
    return [
        clip.encode_text(whole, normalize=True),
        clip.encode_image(pixels, normalize=True),
    ]


@torch.no_grad()
def test_mma_adds_adapters_with_a_shared_layer_to_the_last_blocks_of_both_towers(
    backbone: Backbone,
) -> None:
    model = moved_model(backbone, "mma")
    hooks = []
    own: dict[str, Any] = {
        name.removeprefix("encoders."): value for name, value in model.trainables()
    }
    tokens = backbone.tokenize(TEXTS)
    pixels = torch.randn(2, 3, 32, 32)
    frozen = own_features(backbone, tokens, pixels)
    vectors = [model.encode_text(tokens), model.encode_image(pixels)]
    # of two blocks, two thirds are one
    for tower, (_, last) in blocks(backbone).items():
        hooks.append(
            last.register_forward_hook(
                lambda block, x, y, at=tower: add_adapter(own, at, block, x[0], y)
            )
        )
    expected = own_features(backbone, tokens, pixels)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(vectors, expected)
    for before, after in zip(frozen, vectors, strict=True):
        assert not torch.allclose(before, after, atol=1e-3)


@torch.no_grad()
def test_mmrl_puts_tokens_behind_the_first_row_of_the_last_blocks_and_reads_them_apart(
    backbone: Backbone,
) -> None:
    model = moved_model(backbone, "mmrl")
    hooks = []
    read = []
    own: dict[str, Any] = {
        name.removeprefix("encoders."): value for name, value in model.trainables()
    }
    tokens = backbone.tokenize(TEXTS)
    pixels = torch.randn(2, 3, 32, 32)
    vectors = [model.encode_text(tokens), model.encode_image(pixels)]
    both = model.encode_image(pixels, rows=True)
    for tower, (_, last) in blocks(backbone).items():
        added = F.linear(
            own["tokens"],
            own[f"{tower}.0.weight"],
            own[f"{tower}.0.bias"],
        ).expand(2, -1, -1)

        def insert(
            block: Any,
            x: Any,
            options: Any,
            added: Tensor = added,
        ) -> tuple[Any, Any]:
            longer = torch.cat([x[0][:, :1], added, x[0][:, 1:]], 1)
            mask = torch.full((longer.shape[1],) * 2, -torch.inf).triu(1)
            return (longer,), options | (
                {"attn_mask": mask} if options.get("attn_mask") is not None else {}
            )

        def remove(block: Any, x: Any, longer: Tensor) -> Tensor:
            read.append(longer[:, 1:6])
            return torch.cat([longer[:, :1], longer[:, 6:]], 1)

        hooks.append(last.register_forward_pre_hook(insert, with_kwargs=True))
        hooks.append(last.register_forward_hook(remove))
    expected = own_features(backbone, tokens, pixels)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(vectors, expected)
    second = F.normalize(
        backbone.visual.ln_post(read[1]).mean(1) @ own["project"], dim=-1
    )
    torch.testing.assert_close(both, torch.stack([expected[1], second], 1))


@pytest.mark.parametrize("parts", [1, 3])
def test_the_loss_of_mmrl_is_that_of_the_paper(
    backbone: Backbone,
    tiny_data: Path,
    parts: int,
) -> None:
    model = moved_model(backbone, "mmrl")
    pairs = Annotations(tiny_data).load("train")[0]
    data = prepare_split(pairs, model, for_training=True)
    rows = np.arange(4)
    value = accumulate_gradients(model, data, rows, parts=parts)
    assert data.pixels is not None
    with torch.no_grad():
        pixels = backbone.standardized(data.pixels[data.image_of[rows]])
        text = model.encode_text(data.tokens[rows])
        images = model.encode_image(pixels, rows=True)
        truth = torch.arange(4)
        same = 0.0
        assert len({pairs.samples[row].caption for row in rows}) == len(rows)
        for weight, image in zip((0.7, 0.3), images.unbind(1), strict=True):
            logits = backbone.scale * text @ image.T
            same += (
                weight
                * float(
                    F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
                )
                / 2
            )
        for adapted, frozen in (
            (text, backbone.encode_text(data.tokens[rows])),
            (images[:, 0], backbone.encode_image(pixels)),
        ):
            same += float((1 - F.cosine_similarity(adapted, frozen)).mean())
    assert value == pytest.approx(same, rel=1e-5)


def test_methods_are_compared_and_served_by_no_runtime(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    words = [
        "--data",
        str(tiny_data),
        "--model",
        str(tiny_model),
        "--epochs",
        "1",
        "--batch-size",
        "6",
    ]
    words += ["--methods", "mma,mmrl", "--seeds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["evaluate", *words], catch_exceptions=False)
    for name in METHODS:
        assert f"\n| {name} |" in done.output
        (run,) = (tmp_path / "runs" / name).iterdir()
        with pytest.raises(
            ModelError,
            match=f"{name} can be compared by `dcar evaluate`, but not served",
        ):
            Encoder.load(run)


@pytest.mark.parametrize("name", METHODS)
def test_towers_of_another_kind_are_refused(name: str, tmp_path: Path) -> None:
    text = {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
    }
    backbone = load_backbone(
        BackboneSource(str(write_model(tmp_path / "model", text_cfg=text)))
    )
    with pytest.raises(
        ModelError, match=f"{name} needs both towers of CLIP's own kind; .*: use lora"
    ):
        seeded_model(backbone, find_method(name).config, 0)
