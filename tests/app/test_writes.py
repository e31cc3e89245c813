"""Items changed over HTTP: accepted as jobs, applied in versions, and only by those who may."""

import asyncio
import base64
import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from dcar_client import Client
from filelock import FileLock
from PIL import Image

from app.core.keys import key_hash, new_key, parse_keys
from app.core.settings import load_settings
from app.search.collections import ServedIndex
from app.writes import worker
from app.writes.worker import WriteWorker
from dcar_core.util.errors import DcarError
from index_jobs.jobs.writes.apply import apply_writes
from index_jobs.store.writes.write_queue import WriteQueue
from tests.support.commands import Command
from tests.support.images import encoded, png
from tests.support.processes import children_of, free_port, is_alive
from tests.support.responses import assert_problem
from tests.support.service import ADMIN, ALICE, KEYS, WORDS, bearer, opened, until

WRITES: dict[str, Any] = {"writes": True, "admin_key": ADMIN}
ADMINS = bearer(ADMIN)
JSON = {"Content-Type": "application/json"}


def item(item_id: str, color: str = "pink", **fields: Any) -> dict[str, Any]:
    return {"id": item_id, "image": base64.b64encode(png(color)).decode(), **fields}


async def put(
    client: httpx.AsyncClient, *items: dict[str, Any], path: str = "/items", **options: Any
) -> httpx.Response:
    return await client.put(path, json={"items": items}, headers=options.pop("headers", ADMINS))


async def delete(client: httpx.AsyncClient, *ids: str, path: str = "/items", **options: Any) -> httpx.Response:
    return await client.request("DELETE", path, json={"ids": ids}, headers=options.pop("headers", ADMINS))


async def ended(client: httpx.AsyncClient, response: httpx.Response) -> dict[str, Any]:
    """Return the job of a response at its end."""
    assert response.status_code == 202, response.text
    job: dict[str, Any] = {}

    async def is_over() -> bool:
        job.update((await client.get(response.headers["location"], headers=ADMINS)).json())
        return job["status"] in ("done", "failed")

    await until(is_over)
    return job


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Apply jobs in a thread of this process, which saves seconds of imports; return the exit statuses."""
    codes = list[int]()

    async def run_apply(_: WriteWorker, served: ServedIndex) -> tuple[int, str]:
        try:
            await asyncio.to_thread(apply_writes, served.index, device="cpu", runtime="torch")
        except DcarError as error:
            codes.append(error.exit_code)
            return error.exit_code, f"error: {error}\n"
        codes.append(0)
        return 0, ""

    monkeypatch.setattr(WriteWorker, "run_apply", run_apply)
    return codes


@pytest.mark.usefixtures("in_process")
async def test_items_are_put_replaced_and_deleted_by_jobs(index: Path) -> None:
    async with opened(index, **WRITES) as client:
        accepted = await put(client, item("new/1", caption="a pink thing", category="things", metadata={"price": 3}))
        job = accepted.json()
        assert (job["status"], job["kind"], job["items"], job["collection"]) == ("waiting", "put", 1, "index")
        job = await ended(client, accepted)
        assert (job["status"], job["index_version"], job["failed"]) == ("done", 2, [])
        found = (await client.get("/items/new%2F1")).json()
        assert (found["index_version"], found["caption"], found["category"]) == (2, "a pink thing", "things")
        assert found["metadata"]["price"] == 3
        assert (await client.get(found["image_url"])).content == png("pink")
        body = {"query": "pink", "filter": {"price": {"gte": 3}}}
        assert (await client.post("/search/text", json=body)).json()["results"][0]["id"] == "new/1"

        await ended(client, await put(client, item("new/1", "cyan"), item("new/2")))
        assert (await client.get(found["image_url"])).content == png("cyan")
        assert (await client.get("/items/new%2F1")).json()["caption"] == ""
        assert (await client.get("/items")).json()["count"] == 26

        job = await ended(client, await delete(client, "new/1", "circle/red.png", "unknown"))
        assert (job["status"], job["kind"], job["items"]) == ("done", "delete", 3)
        assert (await client.get("/items")).json()["count"] == 24
        for gone in ("new%2F1", "circle%2Fred.png"):
            assert (await client.get(f"/items/{gone}")).status_code == 404


@pytest.mark.usefixtures("in_process")
async def test_repeated_requests_leave_the_same_items(index: Path) -> None:
    async with opened(index, **WRITES) as client:
        await asyncio.gather(*(put(client, item("a"), item("b")) for _ in range(3)), delete(client, "circle/red.png"))
        await ended(client, await delete(client, "circle/red.png"))
        await ended(client, await put(client, item("a"), item("b")))
        assert (await client.get("/items")).json()["count"] == 25


BAD: list[tuple[str, bytes, int, str]] = [
    ("PUT", b"{", 400, "body"),
    ("PUT", b"[]", 422, "body"),
    ("PUT", b"{}", 422, "items"),
    ("PUT", b'{"items": []}', 422, "items"),
    ("PUT", b'{"items": [{}]}', 422, "items.0.id"),
    ("PUT", json.dumps({"items": [item("a")], "more": 1}).encode(), 422, "more"),
    ("PUT", json.dumps({"items": [item("a") | {"url": "http://x"}]}).encode(), 422, "items.0.url"),
    ("PUT", json.dumps({"items": [item("a"), item("a")]}).encode(), 422, "items.1.id"),
    *(
        ("PUT", json.dumps({"items": [item(bad)]}).encode(), 422, "items.0.id")
        for bad in ("", " a", "a ", "a\n", "a\x00b", ".", "..", "a/image", "a/similar", "a" * 1025)
    ),
    ("PUT", json.dumps({"items": [item("a", caption=1)]}).encode(), 422, "items.0.caption"),
    ("PUT", json.dumps({"items": [item("a", caption="x" * 10_001)]}).encode(), 422, "items.0.caption"),
    ("PUT", json.dumps({"items": [item("a", category=None)]}).encode(), 422, "items.0.category"),
    ("PUT", json.dumps({"items": [item("a", metadata=[])]}).encode(), 422, "items.0.metadata"),
    ("PUT", json.dumps({"items": [item("a", metadata={"id": "b"})]}).encode(), 422, "items.0.metadata"),
    (
        "PUT",
        json.dumps({"items": [item("a", metadata={"file_name": "/etc/passwd"})]}).encode(),
        422,
        "items.0.metadata",
    ),
    ("PUT", json.dumps({"items": [item("a", metadata={"x": "y" * 65_536})]}).encode(), 422, "items.0.metadata"),
    ("PUT", json.dumps({"items": [item("a") | {"image": "%"}]}).encode(), 422, "items.0.image"),
    ("PUT", json.dumps({"items": [item("a"), item("b") | {"image": "AAAA"}]}).encode(), 422, "items.1.image"),
    ("DELETE", b"{}", 422, "ids"),
    ("DELETE", b'{"ids": []}', 422, "ids"),
    ("DELETE", b'{"ids": ["a", ""]}', 422, "ids.1"),
    ("DELETE", b'{"ids": "a"}', 422, "ids"),
    ("DELETE", b'{"ids": ["a"], "filter": {}}', 422, "filter"),
]


async def test_bad_requests_name_the_field_and_change_nothing(index: Path, in_process: list[int]) -> None:
    async with opened(index, max_upload_bytes=20_000, **WRITES) as client:
        for method, body, status, field in BAD:
            response = await client.request(method, "/items", content=body, headers={**ADMINS, **JSON})
            assert_problem(response, status, field)
        wrong_type = await client.put("/items", content=b"{}", headers={**ADMINS, "Content-Type": "text/plain"})
        assert_problem(wrong_type, 415, "Content-Type")
        broken = encoded(Image.effect_noise((90, 90), 90))[:-500]
        given = item("a") | {"image": base64.b64encode(broken).decode()}
        assert_problem(await put(client, given), 422, "items.0.image")
        given = item("a") | {"image": base64.b64encode(b"\x89PNG" + bytes(20_001)).decode()}
        assert_problem(await put(client, given), 413, "items.0.image")
        assert_problem(await put(client, *(item(str(number)) for number in range(257))), 422, "items")
        for job in ("0" * 32, "x", "..%2F..%2Fprogress", "0" * 31 + "G"):
            assert (await client.get(f"/jobs/{job}", headers=ADMINS)).status_code == 404, job
        assert (await client.put("/collections/none/items", json={}, headers=ADMINS)).status_code == 404
        assert not (index / "writes").exists()
    assert in_process == []


async def test_only_the_admin_and_keys_that_may_write_change_items(index: Path, in_process: list[int]) -> None:
    writer, loader, reader, other = (new_key() for _ in range(4))
    keys = (
        f"alice:{key_hash(ALICE)}, admin:{key_hash(reader)}:read:index, loader:{key_hash(loader)}:write:index, "
        f"other:{key_hash(other)}:write:other, writer:{key_hash(writer)}:write"
    )
    async with opened(index, api_keys=keys, collections={"other": index}, **WRITES) as client:

        async def statuses(key: str) -> list[int]:
            """Of a put, a put elsewhere, a job, a search, one elsewhere, and embeddings."""
            headers = bearer(key)
            answers = [
                await put(client, headers=headers),
                await put(client, path="/collections/other/items", headers=headers),
                await client.get("/jobs/0", headers=headers),
                await client.post("/search/text", json=WORDS, headers=headers),
                await client.post("/collections/other/search/text", json=WORDS, headers=headers),
                await client.post("/v1/embeddings", json={"input": "a"}, headers=headers),
                await client.post("/v1/embeddings", json={"input": "a", "model": "other"}, headers=headers),
                await client.get("/metrics", headers=headers),
            ]
            return [answer.status_code for answer in answers]

        # 422: a put without items was allowed
        assert await statuses(ADMIN) == [422, 422, 404, 401, 401, 401, 401, 200]
        assert await statuses(writer) == [422, 422, 404, 200, 200, 200, 200, 200]
        assert await statuses(ALICE) == [403, 403, 403, 200, 200, 200, 200, 200]
        assert await statuses(loader) == [422, 403, 404, 200, 403, 200, 403, 403]
        assert await statuses(reader) == [403, 403, 403, 200, 403, 200, 403, 403]
        assert await statuses(other) == [403, 422, 403, 403, 200, 403, 200, 403]
        assert await statuses("wrong") == [401] * 8
        for key, names in ((loader, ["index"]), (other, ["other"]), (ALICE, ["index", "other"])):
            listed = (await client.get("/collections", headers=bearer(key))).json()["collections"]
            assert [each["name"] for each in listed] == names
        refused = await put(client, headers=bearer(ALICE))
        assert_problem(refused, 403, "Authorization")
        job = await ended(client, await put(client, item("a"), headers=bearer(loader)))
        assert (await client.get(f"/jobs/{job['id']}", headers=bearer(other))).status_code in (403, 404)
    async with opened(index, **KEYS) as client:
        assert (await put(client, item("a"))).status_code == 403, "off by default"
        assert (await client.get("/jobs/0", headers=ADMINS)).status_code == 403
    async with opened(index, **WRITES) as client:
        assert [(await put(client, headers=headers)).status_code for headers in ({}, bearer("wrong"))] == [401, 401]
    with pytest.raises(DcarError, match=r"DCAR_WRITES: .*needs DCAR_ADMIN_KEY"):
        load_settings(index=index, writes=True, api_keys=f"alice:{key_hash(ALICE)}")
    assert load_settings(index=index, writes=True, api_keys=f"alice:{key_hash(ALICE)}:write").writes


@pytest.mark.parametrize("scope", ["", "delete", "write:", "write:a b", "read:a/b", "read:a:b", ":a"])
def test_malformed_scopes_are_refused(scope: str) -> None:
    with pytest.raises(ValueError, match=r"has a scope of alice|NAME:HASH") as caught:
        parse_keys(f"alice:{key_hash(ALICE)}:{scope}")
    assert key_hash(ALICE) not in str(caught.value)


async def test_put_counts_as_its_items_and_large_bodies_are_refused(index: Path, in_process: list[int]) -> None:
    async with opened(index, rate_limit="3/minute", max_upload_bytes=1024, **WRITES) as client:
        assert (await put(client, item("a"), item("b"))).status_code == 202
        assert (await put(client, item("a"), item("b"))).status_code == 429
    async with opened(index, max_upload_bytes=1024, **WRITES) as client:
        body = bytes(1024 * 4 // 3 + 256 * 64 * 2**10 + 1)
        assert_problem(await client.put("/items", content=body, headers={**ADMINS, **JSON}), 413, "body")


@pytest.mark.usefixtures("in_process")
async def test_waiting_jobs_are_applied_after_a_restart(index: Path) -> None:
    queue = WriteQueue(index)
    given = {"id": "a", "caption": "", "category": "", "metadata": {}}
    jobs = [queue.accept("put", [given], [(png(), "png")]), queue.accept("delete", [{"id": "circle/red.png"}])]
    async with opened(index, **WRITES) as client:

        async def are_done() -> bool:
            found = [(await client.get(f"/jobs/{job}", headers=ADMINS)).json() for job in jobs]
            return all(job["status"] == "done" for job in found)

        await until(are_done)
        assert (await client.get("/items")).json()["count"] == 24


def test_index_that_cannot_be_written_is_an_error_at_the_start(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    worker.require_writable(load_settings(index=index))
    with pytest.raises(DcarError, match="cannot be written, which DCAR_WRITES needs"):
        worker.require_writable(load_settings(index=index, **WRITES))


async def test_two_services_of_one_index_apply_each_others_jobs(
    index: Path, in_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_RETRY_S", 0.05)
    async with opened(index, poll_s=0.05, **WRITES) as one, opened(index, poll_s=0.05, **WRITES) as other:
        accepted = await asyncio.gather(*(put(client, item(f"{i}")) for i, client in enumerate((one, other) * 4)))
        for client in (one, other):
            assert {(await ended(client, response))["status"] for response in accepted} == {"done"}
            assert (await client.get("/items")).json()["count"] == 32
    assert set(in_process) <= {0, 5}


async def test_full_disk_refuses_a_job_as_a_whole(
    index: Path, in_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with opened(index, **WRITES) as client:
        with monkeypatch.context() as patch:
            patch.setattr("index_jobs.store.writes.write_queue.write_json", fail)
            response = await put(client, item("a"))
        assert_problem(response, 503)
        assert response.headers["retry-after"] == "10"
        assert not list((index / "writes").glob("*/*"))
        assert (await ended(client, await put(client, item("a"))))["status"] == "done"
    assert in_process == [0]


@pytest.mark.usefixtures("in_process")
async def test_jobs_wait_for_another_writer_and_tell_why(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_RETRY_S", 0.05)
    async with opened(index, **WRITES) as client:
        with FileLock(index / ".lock"):
            response = await put(client, item("a"))

            async def tells_why() -> bool:
                job = (await client.get(response.headers["location"], headers=ADMINS)).json()
                assert job["status"] != "failed"
                return "another job is writing to index" in job.get("reason", "")

            await until(tells_why)
        assert (await ended(client, response))["status"] == "done"


@pytest.mark.usefixtures("in_process")
async def test_collection_is_created_filled_and_dropped(index: Path, tmp_path: Path) -> None:
    given = {**WRITES, "collections_dir": tmp_path / "created", "poll_s": 0.05}
    path = "/collections/lamps"
    async with opened(index, **given) as client, opened(index, **given) as other:
        created = await client.put(path, headers=ADMINS)
        assert created.json() == {
            "name": "lamps", "default": False, "count": 0, "index_version": 0, "min_score": None
        }  # fmt: skip
        assert (await client.put(path, headers=ADMINS)).json() == created.json(), "idempotent"
        assert (await client.get("/readyz")).json()["status"] == "ready"
        assert (await client.post(f"{path}/search/text", json=WORDS)).json()["results"] == []
        await ended(client, await put(client, item("a"), item("b", "cyan"), path=f"{path}/items"))
        found = (await client.post(f"{path}/search/text", json={"query": "pink", "k": 5})).json()["results"]
        assert {each["id"] for each in found} == {"a", "b"}
        assert (await client.get(f"{path}/items/b/image")).content == png("cyan")
        await ended(client, await put(client, item("c"), path=f"{path}/items"))
        assert (await client.get(f"{path}/items")).json()["count"] == 3
        assert (await client.get("/items")).json()["count"] == 24

        async def count_elsewhere() -> bool:
            listed = {each["name"]: each["count"] for each in (await other.get("/collections")).json()["collections"]}
            return listed == {"index": 24, "lamps": 3}

        await until(count_elsewhere)
    async with opened(index, **given) as client:
        assert (await client.get(f"{path}/items")).json()["count"] == 3, "after a restart"
        assert (await client.delete(path, headers=ADMINS)).status_code == 204
        assert (await client.get(f"{path}/items")).status_code == 404
        assert (await client.delete(path, headers=ADMINS)).status_code == 404
        assert not list((tmp_path / "created").iterdir())
        assert (await client.put(path, headers=ADMINS)).json()["count"] == 0


async def test_empty_collection_has_no_results_and_checks_requests(index: Path, tmp_path: Path) -> None:
    async with opened(index, collections_dir=tmp_path / "created", **WRITES) as client:
        path = "/collections/lamps"
        await client.put(path, headers=ADMINS)
        options = {
            "filter": {"price": 3},
            "fields": ["price"],
            "group_by": "price",
            "hybrid": True,
            "min_score": "auto",
        }
        text = {"query": "red", "facets": ["price"], "explain": True, "rerank": True, **options}
        found = (await client.post(f"{path}/search/text", json=text)).json()
        took_ms = found.pop("took_ms")
        assert found == {"index_version": 0, "cached": False, "results": [], "facets": {"price": []}}
        assert took_ms >= 0
        by_image = await client.post(f"{path}/search/image", files={"file": png()}, data={"filter": '{"price": 3}'})
        assert by_image.json()["results"] == []
        batch = await client.post(f"{path}/search/batch", json={"queries": [text, {"query": "blue", "k": 5}]})
        assert [each["results"] for each in batch.json()["answers"]] == [[], []]
        for route in ("items?group_by=price", 'items?filter={"price": 3}', "browse?sort=-price"):
            listed = (await client.get(f"{path}/{route}")).json()
            assert listed == {"index_version": 0, "count": 0, "items": []}
        assert (await client.get(f"{path}/facets")).json() == {"facets": []}
        assert (await client.get(f"{path}/catalogue")).json()["fields"] == []
        embedded = (await client.post("/v1/embeddings", json={"input": "red", "model": "lamps"})).json()
        assert embedded["data"] == (await client.post("/v1/embeddings", json={"input": "red"})).json()["data"]
        assert (await client.get("/readyz")).json()["status"] == "ready"
        for route in ("items/a", "items/a/similar", "items/a/image", "items/a/image?size=192"):
            assert_problem(await client.get(f"{path}/{route}"), 404, "id")
        assert_problem(
            await client.post(f"{path}/search/text", json={"query": "red", "more_like": ["a"]}), 422, "more_like"
        )
        assert_problem(await client.post(f"{path}/search/text", json={"query": ""}), 422, "query")
        assert_problem(await client.post(f"{path}/search/image", files={"file": b"none"}), 422, "file")


async def test_only_collections_of_writers_are_created_and_dropped(index: Path, tmp_path: Path) -> None:
    lamps = new_key()
    keys: dict[str, Any] = {"api_keys": f"alice:{key_hash(ALICE)}, lamps:{key_hash(lamps)}:write:lamps+index"}
    async with opened(index, collections_dir=tmp_path / "created", **WRITES, **keys) as client:

        async def send(method: str, name: str, key: str) -> int:
            return (await client.request(method, f"/collections/{name}", headers=bearer(key))).status_code

        assert [await send("PUT", "lamps", key) for key in (ALICE, "wrong", lamps)] == [403, 401, 200]
        assert [await send("PUT", "other", key) for key in (ALICE, lamps)] == [403, 403]
        assert await send("PUT", "lamps2?model=none", ADMIN) == 404
        assert await send("DELETE", "index", ADMIN) == 409
        assert await send("DELETE", "none", ADMIN) == 404
        for name in (".hidden", "..%2Fx", "a b", "x" * 65, "%00"):
            assert await send("PUT", name, ADMIN) in (404, 405, 422), name
        assert len(list((tmp_path / "created").iterdir())) == 1
        assert [await send("DELETE", "lamps", key) for key in (ALICE, lamps)] == [403, 204]
    async with opened(index, **WRITES) as client:
        assert (await client.put("/collections/lamps", headers=ADMINS)).status_code == 403


@contextmanager
def service_process(index: Path, port: int) -> Iterator[Command]:
    """A service in a process of its own, once it is ready; it is ended if it still runs."""
    environment = {"DCAR_WRITES": "true", "DCAR_ADMIN_KEY": ADMIN, "DCAR_DEVICE": "cpu", "DCAR_RUNTIME": "torch"}
    arguments = ("serve", "--index", index, "--port", port)
    service = Command("app.cli", *arguments, environment=environment, stdout=os.devnull, stderr=os.devnull)
    try:
        end = time.monotonic() + 120
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            assert service.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        yield service
    finally:
        if service.poll() is None:
            service.send_signal(signal.SIGTERM)
            service.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes in /proc")
def test_jobs_of_a_killed_service_are_done_after_its_restart(index: Path) -> None:
    port = free_port()
    with Client(f"http://127.0.0.1:{port}", key=ADMIN) as client:
        with service_process(index, port) as service:
            job = client.put_items([{"id": "a", "image": png("pink")}, {"id": "b", "image": png("cyan")}])
            children = children_of(service.pid)
            service.send_signal(signal.SIGKILL)
            assert service.wait() == -signal.SIGKILL
            for child in children:  # as if the machine had stopped
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        with service_process(index, port) as service:
            assert client.wait_for_job(job.id, timeout_s=300).status == "done"
            assert client.image("b") == png("cyan")
            last = client.delete_items(["a"])
            children = children_of(service.pid)
        assert not any(map(is_alive, children)), "the process that applies jobs ends with the service"
    status = WriteQueue(index).status(last.id)
    assert status is not None
    assert status["status"] in ("waiting", "running", "done")
