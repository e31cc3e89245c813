"""The second stage of training: it moves the feature adapters alone, and never costs validation recall."""

from typing import Any

import torch

from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.training import hard_negatives
from dcar_core.training.hard_negatives import tune_on_hard_negatives
from dcar_core.training.prepared_split import prepare_split
from dcar_core.training.train import train
from dcar_core.training.validation import encode_captions, encode_images, evaluate, mean_r1


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.trainables()}


def test_the_stage_moves_the_feature_adapters_alone_and_costs_no_validation_recall(
    backbone: Backbone, training: Dataset
) -> None:
    model = seeded_model(backbone, method("block-adapters+"), 0)
    split = prepare_split(training, model, for_training=True)
    before, recall = weights(model), evaluate(model, split)
    found = tune_on_hard_negatives(model, split, split, 0)
    changed = {name.split(".")[0] for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"text_adapter", "image_adapter"}
    assert mean_r1(found) >= mean_r1(recall)
    assert found == evaluate(model, split)


def test_a_share_that_costs_validation_recall_is_not_taken(
    backbone: Backbone, pairs: tuple[Dataset, Dataset], monkeypatch: Any
) -> None:
    monkeypatch.setattr(hard_negatives, "LEARNING_RATE", 10.0)  # ruins the adapters
    model = seeded_model(backbone, method("block-adapters+"), 0)
    splits = [prepare_split(data, model, for_training=True) for data in pairs]
    before = evaluate(model, splits[1])
    assert mean_r1(tune_on_hard_negatives(model, splits[0], splits[1], 0)) >= mean_r1(before)


def test_a_stage_that_becomes_infinite_leaves_the_adapters_as_they_were(
    backbone: Backbone, training: Dataset, monkeypatch: Any
) -> None:
    monkeypatch.setattr(hard_negatives, "LEARNING_RATE", float("inf"))
    monkeypatch.setattr(hard_negatives, "mean_r1", lambda recall: recall["t2i_r5"])  # of an untrained model above 0
    model = seeded_model(backbone, method("block-adapters+"), 0)
    split = prepare_split(training, model, for_training=True)
    before, recall = weights(model), evaluate(model, split)
    assert tune_on_hard_negatives(model, split, split, 0) == recall
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_images_that_a_caption_describes_are_no_negatives(backbone: Backbone, described_twice: Dataset) -> None:
    model = seeded_model(backbone, method("block-adapters+"), 0)
    split = prepare_split(described_twice, model, for_training=True)
    texts, images = (torch.from_numpy(encode(model, split)) for encode in (encode_captions, encode_images))
    nearest = hard_negatives.nearest_wrong_images(texts, images, split.right_answers()[0])
    right, _ = split.right_answers()
    assert all(not set(row.tolist()) & set(answers.tolist()) for row, answers in zip(nearest, right, strict=True))
    assert nearest.shape[1] == len(images) - max(map(len, right))


def test_training_ends_with_the_stage(backbone: Backbone, pairs: tuple[Dataset, Dataset]) -> None:
    config, found = TrainConfig(epochs=1, batch_size=6), {}
    for name in ("block-adapters", "block-adapters+"):
        model = seeded_model(backbone, method(name), 0)
        result = train(model, *pairs, config)
        validation = prepare_split(pairs[1], model, for_training=False)
        assert result.best == evaluate(model, validation)
        found[name] = mean_r1(result.best)
    assert found["block-adapters+"] >= found["block-adapters"]
