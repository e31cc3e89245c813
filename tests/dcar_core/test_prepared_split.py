"""A split prepared for training, and its features on the disk: hits, misses and failures."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dcar_core.data import CleaningReport, Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import PromptConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.model.token_weights import blend, pair_weights
from dcar_core.training import prepared_split as module
from dcar_core.training.prepared_split import FeatureCache, prepare_split, report_truncation, split_key
from dcar_core.training.validation import encode_captions, encode_images
from dcar_core.util.arrays import Pixels
from dcar_core.util.errors import DcarError
from tests.support.training import batch_loss, model_and_data, move_weights


@pytest.mark.parametrize("name", ["dcar", "dcar-alone", "dcar-patches"])
def test_token_weights_are_of_each_caption_with_its_own_image(
    name: str, backbone: Backbone, described_twice: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute weights from the texts and images that the options name, relative to a white image."""
    monkeypatch.setattr(module, "TEXT_BATCH", 4)
    model, data = model_and_data(backbone, described_twice, name)
    size = backbone.preprocess.size
    pixels = [backbone.preprocess(described_twice.read(sample.image)) for sample in described_twice.samples]
    seen = np.stack([*pixels, np.full((3, size, size), 255, np.uint8)])
    with torch.no_grad():
        found = backbone.encode_image(
            torch.from_numpy(backbone.preprocess.normalize(seen)), rows=name == "dcar-patches"
        )
        found = found[:, 1:] if name == "dcar-patches" else found
        words = backbone.encode_text(data.tokens, rows=True)[:, 1:]
        words = backbone.lone_token_features(data.tokens) if name == "dcar-alone" else words
        raw = pair_weights(words, found[:-1], found[-1])
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


def test_prompts_that_leave_no_room_for_a_word_are_refused(backbone: Backbone) -> None:
    report_truncation({}, {}, backbone, backbone.context_length - 3)
    with pytest.raises(DcarError, match="30 prompts leave no room for words in a context of 32 tokens"):
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
        replace(training, samples=[unknown]), DCAR(backbone, find_method("dcar").config), for_training=True
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
        replace(training, samples=samples), DCAR(backbone, find_method("coop").config), for_training=True
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


def test_feature_cache_returns_the_computed_features(backbone: Backbone, training: Dataset, tmp_path: Path) -> None:
    shorter = replace(find_method("dcar").config, prompt=PromptConfig(length=2))
    for config in (
        shorter,
        *(find_method(name).config for name in ("dcar", "clip-adapter", "dcar-alone", "dcar-patches")),
    ):
        model, plain = move_weights(DCAR(backbone, config), training)
        for _ in range(2):  # the second time from the disk
            cached = prepare_split(training, model, for_training=True, cache=FeatureCache(tmp_path, backbone))
            for field, one in vars(plain).items():
                other = getattr(cached, field)
                assert (one is None) == (other is None)
                assert one is None or np.array_equal(one, other), field
    assert not list(tmp_path.rglob("*.tmp"))


def test_feature_cache_misses_for_other_images_texts_and_weights(
    backbone: Backbone, training: Dataset, tiny_gallery: Path, retrained: Backbone, tmp_path: Path
) -> None:
    def entries(backbone: Backbone, data: Dataset) -> int:
        model = seeded_model(backbone, find_method("clip-adapter").config, 0)
        prepare_split(data, model, for_training=True, cache=FeatureCache(tmp_path, backbone))
        return len([path for path in tmp_path.rglob("*") if path.is_file()])

    assert entries(backbone, training) == entries(backbone, training) == 3  # pixels, images, texts
    renamed = replace(training, samples=[replace(s, caption=s.caption + "!") for s in training.samples])
    assert entries(backbone, renamed) == 4
    first = tiny_gallery / training.samples[0].image
    content = first.read_bytes()
    try:
        first.write_bytes((tiny_gallery / training.samples[1].image).read_bytes())
        assert entries(backbone, training) == 6
    finally:
        first.write_bytes(content)
    assert entries(retrained, training) == 9


def test_digest_of_a_split_covers_all_training_data(backbone: Backbone, training: Dataset) -> None:
    cache, first = FeatureCache(None, backbone), training.samples[0]
    names = {"caption": "other", "category": "other"} | dict.fromkeys(
        ("negatives", "negative_categories", "attributes"), ("other",)
    )
    others = [replace(first, **{name: value}) for name, value in names.items()]  # type: ignore[arg-type]
    keys = [split_key(replace(training, samples=[one, *training.samples[1:]]), cache) for one in (first, *others)]
    assert len(set(keys)) == 6


def test_a_failure_leaves_no_entry(backbone: Backbone, tmp_path: Path) -> None:
    def fails() -> Tensor:
        raise RuntimeError("out of memory")

    def images() -> Iterator[Pixels]:
        yield np.zeros(8, np.uint8)
        fails()

    cache = FeatureCache(tmp_path, backbone)
    for entry in (partial(cache.tensor, "images", "key", fails), partial(cache.pixels, "key", (2, 8), images)):
        with pytest.raises(RuntimeError, match="out of memory"):
            entry()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
