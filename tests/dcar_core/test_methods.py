"""Methods: LoRA, ProLIP and FLYP, which change the backbone's own weights, PromptSRC,
and all of them.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_core import Encoder
from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from dcar_core.model.config import MODEL_CONFIG, plain_config
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import (
    METHODS,
    Method,
    consistency_loss,
    find_method,
    interpolate,
)
from dcar_core.model.weight_changes import merge
from dcar_core.util.errors import DcarError, ModelError
from tests.support.parts import needs
from tests.support.tiny_models import write_tiny_model


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(
        2,
        3,
        32,
        32,
        generator=torch.Generator().manual_seed(0),
    )


def changed_model(backbone: Backbone, name: str) -> DCAR:
    """Return a model whose weights have moved."""
    model = seeded_model(backbone, find_method(name).config, 0)
    assert model.changes is not None
    with torch.no_grad():
        for high in model.changes.high.values():
            high.normal_(std=0.02)
    return model


@pytest.mark.parametrize(
    ("name", "text_is_frozen"),
    [
        ("lora", False),
        ("prolip", True),
        ("flyp", False),
        ("filip", False),
    ],
)
@torch.no_grad()
def test_a_checkpoint_holds_the_merged_model_and_the_shared_backbone_stays(
    name: str,
    text_is_frozen: bool,
    backbone: Backbone,
    pixels: Tensor,
    tmp_path: Path,
) -> None:
    before = backbone.content_hash()
    tokens = backbone.tokenize(["a red square", "a blue cross"])
    frozen = [
        F.normalize(each, dim=-1)
        for each in (backbone.encode_image(pixels), backbone.encode_text(tokens))
    ]
    start = seeded_model(backbone, find_method(name).config, 0)
    torch.testing.assert_close(
        [start.encode_image(pixels), start.encode_text(tokens)], frozen
    )
    assert start.changes is not None
    assert merge(backbone, start.changes, tmp_path).content_hash() == before, (
        "a change of zero is the same"
    )
    model = changed_model(backbone, name)
    assert model.text_is_frozen == text_is_frozen
    assert model.image_is_frozen is False
    assert not torch.allclose(model.encode_image(pixels), frozen[0], atol=1e-3)
    saved = tmp_path / "saved"
    published = tmp_path / "published"
    save_checkpoint(model, saved)
    copy_checkpoint(saved, published)
    # another training leaves the copy's merged model alone
    save_checkpoint(changed_model(backbone, "prolip"), saved)
    loaded, _ = load_checkpoint(published)
    assert loaded.config.method == name
    assert loaded.changes is None
    assert loaded.text_is_frozen is True
    torch.testing.assert_close(loaded.encode_image(pixels), model.encode_image(pixels))
    torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))
    assert backbone.content_hash() == before


@needs("hf")
def test_a_merged_model_has_the_configuration_of_its_text_encoder(
    tmp_path: Path,
) -> None:
    directory = write_tiny_model("xlm-roberta-base-ViT-B-32", tmp_path / "model")
    config = json.loads((directory / MODEL_CONFIG).read_text())["model_cfg"]
    encoder = config["text_cfg"]["hf_model_name"]
    original = load_backbone(BackboneSource(str(directory)))
    model = seeded_model(original, find_method("lora").config, 0)
    assert model.changes is not None
    merged = merge(original, model.changes, tmp_path / "out")
    assert merged.source.directory is not None
    assert (merged.source.directory / encoder / "config.json").is_file()
    assert merged.content_hash() == original.content_hash()


def test_validation_chooses_between_frozen_and_trained_weights(
    backbone: Backbone,
) -> None:
    model = changed_model(backbone, "flyp")
    assert model.changes is not None
    name = "visual/proj"
    whole = model.changes.high[name].detach().clone()
    recalls = iter([50.0, 70.0, 60.0, 10.0])  # of the shares 1, 0.75, 0.5, 0.25
    interpolate(model.changes, lambda: next(recalls))
    torch.testing.assert_close(model.changes.high[name].detach(), 0.75 * whole)


def test_consistency_with_the_frozen_encoders() -> None:
    text, image, other = F.normalize(
        torch.randn(
            3,
            4,
            8,
            generator=torch.Generator().manual_seed(0),
        ),
        dim=-1,
    )
    scale = torch.tensor(10.0)
    assert float(consistency_loss(text, image, text, image, scale)) == pytest.approx(
        0, abs=1e-6
    )
    adapted, frozen = (
        (scale * each @ text.T).softmax(1).double() for each in (other, image)
    )
    # over the captions too, so it hardly counts
    divergence = (frozen * (frozen / adapted).log()).mean()
    images = (other - image).abs().mean()
    assert float(consistency_loss(text, other, text, image, scale)) == pytest.approx(
        float(10 * images + divergence)
    )
    captions = (other - text).abs().mean()
    adapted, frozen = (
        (scale * image @ each.T).softmax(1).double() for each in (other, text)
    )
    divergence = (frozen * (frozen / adapted).log()).mean()
    assert float(consistency_loss(other, image, text, image, scale)) == pytest.approx(
        float(25 * captions + divergence)
    )


class Shifted(nn.Module):
    """Encoders that add a learned vector to the backbone's features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(backbone.embed_dim))

    def encode_text(self, backbone: Backbone, tokens: Tensor, rows: bool) -> Tensor:
        return backbone.encode_text(tokens, rows=rows) + self.shift

    def encode_image(self, backbone: Backbone, pixels: Tensor, rows: bool) -> Tensor:
        return backbone.encode_image(pixels, rows=rows) + self.shift


@torch.no_grad()
def test_encoders_of_a_plugin_are_in_its_checkpoint_but_no_runtime_serves_them(
    backbone: Backbone,
    pixels: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = backbone.tokenize(["a red square", "a blue cross"])
    with monkeypatch.context() as installed:
        installed.setitem(
            METHODS,
            "shifted",
            Method(config=plain_config("shifted"), encoders=Shifted),
        )
        model = seeded_model(backbone, find_method("shifted").config, 0)
        assert [name for name, _ in model.trainables()] == ["encoders.shift"]
        assert model.text_is_frozen is False
        assert model.image_is_frozen is False
        save_checkpoint(model, tmp_path)
        loaded, _ = load_checkpoint(tmp_path)
        expected = F.normalize(
            backbone.encode_text(tokens) + dict(model.trainables())["encoders.shift"],
            dim=-1,
        )
        torch.testing.assert_close(
            [model.encode_text(tokens), loaded.encode_text(tokens)], [expected] * 2
        )
        torch.testing.assert_close(
            loaded.encode_image(pixels), model.encode_image(pixels)
        )
        for runtime in ("torch", "openvino"):
            with pytest.raises(
                ModelError,
                match="shifted can be compared by `dcar evaluate`, but not served",
            ):
                Encoder.load(tmp_path, runtime=runtime)
    with pytest.raises(DcarError, match="no method is named 'shifted'"):
        load_checkpoint(tmp_path)
