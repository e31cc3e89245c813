"""The rebuild command in both forms: its output, its help and its exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from app.cli import main as dcar
from dcar_core.util.errors import DataError
from index_jobs.index.versions import current_version, open_current
from index_jobs.rebuild import main
from index_jobs.spec import BuildOptions


@pytest.fixture
def required(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    places = {"--gallery": tiny_gallery, "--checkpoint": tiny_checkpoint, "--out": tmp_path / "index"}
    return [str(part) for pair in places.items() for part in pair]


def run_as(form: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command as `dcar index build` or as the module, in this process; return its exit status."""
    if form == "module":
        return main(arguments)
    monkeypatch.setattr(sys, "argv", ["dcar", "index", "build", *arguments])
    with pytest.raises(SystemExit) as ended:
        dcar()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_first_process_of_a_container_is_interrupted_by_sigterm(
    required: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, before = os.getpid(), signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the kernel does for this process
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr("index_jobs.jobs.build.rebuild", lambda *_, **__: os.kill(own, signal.SIGTERM))
    try:
        assert main(required) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted; run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--max-failed", "2"], "--max-failed"),
        (["--memory", "lots"], "'lots' is not a size of a megabyte or more; give one such as 800MiB or 4GiB"),
        (["--memory", "4"], "'4' is not a size of a megabyte or more"),
        (["--unknown"], "--unknown"),
        ([], "--gallery"),
    ],
)
def test_wrong_usage_is_exit_code_2(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--gallery", "g", "--checkpoint", "c", "--out", "o"] if wrong else []
    assert main([*places, *wrong]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"margin": float("nan")}, {"max_failed": 2}, {"batch_size": 0}, {"workers": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(DataError, match=f"{name} must be (0 to 1|at least [01]), not"):
        BuildOptions.of(wrong)


def test_both_forms_have_the_same_help_and_output(
    required: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [*required, "--kind", "ivf", "--text-fields", "color, color,"]
    assert main(given) == 0
    assert open_current(tmp_path / "index").manifest.spec.text_fields == ("color",)
    out, err = capfd.readouterr()
    summary = json.loads(out)
    assert (summary["version"], summary["count"], summary["reused"], summary["kind"]) == (1, 24, False, "IVF1,Flat")
    assert "24/24" in err
    shown = list[tuple[str, str, Any]]()
    for form in ("module", "dcar"):
        outputs = []
        for options in (["--help"], [*given, "--text"], [*given, "--json", "--quiet"]):
            assert run_as(form, *options, monkeypatch=monkeypatch) == 0
            outputs.append(capfd.readouterr().out)
        usage, _, text = outputs[0].partition("\n")
        assert usage.endswith("[OPTIONS]")
        shown.append((text, outputs[1], json.loads(outputs[2]) | {"seconds": 0}))
    assert shown[0] == shown[1]
    for part in ("--gallery", "--checkpoint", "--out", "exit-codes.md", "metadata.jsonl", "Example:"):
        assert part in shown[0][0]
    assert shown[0][1] == f"{tmp_path / 'index'}: version 1 is up to date with 24 images, IVF1,Flat, 0 broken\n"
    code = "import sys; from index_jobs.rebuild import main, rebuild; print(*sys.modules); main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "faiss", "pyarrow", "open_clip"} & set(done.stdout.partition("\n")[0].split())


def test_every_failure_has_its_exit_code_and_one_line(
    required: list[str], gallery: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "index", Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    (broken / "trainables.safetensors").write_bytes(b"no tensors")
    (tmp_path / "file").write_text("")
    few = Path(shutil.copytree(gallery, tmp_path / "few"))
    for name in ("black", "blue", "green"):
        (few / "circle" / f"{name}.png").write_bytes(b"")

    def fails(code: int, *more: object) -> str:
        assert main([*required, "--quiet", *map(str, more)]) == code
        stdout, stderr = capsys.readouterr()
        assert (stdout, stderr.startswith("error: "), stderr.count("\n")) == ("", True, 1)
        return stderr

    for code, *more in (
        (3, "--gallery", tmp_path / "nowhere"),
        (3, "--kind", "nonsense"),
        (4, "--checkpoint", tmp_path / "nowhere"),
        (4, "--checkpoint", gallery),
        (4, "--checkpoint", broken),
        (4, "--device", "cuda:99"),
        (1, "--out", tmp_path / "file"),
    ):
        fails(code, *more)
    out.mkdir(exist_ok=True)
    with FileLock(out / ".lock"):
        fails(5)
    assert fails(3, "--gallery", few).count("the file is empty") == 3
    assert (current_version(out), (out / "versions").exists()) == (None, False)
