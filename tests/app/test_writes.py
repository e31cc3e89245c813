"""Jobs that change items: applied in versions, also after faults and restarts."""

import errno
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dcar_client import Client

from app.service import write_worker
from app.service.write_worker import WriteWorker
from index_jobs.index.created_collections import create_collection, drop_collection
from index_jobs.index.job_queue import JobQueue
from index_jobs.index.versions import open_current
from tests.support.images import png
from tests.support.processes import children_of, is_alive
from tests.support.responses import assert_problem, scrape
from tests.support.service import ADMIN, opened, serving_process, until
from tests.support.writes import ADMINS, WRITES, delete, ended, item, put

ITEMS = "/collections/lamps/items"


async def test_items_are_patched_put_replaced_and_deleted_by_jobs(index: Path, in_process: list[int]) -> None:
    first, second = "circle/red.png", "circle/blue.png"
    async with opened(index, **WRITES) as client:
        before = (await client.get("/items/circle%2Fred.png")).json()

        async def patch(path: str, **body: Any) -> dict[str, Any]:
            return await ended(client, await client.patch(path, json=body, headers=ADMINS))

        job = await patch("/items/circle%2Fred.png", metadata={"price": 12.5, "brand": "Acme"}, caption="a guitar")
        assert (job["kind"], job["items"], job["changed"], job["status"]) == ("patch", 1, 1, "done")
        assert job["new_fields"] == ["brand", "price"]
        found = (await client.get("/items/circle%2Fred.png")).json()
        assert found["metadata"] == before["metadata"] | {"price": 12.5, "brand": "Acme"}
        assert (found["caption"], found["category"], found["index_version"]) == ("a guitar", before["category"], 2)
        body = {"query": "guitar", "hybrid": 1, "filter": {"price": {"lt": 13}}}
        assert [each["id"] for each in (await client.post("/search/text", json=body)).json()["results"]] == [first]

        job = await patch("/items", ids=[first, second, "unknown"], metadata={"price": 3, "brand": None})
        assert (job["items"], job["changed"], job["unknown"], job["new_fields"]) == (3, 2, ["unknown"], [])
        job = await patch("/items", filter={"price": 3}, metadata={"price": 4})
        assert (job["items"], job["changed"]) == (2, 2)
        wrong = await client.patch("/items/circle%2Fred.png", json={"metadata": {"price": "4 EUR"}}, headers=ADMINS)
        assert "'price' is double in the index, not string" in (await ended(client, wrong))["reason"]
        listed = (await client.get("/jobs?limit=2", headers=ADMINS)).json()["jobs"]
        assert [each["id"] for each in listed] == [wrong.json()["id"], job["id"]]
        assert in_process == []

        new = item("new/1", caption="a pink thing", category="things", metadata={"price": 5, "size": "S"})
        accepted = await put(client, new)
        assert accepted.json()["status"] in ("waiting", "running")
        assert (accepted.json()["kind"], accepted.json()["items"], accepted.json()["collection"]) == ("put", 1, "index")
        job = await ended(client, accepted)
        assert (job["status"], job["failed"], job["new_fields"]) == ("done", [], ["size"])
        found = (await client.get("/items/new%2F1")).json()
        assert (found["index_version"], found["caption"]) == (job["index_version"], "a pink thing")
        assert (found["category"], found["metadata"]["price"], found["width"]) == ("things", 5, 40)
        assert (await client.get(found["image_url"])).content == png("pink")
        body = {"query": "pink", "filter": {"price": {"gte": 5}}}
        assert (await client.post("/search/text", json=body)).json()["results"][0]["id"] == "new/1"

        await ended(client, await put(client, item("new/1", "cyan"), item("new/2")))
        assert (await client.get(found["image_url"])).content == png("cyan")
        assert (await client.get("/items/new%2F1")).json()["caption"] == ""
        given = {"image": new["image"], "metadata": {"price": 6}}
        put_one = await client.put("/items/a", json=given, headers=ADMINS)
        assert (await client.patch("/items/a", json={"metadata": {"price": 7}}, headers=ADMINS)).status_code == 202
        assert (await ended(client, put_one))["status"] == "done"
        assert (await client.get("/items")).json()["count"] == 27

        by_filter = {"filter": {"price": {"gte": 5}}}
        await ended(client, await client.request("DELETE", "/items", json=by_filter, headers=ADMINS))
        job = await ended(client, await delete(client, "new/1", "circle/red.png", "unknown"))
        assert (job["status"], job["kind"], job["items"]) == ("done", "delete", 3)
        await ended(client, await client.delete("/items/circle%2Fblue.png", headers=ADMINS))
        for gone in ("a", "new%2F1", "circle%2Fred.png", "circle%2Fblue.png"):
            assert (await client.get(f"/items/{gone}")).status_code == 404
        assert (await client.get("/items")).json()["count"] == 23


@pytest.mark.parametrize(("reason", "code"), [("another job is writing to index", 5), ("No space left on device", 1)])
async def test_jobs_that_cannot_be_stored_are_refused_and_those_that_cannot_be_applied_wait_and_tell_why(
    index: Path, in_process: list[int], monkeypatch: pytest.MonkeyPatch, reason: str, code: int
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
                job = (await client.get(response.headers["location"], headers=ADMINS)).json()
                assert job["status"] == "waiting"
                return job.get("reason") == reason and (code == 5 or (await scrape(client)).get(failures, 0) > 3)

            await until(tells_why)
        assert (await ended(client, response))["status"] == "done"
        assert code == 1 or failures not in await scrape(client), "another writer is no failure"
    assert in_process == [0]


@pytest.mark.parametrize("is_created_again", [False, True])
async def test_change_of_a_collection_that_is_dropped_meanwhile_gets_404(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_created_again: bool
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
        for change in (put(client, item("a"), path=ITEMS), delete(client, "a", path=ITEMS)):
            assert (await client.put("/collections/lamps", headers=ADMINS)).status_code == 200
            assert_problem(await change, 404, "collection")


@pytest.mark.usefixtures("no_writer")
async def test_waiting_jobs_of_a_collection_have_a_quota(index: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {**WRITES, "max_jobs": 2, "collections_dir": tmp_path / "created"}
    (tmp_path / "created").mkdir()
    async with opened(index, **given) as client:
        assert [(await put(client, item("a"))).status_code for _ in range(3)] == [202, 202, 503]
        assert (await scrape(client))["dcar_jobs_waiting", (("collection", "index"),)] == 2
        assert (await client.put("/collections/one", headers=ADMINS)).status_code == 200
        for _ in range(2):
            accepted = [await put(client, item("a"), path="/collections/one/items") for _ in range(3)]
            assert [each.status_code for each in accepted] == [202, 202, 503]
            assert (await client.delete("/collections/one", headers=ADMINS)).status_code == 204
            assert (await client.put("/collections/one", headers=ADMINS)).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes in /proc")
def test_jobs_of_a_killed_service_are_done_after_its_restart(index: Path) -> None:
    settings = {"DCAR_WRITES": "true", "DCAR_ADMIN_KEY": ADMIN}
    with serving_process(index, **settings) as (service, http, _), Client(str(http.base_url), key=ADMIN) as client:
        job = client.put_items([{"id": "a", "image": png("pink")}, {"id": "b", "image": png("cyan")}])
        change = client.patch_item("circle/red.png", {"metadata": {"price": 3}})
        children = children_of(service.pid)
        service.send_signal(signal.SIGKILL)
        assert service.wait() == -signal.SIGKILL
        for child in children:  # as if the machine had stopped
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    with serving_process(index, **settings) as (service, http, _), Client(str(http.base_url), key=ADMIN) as client:
        assert client.wait_for_job(job.id, timeout_s=300).status == "done"
        assert client.image("b") == png("cyan")
        assert client.wait_for_job(change.id, timeout_s=300).changed == 1
        assert client.item("circle/red.png").metadata["price"] == 3
        last = client.delete_items(["a"])
        children = children_of(service.pid)
    end = time.monotonic() + 10
    while any(map(is_alive, children)):
        assert time.monotonic() < end, "the process that applies jobs is killed with the service"
        time.sleep(0.05)
    status = JobQueue(index).status(last.id)
    assert status is not None
    assert status["status"] in ("waiting", "running", "done")
