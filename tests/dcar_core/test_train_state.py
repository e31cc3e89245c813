"""Training runs that are killed and resumed."""

import csv
import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dcar_core.training.train as module
from dcar_core.data import Dataset
from dcar_core.model.backbone import Backbone
from dcar_core.model.config import Amp, TrainConfig
from dcar_core.model.dcar import DCAR, seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.objective import accumulate_gradients
from dcar_core.training.train import STATE_FILE, delete_state, train
from dcar_core.util.errors import DcarError
from tests.support.commands import Command, dcar

Pairs = tuple[Dataset, Dataset]
TRAIN = ("train", "--method", "dcar", "--epochs", 6, "--batch-size", 5, "--lr", "5e-3")


def weights(path: Path) -> dict[str, Tensor]:
    return dict(load_file(path / "trainables.safetensors"))


def column(run: Path, name: str) -> list[float]:
    with (run / "log.csv").open() as lines:
        return [float(row[name]) for row in csv.DictReader(lines)]


@pytest.mark.slow
def test_killed_and_partitioned_training_end_with_the_same_weights(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    whole, killed, parts = (tmp_path / name for name in ("whole", "killed", "parts"))
    command = (*TRAIN, "--data", tiny_data, "--model", tiny_model)
    assert dcar(*command, "--out", whole).returncode in (0, 3)
    process = Command("app.cli", *command, "--out", killed)
    while not (killed / "log.csv").is_file() or len(column(killed, "epoch")) < 3:  # in the middle of the run
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
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert dcar(*command, "--out", parts, "--accumulate", 3).returncode in (
        0,
        3,
    )  # batches of five and two: some parts are empty
    found = weights(parts)
    for name in expected:  # Adam turns the rounding of a gradient near zero (the head's bias) into steps of full size
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-3)
    assert column(parts, "loss") == pytest.approx(column(whole, "loss"), rel=1e-4)


def interrupt(monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
    """Interrupt training at these batches, counted from 1 over all runs."""
    batches = count(1)

    def accumulate(*args: Any, **kwargs: Any) -> float:
        if next(batches) in at:
            raise KeyboardInterrupt
        return accumulate_gradients(*args, **kwargs)

    monkeypatch.setattr(module, "accumulate_gradients", accumulate)


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_an_interruption_changes_nothing(
    amp: Amp, backbone: Backbone, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the first, the second and the third epoch."""
    config = TrainConfig(epochs=3, batch_size=5, lr=5e-3, amp=amp)  # of three batches
    straight = seeded_model(backbone, find_method("dcar").config, 0)
    train(straight, *pairs, config)
    interrupt(monkeypatch, 2, 7, 12)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(seeded_model(backbone, find_method("dcar").config, 0), *pairs, config, run=tmp_path)
    model = seeded_model(backbone, find_method("dcar").config, 0)
    found = train(model, *pairs, config, run=tmp_path)
    assert [line["epoch"] for line in found.history] == [1, 2, 3]
    expected = dict(straight.trainables())
    assert all(torch.equal(expected[name], p) for name, p in model.trainables())


def test_resumed_run_keeps_its_best_epoch(
    backbone: Backbone, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three is the best; the run is stopped in the third."""
    seen: list[dict[str, Tensor]] = []

    def chosen(model: DCAR, *_: object) -> tuple[str, dict[str, float]]:
        seen.append({name: p.detach().clone() for name, p in model.trainables()})
        return "none", dict.fromkeys(("t2i_r1", "i2t_r1"), 50.0 if len(seen) == 1 else 10.0)

    monkeypatch.setattr(module, "choose_query_weights", chosen)
    interrupt(monkeypatch, 5)
    config = TrainConfig(epochs=3, batch_size=6)
    with pytest.raises(KeyboardInterrupt):
        train(seeded_model(backbone, find_method("coop").config, 0), *pairs, config, run=tmp_path)
    model = seeded_model(backbone, find_method("coop").config, 0)
    found = train(model, *pairs, config, run=tmp_path)
    assert (found.epoch, len(found.history), found.best["t2i_r1"]) == (1, 3, 50)
    assert all(torch.equal(seen[0][name], p) for name, p in model.trainables())


class _Payload:
    """Unpickled as code, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_state_of_another_run_is_refused_and_runs_no_code(
    backbone: Backbone, retrained: Backbone, pairs: Pairs, tmp_path: Path
) -> None:
    def run(name: str = "coop", data: Pairs = pairs, backbone: Backbone = backbone, **settings: float) -> None:
        config = TrainConfig.from_dict({"epochs": 1, "batch_size": 6, **settings})
        train(seeded_model(backbone, find_method(name).config, 0), *data, config, run=tmp_path)

    run()
    others: dict[str, dict[str, Any]] = {
        "lr": {"lr": 1e-3},
        "method": {"name": "dual"},
        "backbone": {"backbone": retrained},
        "training data": {"data": (pairs[1], pairs[1])},
        "validation data": {"data": (pairs[0], pairs[0])},
    }
    for named, other in others.items():
        with pytest.raises(DcarError, match=f"unfinished run with another {named}; .*--restart"):
            run(**other)
    delete_state(tmp_path)
    run(lr=1e-3)
    (tmp_path / STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(DcarError, match="not a training state"):
        run(lr=1e-3)
    torch.save({"identity": {}, "extra": _Payload(tmp_path / "ran")}, tmp_path / STATE_FILE)
    with pytest.raises(DcarError, match=r"not a training state \(UnpicklingError\); delete it"):
        run(lr=1e-3)
    assert not (tmp_path / "ran").exists()
