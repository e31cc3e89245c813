"""Slow loads, and a model that is loaded long after the start."""

import asyncio
import shutil
import threading
import time
from pathlib import Path

import pytest

from app.search.snapshots import load_snapshot
from index_jobs.jobs.update import remove
from index_jobs.rebuild import rebuild
from index_jobs.store.publish import rollback
from tests.support.parts import needs
from tests.support.service import ADMIN_ONLY, opened
from tests.support.versions import publish_copy
from tests.support.writes import ADMINS


@pytest.fixture(autouse=True)
def _second_version(index: Path) -> None:
    publish_copy(index)
    rollback(index, 1)


@pytest.mark.slow
async def test_a_load_continues_when_its_caller_leaves(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lock = load_snapshot, threading.Lock()
    running = most = 0

    def slow(*given: object) -> object:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.25)
        with lock:
            running -= 1
        return whole(*given)  # type: ignore[arg-type]

    async with opened(index, poll_s=0, upload_timeout_s=0.15, **ADMIN_ONLY) as client:
        monkeypatch.setattr("app.service.collections.load_snapshot", slow)
        rollback(index, 2)
        first = asyncio.create_task(client.post("/admin/reload", headers=ADMINS))
        await asyncio.sleep(0.1)
        first.cancel()
        again = await client.post("/admin/reload", headers=ADMINS, json={})
        assert again.json()["index_version"] == 2, "its body has arrived, however long the load takes"
        assert not again.json()["changed"], "the first load was used"
        assert most == 1
        rollback(index, 1)
        last = asyncio.create_task(client.post("/admin/reload", headers=ADMINS))
        await asyncio.sleep(0.1)
        last.cancel()
    assert running == 0, "closing waits for a load"


@needs("openvino")
@pytest.mark.slow
async def test_the_model_is_loaded_from_the_served_version(reranking_index: Path, tmp_path: Path) -> None:
    """Start without the model, then update until the first version is deleted."""
    index, cache = Path(shutil.copytree(reranking_index, tmp_path / "reranking")), tmp_path / "cache"

    for start in range(2):
        async with opened(index, runtime="openvino", runtime_cache=cache, poll_s=0, **ADMIN_ONLY) as client:
            if start == 0:
                assert list(cache.glob("exports/*/encoder-*"))
                continue
            live = client.app.state.collections[None].live
            assert live.encoder.backbone is None
            for row in range(4):
                await asyncio.to_thread(remove, index, [live.artifact.item(row).id])
                assert (await client.post("/admin/reload", headers=ADMINS)).json()["changed"]
            assert not live.artifact.checkpoint.exists()
            for what in ("rerank", "explain"):
                response = await client.post("/search/text", json={"query": "a red square", "k": 3, what: True})
                assert response.status_code == 200, response.text


async def test_a_rebuilt_index_with_the_same_version_number_is_served(
    index: Path, gallery: Path, other_checkpoint: Path
) -> None:
    async with opened(index, poll_s=0, **ADMIN_ONLY) as client:
        before = (await client.post("/search/text", json={"query": "red"})).json()
        assert not (await client.post("/admin/reload", headers=ADMINS)).json()["changed"]
        manifest = index / "versions" / "1" / "manifest.json"
        manifest.rename(index / "aside")
        assert not (await client.post("/admin/reload", headers=ADMINS)).json()["changed"]
        assert (await client.get("/readyz")).json()["status"] == "ready", "the served version is intact"
        shutil.rmtree(index)
        await asyncio.to_thread(rebuild, gallery, other_checkpoint, index, workers=0, progress=False)
        assert (await client.post("/admin/reload", headers=ADMINS)).json()["changed"]
        after = (await client.post("/search/text", json={"query": "red"})).json()
        assert after["index_version"] == before["index_version"] == 1
        assert [r["score"] for r in after["results"]] != [r["score"] for r in before["results"]]
        assert not (await client.post("/admin/reload", headers=ADMINS)).json()["changed"]


async def test_a_long_load_does_not_keep_the_service(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, release = threading.Event(), threading.Event()

    def hanging(*given: object) -> object:
        began.set()
        release.wait(60)
        raise OSError("too late")

    monkeypatch.setattr("app.service.collections.CLOSE_S", 0.1)
    async with opened(index, poll_s=0, **ADMIN_ONLY) as client:
        monkeypatch.setattr("app.service.collections.load_snapshot", hanging)
        rollback(index, 2)
        load = asyncio.create_task(client.post("/admin/reload", headers=ADMINS))
        await asyncio.to_thread(began.wait, 10)
        load.cancel()
        started = time.monotonic()
    took_s = time.monotonic() - started
    release.set()
    assert took_s < 10
