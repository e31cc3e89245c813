"""A split prepared for training: frozen features, token weights, negatives and positives."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dcar_core.data import CleaningReport, Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.model.token_weights import blend, pair_weights
from dcar_core.training import prepared_split as module
from dcar_core.training.prepared_split import prepare_split, report_truncation
from dcar_core.training.validation import encode_captions, encode_images
from dcar_core.util.errors import TrainingError
from tests.support.training import batch_loss, model_and_data


@pytest.mark.parametrize("name", ["dcar", "dcar-alone", "dcar-patches"])
def test_token_weights_are_of_each_caption_with_its_own_image(
    name: str, backbone: Backbone, described_twice: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute weights from the texts and images that the options name, relative to a white image."""
    monkeypatch.setattr(module, "TEXT_BATCH", 4)
    model, data = model_and_data(backbone, described_twice, name)
    words = backbone.lone_token_features if name == "dcar-alone" else backbone.text_tower.token_features
    pictures = backbone.image_tower.patch_features if name == "dcar-patches" else backbone.encode_image
    size = backbone.preprocess.size
    pixels = [backbone.preprocess(described_twice.read(sample.image)) for sample in described_twice.samples]
    seen = np.stack([*pixels, np.full((3, size, size), 255, np.uint8)])
    with torch.no_grad():
        found = pictures(torch.from_numpy(backbone.preprocess.normalize(seen)))
        raw = pair_weights(words(data.tokens), found[:-1], found[-1])
    assert data.pair_weights is not None
    wanted = blend(raw, model.backbone.layout.caption_mask(data.tokens), model.config.reweight)
    torch.testing.assert_close(data.pair_weights, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["clip", "coop", "clip-adapter"])
def test_frozen_towers_use_cached_features(name: str, backbone: Backbone, training: Dataset) -> None:
    model, data = model_and_data(backbone, training, name)
    assert data.pixels is None
    pixels = np.stack([backbone.preprocess(training.read(sample.image)) for sample in training.samples])
    forwards = replace(data, pixels=pixels, image_features=None, text_features=None)
    np.testing.assert_allclose(encode_images(model, data), encode_images(model, forwards), atol=1e-5)
    np.testing.assert_allclose(encode_captions(model, data), encode_captions(model, forwards), atol=1e-5)
    if name != "clip":
        rows = np.arange(len(data))
        cached, whole = batch_loss(model, data, rows), batch_loss(model, forwards, rows)
        torch.testing.assert_close(cached, whole)


def test_images_are_encoded_once_for_all_captions(
    backbone: Backbone, training: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TEXT_BATCH", 2)
    seen: list[int] = []
    whole = module.FrozenFeatures._encode_images

    def noted(given: Any, images: Any) -> Any:
        seen.append(len(images))
        return whole(given, images)

    monkeypatch.setattr(module.FrozenFeatures, "_encode_images", noted)
    prepare_split(training, seeded_model(backbone, method("dcar"), 0), for_training=True, progress=False)
    assert len(training) > 2
    assert len(seen) == 1


def test_prompts_that_leave_no_room_for_a_word_are_refused(backbone: Backbone) -> None:
    report_truncation({}, {}, backbone, backbone.context_length - 3)
    with pytest.raises(TrainingError, match="30 prompts leave no room for words in a context of 32 tokens"):
        report_truncation({}, {}, backbone, backbone.context_length - 2)


def test_category_names_are_case_folded_and_eight_negatives_are_used(backbone: Backbone, training: Dataset) -> None:
    one = replace(
        training.samples[0],
        category="Maine Coon",
        negatives=tuple(f"a cat {n}" for n in range(10)),
        negative_categories=("maine_coon", "Sphynx") * 5,
    )
    data = replace(training, samples=[one, *training.samples[1:]])
    _, prepared = model_and_data(backbone, data, "dcar")
    assert prepared.candidate_weights is not None
    assert prepared.candidate_weights[0].tolist() == [1.0] + [1.0, 1.5] * 4
    unknown = replace(training.samples[0], category="", negatives=("one", "two"), negative_categories=("", "face"))
    prepared = prepare_split(
        replace(training, samples=[unknown]), DCAR(backbone, method("dcar")), for_training=True, progress=False
    )
    assert prepared.candidate_weights is not None
    assert prepared.candidate_weights[0].tolist() == [1.0, 1.0, 1.5], (
        "an unknown category is not known to be another one"
    )
    reports = {"train": CleaningReport()}
    report_truncation({"train": data}, reports, backbone, 4)
    assert reports["train"].counts["negatives after the first 8 of a pair, not trained on"] == 2


def test_true_caption_is_no_negative_of_its_image(backbone: Backbone, training: Dataset) -> None:
    """A caption matches its own image and images with an equal caption or attribute, and no others."""
    gift, popper, cat, other = (
        replace(sample, negatives=(), negative_categories=()) for sample in training.samples[:4]
    )
    samples = [
        replace(gift, caption="Birthday_party"),
        replace(gift, caption="a wrapped gift"),
        replace(popper, caption="a party popper", attributes=("birthday party", "loud")),
        replace(cat, caption="a cat"),
        replace(other, caption="birthday  party"),
        replace(other, caption="loud"),
    ]
    data = prepare_split(
        replace(training, samples=samples), DCAR(backbone, method("coop")), for_training=True, progress=False
    )
    found = data.positives(np.arange(6))
    wanted = np.array(
        [  # of the image of:  gift gift popper cat other other
            [1, 1, 1, 0, 1, 1],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [1, 1, 1, 0, 1, 1],
            [0, 0, 1, 0, 1, 1],
        ],
        bool,
    )
    np.testing.assert_array_equal(found, wanted)
    some = np.array([5, 0, 2])
    np.testing.assert_array_equal(data.positives(some), wanted[np.ix_(some, some)])
