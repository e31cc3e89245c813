"""Several collections in one process, named in the settings or created over HTTP: a
shared backbone, own indexes.
"""

import asyncio
import gc
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from dcar_client.models import CollectionsResponse

from app.core.callers import key_hash, new_key
from dcar_core.util.errors import DcarError
from index_jobs.index.created_collections import (
    create_collection,
    drop_collection,
    list_collections,
)
from index_jobs.index.job_queue import JobQueue
from index_jobs.index.manifest import CHECKPOINT
from index_jobs.index.versions import open_current
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.responses import assert_problem, scrape
from tests.support.service import (
    ADMIN,
    ADMIN_ONLY,
    ALICE,
    BOB,
    WORDS,
    bearer,
    opened,
    until,
)
from tests.support.versions import file_of
from tests.support.writes import ADMINS, WRITES, delete, ended, item, put

QUERIES = ("red", "a blue circle", "green cross", "square")


@pytest.fixture(scope="module")
def circles_built(
    gallery: Path,
    other_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An index of another gallery by another checkpoint on the same backbone."""
    out = tmp_path_factory.mktemp("circles") / "circles"
    rebuild(gallery / "circle", other_checkpoint, out, workers=0, progress=False)
    return out


@pytest.fixture
def circles(circles_built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(circles_built, tmp_path / "circles"))


async def test_what_is_loaded_is_exempt_from_the_search_for_garbage(
    built_index: Path,
) -> None:
    before = gc.get_freeze_count()
    async with opened(built_index):
        assert gc.get_freeze_count() > before


async def text(
    client: httpx.AsyncClient,
    prefix: str,
    query: str,
) -> list[dict[str, Any]]:
    response = await client.post(
        f"{prefix}/search/text", json={"query": query, "k": 24}
    )
    assert response.status_code == 200, response.text
    results: list[dict[str, Any]] = response.json()["results"]
    return results


@pytest.mark.slow
async def test_each_collection_has_its_own_index_and_unknown_ones_are_a_404(
    built_index: Path, circles: Path
) -> None:
    async with opened(circles) as alone:
        expected = await text(alone, "", "red")
    async with opened(built_index, collections={"round": circles}) as client:
        response = await client.get("/collections")
        listed = response.json()
        CollectionsResponse.model_validate(listed, strict=True)
        assert [
            (c["name"], c["default"], c["count"]) for c in listed["collections"]
        ] == [
            ("index", True, 24),
            ("round", False, 6),
        ]
        found = await text(client, "/collections/round", "red")
        assert [(r["id"], r["score"]) for r in found] == [
            (r["id"], r["score"]) for r in expected
        ]
        default = await text(client, "", "red")
        named = await text(client, "/collections/index", "red")
        assert [r["id"] for r in default] == [r["id"] for r in named]
        for result in (default[0], named[0], found[0]):
            picture = await client.get(result["image_url"])
            assert picture.headers["content-type"] == "image/png"
        assert found[0]["image_url"].startswith("/collections/round/items/")
        item = found[0]["id"]
        response = await client.get(f"/collections/round/items/{item}")
        assert response.status_code == 200
        response = await client.get(f"/collections/round/items/{item}/similar")
        assert len(response.json()["results"]) == 5
        assert_problem(await client.get(f"/items/{item}"), 404, "id")
        batch = {"queries": [{"query": "red"}, {"query": "blue"}]}
        response = await client.post("/collections/round/search/batch", json=batch)
        assert response.status_code == 200
        for name in ("ROUND", "..%2f..%2fetc", "%00", "x" * 3000):
            body = assert_problem(
                await client.post(
                    f"/collections/{name}/search/text", json={"query": "x"}
                ),
                404,
            )
            assert len(body["detail"]) < 400
        body = assert_problem(
            await client.get("/collections/squares/items/x"),
            404,
            "collection",
        )
        assert body["detail"] == "There is no collection 'squares'."


async def test_collections_share_the_batches_of_one_backbone(
    built_index: Path, circles: Path
) -> None:
    async with opened(
        built_index,
        cache_size=0,
        batch_wait_ms=50,
        collections={"round": circles},
    ) as client:
        encoders = [
            collection.current.encoder for _, collection in client.app.state.collections
        ]
        assert encoders[0] is not encoders[1]
        assert encoders[0].model.backbone is encoders[1].model.backbone
        asked = [
            (prefix, query)
            for query, prefix in product(QUERIES, ("", "/collections/round"))
        ]
        alone = [await text(client, *each) for each in asked]
        before = await scrape(client)
        together = await asyncio.gather(*(text(client, *each) for each in asked))
        after = await scrape(client)
        for one, both in zip(alone, together, strict=True):
            np.testing.assert_allclose(
                [r["score"] for r in one],
                [r["score"] for r in both],
                atol=1e-5,
            )
        assert after["dcar_batch_size_sum", ()] - before[
            "dcar_batch_size_sum", ()
        ] == len(asked)
        assert (
            after["dcar_batch_size_count", ()] - before["dcar_batch_size_count", ()]
            <= 3
        )


async def test_unloadable_collection_is_named_and_others_are_served(
    built_index: Path, circles: Path
) -> None:
    """To keys that open all."""
    items = file_of(circles, "items.arrow")
    whole = items.read_bytes()
    items.write_bytes(b"")
    keys = f"alice:{key_hash(ALICE)}, bob:{key_hash(BOB)}:read:{built_index.name}"
    given: dict[str, Any] = {
        "collections": {"round": circles},
        "api_keys": keys,
        "poll_s": 0,
        **ADMIN_ONLY,
    }
    async with opened(built_index, ready=False, **given) as client:

        async def is_reported() -> bool:
            response = await client.get("/readyz", headers=bearer(ALICE))
            return "round: " in response.json().get("detail", "")

        await until(is_reported)
        response = await client.get("/healthz")
        assert response.status_code == 200
        await until(lambda: client.app.state.collections[None].current is not None)
        response = await client.get("/readyz", headers=ADMINS)
        assert "round: " in response.json()["detail"]
        for headers in ({}, bearer(BOB), bearer("wrong")):
            assert (
                "round"
                not in assert_problem(
                    await client.get("/readyz", headers=headers), 503
                )["detail"]
            )
        client.headers.update(bearer(ALICE))
        assert await text(client, "", "red")
        refused = await client.post(
            "/collections/round/search/text", json={"query": "red"}
        )
        assert_problem(refused, 503)
        assert refused.headers["retry-after"]
        detail = assert_problem(
            await client.post("/admin/reload", headers=ADMINS), 503
        )["detail"]
        assert "round: " in detail
        assert "items.arrow" in detail
        items.write_bytes(whole)
        reloaded = await client.post("/admin/reload", headers=ADMINS)
        assert reloaded.json()["versions"] == {"index": 1, "round": 1}
        response = await client.get("/readyz")
        assert response.json()["status"] == "ready"
        found = await scrape(client)
        assert found["dcar_index_items", (("collection", "round"),)] == 6
        assert found["dcar_index_items", (("collection", "index"),)] == 24


def create(folder: Path, index: Path, *names: str) -> None:
    """Create collections without items, as another process would."""
    folder.mkdir(exist_ok=True)
    served = open_current(index)
    for name in names:
        create_collection(folder, name, served.checkpoint)


@pytest.mark.usefixtures("in_process")
@pytest.mark.slow
async def test_collection_is_created_filled_and_dropped(
    index: Path, tmp_path: Path
) -> None:
    given = {**WRITES, "collections_dir": tmp_path / "created", "poll_s": 0.05}
    path = "/collections/lamps"
    async with opened(index, **given) as client, opened(index, **given) as other:
        created = await client.put(path, headers=ADMINS)
        assert created.json() == {
            "name": "lamps",
            "default": False,
            "count": 0,
            "index_version": 0,
            "min_score": None,
            "reason": None,
        }
        response = await client.put(path, headers=ADMINS)
        assert response.json() == created.json(), "idempotent"
        response = await client.get("/readyz")
        assert response.json()["status"] == "ready"
        response = await client.post(f"{path}/search/text", json=WORDS)
        assert response.json()["results"] == []
        await ended(
            client,
            await put(
                client,
                item("a"),
                item("b", "cyan"),
                path=f"{path}/items",
            ),
        )
        response = await client.post(
            f"{path}/search/text", json={"query": "pink", "k": 5}
        )
        found = response.json()["results"]
        assert {each["id"] for each in found} == {"a", "b"}
        response = await client.get(f"{path}/items/b/image")
        assert response.content == png("cyan")
        await ended(client, await put(client, item("c"), path=f"{path}/items"))
        response = await client.get(f"{path}/items")
        assert response.json()["count"] == 3
        response = await client.get("/items")
        assert response.json()["count"] == 24

        async def count_elsewhere() -> bool:
            response = await other.get("/collections")
            listed = response.json()["collections"]
            return {known["name"]: known["count"] for known in listed} == {
                "index": 24,
                "lamps": 3,
            }

        await until(count_elsewhere)
    async with opened(index, **given) as client:
        await until(lambda: len(client.app.state.collections.loaded) == 2)
        response = await client.get(f"{path}/items")
        assert response.json()["count"] == 3, "after a restart"
        with JobQueue(list_collections(tmp_path / "created")["lamps"]).lock():
            drops = [
                asyncio.create_task(client.delete(path, headers=ADMINS))
                for _ in range(8)
            ]
            await asyncio.sleep(0.2)
        assert sorted([(await drop).status_code for drop in drops]) == [204] + [404] * 7
        response = await client.get(f"{path}/items")
        assert response.status_code == 404
        assert not list((tmp_path / "created").glob("*/"))
        response = await client.put(path, headers=ADMINS)
        assert response.json()["count"] == 0


async def test_empty_collection_has_no_results_and_checks_requests(
    index: Path, tmp_path: Path
) -> None:
    async with opened(index, collections_dir=tmp_path / "created", **WRITES) as client:
        path = "/collections/lamps"
        await client.put(path, headers=ADMINS)
        options = {
            "filter": {"price": 3},
            "fields": ["price"],
            "group_by": "price",
            "min_score": "auto",
        }
        text = {
            "query": "red",
            "hybrid": True,
            "facets": ["price"],
            "explain": True,
            "rerank": True,
            **options,
        }
        response = await client.post(f"{path}/search/text", json=text)
        found = response.json()
        took_ms = found.pop("took_ms")
        assert found == {
            "index_version": 0,
            "cached": False,
            "nothing_fits": False,
            "results": [],
            "facets": {"price": []},
        }
        assert took_ms >= 0
        by_image = await client.post(
            f"{path}/search/image",
            files={"file": png()},
            data={"filter": '{"price": 3}'},
        )
        assert by_image.json()["results"] == []
        batch = await client.post(
            f"{path}/search/batch", json={"queries": [text, {"query": "blue", "k": 5}]}
        )
        assert [answer["results"] for answer in batch.json()["answers"]] == [[], []]
        for route in (
            "items?group_by=price",
            'items?filter={"price": 3}',
            "items?sort=-price",
        ):
            response = await client.get(f"{path}/{route}")
            listed = response.json()
            assert listed == {"index_version": 0, "count": 0, "items": []}
        response = await client.get(f"{path}/ui/facets")
        assert response.json() == {"facets": []}
        response = await client.get(f"{path}/ui/catalogue")
        assert response.json()["fields"] == []
        for route in (
            "items/a",
            "items/a/similar",
            "items/a/image",
            "items/a/image?size=192",
        ):
            assert_problem(await client.get(f"{path}/{route}"), 404, "id")
        assert_problem(
            await client.post(
                f"{path}/search/text", json={"query": "red", "more_like": ["a"]}
            ),
            422,
            "more_like",
        )


async def test_only_collections_of_writers_are_created_and_dropped(
    index: Path, tmp_path: Path
) -> None:
    lamps = new_key()
    shoes = new_key()
    writers = (
        f"lamps:{key_hash(lamps)}:write:lamps+index,"
        f" shoes:{key_hash(shoes)}:write:shoes"
    )
    keys: dict[str, Any] = {"api_keys": f"alice:{key_hash(ALICE)}, {writers}"}
    async with opened(
        index,
        collections_dir=tmp_path / "created",
        **WRITES,
        **keys,
    ) as client:

        async def send(method: str, name: str, key: str) -> int:
            response = await client.request(
                method,
                f"/collections/{name}",
                headers=bearer(key),
            )
            return response.status_code

        assert [await send("PUT", "lamps", key) for key in (ALICE, "wrong", lamps)] == [
            403,
            401,
            200,
        ]
        assert [await send("PUT", "other", key) for key in (ALICE, lamps)] == [403, 403]
        assert await send("PUT", "shoes", shoes) == 403, (
            "its model is of a collection that the key does not open"
        )
        assert_problem(
            await client.put("/collections/lamps2?model=none", headers=ADMINS),
            404,
            "model",
        )
        assert await send("DELETE", "index", ADMIN) == 409
        assert await send("DELETE", "none", ADMIN) == 404
        for name in (".hidden", "..%2Fx", "a b", "x" * 65, "%00"):
            assert await send("PUT", name, ADMIN) in (404, 405, 422), name
        assert len(list((tmp_path / "created").glob("*/"))) == 1
        assert [await send("DELETE", "lamps", key) for key in (ALICE, lamps)] == [
            403,
            204,
        ]
    async with opened(index, **WRITES) as client:
        response = await client.put("/collections/lamps", headers=ADMINS)
        assert response.status_code == 403


async def test_created_collection_that_does_not_load_is_logged_and_degrades_readiness(
    index: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # with which `dcar serve` ends
    folder = tmp_path / "created"
    failures = list[DcarError]()
    create(folder, index, "shoes", "lamps")
    (list_collections(folder)["lamps"] / CHECKPOINT / "config.json").write_bytes(b"{")
    async with opened(
        index,
        collections_dir=folder,
        on_start_failure=failures.append,
        poll_s=0,
        **WRITES,
    ) as client:
        create(folder, index, "later")
        (list_collections(folder)["later"] / CHECKPOINT / "config.json").write_bytes(
            b"{"
        )
        await client.app.state.collections.sync()
        await until(
            lambda: all(
                served.was_tried.is_set() for _, served in client.app.state.collections
            )
        )
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["status"] == "degraded"
        assert all(f"{name}: " in ready.json()["reason"] for name in ("lamps", "later"))
        for name, status in (
            ("shoes", 200),
            ("lamps", 503),
            ("later", 503),
        ):
            answer = await client.post(f"/collections/{name}/search/text", json=WORDS)
            assert answer.status_code == status
    assert failures == []
    assert [
        record.levelname
        for record in caplog.records
        if "is not served" in record.getMessage()
    ] == ["ERROR"] * 2


async def test_changes_see_at_once_what_another_process_has_created_or_dropped(
    index: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "created"
    path = "/collections/lamps"
    given = {**WRITES, "collections_dir": folder, "poll_s": 0}
    async with opened(index, **given) as client, opened(index, **given) as other:
        requests: list[
            tuple[Callable[[httpx.AsyncClient], Awaitable[httpx.Response]], int, str]
        ] = [
            (lambda by: put(by, item("a"), path=f"{path}/items"), 202, "collection"),
            (lambda by: delete(by, "a", path=f"{path}/items"), 202, "collection"),
            (lambda by: by.delete(path, headers=ADMINS), 204, "collection"),
            (
                lambda by: by.put("/collections/shoes?model=lamps", headers=ADMINS),
                200,
                "model",
            ),
        ]
        for request, status, field in requests:
            response = await client.put(path, headers=ADMINS)
            assert response.json()["count"] == 0
            if field == "collection":
                changed = await request(other)
                assert changed.status_code == status
            if status == 202:
                job = await client.get(changed.headers["location"], headers=ADMINS)
                assert job.json()["collection"] == "lamps"
            with suppress(KeyError):
                drop_collection(list_collections(folder)["lamps"])
            assert_problem(await request(client), 404, field)
            response = await client.get("/collections")
            listed = response.json()["collections"]
            assert [each["name"] for each in listed] == ["index"]


async def test_reload_follows_collections_of_another_process_and_logs_damaged_ones_once(
    index: Path,
    other_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "created"
    create(folder, index, "shoes")
    (list_collections(folder)["shoes"] / "collection.json").write_text("{")
    async with opened(index, collections_dir=folder, poll_s=0, **WRITES) as client:

        async def embedded(model: str) -> Any:
            response = await client.post(
                "/v1/embeddings", json={"input": "red", "model": model}
            )
            return response.json()["data"]

        async def reloaded() -> Any:
            with caplog.at_level("INFO"):
                response = await client.post("/admin/reload", headers=ADMINS)
                return response.json()

        create(folder, index, "lamps")
        assert (await reloaded())["versions"] == {"index": 1, "lamps": 0}
        assert await embedded("lamps") == await embedded("index")
        drop_collection(list_collections(folder)["lamps"])
        create_collection(folder, "lamps", other_checkpoint)
        await reloaded()
        assert await embedded("lamps") != await embedded("index"), (
            "it has its new model"
        )
        assert not (await reloaded())["changed"]
        drop_collection(list_collections(folder)["lamps"])
        assert (await reloaded())["versions"] == {"index": 1}
        response = await client.get("/readyz")
        assert response.status_code == 200
    assert "no longer serving the collection lamps" in caplog.text
    assert caplog.text.count("collection.json cannot be read") == 1
