"""The loss terms and token weights against hand calculations, and one step in parts and
in mixed precision.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import (
    Amp,
    LossConfig,
    ReweightConfig,
    TrainWeights,
)
from dcar_core.model.dcar import DCAR
from dcar_core.model.methods import METHODS, find_method
from dcar_core.model.token_weights import blend, pair_weights
from dcar_core.training import objective
from dcar_core.training.objective import (
    MixedPrecision,
    accumulate_gradients,
    anchor_loss,
    category_loss,
    contrastive_loss,
    head_loss,
    resolve_amp,
    warn_once,
)
from dcar_core.util import machine
from tests.support.training import (
    batch_loss,
    check_parts,
    gradients,
    model_and_data,
    move_weights,
)


def features(n: int, seed: int) -> torch.Tensor:
    return F.normalize(
        torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


SCALE = torch.tensor(20.0)


@pytest.mark.parametrize("positives", ["own", "asymmetric"])
def test_contrastive_loss_equals_a_hand_calculation(positives: str) -> None:
    """Caption 0 may also match image 1, caption 1 only its own: rows and columns have
    different targets.
    """
    text = features(3, 0)
    image = features(3, 1)
    own = torch.eye(3, dtype=torch.bool)
    own[0, 1] = positives == "asymmetric"
    logits = SCALE * text @ image.T
    to_image = F.cross_entropy(logits, own / own.sum(1, keepdim=True))
    to_text = F.cross_entropy(logits.T, own.T / own.T.sum(1, keepdim=True))
    torch.testing.assert_close(
        contrastive_loss(text, image, own, SCALE), (to_image + to_text) / 2
    )
    torch.testing.assert_close(
        contrastive_loss(text, image, own, SCALE, "image-to-text"), to_text
    )


def test_category_loss_equals_a_hand_calculation_and_ignores_padding() -> None:
    image = features(1, 0)
    scale = torch.tensor(10.0)
    captions = features(3, 1).unsqueeze(0)
    weights = torch.tensor([[1.0, 1.0, 1.5]])
    scores = 10 * captions[0] @ image[0]
    odds = torch.tensor([1.0, 1.0, 1.5]) * scores.exp()
    torch.testing.assert_close(
        category_loss(image, captions, weights, scale), -(odds[0] / odds.sum()).log()
    )
    padded = torch.cat([captions, torch.zeros(1, 1, 8)], 1)
    torch.testing.assert_close(
        category_loss(image, padded, torch.tensor([[1.0, 1.0, 1.5, 0.0]]), scale),
        category_loss(image, captions, weights, scale),
    )


def test_anchor_and_head_loss_equal_a_hand_calculation() -> None:
    frozen = features(4, 0)
    real = torch.tensor([[False, True, True, False]])
    assert anchor_loss(frozen, frozen).abs() < 1e-6
    torch.testing.assert_close(anchor_loss(-frozen, frozen), torch.tensor(2.0))
    weights = torch.tensor([[9.0, 1.0, 2.0, 9.0]])
    assert head_loss(weights, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), real).item() == 2.0


def test_pair_weights_and_their_blend_equal_a_hand_calculation() -> None:
    words = torch.tensor(
        [
            [
                [1.0, 0.0],
                [1.0, 0.0],
                [0.0, 1.0],
                [1.0, 0.0],
            ]
        ]
    )
    raw = pair_weights(
        words,
        image=torch.tensor([[0.0, 2.0]]),
        blank=torch.tensor([1.0, 1.0]),
    )
    half = 2**-0.5
    torch.testing.assert_close(raw, torch.tensor([[half, half, 1 - half, half]]))
    real = torch.tensor([[False, True, True, False]])  # SOS, two words, EOT
    weights = blend(raw, real, ReweightConfig(strength=0.5, low=0.8, high=1.2))
    assert weights[0, 0] == weights[0, 3] == 1
    # 1.207 and 0.793, clipped
    torch.testing.assert_close(weights[0, 1:3], torch.tensor([1.2, 0.8]))
    gentle = blend(raw, real, ReweightConfig(strength=0.1))[0, 1:3]
    torch.testing.assert_close(
        gentle, 1 + 0.1 * torch.tensor([2 * half - 1, 1 - 2 * half])
    )
    # a white image
    assert blend(torch.zeros(1, 4), real, ReweightConfig()).isfinite().all()
    words = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    patches = torch.tensor([[[3.0, 4.0], [0.0, -1.0]]])
    white = torch.tensor([[1.0, 0.0], [5.0, 12.0]])
    best = pair_weights(words, patches, white)  # by the most similar patch
    torch.testing.assert_close(best, torch.tensor([[1 - 0.6, 12 / 13 - 0.8]]))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "clip"])
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


@pytest.mark.parametrize("weights", ["none", "pair"])
def test_loss_equals_the_pairs_one_by_one(
    weights: TrainWeights,
    backbone: Backbone,
    described_twice: Dataset,
) -> None:
    """Compute the loss with every caption and image encoded alone, from its four
    weighted terms.
    """
    terms = LossConfig(category=0.3, head=0.7, anchor=0.2, alpha=0.4)
    config = replace(
        find_method("dcar+").config,
        reweight=ReweightConfig(train=weights),
        loss=terms,
    )
    torch.manual_seed(0)
    model, data = move_weights(DCAR(backbone, config), described_twice)
    used = data.pair_weights
    adapter = model.category_adapter()
    candidates = data.candidate_weights
    assert (used is None) == (weights == "none")
    assert adapter is not None
    assert candidates is not None
    texts = []
    images = []
    frozen_texts = []
    frozen_images = []
    captions = []
    for i, sample in enumerate(described_twice.samples):
        picture = backbone.preprocess(described_twice.read(sample.image))[None]
        pixels = torch.from_numpy(backbone.preprocess.standardize(picture))
        texts.append(
            model.encode_text(
                data.tokens[i : i + 1], None if used is None else used[i : i + 1]
            )
        )
        images.append(model.encode_image(pixels))
        frozen_images.append(F.normalize(backbone.encode_image(pixels), dim=-1))
        frozen_texts.append(
            F.normalize(
                backbone.encode_text(backbone.tokenize([sample.caption])), dim=-1
            )
        )
        read = F.normalize(
            backbone.encode_text(
                backbone.tokenize([sample.caption, *sample.negatives])
            ),
            dim=-1,
        )
        captions.append(
            F.pad(adapter(read), (0, 0, 0, candidates.shape[1] - len(read)))
        )
    text = torch.cat(texts)
    image = torch.cat(images)
    positives = torch.from_numpy(data.positives(np.arange(len(data))))
    wanted = contrastive_loss(text, image, positives, backbone.scale)
    wanted = wanted + 0.3 * category_loss(
        image,
        torch.stack(captions),
        candidates,
        backbone.scale,
    )
    predicted = model.predicted_weights(data.tokens)
    if predicted is not None and used is not None:
        wanted = wanted + 0.7 * head_loss(
            predicted,
            used,
            backbone.layout.caption_mask(data.tokens),
        )
    held = anchor_loss(image, torch.cat(frozen_images)) + anchor_loss(
        text, torch.cat(frozen_texts)
    )
    torch.testing.assert_close(
        batch_loss(model, data, np.arange(len(data))),
        wanted + 0.2 * held,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_is_close_to_full(
    amp: Amp,
    backbone: Backbone,
    training: Dataset,
) -> None:
    model, data = model_and_data(backbone, training, "dcar")
    rows = np.arange(len(data))
    full = accumulate_gradients(model, data, rows)
    expected = gradients(model)
    precision = MixedPrecision(amp, torch.device("cpu"))
    with precision.autocast():
        assert torch.get_autocast_dtype("cpu") == getattr(torch, amp)
    mixed = accumulate_gradients(model, data, rows, precision=precision)
    scale = precision.scaler.get_scale()
    assert mixed != full  # it really was another precision
    assert mixed == pytest.approx(full, rel=0.02)
    for key, gradient in gradients(model).items():
        similar = torch.cosine_similarity(
            (gradient / scale).flatten(),
            expected[key].flatten(),
            dim=0,
        )
        assert similar > 0.9, key


def test_losses_are_full_precision_in_a_mixed_pass(
    backbone: Backbone,
    training: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("category_loss", "head_loss", "anchor_loss", "contrastive_loss")
    seen = []

    def spy(name: str, whole: Any, *given: Any) -> Tensor:
        dtypes = {
            each.dtype
            for each in given
            if isinstance(each, Tensor) and each.is_floating_point()
        }
        seen.append((name, torch.is_autocast_enabled("cpu"), dtypes))
        return whole(*given)

    for name in names:
        monkeypatch.setattr(
            objective,
            name,
            partial(spy, name, getattr(objective, name)),
        )
    model, data = model_and_data(backbone, training, "dcar+")
    accumulate_gradients(
        model,
        data,
        np.arange(len(data)),
        precision=MixedPrecision("bfloat16", torch.device("cpu")),
    )
    assert {name for name, *_ in seen} == {*names}
    assert all(precision == [False, {torch.float32}] for _, *precision in seen)


def test_automatic_precision_takes_no_emulated_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PyTorch calls bfloat16 supported on any GPU that can emulate it, at a fraction of
    float16's speed.
    """
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : avx512_bf16 avx2\n")
    MixedPrecision("bfloat16", torch.device("cpu"))
    (tmp_path / "cpuinfo").write_text("flags : avx2\n")
    assert MixedPrecision("auto", torch.device("cpu")).name == "off"
    assert not caplog.messages
    warn_once.cache_clear()
    for _ in range(2):
        MixedPrecision("bfloat16", torch.device("cpu"))
    (warning,) = caplog.messages
    assert warning.startswith(
        "--amp bfloat16 is many times slower than --amp off here: this processor has no"
        " bf16"
    )
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation,
    )
    assert resolve_amp("auto", torch.device("cuda")) == "float16"
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: True
    )
    assert resolve_amp("auto", torch.device("cuda")) == "bfloat16"
