"""Loaded backbones: prompts, adapters and tokens; test_towers.py compares every architecture with open_clip."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.config import ModelConfig, PromptConfig
from dcar_core.model.dcar import DCAR
from dcar_core.model.methods.registry import method
from dcar_core.util.errors import ModelError

TEXTS = ["a red square", "x", "a much longer caption of a small green circle beside a wall"]


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_prompts_of_word_embeddings_equal_the_prefixed_sentence(backbone: Backbone) -> None:
    model = DCAR(backbone, ModelConfig(prompt=PromptConfig(image=False)))
    with torch.no_grad():
        prompted = model.encode_text(backbone.tokenize(TEXTS, model.prompt_tokens))
        written = F.normalize(backbone.encode_text(backbone.tokenize([f"a photo of a {t}" for t in TEXTS])), dim=-1)
    torch.testing.assert_close(prompted, written, rtol=1e-5, atol=1e-6)


def test_block_adapters_start_without_effect_and_leave_texts_alone(backbone: Backbone, pixels: torch.Tensor) -> None:
    model = DCAR(backbone, method("block-adapters"))
    tokens = backbone.tokenize(TEXTS)
    assert model.text_is_frozen
    assert not model.image_is_frozen
    assert model.block_adapters is not None
    with torch.no_grad():
        stock = F.normalize(backbone.encode_image(pixels), dim=-1)
        torch.testing.assert_close(model.encode_image(pixels), stock, rtol=0, atol=1e-6)
        model.block_adapters.up.normal_(std=0.2)
        assert not torch.allclose(model.encode_image(pixels), stock, atol=0.01)
        torch.testing.assert_close(model.encode_text(tokens), F.normalize(backbone.encode_text(tokens), dim=-1))


def test_end_of_text_survives_a_long_caption_and_a_marker_is_stripped(backbone: Backbone) -> None:
    tokens = backbone.tokenize(["word " * 100], prompt_tokens=4)
    assert tokens.shape[1] == 28
    assert tokens[0, -1] == 49407
    marked = backbone.tokenize(["a red <end_of_text> square"])
    assert torch.equal(marked, backbone.tokenize(["a red   square"]))


def test_token_features_encode_each_token_alone(backbone: Backbone) -> None:
    tokens = backbone.tokenize(["a red square", "red"])
    found = backbone.lone_token_features(tokens)
    assert found.shape == (2, 5, backbone.embed_dim)
    torch.testing.assert_close(found[0, 2], backbone.encode_text(backbone.tokenize(["red"]))[0])
    torch.testing.assert_close(found[0, 2], found[1, 1])


def test_patch_features_are_the_projected_tokens(backbone: Backbone, pixels: torch.Tensor) -> None:
    patches = backbone.image_tower.patch_features(pixels)
    assert patches.shape == (len(pixels), backbone.patch_grid**2, backbone.embed_dim)
    visual = backbone.visual
    tokens = visual._pool(visual.transformer(visual._embeds(pixels)))[1]
    torch.testing.assert_close(patches, tokens @ visual.proj)


def test_too_many_tokens_for_the_context_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="the context holds 32"):
        backbone.encode_text(backbone.tokenize(["word " * 100]), torch.zeros(1, 4, 64))


@pytest.mark.slow
def test_real_architecture_loads_bit_for_bit_from_both_kinds_of_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    state = {name: value.contiguous() for name, value in clip.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, str(tmp_path / "weights.safetensors"))
    for file in ("weights.pt", "weights.safetensors"):
        backbone = load_backbone(BackboneSource("ViT-S-32-alt", str(tmp_path / file)))
        loaded = backbone.clip.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
        assert (backbone.text_width, backbone.vision_width, backbone.embed_dim) == (256, 384, 256)
        with torch.no_grad():
            tokens = open_clip.get_tokenizer("ViT-S-32-alt")(["a dog"])
            torch.testing.assert_close(backbone.encode_text(tokens), clip.eval().encode_text(tokens), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "weights", "reason"),
    [
        ("{tiny}", "openai", "has weights of its own; leave out --pretrained openai"),
        ("ViT-Z", None, "no model is named 'ViT-Z'"),
        ("ViT-B-16-SigLIP3", "webli", "no model is named 'ViT-B-16-SigLIP3'; near it are .*ViT-B-16-SigLIP2.*"),
        ("{empty}", None, "has no open_clip_config"),
        ("ViT-B-32-quickgelu", None, r"random weights; give --pretrained a tag \(openai"),
        ("ViT-B-32", "weights.pkl", "pickle"),
    ],
)
def test_unknown_models_and_wrong_weights_are_refused(
    model: str, weights: str | None, reason: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        load_backbone(BackboneSource(model.format(tiny=tiny_model, empty=tmp_path), weights))


def test_pickle_in_a_pt_file_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_backbone(BackboneSource("ViT-S-32-alt", str(tmp_path / "evil.pt")))
