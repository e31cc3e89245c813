"""With exported graphs the service starts without the model, and loads it when a query needs it."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from dcar_core import Encoder
from dcar_core.serving import adapter_cache
from index_jobs.rebuild import rebuild
from tests.support.responses import assert_problem
from tests.support.service import opened

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra [openvino]")

PLAIN = {"query": "a red square", "k": 5}
DEEP = PLAIN | {"rerank": True, "explain": True}


def exported(checkpoint: Path, cache: Path) -> Path:
    """Export the graphs, which may take long, and delete the cached adapters."""
    Encoder.load(checkpoint, device="cpu", runtime="openvino", cache=cache)
    for entry in adapter_cache.directory_in(cache).glob("*"):
        entry.unlink()
    return cache


def live(http: httpx.AsyncClient) -> Encoder:
    encoder: Encoder = http.app.state.collections[None].live.encoder  # type: ignore[attr-defined]
    return encoder


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await http.post("/search/text", json=body)
    assert response.status_code == 200, response.text
    return {name: value for name, value in response.json().items() if name not in ("took_ms", "cached")}


@pytest.mark.slow
async def test_a_later_start_loads_no_model_and_has_the_same_results(
    built_index: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"runtime": "openvino", "runtime_cache": exported(tiny_checkpoint, tmp_path)}

    async with opened(built_index, **settings) as http:
        assert live(http).backbone is not None
        first = await ask(http, PLAIN), await ask(http, DEEP)
    async with opened(built_index, **settings) as http:
        assert live(http).backbone is None
        assert await ask(http, PLAIN) == first[0]
        assert live(http).backbone is None, "a plain search needs no model"
        assert await ask(http, DEEP) == first[1]
        assert live(http).backbone is not None


@pytest.mark.slow
async def test_a_missing_model_fails_only_queries_that_need_it(
    gallery: Path, tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model.parent, tmp_path / "models"))
    rebuild(gallery, model / tiny_checkpoint.name, tmp_path / "index", workers=0, progress=False)
    settings: dict[str, Any] = {"runtime": "openvino", "runtime_cache": exported(tiny_checkpoint, tmp_path / "cache")}

    async with opened(tmp_path / "index", **settings) as http:
        await ask(http, PLAIN)
    async with opened(tmp_path / "index", **settings) as http:
        assert live(http).backbone is None
        shutil.rmtree(model / tiny_model.name)
        await ask(http, PLAIN)
        assert "cannot be loaded" in assert_problem(await http.post("/search/text", json=DEEP), 503)["detail"]
        await ask(http, PLAIN | {"k": 3})


@pytest.mark.slow
def test_dcar_search_runs_without_pytorch(
    built_index: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = "import sys, app.cli\ntry: app.cli.main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", program, "search", "a red square", "--index", str(built_index), "--json"]

    def search() -> tuple[str, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr.split()[-1]

    whole, with_torch = search()
    assert with_torch == "True"
    Encoder.load(tiny_checkpoint, device="cpu", runtime="openvino")
    (kept,) = adapter_cache.directory_in(tmp_path / "dcar").iterdir()
    kept.rename(kept.with_name(kept.name.replace("openvino", "auto")))  # as if it were the fastest runtime
    quick, with_torch = search()
    assert with_torch == "False"
    expected, found = json.loads(whole), json.loads(quick)
    assert [each["id"] for each in found["results"]] == [each["id"] for each in expected["results"]]
