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


def make(folder: Path, *given: str, **variables: str) -> str:
    """Run make beside a copy of the Makefile, and return what it says."""
    shutil.copy(ROOT / "Makefile", folder)
    kept = os.environ.keys() - {"MAKEFLAGS", "PYTHONPATH", "EXTRAS", "LOCK"}
    usual = {name: os.environ[name] for name in kept}
    done = subprocess.run(["make", *given], cwd=folder, env=usual | variables, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("found", ["unfinished", "without pip"])
@needs("make")
@pytest.mark.slow
def test_install_goes_on_from_any_virtual_environment(found: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(_PROJECT)
    (tmp_path / "backend.py").write_text(_BACKEND)
    place = tmp_path / ".venv"
    venv.create(place, with_pip=False, symlinks=True)
    (place / "kept").touch()
    if found == "unfinished":  # the scripts come after pip
        for script in place.glob("bin/[aA]ctivate*"):
            script.unlink()
    said = make(tmp_path, "install", f"PYTHON={sys.executable}", PIP_NO_INDEX="1")
    assert [*place.glob(".installed-*")], said
    assert (place / "bin" / "activate").is_file()
    assert (place / "kept").exists(), "nothing is deleted"


@needs("make")
def test_a_lock_is_installed_into_an_environment_without_one(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "a.lock", ".venv/.installed-dev"):
        (tmp_path / name).touch()
    assert "Nothing to be done" in make(tmp_path, "-n", "install")
    assert "--requirement a.lock" in make(tmp_path, "-n", "install", "LOCK=a.lock")
    assert "No rule to make target 'b.lock'" in make(tmp_path, "-n", "install", "LOCK=b.lock")
    (tmp_path / ".venv" / ".installed-dev-a.lock").touch()
    assert "Nothing to be done" in make(tmp_path, "-n", "install", "LOCK=a.lock")
