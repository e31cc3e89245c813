"""`dcar benchmark`: measurements, ranking, and the choice that `auto` makes from them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.data import load_split
from dcar_core.runtimes.equality_proof import Proof, _lowest_cosine
from dcar_core.runtimes.registry import LoadedModel
from dcar_core.serving import runtime_benchmark as module
from dcar_core.serving.runtime_benchmark import RuntimeResult, benchmark, format_report
from dcar_core.serving.runtime_selection import Ranking, candidates, load_ranking, rank, save_ranking
from dcar_core.serving.runtime_trial import RuntimeTrial
from dcar_core.util.errors import DataError


def trial(name: str, speed: float, *, holds: bool = True) -> RuntimeTrial:
    return RuntimeTrial(name, speed, 1000 / speed, speed, 1000 / speed, 1.0, 1.0, holds)


def row(name: str, speed: float, recall: float) -> RuntimeResult:
    return RuntimeResult(name, trial(name, speed), 100, {"t2i_r1": recall, "i2t_r1": recall}, 0.1)


@pytest.fixture
def loaded(tiny_checkpoint: Path, tmp_path: Path) -> LoadedModel:
    return Encoder.load(tiny_checkpoint, device="cpu", cache=tmp_path).loaded


def run(
    loaded: LoadedModel, checkpoint: Path, data: Path, found: list[RuntimeResult], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A benchmark in which `found` is what its processes measure, in place of minutes."""
    rows = iter(found)
    monkeypatch.setattr(module, "in_own_process", lambda *job: next(rows))
    monkeypatch.setattr(module, "_calibrate", lambda *given: None)
    return benchmark(str(checkpoint), data, runtimes=[each.name for each in found], cache=loaded.cache, device="cpu")


@pytest.mark.slow
def test_every_runtime_is_measured_and_auto_takes_the_best(
    tiny_checkpoint: Path, tiny_data: Path, loaded: LoadedModel
) -> None:
    report = benchmark(
        str(tiny_checkpoint), tiny_data, cache=loaded.cache, device="cpu", runtimes=["torch", "cuda-fp16"]
    )
    first, torch, cuda = report.rows
    assert (first.name, torch.name, cuda.name) == ("reference", "torch", "cuda-fp16")
    assert torch.trial is not None
    assert torch.trial.holds
    assert torch.memory is not None
    assert torch.memory > 50
    assert "needs a GPU" in cuda.reason
    shown = format_report(report)
    assert "cuda-fp16       the runtime cuda-fp16 needs a GPU" in shown
    assert report.chosen in shown or "run this without --runtimes" in shown


def test_runtime_that_loses_recall_is_not_taken(
    loaded: LoadedModel, tiny_checkpoint: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("torch", 10, 60), row("onnx-int8", 90, 59)]
    monkeypatch.setattr(module, "in_own_process", lambda *job: rows.pop(0))
    report = benchmark(str(tiny_checkpoint), tiny_data, runtimes=["onnx-int8"], cache=loaded.cache, device="cpu")
    assert [each.name for each in report.rows] == ["reference", "torch", "onnx-int8"]
    assert report.rows[2].reason == "recall@1 is 1.0 points lower"
    unknown = module._judge(row("onnx-int8", 90, 59), None)
    assert unknown.trial is not None
    assert not unknown.trial.holds
    assert "no recall of torch" in unknown.reason


def test_a_broken_image_is_named(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (first, *_) = load_split(data, "test")[0].images
    (data / first).write_bytes(b"")
    with pytest.raises(DataError, match=f"^test: {re.escape(first)}: the file is empty$"):
        benchmark(str(tiny_checkpoint), data, runtimes=["torch"], cache=tmp_path, device="cpu")


def test_second_benchmark_replaces_the_first(
    loaded: LoadedModel, tiny_checkpoint: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = [row(name, 10 + i, 60) for i, name in enumerate(candidates(loaded))]
    good = run(loaded, tiny_checkpoint, tiny_data, [*usual, row("onnx-int8", 90, 60)], monkeypatch)
    assert good.chosen == "onnx-int8"
    bad = run(loaded, tiny_checkpoint, tiny_data, [*usual, row("onnx-int8", 90, 10)], monkeypatch)
    assert bad.chosen == usual[-1].name
    found = load_ranking(loaded)
    assert found is not None
    assert "onnx-int8" not in found.names
    other = replace(loaded, fingerprint="0" * 64)
    assert load_ranking(other) is None, "recall of one adapter says nothing of another's"


@pytest.mark.parametrize("field", ["graphs", "processor", "threads", "libraries"])
def test_ranking_of_another_machine_is_measured_again(field: str, loaded: LoadedModel) -> None:
    save_ranking(loaded, rank([trial("torch", 10)]))
    assert load_ranking(loaded) is not None
    (path,) = (loaded.cache / "rankings").glob("*.json")
    content = json.loads(path.read_text())
    content[field] = {"torch": "1.0"} if field == "libraries" else "another"
    path.write_text(json.dumps(content))
    assert load_ranking(loaded) is None


def test_one_wrong_vector_fails_the_proof() -> None:
    wanted = np.array([[1, 0], [1, 0]], np.float32)
    assert _lowest_cosine(np.array([[1, 0], [0.6, 0.8]], np.float32), wanted) == pytest.approx(0.6)
    broken = np.array([[1, 0], [np.nan, 0]], np.float32)
    assert not Proof(1.0, _lowest_cosine(broken, wanted), 0.999).holds
    assert not Proof(_lowest_cosine(broken, wanted), 1.0, 0.999).holds


def test_score_rises_with_each_speed() -> None:
    usual = RuntimeTrial("torch", 10, 10, 10, 10, 1.0, 1.0, True)
    for better in ({"texts_per_s": 20}, {"text_ms": 5}, {"images_per_s": 20}):
        assert replace(usual, **better).score == pytest.approx(2 ** (1 / 3) * usual.score)  # type: ignore[arg-type]


def test_partial_benchmark_only_removes_failed_runtimes(
    loaded: LoadedModel, tiny_checkpoint: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "candidates", lambda loaded: ["torch", "openvino"])
    looked = run(loaded, tiny_checkpoint, tiny_data, [row("torch", 10, 60), row("onnx", 90, 60)], monkeypatch)
    assert looked.chosen == ""
    assert load_ranking(loaded) is None
    assert "auto has yet to measure" in format_report(looked)
    before = rank([trial("torch", 10), trial("openvino", 30), trial("onnx-int8", 90)])
    save_ranking(loaded, before, own=True)
    again = run(loaded, tiny_checkpoint, tiny_data, [row("torch", 10, 60), row("onnx-int8", 90, 10)], monkeypatch)
    assert again.chosen == "openvino"
    assert load_ranking(loaded) == Ranking(("openvino", "torch"), before.libraries, before.trials)


def test_error_of_a_library_fails_one_row(
    loaded: LoadedModel, tiny_checkpoint: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(
        measure: object, checkpoint: str, pretrained: str | None, device: str, name: str, *rest: object
    ) -> RuntimeResult:
        if name == "onnx":
            raise RuntimeError("no kernel image is available\nand a long story")
        return row(name, 10, 60)

    monkeypatch.setattr(module, "in_own_process", fails)
    report = benchmark(str(tiny_checkpoint), tiny_data, runtimes=["onnx", "torch"], cache=loaded.cache, device="cpu")
    assert [(each.name, each.reason) for each in report.rows[1:]] == [
        ("torch", ""),
        ("onnx", "RuntimeError: no kernel image is available"),
    ]
