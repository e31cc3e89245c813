"""A third party's plug-in: a module and the metadata of a distribution, found on the
path.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from dcar_core.model.checkpoint import load_checkpoint
from dcar_core.model.methods import find_method
from dcar_core.util.errors import DcarError
from tests.support.paths import ROOT

COMMAND = '''
from pathlib import Path
from typing import Any, Literal
from dataclasses import dataclass
from dcar_core.util.options import option, with_options

@dataclass
class Style:
    size: tuple[int, int] = option((1, 2))
    shout: bool = option(False, "In capitals.")
    stop: bool = option(True, "With a full stop.")
    inner: int = 0

@with_options(Style)
def greet(
    names: list[str] = option(),
    *,
    greeting: Literal["hello", "bye"] = option("hello", "What is said."),
    file: Path | None = option(None, "Where it is written."),
    ages: list[int] | None = option(None, "One for each name.", min=0),
    count: int = option(1, "How often.", flags=("-n",)),
    **style: Any,
) -> int:
    """Greet people."""
    print(names, greeting, file, ages, count, style)
    return 3 if greeting == "bye" else 0
'''


def dcar(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(
        [
            str(folder),
            str(ROOT),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    command = [sys.executable, "-m", "app.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_commands_of_another_distribution_join_those_of_dcar(tmp_path: Path) -> None:
    folder = tmp_path
    metadata = tmp_path / "greetings-1.dist-info"
    (folder / "greetings.py").write_text(COMMAND)
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: greetings\nVersion: 1\n"
    )
    lines = [
        "[dcar.commands]",
        *(f"{name} = greetings:greet" for name in ("hello.greet", "data.greet")),
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))

    done = dcar(
        folder,
        "hello",
        "greet",
        "Ada",
        "Bo",
        "--ages",
        "36",
        "--ages",
        "4",
        "--size",
        "3",
        "4",
        "-n",
        "2",
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert (
        done.stdout.strip()
        == "['Ada', 'Bo'] hello None [36, 4] 2 {'size': (3, 4), 'shout': False, 'stop':"
        " True}"
    )
    done = dcar(
        folder,
        "data",
        "greet",
        "Ada",
        "--greeting",
        "bye",
        "--file",
        "a.txt",
        "--shout",
        "--no-stop",
    )
    assert done.returncode == 3
    assert (
        "bye a.txt None 1 {'size': (1, 2), 'shout': True, 'stop': False}" in done.stdout
    )
    for wrong, says in (
        (["Ada", "--ages", "-1"], "'--ages'"),
        (["Ada", "--greeting", "hi"], "'--greeting'"),
        ([], "Missing argument"),
    ):
        done = dcar(folder, "hello", "greet", *wrong)
        assert done.returncode == 2
        assert says in done.stderr
    done = dcar(folder, "hello", "greet", "--help")
    for text in (
        "Greet people.",
        "What is said.",
        "--shout ",
        "--stop / --no-stop",
        "-n ",
    ):
        assert text in done.stdout
    assert "check" in dcar(folder, "data", "--help").stdout, (
        "the command joins those of the group"
    )
    (folder / "greetings.py").write_text("import nothing_of_this_name")
    done = dcar(folder, "models")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: the plug-in greetings:greet cannot be loaded (No module named"
        " 'nothing_of_this_name'); update or uninstall it"
    )


@pytest.mark.slow
def test_a_method_of_another_distribution_trains_and_its_checkpoint_loads_without_it(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The method of the how-to page."""
    page = (ROOT / "docs/how-to/compare-methods.md").read_text()
    (tmp_path / "bitfit.py").write_text(
        page.partition("```python\n# bitfit.py\n")[2].partition("```")[0]
    )
    (metadata := tmp_path / "bitfit-1.dist-info").mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: bitfit\nVersion: 1\n"
    )
    lines = [
        "[dcar.methods]",
        "bitfit = bitfit:METHOD",
        "partial = bitfit:partial",
        "missing = bitfit:OTHER",
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    given = [
        "--data",
        str(tiny_data),
        "--model",
        str(tiny_model),
        "--epochs",
        "1",
        "--batch-size",
        "6",
    ]
    with monkeypatch.context() as installed:
        installed.syspath_prepend(tmp_path)
        done = CliRunner().invoke(
            app, ["train", *given, "--method", "bitfit", "--out", str(tmp_path / "out")]
        )
        assert done.exit_code in {0, 3}, done.output
        given += ["--seeds", "1", "--out", str(tmp_path / "results")]
        done = CliRunner().invoke(app, ["evaluate", *given, "--methods", "bitfit"])
        assert "\n| bitfit |" in done.output
        with pytest.raises(
            DcarError, match=r"bitfit:partial is no method .*; update or uninstall it"
        ):
            find_method("partial")
        with pytest.raises(
            DcarError,
            match=r"bitfit:OTHER is no method .*OTHER.*; update or uninstall it",
        ):
            find_method("missing")
    model, _ = load_checkpoint(tmp_path / "out")
    assert model.config.method == "bitfit"
    with pytest.raises(
        DcarError, match="no method is named 'bitfit'; there are: clip, coop, "
    ):
        assert model.method
