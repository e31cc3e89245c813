"""One step: parts, cached features and mixed precision against the plain pass."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcar_core.data import CleaningReport, Dataset, load_split
from dcar_core.model.backbone import Backbone, BackboneSource, load_backbone
from dcar_core.model.config import Amp, LossConfig, PromptConfig, ReweightConfig, TrainWeights
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import METHODS, method
from dcar_core.model.token_weights import blend, pair_weights
from dcar_core.training import frozen_features, grad_cache
from dcar_core.training.feature_cache import FeatureCache
from dcar_core.training.grad_cache import MixedPrecision, accumulate_gradients, batch_loss, resolve_amp
from dcar_core.training.losses import anchor_loss, category_loss, contrastive_loss, head_loss
from dcar_core.training.prepared_split import PreparedSplit, prepare_split, report_truncation, split_key
from dcar_core.training.validation import encode_captions, encode_images
from dcar_core.util.errors import TrainingError


@pytest.fixture
def training(tiny_data: Path) -> Dataset:
    return load_split(tiny_data, "train")[0]


@pytest.fixture
def described_twice(training: Dataset) -> Dataset:
    """Return images with several captions of different lengths, interleaved."""
    again = [replace(s, caption=f"{s.caption} on a white page, seen from the front") for s in training.samples[3::-1]]
    return replace(training, samples=[*training.samples[:6], *again, replace(training.samples[2], caption="one")])


def ready(backbone: Backbone, data: Dataset, name: str) -> tuple[DCAR, PreparedSplit]:
    """A model away from its start, where some gradients are zero."""
    return moved(seeded_model(backbone, method(name), 0), data)


def moved(model: DCAR, data: Dataset) -> tuple[DCAR, PreparedSplit]:
    with torch.no_grad():
        for _, parameter in model.trainables():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, prepare_split(data, model, for_training=True, progress=False)


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
    model, data = ready(backbone, training, name)
    assert_parts_have_the_gradients_of_the_whole(model, data, np.arange(len(data)), 1, 2, 5, 20)


@pytest.mark.parametrize("name", ["clip-adapter", "dcar", "dcar+"])
def test_parts_with_several_captions_per_image_have_the_gradients_of_the_whole(
    name: str, backbone: Backbone, described_twice: Dataset
) -> None:
    model, data = ready(backbone, described_twice, name)
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
    model, data = moved(DCAR(backbone, config), described_twice)
    normal, scale = torch.nn.functional.normalize, backbone.scale
    texts, images, frozen_texts, frozen_images, captions = [], [], [], [], []
    predicted = model.predicted_weights(data.tokens)
    used = data.pair_weights
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
        captions.append(torch.nn.functional.pad(model.adapt_text(read), (0, 0, 0, short)))
    text, image = torch.cat(texts), torch.cat(images)
    assert data.candidate_weights is not None
    wanted = contrastive_loss(text, image, torch.from_numpy(data.positives(np.arange(len(data)))), scale)
    wanted = wanted + 0.3 * category_loss(image, torch.stack(captions), data.candidate_weights, scale)
    if predicted is not None and data.pair_weights is not None:
        wanted = wanted + 0.7 * head_loss(predicted, data.pair_weights, model.backbone.layout.caption_mask(data.tokens))
    held = anchor_loss(image, torch.cat(frozen_images)) + anchor_loss(text, torch.cat(frozen_texts))
    torch.testing.assert_close(batch_loss(model, data, np.arange(len(data))), wanted + 0.2 * held, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dcar", "dcar-alone", "dcar-patches"])
def test_token_weights_are_of_each_caption_with_its_own_image(
    name: str, backbone: Backbone, described_twice: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute weights from the texts and images that the options name, relative to a white image."""
    monkeypatch.setattr(frozen_features, "TEXT_BATCH", 4)
    model, data = ready(backbone, described_twice, name)
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
def test_frozen_towers_use_cached_features(name: str, backbone: Backbone, training: Dataset, tiny_model: Path) -> None:
    model, data = ready(backbone, training, name)
    assert data.pixels is None
    pixels = np.stack([backbone.preprocess(training.read(sample.image)) for sample in training.samples])
    forwards = replace(data, pixels=pixels, image_features=None, text_features=None)
    np.testing.assert_allclose(encode_images(model, data), encode_images(model, forwards), atol=1e-5)
    np.testing.assert_allclose(encode_captions(model, data), encode_captions(model, forwards), atol=1e-5)
    if name != "clip":
        rows = np.arange(len(data))
        cached, whole = batch_loss(model, data, rows), batch_loss(model, forwards, rows)
        torch.testing.assert_close(cached, whole)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_is_close_to_full(amp: Amp, backbone: Backbone, training: Dataset) -> None:
    model, data = ready(backbone, training, "dcar")
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
    whole, seen = getattr(grad_cache, loss), []

    def spy(*given: Any) -> Tensor:
        seen.append(
            (
                torch.is_autocast_enabled("cpu"),
                {each.dtype for each in given if isinstance(each, Tensor) and each.is_floating_point()},
            )
        )
        return whole(*given)

    monkeypatch.setattr(grad_cache, loss, spy)
    model, data = ready(backbone, training, "dcar+")
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


def test_images_are_encoded_once_for_all_captions(
    backbone: Backbone, training: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_features, "TEXT_BATCH", 2)
    seen: list[int] = []
    whole = frozen_features.FrozenFeatures._encode_images

    def noted(given: Any, images: Any) -> Any:
        seen.append(len(images))
        return whole(given, images)

    monkeypatch.setattr(frozen_features.FrozenFeatures, "_encode_images", noted)
    prepare_split(training, seeded_model(backbone, method("dcar"), 0), for_training=True, progress=False)
    assert len(training) > 2
    assert len(seen) == 1


def test_feature_cache_returns_the_computed_features(backbone: Backbone, training: Dataset, tmp_path: Path) -> None:
    shorter = replace(method("dcar"), prompt=PromptConfig(length=2))
    for config in (shorter, *map(method, ("dcar", "clip-adapter", "dcar-alone", "dcar-patches"))):
        model, plain = moved(DCAR(backbone, config), training)
        for _ in range(2):  # the second time from the disk
            cached = prepare_split(
                training, model, for_training=True, progress=False, cache=FeatureCache(tmp_path, backbone)
            )
            for field in (
                "tokens",
                "image_features",
                "text_features",
                "pair_weights",
                "candidate_features",
                "candidate_weights",
            ):
                one, other = getattr(plain, field), getattr(cached, field)
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other), field
            np.testing.assert_array_equal(plain.pixels, cached.pixels)
    assert not list(tmp_path.rglob("*.part"))


def test_remains_of_killed_runs_are_deleted_after_a_day(backbone: Backbone, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, backbone)
    cache.tensor("kind", "one", lambda: torch.zeros(2))
    (folder,) = tmp_path.iterdir()
    old, fresh = folder / "pixels-x.npy.17.part", folder / "pixels-y.npy.18.part"
    for part in (old, fresh):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.tensor("kind", "two", lambda: torch.ones(2))
    assert sorted(path.name for path in folder.iterdir()) == [
        "kind-one.safetensors",
        "kind-two.safetensors",
        fresh.name,
    ]


def test_feature_cache_misses_for_other_images_texts_and_weights(
    backbone: Backbone, training: Dataset, tiny_gallery: Path, other_backbone: Backbone, tmp_path: Path
) -> None:
    def entries(backbone: Backbone, data: Dataset) -> int:
        model = seeded_model(backbone, method("clip-adapter"), 0)
        prepare_split(data, model, for_training=True, progress=False, cache=FeatureCache(tmp_path, backbone))
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
    assert entries(other_backbone, training) == 9


@pytest.fixture(scope="module")
def other_backbone(tiny_model: Path) -> Backbone:
    other = load_backbone(BackboneSource(str(tiny_model)))
    with torch.no_grad():
        other.visual.proj.mul_(1.001)
    return other


def test_digest_of_a_split_covers_all_training_data(backbone: Backbone, training: Dataset) -> None:
    cache, first = FeatureCache(None, backbone), training.samples[0]
    others = [
        replace(first, caption="other"),
        replace(first, category="other"),
        replace(first, negatives=("other",)),
        replace(first, negative_categories=("other",)),
        replace(first, attributes=("other",)),
    ]
    keys = [split_key(replace(training, samples=[one, *training.samples[1:]]), cache) for one in (first, *others)]
    assert len(set(keys)) == 6


def test_prompts_that_leave_no_room_for_a_word_are_refused(backbone: Backbone) -> None:
    report_truncation({}, {}, backbone, backbone.context_length - 3)
    with pytest.raises(TrainingError, match="30 prompts leave no room for words in a context of 32 tokens"):
        report_truncation({}, {}, backbone, backbone.context_length - 2)


def test_failed_computation_leaves_no_cache_entry(backbone: Backbone, tmp_path: Path) -> None:
    def fails() -> Tensor:
        raise RuntimeError("out of memory")

    cache = FeatureCache(tmp_path, backbone)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.tensor("images", "key", fails)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert torch.equal(cache.tensor("images", "key", lambda: torch.ones(2)), torch.ones(2))


def test_damaged_cache_entry_is_computed_again(backbone: Backbone, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, backbone)

    def entries() -> tuple[Tensor, Any]:
        pixels = cache.array("pixels", "key", (40, 8), lambda out: out.fill(7))
        return cache.tensor("images", "key", lambda: torch.ones(50)), pixels

    entries()
    for length in (0, 20, 150):
        for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
            path.write_bytes(path.read_bytes()[:length])
        features, pixels = entries()
        assert torch.equal(features, torch.ones(50))
        assert (pixels == 7).all()
        assert pixels.shape == (40, 8)


def test_negatives_are_encoded_as_one_by_one(backbone: Backbone, training: Dataset) -> None:
    _, data = ready(backbone, training, "dcar")
    assert data.candidate_features is not None
    assert data.candidate_weights is not None
    for i, sample in enumerate(training.samples):
        texts = [sample.caption, *sample.negatives]
        alone = torch.nn.functional.normalize(backbone.encode_text(backbone.tokenize(texts)), dim=-1)
        torch.testing.assert_close(data.candidate_features[i, : len(texts)], alone)
        assert (data.candidate_weights[i] > 0).sum() == len(texts)


def test_category_names_are_case_folded_and_eight_negatives_are_used(backbone: Backbone, training: Dataset) -> None:
    one = replace(
        training.samples[0],
        category="Maine Coon",
        negatives=tuple(f"a cat {n}" for n in range(10)),
        negative_categories=("maine_coon", "Sphynx") * 5,
    )
    data = replace(training, samples=[one, *training.samples[1:]])
    _, prepared = ready(backbone, data, "dcar")
    assert prepared.candidate_weights is not None
    assert prepared.candidate_weights[0].tolist() == [1.5] + [1.5, 1.0] * 4
    unknown = replace(training.samples[0], category="", negatives=("one", "two"), negative_categories=("", "face"))
    prepared = prepare_split(
        replace(training, samples=[unknown]), DCAR(backbone, method("dcar")), for_training=True, progress=False
    )
    assert prepared.candidate_weights is not None
    assert prepared.candidate_weights[0].tolist() == [1.5, 1.0, 1.0], (
        "two categories that nobody knows are not the same one"
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
