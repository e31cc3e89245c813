"""`make mutants`, and `make install` where a virtual environment is there, unfinished, or has no pip."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from tests.support.parts import needs
from tests.support.paths import ROOT

_PROJECT = """[project]
name = "x"
version = "1"
optional-dependencies.dev = []
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
_BACKEND = """import pathlib, zipfile
def build_editable(folder, *_):
    with zipfile.ZipFile(pathlib.Path(folder) / "x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("x-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: x\\nVersion: 1\\n")
        wheel.writestr("x-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("x-1.dist-info/RECORD", "")
    return "x-1-py3-none-any.whl"
"""


def test_modules_and_tests_of_mutants_exist() -> None:
    mutmut = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    for name in ("only_mutate", "also_copy", "pytest_add_cli_args_test_selection"):
        assert [path for path in mutmut[name] if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("found", ["unfinished", "without pip"])
@needs("make")
@pytest.mark.slow
def test_install_goes_on_from_any_virtual_environment(found: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text(_PROJECT)
    (tmp_path / "backend.py").write_text(_BACKEND)
    place = tmp_path / ".venv"
    venv.create(place, with_pip=False, symlinks=True)
    (place / "kept").touch()
    if found == "unfinished":  # the scripts come after pip
        for script in place.glob("bin/[aA]ctivate*"):
            script.unlink()
    usual = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "PYTHONPATH"}}
    command = ["make", "install", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=usual | {"PIP_NO_INDEX": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "bin" / "activate").is_file()
    assert (place / "kept").exists(), "nothing is deleted"


@needs("make")
def test_a_lock_is_installed_into_an_environment_without_one(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "a.lock", ".venv/.installed-dev"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def plan(*given: str) -> str:
        usual = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "EXTRAS", "LOCK"}}
        command = ["make", "-n", "install", *given]
        done = subprocess.run(command, cwd=tmp_path, env=usual, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "Nothing to be done" in plan()
    assert "--requirement a.lock" in plan("LOCK=a.lock")
    assert "No rule to make target 'b.lock'" in plan("LOCK=b.lock")
    (tmp_path / ".venv" / ".installed-dev-a.lock").touch()
    assert "Nothing to be done" in plan("LOCK=a.lock")
