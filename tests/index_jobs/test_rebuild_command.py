"""The rebuild command in both forms: its output, its help and its exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from app.cli import main as dcar
from dcar_core.util.errors import DataError
from index_jobs.index.versions import current_version
from index_jobs.rebuild import main
from index_jobs.spec import BuildOptions
from tests.support.commands import run


@pytest.mark.slow
def test_command_prints_json_on_stdout_and_progress_on_stderr(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = (
        "--gallery", tiny_gallery, "--checkpoint", tiny_checkpoint, "--out", tmp_path / "index", "--kind", "ivf",
    )  # fmt: skip
    done = run("index_jobs.rebuild", *arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["version"], summary["count"], summary["reused"], summary["kind"]) == (1, 24, False, "IVF1,Flat")
    assert "24/24" in done.stderr
    again = run("index_jobs.rebuild", *arguments, "--quiet")
    assert json.loads(again.stdout)["reused"] is True
    assert again.stderr == ""


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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, before = os.getpid(), signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the kernel does for this process
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr("index_jobs.jobs.build.rebuild", lambda *_, **__: os.kill(own, signal.SIGTERM))
    arguments = ("--gallery", str(tmp_path), "--checkpoint", str(tmp_path), "--out", str(tmp_path / "index"))
    try:
        assert run_as("module", *arguments, monkeypatch=monkeypatch) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted; run the same command again" in capsys.readouterr().err


def test_both_forms_have_the_same_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for form in ("module", "dcar"):
        assert run_as(form, "--help", monkeypatch=monkeypatch) == 0
        usage, _, text = capsys.readouterr().out.partition("\n")
        assert usage.endswith("[OPTIONS]")
        shown.append(text)
    assert shown[0] == shown[1]
    for part in ("--gallery", "--checkpoint", "--out", "Exit codes:", "metadata.jsonl", "interrupted", "Example:"):
        assert part in shown[0]


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from index_jobs.rebuild import main, rebuild; print(*sys.modules); main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "faiss", "pyarrow", "open_clip"} & set(done.stdout.partition("\n")[0].split())


def test_both_forms_print_the_summary_as_asked(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    required = (
        "--gallery", str(tiny_gallery), "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "index"),
    )  # fmt: skip
    main([*required, "--quiet"])
    capsys.readouterr()
    texts, values = set(), []
    for form in ("module", "dcar"):
        assert run_as(form, *required, "--text", monkeypatch=monkeypatch) == 0
        texts.add(capsys.readouterr().out)
        assert run_as(form, *required, "--json", monkeypatch=monkeypatch) == 0
        values.append(json.loads(capsys.readouterr().out) | {"seconds": 0})
    assert texts == {f"{tmp_path / 'index'}: version 1 is up to date with 24 images, Flat, 0 broken\n"}
    assert values[0] == values[1]


def test_every_failure_has_its_exit_code_and_one_line(
    gallery: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "index"

    def run(
        *more: object, gallery: Path = gallery, checkpoint: Path = tiny_checkpoint, out: Path = out
    ) -> tuple[int, str]:
        arguments = ["--gallery", gallery, "--checkpoint", checkpoint, "--out", out, "--quiet", *more]
        code = main([str(argument) for argument in arguments])
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        return code, stderr

    broken = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    (broken / "trainables.safetensors").write_bytes(b"no tensors")
    (tmp_path / "file").write_text("")
    assert run(gallery=tmp_path / "nowhere")[0] == 3
    assert run("--kind", "nonsense")[0] == 3
    assert run(checkpoint=tmp_path / "nowhere")[0] == 4
    assert run(checkpoint=gallery)[0] == 4
    assert run(checkpoint=broken)[0] == 4
    assert run("--device", "cuda:99")[0] == 4
    assert run(out=tmp_path / "file")[0] == 1
    out.mkdir(exist_ok=True)
    with FileLock(out / ".lock"):
        assert run()[0] == 5
    for name in ("black", "blue", "green"):
        (gallery / "circle" / f"{name}.png").write_bytes(b"")
    code, line = run()
    assert code == 3
    assert line.count("the file is empty") == 3
    assert current_version(out) is None
    assert not (out / "versions").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--workers", "-1"], "--workers"),
        (["--keep", "two"], "--keep"),
        (["--max-failed", "2"], "--max-failed"),
        (["--margin", "a bit"], "--margin"),
        (["--target-recall", "nan"], "--target-recall"),
        (["--memory", "lots"], "'lots' is not a size of a megabyte or more; give one such as 800MiB or 4GiB"),
        (["--memory", "4"], "'4' is not a size of a megabyte or more"),
        (["--unknown"], "--unknown"),
        ([], "--gallery"),
    ],
)
def test_wrong_usage_is_exit_code_2(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = ["--gallery", "g", "--checkpoint", "c", "--out", "o"] if wrong else []
    assert main([*required, *wrong]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"margin": float("nan")}, {"max_failed": 2}, {"batch_size": 0}, {"workers": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(DataError, match=f"{name} must be (0 to 1|at least [01]), not"):
        BuildOptions.of(wrong)
