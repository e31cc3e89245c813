import csv
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcar_core.backbone import BackboneSource, load_backbone
from dcar_core.checkpoint import load_checkpoint, save_checkpoint
from dcar_core.config import ModelConfig, TrainConfig
from dcar_core.data import load_split
from dcar_core.errors import DataError, DcarError, DivergedError, MissingExtraError
from dcar_core.features import prepare
from dcar_core.methods import METHODS, method
from dcar_core.runs import seeded_model
from dcar_core.scoring import encode_captions, evaluate, mean_r1
from dcar_core.step import batch_loss
from dcar_core.train import TrainResult, train

QUICK = TrainConfig(epochs=2, batch_size=6)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_and_leaves_the_backbone_as_it_was(name: str, tiny_model: Path, tiny_data: Path) -> None:
    backbone = load_backbone(BackboneSource(str(tiny_model)))
    before = backbone.content_hash()
    model = seeded_model(backbone, method(name), seed=0)
    start = {n: p.detach().clone() for n, p in model.trainables()}
    training, validation = load_split(tiny_data, "train")[0], load_split(tiny_data, "val")[0]
    found = train(model, training, validation, QUICK, progress=False)
    assert backbone.content_hash() == before
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("backbone."))
    assert bool(start) == (name != "clip")
    assert all(not torch.equal(start[n], p) for n, p in model.trainables())  # every part learns
    assert len(found.history) == (0 if name == "clip" else 2)


def test_adapters_start_as_plain_clip_and_serve_after(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    backbone = load_backbone(BackboneSource(str(tiny_model)))
    plain, adapted = (seeded_model(backbone, method(name), seed=0).eval() for name in ("clip", "clip-adapter"))
    data = prepare(load_split(tiny_data, "val")[0], plain, for_training=False, progress=False)
    np.testing.assert_allclose(encode_captions(adapted, data), encode_captions(plain, data), atol=1e-6)
    before = save_checkpoint(adapted, tmp_path / "start")
    train(adapted, load_split(tiny_data, "train")[0], load_split(tiny_data, "val")[0], QUICK, progress=False)
    assert not np.allclose(encode_captions(adapted, data), encode_captions(plain, data), atol=1e-4)
    after = save_checkpoint(adapted, tmp_path / "trained")
    loaded, mark = load_checkpoint(tmp_path / "trained")
    assert mark == after
    np.testing.assert_array_equal(encode_captions(loaded, data), encode_captions(adapted, data))
    assert before != after  # the adapters are part of what serves, so of the fingerprint


def test_the_extension_keeps_its_category_adapter_for_queries(tiny_model: Path) -> None:
    backbone = load_backbone(BackboneSource(str(tiny_model)))
    published, extended = (seeded_model(backbone, method(name), seed=0) for name in ("dcar", "dcar+"))
    assert published.category_adapter() is published.caa
    assert published.text_adapter is None
    assert extended.category_adapter() is extended.text_adapter
    assert extended.caa is None


def test_the_epoch_is_chosen_by_validation_and_it_is_that_ones_weights_that_stay(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(BackboneSource(str(tiny_model)))
    training, validation = load_split(tiny_data, "train")[0], load_split(tiny_data, "val")[0]
    model = seeded_model(backbone, method("coop"), seed=0)
    found = train(model, training, validation, replace(QUICK, epochs=4, lr=0.05), progress=False)
    assert found.best == evaluate(model, prepare(validation, model, for_training=False, progress=False))
    assert found.best != evaluate(model, prepare(training, model, for_training=False, progress=False))
    assert mean_r1(found.best) == max((line["t2i_r1"] + line["i2t_r1"]) / 2 for line in found.history)


def test_options_as_published_leave_no_trace_in_what_names_a_run() -> None:
    assert not {"word", "picture"} & method("dcar").to_dict()["reweight"].keys()
    for name in ("dcar", "dcar-alone", "dcar-patches", "dcar+"):
        assert ModelConfig.from_dict(method(name).to_dict()) == method(name)


def test_training_learns_its_pairs(tiny_model: Path, tiny_data: Path) -> None:
    model = seeded_model(load_backbone(BackboneSource(str(tiny_model))), method("dcar-deep"), seed=0)
    training = load_split(tiny_data, "train")[0]
    data = prepare(training, model, for_training=True, progress=False)
    rows = np.arange(len(data))
    before = float(batch_loss(model, data, rows).detach())
    train(model, training, training, TrainConfig(epochs=40, batch_size=12, lr=1e-2), progress=False)
    assert float(batch_loss(model, data, rows).detach()) < 0.7 * before


def test_a_loss_that_is_no_number_stops_the_run(tiny_model: Path, tiny_data: Path) -> None:
    model = seeded_model(load_backbone(BackboneSource(str(tiny_model))), method("clip-adapter"), seed=0)
    training, validation = load_split(tiny_data, "train")[0], load_split(tiny_data, "val")[0]
    with pytest.raises(DivergedError, match=r"the loss is nan in epoch \d of clip-adapter; use a lower --lr"):
        train(model, training, validation, TrainConfig(epochs=3, batch_size=6, lr=1e30), progress=False)


def test_a_last_step_that_leaves_no_numbers_is_no_result(tiny_model: Path, tiny_data: Path) -> None:
    """The loss of the only step was a number; what the step made of the model is none."""
    model = seeded_model(load_backbone(BackboneSource(str(tiny_model))), method("clip-adapter"), seed=0)
    training, validation = load_split(tiny_data, "train")[0], load_split(tiny_data, "val")[0]
    with pytest.raises(DivergedError, match="the vectors of clip-adapter are no numbers any more; use a lower --lr"):
        train(model, training, validation, TrainConfig(epochs=1, batch_size=64, lr=1e25), progress=False)


def test_training_stops_early_and_keeps_the_best_epoch(tiny_model: Path, tiny_data: Path) -> None:
    model = seeded_model(load_backbone(BackboneSource(str(tiny_model))), method("clip-adapter"), seed=0)
    training, validation = load_split(tiny_data, "train")[0], load_split(tiny_data, "val")[0]
    config = TrainConfig(epochs=50, batch_size=6, lr=1e-6, patience=2)  # too little for any recall to change
    found = train(model, training, validation, config, progress=False)
    assert [line["epoch"] for line in found.history] == [1, 2, 3]
    assert found.epoch == 1
    assert found.best == {key: found.history[0][key] for key in found.best}


def test_the_log_is_a_line_an_epoch(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    found = run_coop(tiny_model, tiny_data, tmp_path)
    with (tmp_path / "log.csv").open() as lines:
        logged = list(csv.DictReader(lines))
    assert [float(line["loss"]) for line in logged] == [line["loss"] for line in found.history]
    assert [float(line["t2i_r1"]) for line in logged] == [line["t2i_r1"] for line in found.history]


def test_tensorboard(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboardX") is None:
        if os.environ.get("DCAR_REQUIRE_ALL") == "1":
            pytest.fail("the tensorboard extra is not installed although everything is required")
        pytest.skip("the extra is not installed: pip install 'dcar[tensorboard]'")
    run_coop(tiny_model, tiny_data, tmp_path, tensorboard=True)
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"training/loss" in events
    assert b"validation/t2i_r1" in events


def test_tensorboard_without_its_extra(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingExtraError, match=r"dcar\[tensorboard\]"):
        run_coop(tiny_model, tiny_data, tmp_path, tensorboard=True)


def run_coop(tiny_model: Path, tiny_data: Path, run: Path, *, tensorboard: bool = False) -> TrainResult:
    model = seeded_model(load_backbone(BackboneSource(str(tiny_model))), method("coop"), seed=0)
    training, validation = load_split(tiny_data, "train")[0], load_split(tiny_data, "val")[0]
    return train(model, training, validation, QUICK, progress=False, run=run, tensorboard=tensorboard)


def test_evaluation_does_not_use_the_paired_image(tiny_model: Path, tiny_data: Path) -> None:
    """Shuffling the pictures of the split must not change a single caption's vector."""
    config = ModelConfig().with_query_weights("predicted")
    model = seeded_model(load_backbone(BackboneSource(str(tiny_model))), config, seed=0)
    data = prepare(load_split(tiny_data, "val")[0], model, for_training=False, progress=False)
    other = replace(data, pixels=data.pixels[::-1].copy())
    np.testing.assert_array_equal(encode_captions(model, data), encode_captions(model, other))
    assert data.pair_weights is None


def test_unknown_method_and_missing_pictures(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DcarError, match=r"no method is named 'dcarr'; there are: clip, coop"):
        method("dcarr")
    model = seeded_model(load_backbone(BackboneSource(str(tiny_model))), method("coop"), seed=0)
    elsewhere = load_split(tiny_data, "train", images=tmp_path, pictures="ignore")[0]
    with pytest.raises(DataError, match=r"train: no file .*--images"):
        prepare(elsewhere, model, for_training=False, progress=False)
