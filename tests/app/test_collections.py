"""Several collections in one process: own checkpoints and indexes, a shared backbone and shared batches."""

import asyncio
import gc
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from dcar_client.models import CollectionsResponse

from app.core.callers import key_hash
from index_jobs.rebuild import rebuild
from tests.support.responses import assert_problem, scrape
from tests.support.service import ADMIN_ONLY, ALICE, BOB, bearer, opened, until
from tests.support.versions import file_of
from tests.support.writes import ADMINS

WORDS = ("red", "a blue circle", "green cross", "square")


@pytest.fixture(scope="module")
def circles_built(gallery: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of another gallery by another checkpoint on the same backbone."""
    out = tmp_path_factory.mktemp("circles") / "circles"
    rebuild(gallery / "circle", other_checkpoint, out, workers=0, progress=False)
    return out


@pytest.fixture
def circles(circles_built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(circles_built, tmp_path / "circles"))


async def test_what_is_loaded_is_exempt_from_the_search_for_garbage(built_index: Path) -> None:
    before = gc.get_freeze_count()
    async with opened(built_index):
        assert gc.get_freeze_count() > before


async def text(client: httpx.AsyncClient, prefix: str, query: str) -> list[dict[str, Any]]:
    response = await client.post(f"{prefix}/search/text", json={"query": query, "k": 24})
    assert response.status_code == 200, response.text
    results: list[dict[str, Any]] = response.json()["results"]
    return results


@pytest.mark.slow
async def test_each_collection_has_its_own_index_and_unknown_ones_are_a_404(built_index: Path, circles: Path) -> None:
    async with opened(circles) as alone:
        expected = await text(alone, "", "red")
    async with opened(built_index, collections={"round": circles}) as client:
        listed = (await client.get("/collections")).json()
        CollectionsResponse.model_validate(listed, strict=True)
        assert [(c["name"], c["default"], c["count"]) for c in listed["collections"]] == [
            ("index", True, 24), ("round", False, 6),
        ]  # fmt: skip
        found = await text(client, "/collections/round", "red")
        assert [(r["id"], r["score"]) for r in found] == [(r["id"], r["score"]) for r in expected]
        default = await text(client, "", "red")
        named = await text(client, "/collections/index", "red")
        assert [r["id"] for r in default] == [r["id"] for r in named]
        for result in (default[0], named[0], found[0]):
            picture = await client.get(result["image_url"])
            assert picture.headers["content-type"] == "image/png"
        assert found[0]["image_url"].startswith("/collections/round/items/")
        item = found[0]["id"]
        assert (await client.get(f"/collections/round/items/{item}")).status_code == 200
        assert len((await client.get(f"/collections/round/items/{item}/similar")).json()["results"]) == 5
        assert_problem(await client.get(f"/items/{item}"), 404, "id")
        batch = {"queries": [{"query": "red"}, {"query": "blue"}]}
        assert (await client.post("/collections/round/search/batch", json=batch)).status_code == 200
        for name in ("ROUND", "..%2f..%2fetc", "%00", "x" * 3000):
            body = assert_problem(await client.post(f"/collections/{name}/search/text", json={"query": "x"}), 404)
            assert len(body["detail"]) < 400
        body = assert_problem(await client.get("/collections/squares/items/x"), 404, "collection")
        assert body["detail"] == "There is no collection 'squares'."


async def test_collections_share_the_batches_of_one_backbone(built_index: Path, circles: Path) -> None:
    async with opened(built_index, cache_size=0, batch_wait_ms=50, collections={"round": circles}) as client:
        encoders = [snapshots.live.encoder for _, snapshots in client.app.state.collections]
        assert encoders[0] is not encoders[1]
        assert encoders[0].model.backbone is encoders[1].model.backbone
        asked = [(prefix, query) for query in WORDS for prefix in ("", "/collections/round")]
        alone = [await text(client, *each) for each in asked]
        before = await scrape(client)
        together = await asyncio.gather(*(text(client, *each) for each in asked))
        after = await scrape(client)
        for one, both in zip(alone, together, strict=True):
            np.testing.assert_allclose([r["score"] for r in one], [r["score"] for r in both], atol=1e-5)
        assert after["dcar_batch_size_sum", ()] - before["dcar_batch_size_sum", ()] == len(asked)
        assert after["dcar_batch_size_count", ()] - before["dcar_batch_size_count", ()] <= 3


async def test_a_collection_that_cannot_be_loaded_is_named_and_the_others_are_served(
    built_index: Path, circles: Path
) -> None:
    """To keys that open all."""
    items = file_of(circles, "items.arrow")
    whole = items.read_bytes()
    items.write_bytes(b"")
    keys = f"alice:{key_hash(ALICE)}, bob:{key_hash(BOB)}:read:{built_index.name}"
    given: dict[str, Any] = {"collections": {"round": circles}, "api_keys": keys, "poll_s": 0, **ADMIN_ONLY}
    async with opened(built_index, ready=False, **given) as client:

        async def is_reported() -> bool:
            return "round: " in (await client.get("/readyz", headers=bearer(ALICE))).json().get("detail", "")

        await until(is_reported)
        await until(lambda: client.app.state.collections[None].live is not None)
        assert "round: " in (await client.get("/readyz", headers=ADMINS)).json()["detail"]
        for headers in ({}, bearer(BOB), bearer("wrong")):
            assert "round" not in assert_problem(await client.get("/readyz", headers=headers), 503)["detail"]
        client.headers.update(bearer(ALICE))
        assert await text(client, "", "red")
        assert_problem(await client.post("/collections/round/search/text", json={"query": "red"}), 503)
        detail = assert_problem(await client.post("/admin/reload", headers=ADMINS), 503)["detail"]
        assert "round: " in detail
        assert "items.arrow" in detail
        items.write_bytes(whole)
        reloaded = await client.post("/admin/reload", headers=ADMINS)
        assert reloaded.json()["versions"] == {"index": 1, "round": 1}
        assert (await client.get("/readyz")).json()["status"] == "ready"
        found = await scrape(client)
        assert found["dcar_index_items", (("collection", "round"),)] == 6
        assert found["dcar_index_items", (("collection", "index"),)] == 24
