"""Training runs that are killed and resumed."""

import csv
import os
import signal
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dcar_core.training.train as module
from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import Amp, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods.registry import method
from dcar_core.training.finished import STATE_FILE
from dcar_core.training.objective import accumulate_gradients
from dcar_core.training.train import train
from dcar_core.training.train_state import delete_state
from dcar_core.util.errors import TrainingError
from tests.support.commands import Command, run
from tests.support.paths import TRAIN_PROCESS

T = TypeVar("T")
Pairs = tuple[Dataset, Dataset]


def train_in_process(*arguments: object) -> str:
    done = run(TRAIN_PROCESS, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(path: Path) -> dict[str, Tensor]:
    return dict(load_file(str(path / "trainables.safetensors")))


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    train_in_process(tiny_model, tiny_data, out, "dcar")
    return out


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(
    uninterrupted: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    process = Command(TRAIN_PROCESS, tiny_model, tiny_data, tmp_path, "dcar")
    for _ in range(3):  # in the middle of the run, wherever it is by then
        assert process.stdout.readline().startswith("epoch")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert (tmp_path / STATE_FILE).is_file()
    assert not (tmp_path / "trainables.safetensors").exists()
    went_on = train_in_process(tiny_model, tiny_data, tmp_path, "dcar").splitlines()
    assert 0 < len(went_on) < 6  # it did not start anew
    expected, found = weights(uninterrupted), weights(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with (tmp_path / "log.csv").open() as lines:
        assert [row["epoch"] for row in csv.DictReader(lines)] == list("123456")


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_an_interruption_within_an_epoch_changes_nothing(
    amp: Amp, backbone: Backbone, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each single batch of the first epochs, with a state saved there."""
    config = TrainConfig(epochs=2, batch_size=5, lr=5e-3, amp=amp)
    straight = seeded_model(backbone, method("dcar"), 0)
    train(straight, *pairs, config)
    monkeypatch.setattr(module, "SAVE_EVERY_S", -1)
    done = 0

    def interrupted(*args: Any, **kwargs: Any) -> float:
        nonlocal done
        done += 1
        if done % 2 == 0:
            raise KeyboardInterrupt
        return accumulate_gradients(*args, **kwargs)

    monkeypatch.setattr(module, "accumulate_gradients", interrupted)
    for _ in range(20):
        model = seeded_model(backbone, method("dcar"), 0)
        try:
            found = train(model, *pairs, config, run=tmp_path)
            break
        except KeyboardInterrupt:
            continue
    assert done == 11  # six batches, five interruptions
    assert [line["epoch"] for line in found.history] == [1, 2]
    expected = dict(straight.trainables())
    assert all(torch.equal(expected[name], p) for name, p in model.trainables())


def test_resumed_run_keeps_its_best_epoch(
    backbone: Backbone, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three is the best; the run is stopped in the third."""
    seen: list[dict[str, Tensor]] = []
    batches = 0

    def chosen(model: DCAR, *_: object) -> tuple[str, dict[str, float]]:
        seen.append({name: p.detach().clone() for name, p in model.trainables()})
        score = 50.0 if len(seen) == 1 else 10.0
        return "none", {"t2i_r1": score, "i2t_r1": score}

    def interrupted(*args: Any, **kwargs: Any) -> float:
        nonlocal batches
        batches += 1
        if batches == 5:
            raise KeyboardInterrupt
        return accumulate_gradients(*args, **kwargs)

    monkeypatch.setattr(module, "choose_query_weights", chosen)
    monkeypatch.setattr(module, "accumulate_gradients", interrupted)
    config = TrainConfig(epochs=3, batch_size=6)
    with pytest.raises(KeyboardInterrupt):
        train(seeded_model(backbone, method("coop"), 0), *pairs, config, run=tmp_path)
    model = seeded_model(backbone, method("coop"), 0)
    found = train(model, *pairs, config, run=tmp_path)
    assert (found.epoch, len(found.history), found.best["t2i_r1"]) == (1, 3, 50)
    assert all(torch.equal(seen[0][name], p) for name, p in model.trainables())


def test_a_state_of_another_run_is_refused(
    backbone: Backbone, retrained: Backbone, pairs: Pairs, tmp_path: Path
) -> None:
    def run(name: str = "coop", data: Pairs = pairs, backbone: Backbone = backbone, **settings: float) -> None:
        config = TrainConfig.from_dict({"epochs": 1, "batch_size": 6, **settings})
        train(seeded_model(backbone, method(name), 0), *data, config, run=tmp_path)

    run()
    others: dict[str, dict[str, Any]] = {
        "lr": {"lr": 1e-3},
        "method": {"name": "dual"},
        "backbone": {"backbone": retrained},
        "training data": {"data": (pairs[1], pairs[1])},
        "validation data": {"data": (pairs[0], pairs[0])},
    }
    for named, other in others.items():
        with pytest.raises(TrainingError, match=f"unfinished run with another {named}; .*--restart"):
            run(**other)
    delete_state(tmp_path)
    run(lr=1e-3)
    (tmp_path / STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(TrainingError, match="not a training state"):
        run(lr=1e-3)


class _Payload:
    """Unpickled as code, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_state_runs_no_code(backbone: Backbone, training: Dataset, tmp_path: Path) -> None:
    torch.save({"identity": {}, "extra": _Payload(tmp_path / "ran")}, tmp_path / STATE_FILE)
    model = seeded_model(backbone, method("coop"), 0)
    with pytest.raises(TrainingError, match=r"not a training state \(UnpicklingError\); delete it"):
        train(model, training, training, TrainConfig(epochs=1, batch_size=6), run=tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_parts_learn_what_whole_batches_teach(
    uninterrupted: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Batches of five and two (12 pairs): some parts are empty."""
    train_in_process(tiny_model, tiny_data, tmp_path, "dcar", 3)
    expected, found = weights(uninterrupted), weights(tmp_path)
    for name in expected:  # Adam turns the rounding of a gradient near zero (the head's bias) into steps of full size
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-3)
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=1e-4)


def losses(run: Path) -> list[float]:
    with (run / "log.csv").open() as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines)]
