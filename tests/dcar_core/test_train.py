"""The training loop: every method, the best epoch, early stops, schedules and logs."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcar_core.training.train as module
from dcar_core.data import Annotations, Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.checkpoint import load_checkpoint, save_checkpoint
from dcar_core.model.config import Amp, LossConfig, ModelConfig, PromptConfig, QueryWeights, ReweightConfig, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import METHODS, find_method
from dcar_core.training import validation
from dcar_core.training.objective import accumulate_gradients
from dcar_core.training.prepared_split import PreparedSplit, prepare_split
from dcar_core.training.train import train
from dcar_core.training.validation import choose_query_weights, encode_captions, encode_images
from dcar_core.util.errors import DataError, DivergedError
from tests.support.training import batch_loss

Pairs = tuple[Dataset, Dataset]
QUICK = TrainConfig(epochs=2, batch_size=6)


def new_model(backbone: Backbone, name: str) -> DCAR:
    return seeded_model(backbone, find_method(name).config, seed=0)


def prepared(data: Dataset, model: DCAR, *, for_training: bool = False) -> PreparedSplit:
    return prepare_split(data, model, for_training=for_training)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.slow
def test_every_method_trains_and_leaves_the_backbone_as_it_was(name: str, backbone: Backbone, pairs: Pairs) -> None:
    before = backbone.content_hash()
    model = new_model(backbone, name)
    start = {n: p.detach().clone() for n, p in model.trainables()}
    found = train(model, *pairs, QUICK)
    assert backbone.content_hash() == before
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("backbone."))
    assert bool(start) == (name != "clip")
    assert all(not torch.equal(start[n], p) for n, p in model.trainables())  # every part learns
    assert len(found.history) == (0 if name == "clip" else 2)


def test_controls_keep_their_prompts_and_their_temperature_to_themselves(
    backbone: Backbone, pairs: Pairs, tmp_path: Path
) -> None:
    """Constant prompts leave `dual` nothing to learn, and `dcar+` its adapters; temperatures are not served."""
    constant = PromptConfig(values="constant")
    fixed = replace(
        find_method("dual").config, prompt=constant, loss=LossConfig(temperature="learned", category=0, head=0)
    )
    assert train(seeded_model(backbone, fixed, 0), *pairs, QUICK).history == []
    config = replace(find_method("dcar+").config, prompt=constant, loss=LossConfig(temperature="learned", anchor=0.5))
    model = seeded_model(backbone, config, 0)
    start = {name: p.detach().clone() for name, p in model.trainables()}
    assert len(train(model, *pairs, QUICK).history) == 2
    moved = {name for name, p in model.trainables() if not torch.equal(start[name], p)}
    assert moved == {name for name in start if not name.startswith("prompts.")}
    assert {"log_scale", "block_adapters.up"} < moved
    save_checkpoint(model, tmp_path)
    loaded, _ = load_checkpoint(tmp_path, backbone=backbone)
    assert replace(loaded.config, reweight=config.reweight) == config
    data = prepared(pairs[1], model)
    np.testing.assert_array_equal(encode_captions(loaded, data), encode_captions(model, data))


@pytest.mark.slow
def test_training_learns_its_pairs(backbone: Backbone, training: Dataset) -> None:
    model = new_model(backbone, "dcar-deep")
    data = prepared(training, model, for_training=True)
    before = float(batch_loss(model, data, np.arange(len(data))).detach())
    train(model, training, training, TrainConfig(epochs=40, batch_size=12, lr=1e-2))
    assert float(batch_loss(model, data, np.arange(len(data))).detach()) < 0.7 * before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TrainConfig(epochs=3, batch_size=6, lr=1e30), r"the loss is nan in epoch \d"),
        # The loss of the only step was a number; what the step made of the model is none.
        (TrainConfig(epochs=1, batch_size=64, lr=1e25), "its vectors are not finite"),
    ],
)
def test_a_diverged_run_is_no_result(config: TrainConfig, reason: str, backbone: Backbone, pairs: Pairs) -> None:
    with pytest.raises(DivergedError, match=f"clip-adapter diverged: {reason}; use a lower --lr"):
        train(new_model(backbone, "clip-adapter"), *pairs, config)


def test_training_stops_early_and_keeps_the_best_epoch(backbone: Backbone, pairs: Pairs) -> None:
    config = TrainConfig(epochs=50, batch_size=6, lr=1e-6, patience=2)  # too little for any recall to change
    found = train(new_model(backbone, "clip-adapter"), *pairs, config)
    assert [line["epoch"] for line in found.history] == [1, 2, 3]
    assert found.epoch == 1
    assert found.best == {key: found.history[0][key] for key in found.best}


def test_result_is_the_best_validation_epoch(backbone: Backbone, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights and its queries, whatever later epochs were; and it is the validation split that is asked."""
    model = new_model(backbone, "dcar")
    asked = prepared(pairs[1], model)
    said: list[tuple[float, QueryWeights]] = [(10, "none"), (50, "predicted"), (40, "none")]
    seen: list[dict[str, torch.Tensor]] = []

    def chosen(model: DCAR, data: PreparedSplit) -> tuple[QueryWeights, dict[str, float]]:
        assert torch.equal(data.tokens, asked.tokens)
        assert data.pair_weights is None
        seen.append({name: p.detach().clone() for name, p in model.trainables()})
        score, query = said[len(seen) - 1]
        model.query_weights = query
        return query, {"t2i_r1": score, "i2t_r1": score}

    monkeypatch.setattr(module, "choose_query_weights", chosen)
    found = train(model, *pairs, TrainConfig(epochs=3, batch_size=6))
    assert (found.epoch, found.best["t2i_r1"], model.query_weights) == (2, 50, "predicted")
    assert all(torch.equal(seen[1][name], p) for name, p in model.trainables())
    assert any(not torch.equal(seen[2][name], p) for name, p in model.trainables())


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_order_learning_rates_and_gradient_clipping(
    amp: Amp, backbone: Backbone, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients scaled up for float16 are clipped by their true length; the order follows from seed and epoch."""
    steps: list[tuple[float, float, float]] = []
    losses: list[float] = []
    orders: list[list[int]] = []
    whole = torch.optim.AdamW.step

    def steeper(model: DCAR, data: PreparedSplit, rows: np.ndarray, **more: Any) -> float:
        orders.append(rows.tolist())
        losses.append(loss := accumulate_gradients(model, data, rows, **more))
        for _, parameter in model.trainables():
            assert parameter.grad is not None
            parameter.grad *= 1e4
        return loss

    def step(self: torch.optim.AdamW) -> object:
        (group,) = self.param_groups
        length = torch.stack([p.grad.norm() for p in group["params"]]).norm()
        steps.append((group["lr"], float(length), group["weight_decay"]))
        return whole(self)

    monkeypatch.setattr(module, "accumulate_gradients", steeper)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = TrainConfig(epochs=2, batch_size=4, lr=1e-3, warmup=0.5, weight_decay=0.3, amp=amp)  # six steps
    found = train(new_model(backbone, "coop"), *pairs, config)
    assert [line["loss"] for line in found.history] == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])])
    assert [rate for rate, *_ in steps] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 0.75e-3, 0.25e-3])
    assert [length for _, length, _ in steps] == pytest.approx([1.0] * 6, rel=1e-3)
    assert {decay for *_, decay in steps} == {0.3}
    for seed in (0, 1):
        train(new_model(backbone, "coop"), *pairs, replace(config, seed=seed))
    epochs = [[*chain(*orders[i : i + 3])] for i in range(0, 18, 3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[:2] == epochs[2:4]
    assert len({tuple(epochs[i]) for i in (0, 1, 4)}) == 3


@pytest.mark.parametrize(("better", "wanted"), [("none", "none"), ("predicted", "predicted"), ("neither", "none")])
def test_query_weights_are_chosen_by_validation(
    better: str, wanted: str, backbone: Backbone, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(backbone, "dcar")
    data = prepared(pairs[1], model)
    pictures = np.eye(len(data), dtype=np.float32)

    def captions(model: DCAR, data: PreparedSplit) -> np.ndarray:
        return pictures if better in ("neither", model.query_weights) else pictures[::-1]

    monkeypatch.setattr(validation, "encode_captions", captions)
    monkeypatch.setattr(validation, "encode_images", lambda *_: pictures)
    query, recall = choose_query_weights(model, data)
    assert query == model.query_weights == wanted
    assert recall["t2i_r1"] == recall["i2t_r1"] == 100
    monkeypatch.setattr(validation, "encode_images", lambda *_: pictures * np.float32("nan"))
    with pytest.raises(DivergedError, match="dcar diverged: its vectors are not finite"):
        choose_query_weights(model, data)


@pytest.mark.parametrize("name", ["dcar", "clip-adapter"])
def test_split_is_encoded_like_its_queries_and_images_one_by_one(
    name: str, backbone: Backbone, training: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "BATCH", 5)
    model = new_model(backbone, name)
    if model.head is not None:
        model.query_weights = "predicted"
    with torch.no_grad():
        for _, parameter in model.trainables():
            parameter.add_(0.1 * torch.randn_like(parameter))
    data = prepared(training, model)
    text, image = encode_captions(model, data), encode_images(model, data)
    with torch.no_grad():
        for row, sample in enumerate(training.samples):
            alone = model.encode_query(backbone.tokenize([sample.caption], model.prompt_tokens))
            pixels = backbone.preprocess.normalize(backbone.preprocess(training.read(sample.image))[None])
            picture = model.encode_image(torch.from_numpy(pixels))
            np.testing.assert_allclose(text[row], alone[0], atol=1e-5)
            np.testing.assert_allclose(image[data.image_of[row]], picture[0], atol=1e-5)


def test_evaluation_does_not_use_the_paired_image(backbone: Backbone, pairs: Pairs) -> None:
    """Shuffling the images of the split changes no caption's vector."""
    model = seeded_model(backbone, ModelConfig(reweight=ReweightConfig(query="predicted")), seed=0)
    data = prepared(pairs[1], model)
    assert data.pixels is not None
    other = replace(data, pixels=data.pixels[::-1].copy())
    np.testing.assert_array_equal(encode_captions(model, data), encode_captions(model, other))
    assert data.pair_weights is None


def test_missing_images_are_refused(backbone: Backbone, tiny_data: Path, tmp_path: Path) -> None:
    elsewhere = Annotations(tiny_data, tmp_path).load("train", "ignore")[0]
    with pytest.raises(DataError, match=r"train: no file .*--images"):
        prepared(elsewhere, new_model(backbone, "coop"))


@pytest.mark.parametrize(
    ("field", "value"), [("lr", float("inf")), ("lr", float("nan")), ("lr", -1e-3), ("seed", -1), ("seed", 2**63)]
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {field}: Input should be"):
        TrainConfig.from_dict({field: value})
