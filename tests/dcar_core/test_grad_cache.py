"""One step: parts and mixed precision against the plain pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import Amp, LossConfig, ReweightConfig, TrainWeights
from dcar_core.model.dcar import DCAR
from dcar_core.model.methods.registry import METHODS, method
from dcar_core.training import objective
from dcar_core.training.objective import (
    MixedPrecision,
    accumulate_gradients,
    anchor_loss,
    category_loss,
    contrastive_loss,
    head_loss,
    resolve_amp,
)
from dcar_core.training.prepared_split import PreparedSplit
from tests.support.training import batch_loss, model_and_data, move_weights


def gradients(model: DCAR) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.trainables() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_parts_have_the_gradients_of_the_whole(
    model: DCAR, data: PreparedSplit, rows: np.ndarray, *numbers: int
) -> None:
    whole = batch_loss(model, data, rows)
    whole.backward()  # type: ignore[no-untyped-call]
    expected = gradients(model)
    for parts in numbers:
        value = accumulate_gradients(model, data, rows, parts=parts)
        found = gradients(model)
        assert expected.keys() == found.keys()
        assert value == pytest.approx(float(whole.detach()), rel=1e-5), parts
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5, msg=f"{key}, {parts} parts")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "clip"])
@pytest.mark.slow
def test_a_batch_in_parts_has_the_gradients_of_the_whole(name: str, backbone: Backbone, training: Dataset) -> None:
    model, data = model_and_data(backbone, training, name)
    assert_parts_have_the_gradients_of_the_whole(model, data, np.arange(len(data)), 1, 2, 5, 20)


@pytest.mark.parametrize("name", ["clip-adapter", "dcar", "dcar+"])
def test_parts_with_several_captions_per_image_have_the_gradients_of_the_whole(
    name: str, backbone: Backbone, described_twice: Dataset
) -> None:
    model, data = model_and_data(backbone, described_twice, name)
    assert_parts_have_the_gradients_of_the_whole(model, data, np.random.default_rng(0).permutation(len(data)), 1, 4)


@pytest.mark.parametrize("weights", ["none", "pair"])
def test_loss_equals_the_pairs_one_by_one(weights: TrainWeights, backbone: Backbone, described_twice: Dataset) -> None:
    """Compute the loss with every caption and image encoded alone, from its four weighted terms."""
    config = replace(
        method("dcar+"),
        reweight=ReweightConfig(train=weights),
        loss=LossConfig(category=0.3, head=0.7, anchor=0.2, alpha=0.4),
    )
    torch.manual_seed(0)
    model, data = move_weights(DCAR(backbone, config), described_twice)
    normal, scale = torch.nn.functional.normalize, backbone.scale
    texts, images, frozen_texts, frozen_images, captions = [], [], [], [], []
    predicted = model.predicted_weights(data.tokens)
    used, category_adapter = data.pair_weights, model.category_adapter()
    assert category_adapter is not None
    assert (used is None) == (weights == "none")
    for i, sample in enumerate(described_twice.samples):
        picture = backbone.preprocess(described_twice.read(sample.image))[None]
        pixels = torch.from_numpy(backbone.preprocess.normalize(picture))
        texts.append(model.encode_text(data.tokens[i : i + 1], None if used is None else used[i : i + 1]))
        images.append(model.encode_image(pixels))
        frozen_images.append(normal(backbone.encode_image(pixels), dim=-1))
        frozen_texts.append(normal(backbone.encode_text(backbone.tokenize([sample.caption])), dim=-1))
        read = normal(backbone.encode_text(backbone.tokenize([sample.caption, *sample.negatives])), dim=-1)
        short = data.candidate_weights.shape[1] - len(read) if data.candidate_weights is not None else 0
        captions.append(torch.nn.functional.pad(category_adapter(read), (0, 0, 0, short)))
    text, image = torch.cat(texts), torch.cat(images)
    assert data.candidate_weights is not None
    wanted = contrastive_loss(text, image, torch.from_numpy(data.positives(np.arange(len(data)))), scale)
    wanted = wanted + 0.3 * category_loss(image, torch.stack(captions), data.candidate_weights, scale)
    if predicted is not None and data.pair_weights is not None:
        wanted = wanted + 0.7 * head_loss(predicted, data.pair_weights, model.backbone.layout.caption_mask(data.tokens))
    held = anchor_loss(image, torch.cat(frozen_images)) + anchor_loss(text, torch.cat(frozen_texts))
    torch.testing.assert_close(batch_loss(model, data, np.arange(len(data))), wanted + 0.2 * held, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_is_close_to_full(amp: Amp, backbone: Backbone, training: Dataset) -> None:
    model, data = model_and_data(backbone, training, "dcar")
    rows = np.arange(len(data))
    full = accumulate_gradients(model, data, rows)
    expected = gradients(model)
    precision = MixedPrecision(amp, torch.device("cpu"))
    mixed = accumulate_gradients(model, data, rows, precision=precision)
    scale = precision.scaler.get_scale()
    assert mixed != full  # it really was another precision
    assert mixed == pytest.approx(full, rel=0.02)
    for key, gradient in gradients(model).items():
        similar = torch.cosine_similarity((gradient / scale).flatten(), expected[key].flatten(), dim=0)
        assert similar > 0.9, key


@pytest.mark.parametrize("loss", ["category_loss", "head_loss", "anchor_loss", "contrastive_loss"])
def test_losses_are_full_precision_in_a_mixed_pass(
    loss: str, backbone: Backbone, training: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = getattr(objective, loss), []

    def spy(*given: Any) -> Tensor:
        seen.append(
            (
                torch.is_autocast_enabled("cpu"),
                {each.dtype for each in given if isinstance(each, Tensor) and each.is_floating_point()},
            )
        )
        return whole(*given)

    monkeypatch.setattr(objective, loss, spy)
    model, data = model_and_data(backbone, training, "dcar+")
    accumulate_gradients(model, data, np.arange(len(data)), precision=MixedPrecision("bfloat16", torch.device("cpu")))
    assert seen
    assert all(each == (False, {torch.float32}) for each in seen)


def test_precision_is_full_where_the_device_has_nothing_better() -> None:
    assert MixedPrecision("auto", torch.device("cpu")).name == "off"


def test_automatic_precision_takes_no_emulated_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch calls bfloat16 supported on any GPU that can emulate it, at a fraction of float16's speed."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_amp("auto", torch.device("cuda")) == "float16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_amp("auto", torch.device("cuda")) == "bfloat16"
