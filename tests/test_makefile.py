"""What `make mutants` names, and what `make install` does about locks."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

from tests.support.parts import needs
from tests.support.paths import ROOT


def test_modules_and_tests_of_mutants_exist() -> None:
    mutmut = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    for name in ("only_mutate", "also_copy", "pytest_add_cli_args_test_selection"):
        assert [path for path in mutmut[name] if not (ROOT / path).exists()] == []


def make(folder: Path, *given: str, **variables: str) -> str:
    """Run make beside a copy of the Makefile, and return what it says."""
    shutil.copy(ROOT / "Makefile", folder)
    kept = os.environ.keys() - {"MAKEFLAGS", "PYTHONPATH", "EXTRAS", "LOCK"}
    usual = {name: os.environ[name] for name in kept}
    done = subprocess.run(
        ["make", *given],
        cwd=folder,
        env=usual | variables,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@needs("make")
def test_a_lock_is_installed_into_an_environment_without_one(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "a.lock", ".venv/.installed"):
        (tmp_path / name).touch()
    assert "Nothing to be done" in make(tmp_path, "-n", "install")
    assert "--editable '.[dev,hf,torch]'" in make(
        tmp_path,
        "-n",
        "test",
        "EXTRAS=torch,hf",
    ), "all that tests need"
    assert "--requirement a.lock" in make(tmp_path, "-n", "install", "LOCK=a.lock")
    assert "No rule to make target 'b.lock'" in make(
        tmp_path,
        "-n",
        "install",
        "LOCK=b.lock",
    )
    (tmp_path / ".venv" / ".installed-a.lock").touch()
    assert "Nothing to be done" in make(tmp_path, "-n", "install", "LOCK=a.lock")
