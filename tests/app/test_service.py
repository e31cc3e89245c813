"""The service around the search: version swaps, admin, pages, unexpected errors."""

import asyncio
import shutil
from pathlib import Path

import pytest

from app.api.schemas import ReloadResponse
from index_jobs.rebuild import rebuild
from index_jobs.store.publish import rollback
from tests.support.images import png
from tests.support.responses import assert_problem
from tests.support.service import ADMIN_ONLY, before_encoding, opened, restore, until, until_ready
from tests.support.versions import publish_copy
from tests.support.writes import ADMINS


@pytest.mark.slow
async def test_new_version_is_picked_up(index: Path, gallery: Path, other_checkpoint: Path) -> None:
    async with opened(index, poll_s=0.02) as client:
        before = client.app.state.collections[None].live.encoder.fingerprint
        await asyncio.to_thread(rebuild, gallery, other_checkpoint, index, workers=0, progress=False)
        await until_ready(client, index_version=2)
        live = client.app.state.collections[None].live
        assert live.encoder.fingerprint == live.artifact.manifest.spec.fingerprint != before


@pytest.fixture
def newer_weights(index: Path) -> Path:
    """Return the weights file of version 2; version 1 is current."""
    publish_copy(index)
    rollback(index, 1)
    return index / "versions/2/checkpoint/trainables.safetensors"


def publish(index: Path, version: str) -> None:
    (index / "CURRENT").write_text(f"{version}\n")


async def test_flipped_bits_of_a_served_file_are_reported(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    vectors = index / "versions/1/index.faiss"
    data = bytearray(vectors.read_bytes())
    data[-40] ^= 1
    vectors.write_bytes(data)
    async with opened(index, poll_s=0.02, **ADMIN_ONLY) as client:
        await until_ready(client, status="degraded")
        assert "index.faiss is corrupted" in (await client.get("/readyz", headers=ADMINS)).json()["reason"]
        assert f'dcar_index_degraded{{collection="{index.name}"}} 1.0' in (await client.get("/metrics")).text
        assert (await client.post("/search/text", json={"query": "x"})).status_code == 200
        await client.post("/admin/reload", headers=ADMINS)
        assert (await client.get("/readyz")).json()["status"] == "degraded"
    assert "is damaged, and its results may be wrong" in caplog.text


async def test_broken_version_keeps_the_old_one_served(
    index: Path, newer_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = newer_weights.read_bytes()
    async with opened(index, poll_s=0.02, **ADMIN_ONLY) as client:
        newer_weights.write_bytes(whole[:100])
        publish(index, "2")
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
        publish(index, "junk")
        await until_ready(client, status="degraded")
        publish(index, "2")
        await until_ready(client, status="ready")
    assert not [record for record in caplog.records if record.exc_info]


async def test_repaired_version_is_loaded_later(
    index: Path, newer_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = newer_weights.read_bytes()
    monkeypatch.setattr("app.service.collections.RETRY_S", 0.1)
    async with opened(index, poll_s=0.02) as client:
        newer_weights.write_bytes(whole[:100])
        publish(index, "2")
        await until_ready(client, status="degraded")
        newer_weights.write_bytes(whole)
        await until_ready(client, index_version=2)


async def test_searches_are_refused_503_until_the_model_is_loaded(index: Path) -> None:
    (index / "versions/1/items.arrow").write_bytes(b"")
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
        refused = await client.post("/admin/reload")
        assert refused.status_code == 403
        assert "DCAR_ADMIN_KEY" in refused.json()["detail"]


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
    class PanicError(BaseException):
        """As raised by libraries in Rust."""

    def panic(*_: object) -> None:
        raise PanicError("a secret detail")

    def fail(*_: object) -> None:
        raise RuntimeError("a secret detail")

    async with opened(built_index) as client:
        encoder = client.app.state.collections[None].live.encoder
        before_encoding(encoder, fail)
        failed = await client.post("/search/text", json={"query": "x"})
        restore(encoder)
        monkeypatch.setattr("app.search.engine.filter_rows", panic)
        filtered = {"query": "x", "filter": {"color": "red"}}
        panicked = await client.post("/search/text", json=filtered, headers={"x-request-id": "panicking"})
        for response in (failed, panicked):
            assert "secret" not in assert_problem(response, 500)["detail"]
        assert panicked.headers["x-request-id"] == "panicking"
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
