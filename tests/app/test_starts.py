"""A service whose towers an exported graph runs starts without the model, and loads it when a query needs it."""

import asyncio
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from app_harness import opened
from test_bad_input import check

from dcar_core import Encoder
from index_jobs.rebuild import rebuild

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra [openvino]")

PLAIN = {"query": "a red square", "k": 5}
DEEP = PLAIN | {"rerank": True, "explain": True}


def live(http: httpx.AsyncClient) -> Encoder:
    encoder: Encoder = http.app.state.collections[None].live.encoder  # type: ignore[attr-defined]
    return encoder


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post("/search/text", json=body)
    assert answer.status_code == 200, answer.text
    return {name: value for name, value in answer.json().items() if name not in ("took_ms", "cached")}


def test_a_later_start_answers_the_same(built_index: Path, tmp_path: Path) -> None:
    async def main() -> None:
        settings = {"runtime": "openvino", "runtime_cache": tmp_path}
        async with opened(built_index, **settings) as http:
            assert live(http).backbone is not None
            first = await ask(http, PLAIN), await ask(http, DEEP)
        async with opened(built_index, **settings) as http:
            assert live(http).backbone is None
            assert await ask(http, PLAIN) == first[0]
            assert live(http).backbone is None, "a plain search needs no model"
            assert await ask(http, DEEP) == first[1]
            assert live(http).backbone is not None

    asyncio.run(main())


def test_a_model_that_is_gone_fails_only_who_needs_it(
    gallery: Path, tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model.parent, tmp_path / "models"))
    rebuild(gallery, model / tiny_checkpoint.name, tmp_path / "index", workers=0, progress=False)

    async def main() -> None:
        settings = {"runtime": "openvino", "runtime_cache": tmp_path / "cache"}
        async with opened(tmp_path / "index", **settings) as http:
            await ask(http, PLAIN)
        async with opened(tmp_path / "index", **settings) as http:
            assert live(http).backbone is None
            shutil.rmtree(model / tiny_model.name)
            await ask(http, PLAIN)
            assert "cannot be loaded" in check(await http.post("/search/text", json=DEEP), 503)["detail"]
            await ask(http, PLAIN | {"k": 3})

    asyncio.run(main())
