"""Methods that change the backbone's own weights or the loss, and DCAR's ablations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_baselines.filip import late_interaction_loss
from dcar_baselines.flyp import interpolate
from dcar_baselines.promptsrc import consistency_loss
from dcar_core.data import Dataset
from dcar_core.evaluation.method_runner import serving_cost
from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from dcar_core.model.config import MODEL_CONFIG, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import METHODS, find_method
from dcar_core.model.weight_changes import merge
from dcar_core.training.objective import contrastive_loss
from dcar_core.training.train import train
from dcar_core.util.errors import DcarError
from tests.app.test_cli import dcar
from tests.support.parts import needs
from tests.support.tiny_models import write_tiny_model
from tests.support.training import (
    batch_loss,
    check_parts,
    model_and_data,
    move_weights,
)

NAMES = (
    "dcar-alone",
    "dcar-deep",
    "dcar-no-category",
    "dcar-no-weights",
    "dcar-patches",
    "dual",
    "filip",
    "flyp",
    "lora",
    "mma",
    "mmrl",
    "prolip",
    "promptsrc",
)


def features(n: int, seed: int) -> Tensor:
    return F.normalize(
        torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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
    [("lora", False), ("prolip", True), ("flyp", False), ("filip", False)],
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
        torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1
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


def test_late_interaction_is_the_mean_of_the_best_similarities() -> None:
    """One pair after the other; the second caption has two words, and padding, the
    third none.
    """
    words = features(12, 0).reshape(3, 4, 8)
    patches = features(15, 1).reshape(3, 5, 8)
    words[1, 2:] = 0
    words[2] = 0
    scale = torch.tensor(10.0)
    own = torch.eye(3, dtype=torch.bool)
    by_words = torch.zeros(3, 3)
    by_patches = torch.full((3, 3), -1.0)
    for i, count in ((0, 4), (1, 2)):
        for j in range(3):
            cosines = words[i, :count] @ patches[j].T
            by_words[i, j] = cosines.max(1).values.mean()
            by_patches[i, j] = cosines.max(0).values.mean()
    to_image = F.cross_entropy(10 * by_words, torch.arange(3))
    to_text = F.cross_entropy(10 * by_patches.T, torch.arange(3))
    torch.testing.assert_close(
        late_interaction_loss(words, patches, own, scale), (to_image + to_text) / 2
    )
    torch.testing.assert_close(
        late_interaction_loss(words, patches, own, scale, "image-to-text"), to_text
    )


@pytest.mark.parametrize("name", ["filip", "promptsrc", "prolip"])
def test_loss_of_a_method_has_its_terms(
    name: str,
    backbone: Backbone,
    described_twice: Dataset,
) -> None:
    config = find_method(name).config.with_loss_direction("image-to-text")
    samples = described_twice.samples
    model, data = move_weights(seeded_model(backbone, config, 0), described_twice)
    pixels = backbone.standardized(
        np.stack(
            [backbone.preprocess(described_twice.read(each.image)) for each in samples]
        )
    )
    tokens = data.tokens
    positives = torch.from_numpy(data.positives(np.arange(len(data))))
    text = model.encode_text(tokens)
    image = model.encode_image(pixels)
    wanted = contrastive_loss(text, image, positives, backbone.scale, "image-to-text")
    if name == "filip":
        words = (
            model.encode_text(tokens, rows=True)[:, 1:]
            * backbone.layout.caption_mask(tokens)[..., None]
        )
        patches = model.encode_image(pixels, rows=True)[:, 1:]
        wanted = (
            wanted
            + late_interaction_loss(
                words,
                patches,
                positives,
                backbone.scale,
                "image-to-text",
            )
        ) / 2
    elif name == "promptsrc":
        read = backbone.encode_text(
            backbone.tokenize([each.caption for each in samples])
        )
        frozen_text, frozen_image = (
            F.normalize(rows, dim=-1) for rows in (read, backbone.encode_image(pixels))
        )
        wanted = wanted + consistency_loss(
            text,
            image,
            frozen_text,
            frozen_image,
            backbone.scale,
        )
    else:
        assert model.changes is not None
        wanted = wanted + sum(
            high.square().sum() for high in model.changes.high.values()
        )
    torch.testing.assert_close(
        batch_loss(model, data, np.arange(len(data))),
        wanted,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_batch_in_parts_has_the_gradients_of_the_whole(
    name: str,
    uneven: Backbone,
    described_twice: Dataset,
) -> None:
    """Some images have several captions; of twenty parts some are empty."""
    model, data = model_and_data(uneven, described_twice, name)
    found = check_parts(model, data, np.random.default_rng(0).permutation(len(data)))
    # trained afterwards
    learned = {
        part for part, _ in model.trainables() if not part.startswith("query_prompts.")
    }
    assert learned == found.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_method_trains_and_leaves_the_backbone_as_it_was(
    name: str,
    backbone: Backbone,
    pairs: tuple[Dataset, Dataset],
) -> None:
    before = backbone.content_hash()
    model = seeded_model(backbone, find_method(name).config, 0)
    start = {n: p.detach().clone() for n, p in model.trainables()}
    found = train(model, *pairs, TrainConfig(epochs=2, batch_size=6))
    assert backbone.content_hash() == before
    assert all(
        p.grad is None for n, p in model.named_parameters() if n.startswith("backbone.")
    )
    # every part learns
    assert all(not torch.equal(start[n], p) for n, p in model.trainables())
    assert len(found.history) == 2


def test_changed_weights_need_a_backbone_of_their_own(backbone: Backbone) -> None:
    cost = serving_cost(seeded_model(backbone, find_method("lora").config, 0))
    assert (cost["backbone"], cost["gallery"]) == ("own", "encoded again")
    assert cost["bytes"] >= sum(4 * p.numel() for p in backbone.clip.parameters())


def test_an_unknown_name_lists_those_of_the_plug_in() -> None:
    with pytest.raises(DcarError, match=r"there are: clip, .*dcar-alone, .*promptsrc"):
        find_method("nothing")
    assert not METHODS.keys() & set(NAMES)


def test_diverged_training_refuses_no_lower_rate(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    command = (
        "train",
        "--data",
        tiny_data,
        "--model",
        tiny_model,
        "--method",
        "prolip",
        "--epochs",
        3,
    )
    done = dcar(*command, "--out", tmp_path, "--lr", "1e30")
    assert (
        str(done.exception)
        == "prolip diverged: the loss is inf in epoch 2; use a lower --lr"
    )
    done = dcar(*command, "--out", tmp_path, "--lr", "1e-4")
    assert done.exit_code in (0, 3), done.output
