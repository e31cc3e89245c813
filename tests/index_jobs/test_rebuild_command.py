"""The job as a command: its output, its help, its exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from index_jobs.rebuild import main
from index_jobs.store.artifact import current_version


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "index_jobs.rebuild", *map(str, arguments)]


def test_command_prints_json_on_stdout_and_progress_on_stderr(
    tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    arguments = (
        "--gallery",
        tiny_gallery,
        "--checkpoint",
        tiny_checkpoint,
        "--out",
        tmp_path / "index",
        "--kind",
        "ivf",
    )
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert (summary["version"], summary["count"], summary["reused"], summary["kind"]) == (1, 24, False, "IVF1,Flat")
    assert "24/24" in done.stderr
    again = subprocess.run(command(*arguments, "--quiet"), capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["reused"] is True
    assert again.stderr == ""


def test_help_teaches_and_loads_nothing_heavy() -> None:
    code = "import sys; from index_jobs.rebuild import main, rebuild; print(*sys.modules); main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, _, text = done.stdout.partition("\n")
    assert not {"torch", "faiss", "pyarrow", "open_clip"} & set(modules.split())
    for part in ("--gallery", "--checkpoint", "--out", "exit codes:", "metadata.jsonl", "goes on where it stopped"):
        assert part in text


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
    assert list((out / "versions").iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--batch-size", "0"], "a whole number of at least 1, not 0"),
        (["--workers", "-1"], "a whole number of at least 0, not -1"),
        (["--keep", "two"], "a whole number of at least 1, not two"),
        (["--max-failed", "2"], "a share from 0 to 1, not 2"),
        (["--margin", "a bit"], "a share from 0 to 1, not a bit"),
        (["--unknown"], "--unknown"),
        ([], "--gallery"),
    ],
)
def test_wrong_usage_is_exit_code_2(wrong: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = ["--gallery", "g", "--checkpoint", "c", "--out", "o"] if wrong else []
    with pytest.raises(SystemExit) as caught:
        main([*needed, *wrong])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
