"""Requests and jobs that change items: who may send them, what they contain, and faults
and restarts.
"""

import base64
import errno
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dcar_client import Client
from PIL import Image

from app.api import writing
from app.core.callers import key_hash, new_key
from app.core.settings import load_settings
from app.service import write_worker
from app.service.write_worker import WriteWorker
from dcar_core.util.errors import DcarError
from index_jobs.index.created_collections import create_collection, drop_collection
from index_jobs.index.job_queue import JobQueue
from index_jobs.index.versions import open_current
from tests.support.files import write_file
from tests.support.images import encoded, png
from tests.support.parts import needs
from tests.support.processes import children_of, is_alive
from tests.support.responses import assert_problem, scrape
from tests.support.service import (
    ADMIN,
    ALICE,
    KEYS,
    WORDS,
    bearer,
    opened,
    serving_process,
    until,
)
from tests.support.writes import ADMINS, JSON, WRITES, delete, ended, item, put

ITEMS = "/collections/lamps/items"


async def test_items_are_patched_put_replaced_and_deleted_by_jobs(
    index: Path, in_process: list[int]
) -> None:
    first = "circle/red.png"
    second = "circle/blue.png"
    async with opened(index, **WRITES) as client:
        before = (await client.get("/items/circle%2Fred.png")).json()

        async def patch(path: str, **body: Any) -> dict[str, Any]:
            return await ended(
                client, await client.patch(path, json=body, headers=ADMINS)
            )

        job = await patch(
            "/items/circle%2Fred.png",
            metadata={"price": 12.5, "brand": "Acme"},
            caption="a guitar",
        )
        assert job["kind"] == "patch"
        assert job["items"] == 1
        assert job["changed"] == 1
        assert job["status"] == "done"
        assert job["new_fields"] == ["brand", "price"]
        found = (await client.get("/items/circle%2Fred.png")).json()
        assert found["metadata"] == before["metadata"] | {
            "price": 12.5,
            "brand": "Acme",
        }
        assert found["caption"] == "a guitar"
        assert found["category"] == before["category"]
        assert found["index_version"] == 2
        body = {
            "query": "guitar",
            "hybrid": 1,
            "filter": {"price": {"lt": 13}},
        }
        assert [
            result["id"]
            for result in (await client.post("/search/text", json=body)).json()[
                "results"
            ]
        ] == [first]

        job = await patch(
            "/items",
            ids=[first, second, "unknown"],
            metadata={"price": 3, "brand": None},
        )
        assert job["items"] == 3
        assert job["changed"] == 2
        assert job["unknown"] == ["unknown"]
        assert job["new_fields"] == []
        job = await patch(
            "/items",
            filter={"price": 3},
            metadata={"price": 4},
        )
        assert job["items"] == 2
        assert job["changed"] == 2
        job = await patch(
            "/items",
            by="price",
            changes={"4": {"price": 5, "sku": "7"}, "9": {"price": 1}},
        )
        assert job["items"] == 2
        assert job["changed"] == 2
        assert job["unknown"] == ["9"]
        assert job["new_fields"] == ["sku"]
        job = await patch("/items", by="sku", changes={"7": {"price": 4}})
        assert job["changed"] == 2
        assert (await client.get("/items/circle%2Fblue.png")).json()["metadata"][
            "price"
        ] == 4
        wrong = {**item("a"), "metadata": {"price": "19,90"}}
        for method, path, given, field in (
            (
                "PATCH",
                "/items",
                {"by": "sku", "changes": {"7": wrong["metadata"]}},
                "changes.7.price",
            ),
            (
                "PATCH",
                "/items/circle%2Fred.png",
                {"metadata": wrong["metadata"]},
                "metadata.price",
            ),
            ("PUT", "/items", {"items": [item("b"), wrong]}, "items.1.metadata.price"),
        ):
            response = await client.request(method, path, json=given, headers=ADMINS)
            assert_problem(response, 422, field)
            assert "must be double, as in the index, not string" in response.text
        listed = (await client.get("/jobs?limit=2", headers=ADMINS)).json()["jobs"]
        assert listed[0]["id"] == job["id"]
        assert in_process == []

        new = item(
            "new/1",
            caption="a pink thing",
            category="things",
            metadata={"price": 5, "size": "S"},
        )
        accepted = await put(client, new)
        assert accepted.json()["status"] in ("waiting", "running")
        assert accepted.json()["kind"] == "put"
        assert accepted.json()["items"] == 1
        assert accepted.json()["collection"] == "index"
        job = await ended(client, accepted)
        assert job["status"] == "done"
        assert job["failed"] == []
        assert job["new_fields"] == ["size"]
        found = (await client.get("/items/new%2F1")).json()
        assert found["index_version"] == job["index_version"]
        assert found["caption"] == "a pink thing"
        assert found["category"] == "things"
        assert found["metadata"]["price"] == 5
        assert found["width"] == 40
        assert (await client.get(found["image_url"])).content == png("pink")
        body = {"query": "pink", "filter": {"price": {"gte": 5}}}
        assert (await client.post("/search/text", json=body)).json()["results"][0][
            "id"
        ] == "new/1"

        await ended(client, await put(client, item("new/1", "cyan"), item("new/2")))
        assert (await client.get(found["image_url"])).content == png("cyan")
        assert (await client.get("/items/new%2F1")).json()["caption"] == ""
        given = {"image": new["image"], "metadata": {"price": 6}}
        put_one = await client.put("/items/a", json=given, headers=ADMINS)
        assert (
            await client.patch(
                "/items/a",
                json={"metadata": {"price": 7}},
                headers=ADMINS,
            )
        ).status_code == 202
        assert (await ended(client, put_one))["status"] == "done"
        assert (await client.get("/items")).json()["count"] == 27

        by_filter = {"filter": {"price": {"gte": 5}}}
        await ended(
            client,
            await client.request("DELETE", "/items", json=by_filter, headers=ADMINS),
        )
        job = await ended(
            client, await delete(client, "new/1", "circle/red.png", "unknown")
        )
        assert job["status"] == "done"
        assert job["kind"] == "delete"
        assert job["items"] == 3
        await ended(
            client, await client.delete("/items/circle%2Fblue.png", headers=ADMINS)
        )
        for gone in ("a", "new%2F1", "circle%2Fred.png", "circle%2Fblue.png"):
            assert (await client.get(f"/items/{gone}")).status_code == 404
        assert (await client.get("/items")).json()["count"] == 23


@pytest.mark.parametrize(
    ("reason", "code"),
    [("another job is writing to index", 5), ("No space left on device", 1)],
)
async def test_jobs_that_cannot_be_stored_are_refused_and_others_wait_and_tell_why(
    index: Path,
    in_process: list[int],
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    code: int,
) -> None:
    async def fail(*_: object) -> tuple[int, str]:
        return code, f"error: {reason}\n"

    def is_full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write_worker, "RETRY_S", 0.05)
    failures = "dcar_task_failures_total", (("task", "changes of items"),)
    async with opened(index, **WRITES) as client:
        with monkeypatch.context() as patch:
            patch.setattr("index_jobs.index.job_queue.write_bytes", is_full)
            refused = await put(client, item("a"))
        assert_problem(refused, 503)
        assert refused.headers["retry-after"] == "10"
        assert not JobQueue(index).newest(1)
        with monkeypatch.context() as patch:
            patch.setattr(WriteWorker, "run_apply", fail)
            response = await put(client, item("a"))

            async def tells_why() -> bool:
                job = (
                    await client.get(response.headers["location"], headers=ADMINS)
                ).json()
                assert job["status"] == "waiting"
                return job.get("reason") == reason and (
                    code == 5 or (await scrape(client)).get(failures, 0) > 3
                )

            await until(tells_why)
        assert (await ended(client, response))["status"] == "done"
        assert code == 1 or failures not in await scrape(client), (
            "another writer is no failure"
        )
    assert in_process == [0]


@pytest.mark.parametrize("is_created_again", [False, True])
async def test_change_of_a_collection_that_is_dropped_meanwhile_gets_404(
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_created_again: bool,
) -> None:
    accept = JobQueue.accept

    def accept_and_drop(queue: JobQueue, *given: Any, **more: Any) -> str:
        job = accept(queue, *given, **more)
        drop_collection(queue.index)
        if is_created_again:
            served = open_current(index)
            create_collection(tmp_path / "created", "lamps", served.checkpoint)
        return job

    monkeypatch.setattr(JobQueue, "accept", accept_and_drop)
    (tmp_path / "created").mkdir()
    async with opened(index, collections_dir=tmp_path / "created", **WRITES) as client:
        for change in (
            put(client, item("a"), path=ITEMS),
            delete(client, "a", path=ITEMS),
        ):
            response = await client.put("/collections/lamps", headers=ADMINS)
            assert response.status_code == 200
            assert_problem(await change, 404, "collection")


@pytest.mark.usefixtures("no_writer")
async def test_waiting_jobs_of_a_collection_have_a_quota(
    index: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        **WRITES,
        "max_jobs": 2,
        "collections_dir": tmp_path / "created",
    }
    (tmp_path / "created").mkdir()
    async with opened(index, **given) as client:
        assert [(await put(client, item("a"))).status_code for _ in range(3)] == [
            202,
            202,
            503,
        ]
        assert (await scrape(client))[
            "dcar_jobs_waiting", (("collection", "index"),)
        ] == 2
        response = await client.put("/collections/one", headers=ADMINS)
        assert response.status_code == 200
        for _ in range(2):
            accepted = [
                await put(client, item("a"), path="/collections/one/items")
                for _ in range(3)
            ]
            assert [each.status_code for each in accepted] == [202, 202, 503]
            response = await client.delete("/collections/one", headers=ADMINS)
            assert response.status_code == 204
            response = await client.put("/collections/one", headers=ADMINS)
            assert response.status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds child processes in /proc"
)
@needs("time")
def test_jobs_of_a_killed_service_are_done_after_its_restart(index: Path) -> None:
    settings = {"DCAR_WRITES": "true", "DCAR_ADMIN_KEY": ADMIN, "DCAR_RUNTIME": "auto"}
    with (
        serving_process(index, **settings) as (service, http, _),
        Client(str(http.base_url), key=ADMIN) as client,
    ):
        job = client.put_items(
            [{"id": "a", "image": png("pink")}, {"id": "b", "image": png("cyan")}]
        )
        change = client.patch_item("circle/red.png", {"metadata": {"price": 3}})
        children = children_of(service.pid)
        service.send_signal(signal.SIGKILL)
        assert service.wait() == -signal.SIGKILL
        for child in children:  # as if the machine had stopped
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    with (
        serving_process(index, **settings) as (service, http, _),
        Client(str(http.base_url), key=ADMIN) as client,
    ):
        assert client.wait_for_job(job.id, timeout_s=300).status == "done"
        assert client.image("b") == png("cyan")
        assert client.wait_for_job(change.id, timeout_s=300).changed == 1
        assert client.item("circle/red.png").metadata["price"] == 3
        last = client.delete_items(["a"])
        children = children_of(service.pid)
    end = time.monotonic() + 10
    while any(map(is_alive, children)):
        assert time.monotonic() < end, (
            "the process that applies jobs is killed with the service"
        )
        time.sleep(0.05)
    status = JobQueue(index).status(last.id)
    assert status is not None
    assert status["status"] in ("waiting", "running", "done")


ONE = "/items/a"
BAD: list[tuple[str, Any, str]] = [
    ("PUT", [], "body"),
    ("PUT", {}, "items"),
    ("PUT", {"items": []}, "items"),
    ("PUT", {"items": [{}]}, "items.0.id"),
    ("PUT", {"items": [item("a")], "more": 1}, "more"),
    ("PUT", {"items": [item("a") | {"url": "http://x"}]}, "items.0.url"),
    ("PUT", {"items": [item("a"), item("a")]}, "items.1.id"),
    *(
        ("PUT", {"items": [item(bad)]}, "items.0.id")
        for bad in (
            "",
            " a",
            "a ",
            "a\n",
            "a\x00b",
            ".",
            "..",
            "a/image",
            "a/similar",
            "a" * 1025,
        )
    ),
    *(
        ("PUT", {"items": [item("a", caption=bad)]}, "items.0.caption")
        for bad in (1, "x" * 10_001)
    ),
    ("PUT", {"items": [item("a", category=None)]}, "items.0.category"),
    *(
        ("PUT", {"items": [item("a", metadata=bad)]}, "items.0.metadata")
        for bad in (
            list[Any](),
            {"id": "b"},
            {"file_name": "/etc/passwd"},
            {"x": "y" * 65_536},
            {"n" * 257: 1},
        )
    ),
    (
        "PUT",
        {"items": [item(x, metadata={f"{x}{n}": n for n in range(500)}) for x in "ab"]},
        "items.1.metadata",
    ),
    ("PUT", {"items": [item("a") | {"image": "%"}]}, "items.0.image"),
    ("PUT", {"items": [item("a"), item("b") | {"image": "AAAA"}]}, "items.1.image"),
    ("DELETE", {}, "ids"),
    ("DELETE", {"ids": []}, "ids"),
    ("DELETE", {"ids": ["a", ""]}, "ids.1"),
    ("DELETE", {"ids": "a"}, "ids"),
    ("DELETE", {"ids": ["a"], "filter": {}}, "filter"),
    ("DELETE", {"ids": ["a"], "filter": {"category": "a"}}, "ids"),
    ("DELETE", {"filter": {"price": 3}}, "filter.price"),
    ("PATCH", {"ids": ["a"]}, "body"),
    ("PATCH", {"metadata": {"price": 3}}, "ids"),
    (
        "PATCH",
        {
            "ids": ["a"],
            "filter": {"category": "a"},
            "metadata": {"price": 3},
        },
        "ids",
    ),
    ("PATCH", {"filter": {"price": 3}, "caption": ""}, "filter.price"),
    ("PATCH", {"ids": ["a"], "metadata": {"caption": "b"}}, "metadata"),
    (
        "PATCH",
        {"ids": ["a"], "metadata": {"x": json.loads("[" * 100 + "]" * 100)}},
        "metadata",
    ),
    ("PATCH", {"ids": ["a"], "image": "AAAA"}, "image"),
    ("PATCH", {"by": "sku", "changes": {"7": {"x": 1}}}, "by"),
    ("PATCH", {"changes": {"a": {"x": 1}}, "caption": "b"}, "body"),
    ("PATCH", {"changes": {}}, "changes"),
    ("PATCH", {"ids": [f"{n}" for n in range(200)], "caption": "x" * 9000}, "ids"),
    (
        "PATCH",
        {"filter": {"id": {"not": "a"}}, "metadata": {"x": "x" * 60_000}},
        "filter",
    ),
    (f"PUT {ONE}", {"image": "%"}, "image"),
    (f"PUT {ONE}", {"image": "AAAA"}, "image"),
    (f"PUT {ONE}", {"caption": "b"}, "image"),
    (f"PUT {ONE}%2Fimage", {"image": "AAAA"}, "item_id"),
    (f"PATCH {ONE}", {"ids": ["a"], "metadata": {"price": 3}}, "ids"),
    (f"PATCH {ONE}", {}, "body"),
]


async def test_bad_requests_name_the_field_and_change_nothing(
    index: Path,
    in_process: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "MAX_CHANGE_BYTES", 2**20)
    async with opened(index, max_upload_bytes=20_000, **WRITES) as client:
        for request, body, field in BAD:
            method, _, path = request.partition(" ")
            assert_problem(
                await client.request(
                    method,
                    path or "/items",
                    json=body,
                    headers=ADMINS,
                ),
                422,
                field,
            )
        assert_problem(
            await client.put("/items", content=b"{", headers={**ADMINS, **JSON}),
            400,
            "body",
        )
        wrong_type = await client.put(
            "/items",
            content=b"{}",
            headers={**ADMINS, "Content-Type": "text/plain"},
        )
        assert_problem(wrong_type, 415, "Content-Type")
        broken = encoded(Image.effect_noise((90, 90), 90))[:-500]
        given = item("a") | {"image": base64.b64encode(broken).decode()}
        assert_problem(await put(client, given), 422, "items.0.image")
        given = item("a") | {
            "image": base64.b64encode(b"\x89PNG" + bytes(20_001)).decode()
        }
        assert_problem(await put(client, given), 413, "items.0.image")
        assert_problem(
            await put(client, *(item(str(number)) for number in range(257))),
            422,
            "items",
        )
        for job in ("0" * 32, "x", "..%2F..%2Fprogress", "0" * 31 + "G"):
            response = await client.get(f"/jobs/{job}", headers=ADMINS)
            assert response.status_code == 404, job
        response = await client.delete("/collections/none/items/a", headers=ADMINS)
        assert response.status_code == 404
        assert not (index / "jobs.sqlite").exists()
    assert in_process == []


@pytest.mark.slow
async def test_only_the_admin_and_keys_that_may_write_change_items(
    index: Path, in_process: list[int]
) -> None:
    writer, loader, reader, other = (new_key() for _ in range(4))
    keys = (
        f"alice:{key_hash(ALICE)}, admin:{key_hash(reader)}:read:index,"
        f" loader:{key_hash(loader)}:write:index, other:{key_hash(other)}:write:other,"
        f" writer:{key_hash(writer)}:write"
    )
    copy = Path(shutil.copytree(index, index.parent / "copy"))
    async with opened(
        index,
        api_keys=keys,
        collections={"other": copy},
        **WRITES,
    ) as client:

        async def statuses(key: str) -> list[int]:
            """Of a put, a put elsewhere, the same of a name, a job, a search, one
            elsewhere, and embeddings.
            """
            headers = bearer(key)
            answers = [
                await put(client, headers=headers),
                await put(client, path="/collections/other/items", headers=headers),
                await client.put("/concepts/rex", json={"ids": []}, headers=headers),
                await client.put(
                    "/collections/other/concepts/rex",
                    json={"ids": []},
                    headers=headers,
                ),
                await client.get("/jobs/0", headers=headers),
                await client.post("/search/text", json=WORDS, headers=headers),
                await client.post(
                    "/collections/other/search/text",
                    json=WORDS,
                    headers=headers,
                ),
                await client.post(
                    "/v1/embeddings",
                    json={"input": "a"},
                    headers=headers,
                ),
                await client.post(
                    "/v1/embeddings",
                    json={"input": "a", "model": "other"},
                    headers=headers,
                ),
                await client.get("/metrics", headers=headers),
            ]
            return [answer.status_code for answer in answers]

        # 422: a put without items, or examples, was allowed
        assert await statuses(ADMIN) == [
            422,
            422,
            422,
            422,
            404,
            401,
            401,
            401,
            401,
            200,
        ]
        assert await statuses(writer) == [
            422,
            422,
            422,
            422,
            404,
            200,
            200,
            200,
            200,
            200,
        ]
        assert await statuses(ALICE) == [
            403,
            403,
            403,
            403,
            403,
            200,
            200,
            200,
            200,
            200,
        ]
        assert await statuses(loader) == [
            422,
            403,
            422,
            403,
            404,
            200,
            403,
            200,
            403,
            403,
        ]
        assert await statuses(reader) == [
            403,
            403,
            403,
            403,
            403,
            200,
            403,
            200,
            403,
            403,
        ]
        assert await statuses(other) == [
            403,
            422,
            403,
            422,
            404,
            403,
            200,
            403,
            200,
            403,
        ]
        assert await statuses("wrong") == [401] * 10
        path = "/collections/other/concepts/rex"
        ids = {"ids": ["circle/red.png"]}
        response = await client.put(path, json=ids, headers=bearer(other))
        assert response.status_code == 200
        url = "/collections/other/search/text"
        named = {"query": "@rex", "filter": {"concept": "rex"}, "k": 24}
        response = await client.post(url, json=named, headers=bearer(ALICE))
        results = response.json()["results"]
        assert ids["ids"][0] in [result["id"] for result in results]
        response = await client.delete(path, headers=bearer(loader))
        assert response.status_code == 403
        response = await client.delete(path, headers=bearer(writer))
        assert response.status_code == 204
        for key, names in (
            (loader, ["index"]),
            (other, ["other"]),
            (ALICE, ["index", "other"]),
        ):
            response = await client.get("/collections", headers=bearer(key))
            listed = response.json()["collections"]
            assert [each["name"] for each in listed] == names
        refused = await put(client, headers=bearer(ALICE))
        assert_problem(refused, 403, "Authorization")
        job = await ended(client, await put(client, item("a"), headers=bearer(loader)))
        response = await client.get(f"/jobs/{job['id']}", headers=bearer(other))
        assert response.status_code == 404
    async with opened(index, **KEYS) as client:
        response = await put(client, item("a"))
        assert response.status_code == 403, "off by default"
        response = await client.get("/jobs/0", headers=ADMINS)
        assert response.status_code == 403
    async with opened(index, **WRITES) as client:
        assert [
            (await put(client, headers=headers)).status_code
            for headers in ({}, bearer("wrong"))
        ] == [401, 401]
    with pytest.raises(DcarError, match=r"DCAR_WRITES: .*needs DCAR_ADMIN_KEY"):
        load_settings(index=index, writes=True, api_keys=f"alice:{key_hash(ALICE)}")
    assert load_settings(
        index=index,
        writes=True,
        api_keys=f"alice:{key_hash(ALICE)}:write",
    ).writes


async def test_put_counts_as_its_items_and_large_bodies_are_refused(
    index: Path, in_process: list[int]
) -> None:
    async with opened(
        index,
        rate_limit="2/minute",  # nor do they fit when a minute begins in between
        max_upload_bytes=1024,
        **WRITES,
    ) as client:
        response = await put(client, item("a"), item("b"))
        assert response.status_code == 202
        response = await put(client, item("a"), item("b"))
        assert response.status_code == 429
    async with opened(index, max_upload_bytes=1024, **WRITES) as client:
        body = bytes(1024 * 4 // 3 + 256 * 64 * 2**10 + 1)
        assert_problem(
            await client.put("/items", content=body, headers={**ADMINS, **JSON}),
            413,
            "body",
        )


@pytest.mark.slow
async def test_image_that_only_queries_may_have_is_refused(
    index: Path, in_process: list[int]
) -> None:
    """Index jobs read at most 64 million pixels, whatever DCAR_MAX_PIXELS allows."""
    data = encoded(Image.new("1", (8001, 8000)), "PNG")
    async with opened(index, max_pixels=100_000_000, **WRITES) as client:
        response = await client.post("/search/image", files={"file": data})
        assert response.status_code == 200
        given = item("a") | {"image": base64.b64encode(data).decode()}
        assert_problem(await put(client, given), 422, "items.0.image")
    assert not in_process


def test_read_only_folders_are_an_error_at_start(
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_file(tmp_path / "collections", b"")
    with pytest.raises(
        DcarError, match=r"collections cannot be written: .* is not a directory"
    ):
        write_worker.require_writable(
            load_settings(index=index, collections_dir=file, **WRITES)
        )
    write_worker.require_writable(
        load_settings(
            index=index,
            collections_dir=tmp_path / "new" / "folder",
            **WRITES,
        )
    )
    # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    write_worker.require_writable(load_settings(index=index))
    with pytest.raises(DcarError, match="cannot be written"):
        write_worker.require_writable(load_settings(index=index, **WRITES))
