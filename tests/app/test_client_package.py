"""The client's distribution: light, generated from the service's models, complete."""

import os
import re
import subprocess
import sys
import tomllib

import dcar_client
from dcar_client import Client, models

from tests.support.paths import ROOT

PACKAGE = ROOT / "clients" / "python"


def test_the_openapi_document_and_the_generated_models_are_up_to_date() -> None:
    script = ROOT / "scripts" / "generate_client_models.py"
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_model_is_exported() -> None:
    own = {name for name, each in vars(models).items() if isinstance(each, type) and each.__module__ == models.__name__}
    assert own - {*dcar_client.__all__} == {"Model"}


def test_the_client_depends_on_httpx_and_pydantic_alone() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split(r"[<>=]", each)[0] for each in project["dependencies"]} == {"httpx", "pydantic"}
    code = "import sys, dcar_client; sys.exit(bool({'torch', 'faiss', 'numpy', 'app', 'dcar_core'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE / "src")}
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE, env=environment).returncode == 0


def test_the_readme_names_every_method() -> None:
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    methods = [name for name in vars(Client) if not name.startswith("_") and name != "close"]
    assert [name for name in methods if f"`{name}(" not in readme] == []
