"""What follows the epochs: hard negatives for the adapters, and the second stage that
orders the first images.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcar_core.data import Annotations, Dataset
from dcar_core.evaluation.comparison import WITH_RERANK, compare
from dcar_core.evaluation.tables import recall_rows
from dcar_core.model.backbone import Backbone, BackboneSource
from dcar_core.model.checkpoint import load_checkpoint, save_checkpoint
from dcar_core.model.config import RerankConfig, TrainConfig
from dcar_core.model.dcar import DCAR, SecondStage, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.model.towers.text import PromptRows
from dcar_core.training import hard_negatives
from dcar_core.training.adapt import adapt
from dcar_core.training.hard_negatives import train_second_stage, tune_on_hard_negatives
from dcar_core.training.prepared_split import PreparedSplit, prepare_split
from dcar_core.training.validation import (
    FirstImages,
    encode_captions,
    encode_images,
    evaluate,
    first_images,
    mean_r1,
    rerank,
)
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ModelError
from dcar_core.util.metrics import Ranks, recall_of_ranks


@pytest.fixture
def model(backbone: Backbone) -> DCAR:
    """A model whose learned layers are all away from zero."""
    model = untrained(backbone)
    with torch.no_grad():
        for _, parameter in model.trainables():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def untrained(backbone: Backbone, name: str = "query-prompts") -> DCAR:
    return seeded_model(backbone, find_method(name).config, 0).eval()


def weights(model: DCAR) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.trainables()}


def moved(model: DCAR, start: dict[str, torch.Tensor]) -> set[str]:
    return {
        name.split(".")[0]
        for name, value in model.trainables()
        if not torch.equal(value, start[name])
    }


def test_hard_negatives_move_the_feature_adapters_alone_and_cost_no_validation_recall(
    backbone: Backbone,
    training: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = untrained(backbone, "block-adapters+")
    split = prepare_split(training, model, for_training=True)
    start = weights(model)
    before = evaluate(model, split)
    found = tune_on_hard_negatives(model, split, split, 0)
    assert moved(model, start) == {"text_adapter", "image_adapter"}
    assert mean_r1(found) >= mean_r1(before)
    assert found == evaluate(model, split)
    model.load_state_dict(start, strict=False)
    monkeypatch.setattr(hard_negatives, "LEARNING_RATE", float("inf"))
    # of an untrained model above 0
    monkeypatch.setattr(hard_negatives, "mean_r1", lambda recall: recall["t2i_r5"])
    assert tune_on_hard_negatives(model, split, split, 0) == before
    assert moved(model, start) == set()


def test_images_that_a_caption_describes_are_no_negatives(
    backbone: Backbone, described_twice: Dataset
) -> None:
    model = seeded_model(backbone, find_method("block-adapters+").config, 0)
    split = prepare_split(described_twice, model, for_training=True)
    texts, images = (
        torch.from_numpy(encode(model, split))
        for encode in (encode_captions, encode_images)
    )
    nearest = hard_negatives.nearest_wrong_images(
        texts,
        images,
        split.right_answers()[0],
    )
    right, _ = split.right_answers()
    assert all(
        not set(row.tolist()) & set(answers.tolist())
        for row, answers in zip(nearest, right, strict=True)
    )
    assert nearest.shape[1] == len(images) - max(map(len, right))


def image_rows(model: DCAR, count: int = 3) -> torch.Tensor:
    size = model.backbone.preprocess.size
    pixels = np.random.default_rng(0).integers(
        0,
        256,
        (count, 3, size, size),
        dtype=np.uint8,
    )
    return SecondStage(model).image_rows(model.backbone.standardized(pixels))


def test_a_pair_costs_one_row_and_equals_whole_passes_over_unprompted_patches(
    model: DCAR,
) -> None:
    stage = SecondStage(model)
    tower = model.backbone.image_tower
    adapters = model.block_adapters
    rows = image_rows(model)
    prompts = torch.randn(3, 2, model.backbone.vision_width)
    assert adapters is not None
    run = PromptRows(None, 0, adapters.matrices())
    blocks = list(tower.module.transformer.resblocks)
    plain = rows
    prompted = rows[:, :1]
    for i, block in enumerate(blocks[-2:]):
        whole = torch.cat([prompted + prompts[:, i, None], plain[:, 1:]], 1)
        plain, prompted = (
            run.adapt(block(x), len(blocks) - 2 + i) for x in (plain, whole)
        )
        prompted = prompted[:, :1]
    images = stage.images(rows)
    found = stage.tower.class_row_features(images, prompts, stage.block, stage.adapters)
    torch.testing.assert_close(
        found,
        tower.project(tower.pool(prompted)),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(images.patches, plain[:, 1:])


def test_late_interaction_is_the_mean_of_the_best_patches(model: DCAR) -> None:
    stage = SecondStage(model)
    texts = stage.texts(model.backbone.tokenize(["a red square", "dog"]))
    images = stage.images(image_rows(model, 2))
    found = stage.layers.late(texts, images.patches).detach()
    patches = (
        F.layer_norm(images.patches, images.patches.shape[-1:])
        @ stage.layers.patch.weight.T
    )
    for text in (0, 1):
        words = texts.words[text][texts.mask[text]] @ stage.layers.word.weight.T
        cosines = F.normalize(words, dim=-1) @ F.normalize(patches[text], dim=-1).T
        torch.testing.assert_close(found[text], cosines.amax(1).mean().detach())


def test_a_pair_alone_scores_like_its_chunk_and_without_prompts_like_its_vector(
    model: DCAR, pairs: tuple[Dataset, Dataset]
) -> None:
    split = prepare_split(pairs[1], model, for_training=False)
    stage = SecondStage(model)
    assert split.pixels is not None
    images = encode_images(model, split)
    found = stage.vectors(
        stage.images(stage.image_rows(model.backbone.standardized(split.pixels)))
    )
    np.testing.assert_allclose(found, images, atol=1e-5)
    first = first_images(model, split, encode_captions(model, split), images)
    for text, place in ((0, 0), (2, 1)):
        pixels = split.pixels[first.rows[text, place]][None]
        one = stage.images(stage.image_rows(model.backbone.standardized(pixels)))
        score = stage.scores(stage.texts(split.tokens[text : text + 1]), one)
        assert float(score) == pytest.approx(float(first.second[text, place]), abs=1e-3)


def reranked_recall(model: DCAR, split: PreparedSplit) -> dict[str, float]:
    return recall_of_ranks(
        rerank(
            model,
            split,
            encode_captions(model, split),
            encode_images(model, split),
        )
    )


def test_training_learns_the_second_stage_alone_and_costs_no_validation_recall(
    backbone: Backbone,
    training: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = untrained(backbone)
    split = prepare_split(training, model, for_training=True)
    start = weights(model)
    before = evaluate(model, split)
    margins = []
    for epochs in (1, 60):
        monkeypatch.setattr(hard_negatives, "STAGE_EPOCHS", epochs)
        model.load_state_dict(start, strict=False)
        train_second_stage(model, split, split, 0)
        assert "training the second stage: 100%" in capsys.readouterr().err
        first = first_images(
            model,
            split,
            encode_captions(model, split),
            encode_images(model, split),
        )
        own = first.rows == split.image_of[:, None]
        margins.append(first.second[own].mean() - first.second[~own].mean())
    assert margins[1] > margins[0] + 0.02
    assert moved(model, start) == {"query_prompts"}
    assert evaluate(model, split) == before, "the search by vectors stays as it was"
    assert mean_r1(reranked_recall(model, split)) >= mean_r1(before)


@pytest.mark.parametrize("gains", [-10.0, 0.0])
def test_a_stage_that_costs_or_gains_no_validation_recall_is_turned_off(
    gains: float,
    backbone: Backbone,
    training: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def second(
        model: DCAR,
        split: PreparedSplit,
        text: Floats,
        image: Floats,
    ) -> FirstImages:
        first = first_images(model, split, text, image)
        return replace(first, second=gains * (first.rows == split.image_of[:, None]))

    monkeypatch.setattr(hard_negatives, "first_images", second)
    # above 0
    monkeypatch.setattr(
        hard_negatives, "mean_r1", lambda recall: recall["t2i_r5"] if gains else 50.0
    )
    model = untrained(backbone)
    split = prepare_split(training, model, for_training=True)
    before = evaluate(model, split)
    assert before["t2i_r5"] > 0
    train_second_stage(model, split, split, 0)
    assert model.rerank_weight == 0
    assert reranked_recall(model, split) == before


def test_images_beyond_the_memory_limit_are_left_out(
    backbone: Backbone,
    training: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = seeded_model(backbone, find_method("query-prompts").config, 0).eval()
    split = prepare_split(training, model, for_training=True)
    stage = SecondStage(model)
    random = np.random.default_rng
    _, whole = hard_negatives.image_parts(stage, split, random(0))
    monkeypatch.setattr(
        hard_negatives,
        "MAX_BYTES",
        sum(each[:5].nbytes for each in whole),
    )
    kept, images = hard_negatives.image_parts(stage, split, random(0))
    assert len(kept) == len(images.first) == 5
    torch.testing.assert_close(images.patches, whole.patches[kept])
    train_second_stage(model, split, split, 0)


def test_a_checkpoint_keeps_the_stage_and_its_weight(
    model: DCAR,
    training: Dataset,
    tmp_path: Path,
) -> None:
    fingerprints = []
    for weight in (1.0, 0.5):
        model.rerank_weight = weight
        fingerprints.append(save_checkpoint(model, tmp_path))
    loaded, fingerprint = load_checkpoint(tmp_path)
    assert fingerprint == fingerprints[1] != fingerprints[0]
    assert loaded.config == model.served_config
    split = prepare_split(training, model, for_training=False)
    vectors = encode_captions(model, split), encode_images(model, split)
    expected = first_images(model, split, *vectors).second
    np.testing.assert_array_equal(
        first_images(loaded, split, *vectors).second, expected
    )


def test_the_stage_orders_the_first_images_alone() -> None:
    image_of = np.array([0, 1, 2])
    first = np.array(
        [
            [3, 0],
            [1, 0],
            [0, 1],
        ]
    )
    ranks = Ranks(
        np.array([1, 0, 2]),
        np.zeros(3, np.int64),
        np.arange(3),
    )
    scores = np.array(
        [
            [0.1, 0.2],
            [0.5, 0.5],
            [0.9, 0.8],
        ],
        np.float32,
    )
    found = ranks.reordered(first, scores, image_of)
    assert found.text.tolist() == [0, 1, 2], "first now, a tie, and not among them"
    assert found.image is ranks.image


def test_an_image_tower_of_another_kind_is_refused(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone.image_tower, "pools_class_row", False)
    with pytest.raises(
        ModelError, match=r"query-prompts has prompts made .* use block-adapters\+$"
    ):
        DCAR(backbone, find_method("query-prompts").config)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="query-prompts has prompts"):
        DCAR(
            backbone,
            replace(find_method("query-prompts").config, rerank=RerankConfig(blocks=9)),
        )


@pytest.mark.slow
def test_training_and_comparison_report_both_stages(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # whatever validation prefers
    monkeypatch.setattr(hard_negatives, "WEIGHTS", (1.0,))
    source = BackboneSource(str(tiny_model))
    config = TrainConfig(epochs=1, batch_size=6)
    done = adapt(tiny_data, source, tmp_path / "adapted", config)
    assert done is not None
    assert "adapted (query-prompts)" in done.verdict
    assert "\nWith `rerank`: " in done.verdict
    model, fingerprint = load_checkpoint(tmp_path / "adapted")
    assert fingerprint == done.fingerprint
    assert model.config.rerank.blocks == 2
    methods = ["clip", "query-prompts"]
    results = compare(
        model.backbone,
        tiny_data,
        methods,
        1,
        tmp_path / "compared",
        config,
    )
    (run,) = results["methods"]["query-prompts"]["runs"]
    loaded, _ = load_checkpoint(
        tmp_path / "compared" / run["run"], backbone=model.backbone
    )
    split = prepare_split(
        Annotations(tiny_data).load("test")[0],
        loaded,
        for_training=False,
    )
    assert evaluate(loaded, split) == run["test"]
    (again,) = results["methods"]["query-prompts" + WITH_RERANK]["runs"]
    assert again["test"] == reranked_recall(loaded, split)
    assert [row[0] for row in recall_rows(results)[1:]] == [
        *methods,
        "query-prompts with rerank",
    ]
    assert ("With `rerank`" in results["recommendation"]) == results[
        "recommendation"
    ].startswith("Take query-prompts")
    assert (
        "| query-prompts with rerank |"
        in (tmp_path / "compared/results.md").read_text()
    )
