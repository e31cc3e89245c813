"""Training: what is prepared and cached, every method, the best epoch, schedules, and
runs killed and resumed.
"""

import csv
import os
import signal
import time
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dcar_core.training.train as module
from dcar_core.data import CleaningReport, Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import (
    Amp,
    ModelConfig,
    PromptConfig,
    QueryWeights,
    ReweightConfig,
    TrainConfig,
)
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import METHODS, find_method
from dcar_core.model.token_weights import blend, pair_weights
from dcar_core.training import prepared_split, validation
from dcar_core.training.objective import accumulate_gradients
from dcar_core.training.prepared_split import (
    FeatureCache,
    PreparedSplit,
    prepare_split,
    report_truncation,
    split_key,
)
from dcar_core.training.train import STATE_FILE, delete_state, train
from dcar_core.training.validation import (
    choose_query_weights,
    encode_captions,
    encode_images,
)
from dcar_core.util.errors import DcarError, DivergedError
from tests.support.commands import Command, dcar
from tests.support.training import batch_loss, model_and_data, move_weights

Pairs = tuple[Dataset, Dataset]
QUICK = TrainConfig(epochs=2, batch_size=6)


def new_model(backbone: Backbone, name: str) -> DCAR:
    return seeded_model(backbone, find_method(name).config, seed=0)


def prepared(
    data: Dataset,
    model: DCAR,
    *,
    for_training: bool = False,
) -> PreparedSplit:
    return prepare_split(data, model, for_training=for_training)


def interrupt(monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
    """Interrupt training at these batches, counted from 1 over all runs."""
    batches = count(1)

    def accumulate(*args: Any, **kwargs: Any) -> float:
        if next(batches) in at:
            raise KeyboardInterrupt
        return accumulate_gradients(*args, **kwargs)

    monkeypatch.setattr(module, "accumulate_gradients", accumulate)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.slow
def test_every_method_trains_and_leaves_the_backbone_as_it_was(
    name: str,
    backbone: Backbone,
    pairs: Pairs,
) -> None:
    before = backbone.content_hash()
    model = new_model(backbone, name)
    start = {n: p.detach().clone() for n, p in model.trainables()}
    found = train(model, *pairs, QUICK)
    assert backbone.content_hash() == before
    assert all(
        p.grad is None for n, p in model.named_parameters() if n.startswith("backbone.")
    )
    assert bool(start) == (name != "clip")
    # every part learns
    assert all(not torch.equal(start[n], p) for n, p in model.trainables())
    assert len(found.history) == (0 if name == "clip" else 2)


@pytest.mark.slow
def test_training_learns_its_pairs(backbone: Backbone, training: Dataset) -> None:
    model = new_model(backbone, "maple")
    data = prepared(training, model, for_training=True)
    before = float(batch_loss(model, data, np.arange(len(data))).detach())
    train(model, training, training, TrainConfig(epochs=40, batch_size=12, lr=1e-2))
    assert float(batch_loss(model, data, np.arange(len(data))).detach()) < 0.7 * before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TrainConfig(epochs=3, batch_size=6, lr=1e30), r"the loss is nan in epoch \d"),
        # The loss of the only step was a number; what the step made of the model is
        # none.
        (TrainConfig(epochs=1, batch_size=64, lr=1e25), "its vectors are not finite"),
    ],
)
def test_a_diverged_run_is_no_result(
    config: TrainConfig,
    reason: str,
    backbone: Backbone,
    pairs: Pairs,
) -> None:
    with pytest.raises(
        DivergedError, match=f"clip-adapter diverged: {reason}; use a lower --lr"
    ):
        train(new_model(backbone, "clip-adapter"), *pairs, config)


def test_training_stops_early_and_keeps_the_best_epoch(
    backbone: Backbone, pairs: Pairs
) -> None:
    # too little for any recall to change
    config = TrainConfig(epochs=50, batch_size=6, lr=1e-6, patience=2)
    found = train(new_model(backbone, "clip-adapter"), *pairs, config)
    assert [line["epoch"] for line in found.history] == [1, 2, 3]
    assert found.epoch == 1
    assert found.best == {key: found.history[0][key] for key in found.best}


def test_result_is_the_best_validation_epoch(
    backbone: Backbone,
    pairs: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights and queries, also of a run that is resumed later; and it is the
    validation split that is asked.
    """
    model = new_model(backbone, "dcar")
    asked = prepared(pairs[1], model)
    said: list[tuple[float, QueryWeights]] = [
        (10, "none"),
        (50, "predicted"),
        (40, "none"),
    ]
    seen: list[dict[str, torch.Tensor]] = []

    def chosen(
        model: DCAR, data: PreparedSplit
    ) -> tuple[QueryWeights, dict[str, float]]:
        assert torch.equal(data.tokens, asked.tokens)
        assert data.pair_weights is None
        seen.append({name: p.detach().clone() for name, p in model.trainables()})
        score, query = said[len(seen) - 1]
        model.query_weights = query
        return query, {"t2i_r1": score, "i2t_r1": score}

    monkeypatch.setattr(module, "choose_query_weights", chosen)
    interrupt(monkeypatch, 5)
    config = TrainConfig(epochs=3, batch_size=6)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(backbone, "dcar"), *pairs, config, run=tmp_path)
    found = train(model, *pairs, config, run=tmp_path)
    assert found.epoch == 2
    assert len(found.history) == 3
    assert found.best["t2i_r1"] == 50
    assert model.query_weights == "predicted"
    assert all(torch.equal(seen[1][name], p) for name, p in model.trainables())
    assert any(not torch.equal(seen[2][name], p) for name, p in model.trainables())


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_order_learning_rates_and_gradient_clipping(
    amp: Amp,
    backbone: Backbone,
    pairs: Pairs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients scaled up for float16 are clipped by their true length; the order
    follows from seed and epoch.
    """
    steps: list[tuple[float, float, float]] = []
    losses: list[float] = []
    orders: list[list[int]] = []
    whole = torch.optim.AdamW.step

    def steeper(
        model: DCAR,
        data: PreparedSplit,
        rows: np.ndarray,
        **more: Any,
    ) -> float:
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
    # six steps
    config = TrainConfig(
        epochs=2,
        batch_size=4,
        lr=1e-3,
        warmup=0.5,
        weight_decay=0.3,
        amp=amp,
    )
    found = train(new_model(backbone, "coop"), *pairs, config)
    assert [line["loss"] for line in found.history] == pytest.approx(
        [np.mean(losses[:3]), np.mean(losses[3:])]
    )
    assert [rate for rate, *_ in steps] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 0.75e-3, 0.25e-3]
    )
    assert [length for _, length, _ in steps] == pytest.approx([1.0] * 6, rel=1e-3)
    assert {decay for *_, decay in steps} == {0.3}
    for seed in (0, 1):
        train(
            new_model(backbone, "coop"),
            *pairs,
            replace(config, seed=seed),
        )
    epochs = [[*chain(*orders[i : i + 3])] for i in range(0, 18, 3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[:2] == epochs[2:4]
    assert len({tuple(epochs[i]) for i in (0, 1, 4)}) == 3


@pytest.mark.parametrize(
    ("better", "wanted"),
    [
        ("none", "none"),
        ("predicted", "predicted"),
        ("neither", "none"),
    ],
)
def test_query_weights_are_chosen_by_validation(
    better: str,
    wanted: str,
    backbone: Backbone,
    pairs: Pairs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = new_model(backbone, "dcar")
    data = prepared(pairs[1], model)
    pictures = np.eye(len(data), dtype=np.float32)

    def captions(model: DCAR, data: PreparedSplit) -> np.ndarray:
        if better in ("neither", model.query_weights):
            return pictures
        return pictures[::-1]

    monkeypatch.setattr(validation, "encode_captions", captions)
    monkeypatch.setattr(validation, "encode_images", lambda *_: pictures)
    query, recall = choose_query_weights(model, data)
    assert query == model.query_weights == wanted
    assert recall["t2i_r1"] == recall["i2t_r1"] == 100
    monkeypatch.setattr(
        validation, "encode_images", lambda *_: pictures * np.float32("nan")
    )
    with pytest.raises(
        DivergedError, match="dcar diverged: its vectors are not finite"
    ):
        choose_query_weights(model, data)


@pytest.mark.parametrize("name", ["dcar", "clip-adapter"])
def test_split_is_encoded_like_its_queries_and_images_one_by_one(
    name: str,
    backbone: Backbone,
    training: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation, "BATCH", 5)
    model = new_model(backbone, name)
    if model.head is not None:
        model.query_weights = "predicted"
    with torch.no_grad():
        for _, parameter in model.trainables():
            parameter.add_(0.1 * torch.randn_like(parameter))
    data = prepared(training, model)
    text = encode_captions(model, data)
    image = encode_images(model, data)
    with torch.no_grad():
        for row, sample in enumerate(training.samples):
            alone = model.encode_query(
                backbone.tokenize([sample.caption], model.prompt_tokens)
            )
            pixels = backbone.preprocess.standardize(
                backbone.preprocess(training.read(sample.image))[None]
            )
            picture = model.encode_image(torch.from_numpy(pixels))
            np.testing.assert_allclose(text[row], alone[0], atol=1e-5)
            np.testing.assert_allclose(image[data.image_of[row]], picture[0], atol=1e-5)


def test_evaluation_does_not_use_the_paired_image(
    backbone: Backbone, pairs: Pairs
) -> None:
    """Shuffling the images of the split changes no caption's vector."""
    model = seeded_model(
        backbone,
        ModelConfig(reweight=ReweightConfig(query="predicted")),
        seed=0,
    )
    data = prepared(pairs[1], model)
    assert data.pixels is not None
    other = replace(data, pixels=data.pixels[::-1].copy())
    np.testing.assert_array_equal(
        encode_captions(model, data), encode_captions(model, other)
    )
    assert data.pair_weights is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("lr", -1e-3),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {field}: Input should be"):
        TrainConfig.from_dict({field: value})


TRAIN = ("train", "--method", "dcar", "--epochs", 6, "--batch-size", 5, "--lr", "5e-3")


def weights(path: Path) -> dict[str, Tensor]:
    return dict(load_file(path / "trainables.safetensors"))


def column(run: Path, name: str) -> list[float]:
    with (run / "log.csv").open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines)]


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    command = (*TRAIN, "--data", tiny_data, "--model", tiny_model)
    assert dcar(*command, "--out", whole).returncode in (0, 3)
    process = Command("app.cli", *command, "--out", killed)
    # in the middle of the run
    while not (killed / "log.csv").is_file() or len(column(killed, "epoch")) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    before = column(killed, "seconds")
    assert (killed / STATE_FILE).is_file()
    assert not (killed / "trainables.safetensors").exists()
    assert dcar(*command, "--out", killed).returncode in (0, 3)
    assert column(killed, "seconds")[: len(before)] == before, "it did not start anew"
    assert column(killed, "epoch") == [1, 2, 3, 4, 5, 6]
    expected = weights(whole)
    found = weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_an_interruption_changes_nothing(
    amp: Amp,
    backbone: Backbone,
    pairs: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the middle of the first, the second and the third epoch."""
    config = TrainConfig(epochs=3, batch_size=5, lr=5e-3, amp=amp)  # of three batches
    straight = seeded_model(backbone, find_method("dcar").config, 0)
    train(straight, *pairs, config)
    interrupt(monkeypatch, 2, 7, 12)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(
                seeded_model(backbone, find_method("dcar").config, 0),
                *pairs,
                config,
                run=tmp_path,
            )
    model = seeded_model(backbone, find_method("dcar").config, 0)
    found = train(model, *pairs, config, run=tmp_path)
    assert [line["epoch"] for line in found.history] == [1, 2, 3]
    expected = dict(straight.trainables())
    assert all(torch.equal(expected[name], p) for name, p in model.trainables())


class _Payload:
    """Unpickled as code, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_state_of_another_run_is_refused_and_runs_no_code(
    backbone: Backbone,
    retrained: Backbone,
    pairs: Pairs,
    tmp_path: Path,
) -> None:
    def run(
        name: str = "coop",
        data: Pairs = pairs,
        backbone: Backbone = backbone,
        **settings: float,
    ) -> None:
        config = TrainConfig.from_dict({"epochs": 1, "batch_size": 6, **settings})
        train(
            seeded_model(backbone, find_method(name).config, 0),
            *data,
            config,
            run=tmp_path,
        )

    run()
    others: dict[str, dict[str, Any]] = {
        "lr": {"lr": 1e-3},
        "method": {"name": "maple"},
        "backbone": {"backbone": retrained},
        "training data": {"data": (pairs[1], pairs[1])},
        "validation data": {"data": (pairs[0], pairs[0])},
    }
    for named, other in others.items():
        with pytest.raises(
            DcarError, match=f"unfinished run with another {named}; .*--restart"
        ):
            run(**other)
    delete_state(tmp_path)
    run(lr=1e-3)
    (tmp_path / STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(DcarError, match="not a training state"):
        run(lr=1e-3)
    torch.save(
        {"identity": {}, "extra": _Payload(tmp_path / "ran")}, tmp_path / STATE_FILE
    )
    with pytest.raises(
        DcarError, match=r"not a training state \(UnpicklingError\); delete it"
    ):
        run(lr=1e-3)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "options",
    [
        ReweightConfig(),
        ReweightConfig(token_feature="alone"),
        ReweightConfig(image_feature="patches"),
    ],
)
def test_token_weights_are_of_each_caption_with_its_own_image(
    options: ReweightConfig,
    backbone: Backbone,
    described_twice: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compute weights from the texts and images that the options name, relative to a
    white image.
    """
    monkeypatch.setattr(prepared_split, "TEXT_BATCH", 4)
    config = ModelConfig(reweight=options)
    model, data = move_weights(DCAR(backbone, config), described_twice)
    by_patches = options.image_feature == "patches"
    size = backbone.preprocess.size
    pixels = [
        backbone.preprocess(described_twice.read(sample.image))
        for sample in described_twice.samples
    ]
    seen = np.stack([*pixels, np.full((3, size, size), 255, np.uint8)])
    with torch.no_grad():
        found = backbone.encode_image(
            torch.from_numpy(backbone.preprocess.standardize(seen)),
            rows=by_patches,
        )
        found = found[:, 1:] if by_patches else found
        words = backbone.encode_text(data.tokens, rows=True)[:, 1:]
        if options.token_feature == "alone":
            words = backbone.lone_token_features(data.tokens)
        raw = pair_weights(words, found[:-1], found[-1])
    assert data.pair_weights is not None
    wanted = blend(
        raw,
        model.backbone.layout.caption_mask(data.tokens),
        model.config.reweight,
    )
    torch.testing.assert_close(data.pair_weights, wanted, rtol=1e-3, atol=1e-3)


def test_prompts_that_leave_no_room_for_a_word_are_refused(backbone: Backbone) -> None:
    report_truncation({}, {}, backbone, backbone.context_length - 3)
    with pytest.raises(
        DcarError, match="30 prompts leave no room for words in a context of 32 tokens"
    ):
        report_truncation({}, {}, backbone, backbone.context_length - 2)


def test_category_names_are_case_folded_and_eight_negatives_are_used(
    backbone: Backbone, training: Dataset
) -> None:
    one = replace(
        training.samples[0],
        category="Maine Coon",
        negatives=tuple(f"a cat {n}" for n in range(10)),
    )
    one = replace(one, negative_categories=("maine_coon", "Sphynx") * 5)
    data = replace(training, samples=[one, *training.samples[1:]])
    _, prepared = model_and_data(backbone, data, "dcar")
    assert prepared.candidate_weights is not None
    assert prepared.candidate_weights[0].tolist() == [1.0] + [1.0, 1.5] * 4
    unknown = replace(
        training.samples[0],
        category="",
        negatives=("one", "two"),
        negative_categories=("", "face"),
    )
    _, prepared = model_and_data(backbone, replace(training, samples=[unknown]), "dcar")
    assert prepared.candidate_weights is not None
    assert prepared.candidate_weights[0].tolist() == [
        1.0,
        1.0,
        1.5,
    ], "an unknown category may be the same one"
    reports = {"train": CleaningReport()}
    report_truncation({"train": data}, reports, backbone, 4)
    assert (
        reports["train"].counts["negatives after the first 8 of a pair, not trained on"]
        == 2
    )


def test_true_caption_is_no_negative_of_its_image(
    backbone: Backbone, training: Dataset
) -> None:
    """A caption matches its own image and images with an equal caption or attribute,
    and no others.
    """
    gift, popper, cat, other = (
        replace(s, negatives=(), negative_categories=()) for s in training.samples[:4]
    )
    samples = [
        replace(gift, caption="Birthday_party"),
        replace(gift, caption="a wrapped gift"),
        replace(
            popper,
            caption="a party popper",
            attributes=("birthday party", "loud"),
        ),
        replace(cat, caption="a cat"),
        replace(other, caption="birthday  party"),
        replace(other, caption="loud"),
    ]
    _, data = model_and_data(backbone, replace(training, samples=samples), "coop")
    found = data.positives(np.arange(6))
    # of the image of: gift, gift, popper, cat, other, other
    rows = "111011 110000 001000 000100 111011 001011"
    wanted = np.array([[*map(int, row)] for row in rows.split()], bool)
    np.testing.assert_array_equal(found, wanted)
    some = np.array([5, 0, 2])
    np.testing.assert_array_equal(data.positives(some), wanted[np.ix_(some, some)])


def test_feature_cache_returns_the_computed_features(
    backbone: Backbone,
    training: Dataset,
    tmp_path: Path,
) -> None:
    configs = [
        find_method("dcar").config,
        find_method("clip-adapter").config,
        ModelConfig(reweight=ReweightConfig(token_feature="alone")),
        ModelConfig(reweight=ReweightConfig(image_feature="patches")),
    ]
    for config in (replace(configs[0], prompt=PromptConfig(length=2)), *configs):
        model, plain = move_weights(DCAR(backbone, config), training)
        for _ in range(2):  # the second time from the disk
            cached = prepare_split(
                training,
                model,
                for_training=True,
                cache=FeatureCache(tmp_path, backbone),
            )
            for field, one in vars(plain).items():
                other = getattr(cached, field)
                assert (one is None) == (other is None)
                assert one is None or np.array_equal(one, other), field
    assert not list(tmp_path.rglob("*.tmp"))


def test_feature_cache_misses_for_other_images_texts_and_weights(
    backbone: Backbone,
    training: Dataset,
    tiny_gallery: Path,
    retrained: Backbone,
    tmp_path: Path,
) -> None:
    def entries(backbone: Backbone, data: Dataset) -> int:
        model = seeded_model(backbone, find_method("clip-adapter").config, 0)
        prepare_split(
            data,
            model,
            for_training=True,
            cache=FeatureCache(tmp_path, backbone),
        )
        return len([path for path in tmp_path.rglob("*") if path.is_file()])

    # pixels, images, texts
    assert entries(backbone, training) == entries(backbone, training) == 3
    renamed = replace(
        training,
        samples=[replace(s, caption=s.caption + "!") for s in training.samples],
    )
    assert entries(backbone, renamed) == 4
    first = tiny_gallery / training.samples[0].image
    content = first.read_bytes()
    try:
        first.write_bytes((tiny_gallery / training.samples[1].image).read_bytes())
        assert entries(backbone, training) == 6
    finally:
        first.write_bytes(content)
    assert entries(retrained, training) == 9


def test_digest_of_a_split_covers_all_training_data(
    backbone: Backbone, training: Dataset
) -> None:
    cache = FeatureCache(None, backbone)
    first = training.samples[0]
    lists = dict.fromkeys(
        ("negatives", "negative_categories", "attributes"), ("other",)
    )
    names = {"caption": "other", "category": "other", **lists}
    others = [replace(first, **{name: value}) for name, value in names.items()]  # type: ignore[arg-type]
    keys = [
        split_key(replace(training, samples=[one, *training.samples[1:]]), cache)
        for one in (first, *others)
    ]
    assert len(set(keys)) == 6
