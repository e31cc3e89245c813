"""Training runs that are killed and resumed."""

import csv
import os
import signal
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
from tests.support.commands import Command, run

Pairs = tuple[Dataset, Dataset]
# MODEL DATA OUT [PARTS]
TRAIN = """
import sys
from pathlib import Path
from unittest import mock
from dcar_core.data import Annotations
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.config import TrainConfig
from dcar_core.model.dcar import seeded_model
from dcar_core.model.methods import find_method
from dcar_core.training.prepared_split import FeatureCache
from dcar_core.training.train import train, write_csv

data, out = map(Path, sys.argv[2:4])
model = seeded_model(load_backbone(BackboneSource(sys.argv[1])), find_method("dcar").config, 0)

def tell(directory, history):
    write_csv(directory, history)
    print("epoch", len(history), flush=True)

with mock.patch("dcar_core.training.train.write_csv", tell):
    splits = (Annotations(data).load(split)[0] for split in ("train", "val"))
    config = TrainConfig(epochs=6, batch_size=5, lr=5e-3, accumulate=int(sys.argv[4]))
    train(model, *splits, config, run=out, cache=FeatureCache(out / "features", model.backbone))
save_checkpoint(model, out)
"""


def train_in_process(*arguments: object, parts: int = 1) -> str:
    done = run("-c", TRAIN, *arguments, parts)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    train_in_process(tiny_model, tiny_data, whole)
    process = Command("-c", TRAIN, tiny_model, tiny_data, killed, 1)
    for _ in range(3):  # in the middle of the run, wherever it is by then
        assert process.stdout.readline().startswith("epoch")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert (killed / STATE_FILE).is_file()
    assert not (killed / "trainables.safetensors").exists()
    went_on = train_in_process(tiny_model, tiny_data, killed).splitlines()
    assert 0 < len(went_on) < 6, "it did not start anew"
    assert column(killed, "epoch") == [1, 2, 3, 4, 5, 6]
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    train_in_process(tiny_model, tiny_data, parts, parts=3)  # batches of five and two: some parts are empty
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
