"""`dcar benchmark`: what it measures, which runtimes hold, and the fastest of these."""

import re
import shutil
from pathlib import Path

import pytest

from dcar_core.data import load_split
from dcar_core.serving import runtime_benchmark as module
from dcar_core.serving.runtime_benchmark import RuntimeReport, RuntimeResult, benchmark
from dcar_core.util.errors import DataError
from tests.support.parts import needs


def row(name: str, speed: float, recall: float) -> RuntimeResult:
    speeds = {"texts_per_s": speed, "text_ms": 1000 / speed, "images_per_s": speed, "image_ms": 1000 / speed}
    return RuntimeResult(name, "", speeds, {"t2i_r1": recall, "i2t_r1": recall})


@pytest.mark.slow
def test_every_runtime_is_measured_and_the_fastest_is_named(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    report = benchmark(str(tiny_checkpoint), tiny_data, cache=tmp_path, device="cpu", runtimes=["torch", "cuda-fp16"])
    first, torch, cuda = report.rows
    assert (first.name, torch.name, cuda.name) == ("reference", "torch", "cuda-fp16")
    assert (torch.reason, min(torch.speeds.values()) > 0, torch.cost["memory"] > 50) == ("", True, True)
    shown = str(report)
    assert "cuda-fp16       the runtime cuda-fp16 needs a GPU" in shown
    assert f"fastest here: torch; auto tries {report.auto} first" in shown


def measured(
    rows: list[RuntimeResult], checkpoint: Path, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> RuntimeReport:
    """A report of rows that stand for what the processes of the runtimes measure, in place of minutes."""
    names, found = [each.name for each in rows], iter(rows)
    monkeypatch.setattr(module, "in_own_process", lambda *job: next(found))
    monkeypatch.setattr(module, "_calibrate", lambda *given: None)
    return benchmark(str(checkpoint), data, runtimes=names, cache=cache, device="cpu")


@needs("openvino")
def test_runtime_that_loses_recall_is_not_the_fastest(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("torch", 10, 60), row("openvino", 30, 60), row("openvino-int8", 90, 59)]
    report = measured(rows, tiny_checkpoint, tiny_data, tmp_path, monkeypatch)
    assert [each.name for each in report.rows] == ["reference", "torch", "openvino", "openvino-int8"]
    assert report.rows[3].reason == "recall@1 is 1.0 points lower"
    assert report.fastest == "openvino"
    assert "no recall of torch" in module._judge(row("openvino-int8", 90, 59), {}).reason


def test_a_broken_image_is_named(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (first, *_) = load_split(data, "test")[0].images
    (data / first).write_bytes(b"")
    with pytest.raises(DataError, match=f"^test: {re.escape(first)}: the file is empty$"):
        benchmark(str(tiny_checkpoint), data, runtimes=["torch"], cache=tmp_path, device="cpu")


def test_error_of_a_library_fails_one_row(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(measure: object, load: object, name: str, *rest: object) -> RuntimeResult:
        if name == "openvino":
            raise RuntimeError("no kernel image is available\nand a long story")
        return row(name, 10, 60)

    monkeypatch.setattr(module, "in_own_process", fails)
    report = benchmark(str(tiny_checkpoint), tiny_data, runtimes=["openvino", "torch"], cache=tmp_path, device="cpu")
    assert [(each.name, each.reason) for each in report.rows[1:]] == [
        ("torch", ""),
        ("openvino", "RuntimeError: no kernel image is available"),
    ]
