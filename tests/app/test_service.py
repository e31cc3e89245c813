"""The service around the search: version swaps, admin, pages, unexpected errors."""

import asyncio
import shutil
import threading
import time
from pathlib import Path

import pytest
from dcar_client.models import ReloadResponse

from app.search.snapshots import load_snapshot
from index_jobs.index.versions import rollback, version_numbers
from index_jobs.jobs.update import remove
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.parts import needs
from tests.support.responses import assert_problem
from tests.support.service import ADMIN_ONLY, before_encoding, opened, restore, until, until_ready
from tests.support.versions import file_of, point, publish_copy
from tests.support.writes import ADMINS


@pytest.fixture
def newer(index: Path) -> Path:
    """Version 2; version 1 is current."""
    publish_copy(index)
    rollback(index, 1)
    return index


@pytest.fixture
def newer_weights(newer: Path) -> Path:
    return file_of(newer, "checkpoint/trainables.safetensors", 2)


async def test_broken_version_keeps_the_old_one_served(
    index: Path, newer_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = newer_weights.read_bytes()
    async with opened(index, poll_s=0.02, **ADMIN_ONLY) as client:
        newer_weights.write_bytes(whole[:100])
        point(index, 2)
        ready = await until_ready(client, status="degraded")
        assert ready["index_version"] == 1
        assert "trainables.safetensors" in ready["reason"]
        refused = await client.post("/admin/reload", headers=ADMINS)
        assert refused.status_code == 503
        assert "trainables.safetensors" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) > 0
        assert (await client.post("/search/text", json={"query": "x"})).json()["index_version"] == 1
        newer_weights.write_bytes(whole)
        reloaded = (await client.post("/admin/reload", headers=ADMINS)).json()
        ReloadResponse.model_validate(reloaded, strict=True)
        assert reloaded == {"index_version": 2, "versions": {index.name: 2}, "changed": True}
        await until_ready(client, status="ready")
        (index / "CURRENT").write_text("junk\n")
        await until_ready(client, status="degraded")
        point(index, 2)
        await until_ready(client, status="ready")
    assert not [record for record in caplog.records if record.exc_info]


async def test_repaired_version_is_loaded_later(
    index: Path, newer_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = newer_weights.read_bytes()
    monkeypatch.setattr("app.service.collections.RETRY_S", 0.1)
    async with opened(index, poll_s=0.02) as client:
        newer_weights.write_bytes(whole[:100])
        point(index, 2)
        await until_ready(client, status="degraded")
        newer_weights.write_bytes(whole)
        await until_ready(client, index_version=2)


@pytest.mark.slow
@pytest.mark.usefixtures("newer")
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
            assert 1 not in version_numbers(index)
            for what in ("rerank", "explain"):
                response = await client.post("/search/text", json={"query": "a red square", "k": 3, what: True})
                assert response.status_code == 200, response.text


async def test_a_rebuilt_index_with_the_same_version_number_is_served(
    index: Path, gallery: Path, other_checkpoint: Path
) -> None:
    async with opened(index, poll_s=0, **ADMIN_ONLY) as client:
        before = (await client.post("/search/text", json={"query": "red"})).json()
        assert not (await client.post("/admin/reload", headers=ADMINS)).json()["changed"]
        manifest = index / "versions/1.json"
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


async def test_searches_are_refused_503_until_the_model_is_loaded(index: Path) -> None:
    file_of(index, "items.arrow").write_bytes(b"")
    async with opened(index, ready=False, poll_s=0) as client:
        assert (await client.get("/healthz")).status_code == 200
        early = await client.post("/search/text", json={"query": "x"})
        assert early.status_code == 503
        assert early.headers["retry-after"]
        assert early.headers["content-type"] == "application/problem+json"

        async def failed() -> bool:
            return "items.arrow" in (await client.get("/readyz")).json()["detail"]

        await until(failed)
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/items/x")).status_code == 503
        assert client.app.state.collections[None].live is None


async def test_without_an_admin_key_there_are_no_admin_routes(built_index: Path) -> None:
    async with opened(built_index) as client:
        assert "DCAR_ADMIN_KEY" in assert_problem(await client.post("/admin/reload"), 403)["detail"]


async def test_missing_broken_and_outside_images_are_404(tmp_path: Path, gallery: Path, tiny_checkpoint: Path) -> None:
    changing = Path(shutil.copytree(gallery, tmp_path / "gallery"))
    rebuild(changing, tiny_checkpoint, tmp_path / "other", workers=0, progress=False)
    (changing / "circle/red.png").unlink()
    (changing / "circle/blue.png").write_text("<script>alert(1)</script>")
    (changing / "circle/black.png").write_bytes(png()[:60])
    (tmp_path / "secret.png").write_bytes(png())
    (changing / "circle/green.png").unlink()
    (changing / "circle/green.png").symlink_to(tmp_path / "secret.png")

    async with opened(tmp_path / "other") as client:
        paths = [f"{color}.png/image{size}" for color in ("red", "blue", "green") for size in ("", "?size=192")]
        for path in (*paths, "black.png/image?size=192"):
            response = await client.get(f"/items/circle%2F{path}")
            assert response.status_code == 404, path
            assert str(changing) not in response.text
    async with opened(tmp_path / "other", image_roots=(tmp_path,)) as client:
        assert (await client.get("/items/circle%2Fgreen.png/image")).content == png(), "unless that folder is allowed"


async def test_unexpected_errors_reveal_no_internals(
    built_index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret detail")

    async with opened(built_index) as client:
        encoder = client.app.state.collections[None].live.encoder
        before_encoding(encoder, fail)
        failed = await client.post("/search/text", json={"query": "x"})
        restore(encoder)
        monkeypatch.setattr("app.search.query.filter_rows", fail)
        filtered = {"query": "x", "filter": {"color": "red"}}
        failed_later = await client.post("/search/text", json=filtered, headers={"x-request-id": "failing"})
        for response in (failed, failed_later):
            assert "secret" not in assert_problem(response, 500)["detail"]
        assert failed_later.headers["x-request-id"] == "failing"
        assert "unexpected error in POST /search/text" in caplog.text
        assert (await client.post("/search/text", json={"query": "x"})).status_code == 200


async def test_pages_load_nothing_from_other_sites(built_index: Path) -> None:
    async with opened(built_index) as client:
        for path in ("/", "/docs"):
            page = await client.get(path)
            assert page.headers["content-type"].startswith("text/html")
            assert "http:" not in page.text
            assert "https:" not in page.text
            policy = page.headers["content-security-policy"]
            assert "script-src 'self';" in policy
            assert "access-control-allow-origin" not in page.headers
            again = await client.get(path, headers={"If-None-Match": page.headers["etag"]})
            assert again.status_code == 304
            for name in [part.split('"')[0] for part in page.text.split('"ui/')[1:]]:
                assert (await client.get(f"/ui/{name}")).status_code == 200, name
