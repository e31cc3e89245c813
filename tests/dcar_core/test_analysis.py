"""Analysis of a test split: recall by category, confusions and hard negatives; and the cost of serving."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import dcar_core.evaluation.analysis as module
from dcar_core.data import Dataset
from dcar_core.evaluation.analysis import analyse, serving_cost
from dcar_core.model.backbone import Backbone
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.training.prepared_split import prepare_split
from dcar_core.util.arrays import Floats


def analysed(
    backbone: Backbone, data: Dataset, categories: str, text: Floats, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Analyse the first pairs of a split: one image for each letter of `categories`, with unit vectors of their own."""
    image = np.eye(len(categories), dtype=np.float32)
    samples = [replace(s, category=c) for s, c in zip(data.samples, categories, strict=False)]
    model, data = seeded_model(backbone, method("clip"), 0), replace(data, samples=samples)
    negatives = [image[-1:], image[:0], *([image[:1]] if categories == "aab" else [image[:0]] * 2)]
    monkeypatch.setattr(module, "encode_captions", lambda *_: text)
    monkeypatch.setattr(module, "encode_images", lambda *_: image)
    monkeypatch.setattr(module, "_encode_negatives", lambda *_: negatives)
    return analyse(model, data, prepare_split(data, model, for_training=False, progress=False))


def test_analysis_equals_a_hand_calculation(
    backbone: Backbone, training: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images of one category, and one of another that is the first result for the second caption."""
    text = np.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]], np.float32)
    found = analysed(backbone, training, "aab", text, monkeypatch)
    assert found["recall"]["t2i_r1"] == pytest.approx(200 / 3)
    assert found["hard_negative_accuracy"] == 100  # the second pair has no negatives
    assert found["categories"]["a"] == {"pairs": 2, "t2i_r1": 50.0, "i2t_r1": 100.0}
    assert found["categories"]["b"] == {"pairs": 1, "t2i_r1": 100.0, "i2t_r1": 100.0}
    _, two, three = training.samples[:3]
    assert found["confusions"] == [
        {"category": "a", "taken_for": "b", "count": 1, "of": 2,
         "examples": [{"caption": two.caption, "image": two.image, "found": three.image}]}
    ]  # fmt: skip


def test_a_caption_at_rank_two_is_no_hit(
    backbone: Backbone, training: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most frequent confusion comes first: b, a and a find c; c finds b."""
    found = analysed(backbone, training, "baac", np.eye(4, dtype=np.float32)[[3, 3, 3, 0]], monkeypatch)
    recalls = {(of["t2i_r1"], of["i2t_r1"]) for of in found["categories"].values()}
    assert (list(found["categories"]), recalls) == (["a", "b", "c"], {(0.0, 0.0)})
    pairs = [(c["category"], c["taken_for"], c["count"], c["of"]) for c in found["confusions"]]
    assert pairs == [("a", "c", 2, 2), ("b", "c", 1, 1), ("c", "b", 1, 1)]


@pytest.mark.parametrize("name", ["coop", "dcar"])
def test_hard_negatives_are_encoded_as_queries(name: str, backbone: Backbone, training: Dataset) -> None:
    model = seeded_model(backbone, method(name).with_query_weights("predicted"), 0)
    if model.head is not None:
        torch.nn.init.normal_(model.head.linear.weight)
    prepared = prepare_split(training, model, for_training=False, progress=False)
    found = analyse(model, training, prepared)["hard_negative_accuracy"]
    hits = []
    for sample in training.samples:
        pixels = backbone.preprocess(training.read(sample.image))[None]
        image = model.encode_image(torch.from_numpy(backbone.preprocess.normalize(pixels))).detach()
        texts = model.encode_query(backbone.tokenize([sample.caption, *sample.negatives], model.prompt_tokens)).detach()
        scores = (texts @ image.T).flatten()
        hits.append(bool(scores[0] > scores[1:].max()))
    assert found == pytest.approx(100 * np.mean(hits))
    others = tuple(f"a thing {n}" for n in range(9))
    many = [replace(s, negatives=others + s.negatives, negative_categories=()) for s in training.samples]
    turned = [replace(s, negatives=s.negatives[::-1]) for s in many]
    accuracies = [analyse(model, replace(training, samples=s), prepared) for s in (many, turned)]
    assert accuracies[0]["hard_negative_accuracy"] == accuracies[1]["hard_negative_accuracy"]
    bare = [replace(sample, negatives=(), negative_categories=()) for sample in training.samples]
    assert analyse(model, replace(training, samples=bare), prepared)["hard_negative_accuracy"] is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", ("shared", "unchanged")),
        ("coop", ("shared", "unchanged")),
        ("clip-adapter", ("shared", "matrix product")),
        ("dcar+", ("shared", "encode again")),
        ("block-adapters", ("shared", "encode again")),
        ("lora", ("own", "encode again")),
    ],
)
def test_the_cost_of_serving(name: str, expected: tuple[str, str], backbone: Backbone) -> None:
    cost = serving_cost(seeded_model(backbone, method(name), 0))
    assert (cost["backbone"], cost["gallery"]) == expected
    weights = sum(4 * p.numel() for p in backbone.clip.parameters())
    assert (cost["bytes"] == 0) == (name == "clip")
    assert (cost["bytes"] >= weights) == (name == "lora")
