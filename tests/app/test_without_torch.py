"""The service starts without the model in PyTorch, and loads it when a query needs
it.
"""

import asyncio
import base64
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.search import Index
from dcar_core import Encoder
from dcar_core.model.checkpoint import PORTABLE
from dcar_core.util.machine import WEIGHTS_FILE
from index_jobs.index.versions import open_current, version_numbers
from index_jobs.jobs.update import remove
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.parts import needs
from tests.support.processes import without_pytorch
from tests.support.responses import assert_problem
from tests.support.searches import ids
from tests.support.service import ADMIN, ADMIN_ONLY, opened, serving_by
from tests.support.writes import ADMINS, item

pytestmark = needs("openvino")

PLAIN = {"query": "a red square", "k": 5}
DEEP = PLAIN | {"rerank": True, "explain": True}


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await http.post("/search/text", json=body)
    assert response.status_code == 200, response.text
    return {
        name: value
        for name, value in response.json().items()
        if name not in ("took_ms", "cached")
    }


@pytest.mark.slow
@needs("time")
async def test_a_later_start_loads_no_model_and_has_the_same_results(
    reranking_index: Path, tmp_path: Path
) -> None:
    """Though the version that it started with is deleted."""
    index = Path(shutil.copytree(reranking_index, tmp_path / "reranking"))
    settings: dict[str, Any] = {
        "runtime": "openvino",
        "runtime_cache": tmp_path / "cache",
        "poll_s": 0,
        **ADMIN_ONLY,
    }
    async with opened(index, **settings) as http:
        first = await ask(http, PLAIN), await ask(http, DEEP)
    others = {item_id for body in first for item_id in ids(body)}
    async with opened(index, **settings) as http:
        assert http.encoder.backbone is None
        assert await ask(http, PLAIN) == first[0]
        assert http.encoder.backbone is None, "a plain search needs no model"
        opened_index = http.app.state.collections[None].current.index
        listed = [opened_index.item(row).id for row in range(opened_index.rows)]
        for item_id in [item_id for item_id in listed if item_id not in others][-4:]:
            await asyncio.to_thread(remove, index, [item_id])
            response = await http.post("/admin/reload", headers=ADMINS)
            assert response.json()["changed"]
        assert 1 not in version_numbers(index)
        deep = await ask(http, DEEP)
        assert deep["results"] == first[1]["results"], (
            "the model is that of the served version"
        )
        assert http.encoder.backbone is not None


@pytest.mark.slow
def test_dcar_search_runs_without_pytorch(built_index: Path) -> None:
    program = (
        "import sys, app.cli\ntry: app.cli.main()\nfinally: print('torch' in"
        " sys.modules, file=sys.stderr)"
    )
    command = ["search", "a red square", "--index", str(built_index), "--json"]
    expected = Index.open(built_index, device="cpu", runtime="torch").search(
        "a red square"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.split()[-1] == "False"
    assert ids(json.loads(done.stdout)) == [
        result["id"] for result in expected["results"]
    ]


@pytest.mark.slow
def test_a_published_version_is_served_and_changed_without_pytorch(
    gallery: Path,
    reranking_checkpoint: Path,
    tmp_path: Path,
) -> None:
    rebuild(
        gallery,
        reranking_checkpoint,
        tmp_path / "index",
        runtime="openvino",
        workers=0,
        progress=False,
    )
    texts = ["a red square", "naïve 😿"]
    photo = base64.b64encode(png("red")).decode()
    encoder = Encoder.load(reranking_checkpoint, device="cpu")
    expected = np.concatenate(
        [encoder.encode_text(texts), encoder.encode_images([png("red")])]
    )

    settings = {
        "DCAR_RUNTIME_CACHE": str(tmp_path / "cache"),
        "DCAR_RUNTIME": "auto",
        **without_pytorch(tmp_path),
    }
    settings |= {"DCAR_WRITES": "true", "DCAR_ADMIN_KEY": ADMIN}
    with serving_by(
        sys.executable,
        "serve",
        "--index",
        tmp_path / "index",
        **settings,
    ) as http:
        given = {"input": [*texts, {"image": photo}]}
        found = [
            each["embedding"]
            for each in http.post("/v1/embeddings", json=given).json()["data"]
        ]
        assert (np.array(found) * expected).sum(1).min() > 0.999
        results = http.post("/search/text", json=PLAIN | {"explain": True}).json()[
            "results"
        ]
        assert len(results) == 5
        assert all(result["explanation"]["relevance"] for result in results)
        answer = http.post("/search/image", files={"file": png("red")})
        assert answer.json()["results"][0]["category"] == "square"
        detail = assert_problem(
            http.post("/search/text", json=PLAIN | {"rerank": True}), 409
        )["detail"]
        assert "runs without PyTorch" in detail
        job = http.put("/items", json={"items": [item("new")]}, headers=ADMINS).headers[
            "location"
        ]
        while (ended := http.get(job, headers=ADMINS).json())["status"] not in (
            "done",
            "failed",
        ):
            time.sleep(0.1)
        assert ended["status"] == "done", ended
        assert (
            f"checkpoint/{PORTABLE}/{WEIGHTS_FILE}"
            in open_current(tmp_path / "index").manifest.files
        ), "the next version carries it as well"
