"""The client's distribution: light, generated from the service's models, complete."""

import os
import re
import subprocess
import sys
import tomllib
from typing import Any
from urllib.parse import unquote

import dcar_client
from dcar_client import Client, calls, models

from app.core.settings import Settings
from app.main import create_app
from tests.support.paths import ROOT

PACKAGE = ROOT / "clients" / "python"


def test_the_generated_models_are_up_to_date() -> None:
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


def test_the_client_covers_every_route() -> None:
    """Except those for Prometheus and for OpenAI's clients."""
    schema = create_app(Settings(index=ROOT)).openapi()
    routes = {
        f"{method.upper()} {path.removeprefix('/collections/{collection}') or path}"
        for path, operations in schema["paths"].items()
        for method in operations
    }
    covered: list[Any] = [
        calls.search_text("", "red", {}),
        calls.search_image("", b"", "", {}),
        calls.search_batch("", [], {}),
        calls.embeddings([], None),
        calls.similar("", "{item_id}", 10, 0),
        calls.items("", None, 10, 0, "", None),
        calls.item("", "{item_id}"),
        calls.image("", "{item_id}", None),
        calls.feedback([]),
        calls.put_items("", [], False),
        calls.put_item("", {"id": "{item_id}", "image": b""}, False),
        calls.patch_items("", {}, ["a"], None, False),
        calls.patch_item("", "{item_id}", {}, False),
        calls.delete_items("", [], None),
        calls.delete_item("", "{item_id}"),
        calls.jobs(20),
        calls.job("{job_id}"),
        calls.collections(),
        calls.put_collection("{collection}", None),
        calls.delete_collection("{collection}"),
        calls.health(),
        calls.readiness(),
        calls.reload(),
    ]
    assert {f"{call.method} {unquote(call.path)}" for call in covered} == routes - {
        "GET /metrics",
        "GET /v1/models",
        "GET /v1/models/{collection}",
    }
