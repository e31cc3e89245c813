"""Requests that change items: what they must contain, and who may send them."""

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from app.api import writing
from app.core.keys import key_hash, new_key
from app.core.settings import load_settings
from app.service import write_worker
from dcar_core.util.errors import DcarError
from tests.support.files import write_file
from tests.support.images import encoded
from tests.support.responses import assert_problem
from tests.support.service import ADMIN, ALICE, KEYS, WORDS, bearer, opened
from tests.support.writes import ADMINS, JSON, WRITES, ended, item, put

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
    ("PUT", json.dumps({"items": [item("a", metadata={"n" * 257: 1})]}).encode(), 422, "items.0.metadata"),
    ("PATCH", b'{"ids": ["a"], "metadata": {"x": %s}}' % (b"[" * 100 + b"]" * 100), 422, "metadata"),
    (
        "PUT",
        json.dumps({"items": [item(x, metadata={f"{x}{n}": n for n in range(500)}) for x in "ab"]}).encode(),
        422,
        "items.1.metadata",
    ),
    ("PUT", json.dumps({"items": [item("a") | {"image": "%"}]}).encode(), 422, "items.0.image"),
    ("PUT", json.dumps({"items": [item("a"), item("b") | {"image": "AAAA"}]}).encode(), 422, "items.1.image"),
    ("DELETE", b"{}", 422, "ids"),
    ("DELETE", b'{"ids": []}', 422, "ids"),
    ("DELETE", b'{"ids": ["a", ""]}', 422, "ids.1"),
    ("DELETE", b'{"ids": "a"}', 422, "ids"),
    ("DELETE", b'{"ids": ["a"], "filter": {}}', 422, "filter"),
    ("DELETE", b'{"ids": ["a"], "filter": {"category": "a"}}', 422, "ids"),
    ("DELETE", b'{"filter": {"price": 3}}', 422, "filter.price"),
    ("PATCH", b'{"ids": ["a"]}', 422, "body"),
    ("PATCH", b'{"metadata": {"price": 3}}', 422, "ids"),
    ("PATCH", b'{"ids": ["a"], "filter": {"category": "a"}, "metadata": {"price": 3}}', 422, "ids"),
    ("PATCH", b'{"filter": {"price": 3}, "caption": ""}', 422, "filter.price"),
    ("PATCH", b'{"ids": ["a"], "metadata": {"caption": "b"}}', 422, "metadata"),
    ("PATCH", b'{"ids": ["a"], "image": "AAAA"}', 422, "image"),
    ("PATCH", json.dumps({"ids": [f"{n}" for n in range(200)], "caption": "x" * 9000}).encode(), 422, "ids"),
    ("PATCH", b'{"filter": {"id": {"not": "a"}}, "metadata": {"x": "%s"}}' % (b"x" * 60_000), 422, "filter"),
]
BAD_ITEM: list[tuple[str, str, bytes, int, str]] = [
    ("PUT", "/items/a", json.dumps({"image": "%"}).encode(), 422, "image"),
    ("PUT", "/items/a", json.dumps({"image": "AAAA"}).encode(), 422, "image"),
    ("PUT", "/items/a", b'{"caption": "b"}', 422, "image"),
    ("PUT", "/items/a%2Fimage", json.dumps({"image": "AAAA"}).encode(), 422, "item_id"),
    ("PUT", "/items/a?strict=true", json.dumps({"image": "AAAA", "metadata": {"prise": 3}}).encode(), 422,
     "metadata.prise"),
    ("PUT", "/items?strict=true", json.dumps({"items": [item("a"), item("b", metadata={"prise": 3})]}).encode(), 422,
     "items.1.metadata.prise"),
    ("PATCH", "/items?strict=true", b'{"ids": ["a"], "metadata": {"prise": 3}}', 422, "metadata.prise"),
    ("PATCH", "/items/a", b'{"metadata": {"price": 3}}', 404, "id"),
    ("PATCH", "/items/a", b'{"ids": ["a"], "metadata": {"price": 3}}', 422, "ids"),
    ("PATCH", "/items/a", b'{}', 422, "body"),
    ("DELETE", "/items/a", b"", 404, "id"),
]  # fmt: skip


async def test_bad_requests_name_the_field_and_change_nothing(
    index: Path, in_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_CHANGE_BYTES", 2**20)
    async with opened(index, max_upload_bytes=20_000, **WRITES) as client:
        for method, body, status, field in BAD:
            response = await client.request(method, "/items", content=body, headers={**ADMINS, **JSON})
            assert_problem(response, status, field)
        for method, path, body, status, field in BAD_ITEM:
            response = await client.request(method, path, content=body, headers={**ADMINS, **JSON})
            assert_problem(response, status, field)
        wrong_type = await client.put("/items", content=b"{}", headers={**ADMINS, "Content-Type": "text/plain"})
        assert_problem(wrong_type, 415, "Content-Type")
        broken = encoded(Image.effect_noise((90, 90), 90))[:-500]
        given = item("a") | {"image": base64.b64encode(broken).decode()}
        assert_problem(await put(client, given), 422, "items.0.image")
        given = item("a") | {"image": base64.b64encode(b"\x89PNG" + bytes(20_001)).decode()}
        assert_problem(await put(client, given), 413, "items.0.image")
        assert_problem(await put(client, *(item(str(number)) for number in range(257))), 422, "items")
        path, many = "/items?strict=true", {f"{n}": n for n in range(900)}
        misspelt = await client.patch(path, json={"ids": ["a"], "metadata": many}, headers=ADMINS)
        assert len(misspelt.json()["errors"]) == 20
        for job in ("0" * 32, "x", "..%2F..%2Fprogress", "0" * 31 + "G"):
            assert (await client.get(f"/jobs/{job}", headers=ADMINS)).status_code == 404, job
        assert (await client.put("/collections/none/items", json={}, headers=ADMINS)).status_code == 404
        assert not (index / "jobs.sqlite").exists()
    assert in_process == []


@pytest.mark.slow
async def test_only_the_admin_and_keys_that_may_write_change_items(index: Path, in_process: list[int]) -> None:
    writer, loader, reader, other = (new_key() for _ in range(4))
    keys = (
        f"alice:{key_hash(ALICE)}, admin:{key_hash(reader)}:read:index, loader:{key_hash(loader)}:write:index, "
        f"other:{key_hash(other)}:write:other, writer:{key_hash(writer)}:write"
    )
    copy = Path(shutil.copytree(index, index.parent / "copy"))
    async with opened(index, api_keys=keys, collections={"other": copy}, **WRITES) as client:

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
        assert (await client.get(f"/jobs/{job['id']}", headers=bearer(other))).status_code == 403
    async with opened(index, **KEYS) as client:
        assert (await put(client, item("a"))).status_code == 403, "off by default"
        assert (await client.get("/jobs/0", headers=ADMINS)).status_code == 403
    async with opened(index, **WRITES) as client:
        assert [(await put(client, headers=headers)).status_code for headers in ({}, bearer("wrong"))] == [401, 401]
    with pytest.raises(DcarError, match=r"DCAR_WRITES: .*needs DCAR_ADMIN_KEY"):
        load_settings(index=index, writes=True, api_keys=f"alice:{key_hash(ALICE)}")
    assert load_settings(index=index, writes=True, api_keys=f"alice:{key_hash(ALICE)}:write").writes


async def test_put_counts_as_its_items_and_large_bodies_are_refused(index: Path, in_process: list[int]) -> None:
    async with opened(index, rate_limit="3/minute", max_upload_bytes=1024, **WRITES) as client:
        assert (await put(client, item("a"), item("b"))).status_code == 202
        assert (await put(client, item("a"), item("b"))).status_code == 429
    async with opened(index, max_upload_bytes=1024, **WRITES) as client:
        body = bytes(1024 * 4 // 3 + 256 * 64 * 2**10 + 1)
        assert_problem(await client.put("/items", content=body, headers={**ADMINS, **JSON}), 413, "body")


@pytest.mark.slow
async def test_image_that_only_queries_may_have_is_refused(index: Path, in_process: list[int]) -> None:
    """Index jobs read at most 64 million pixels, whatever DCAR_MAX_PIXELS allows."""
    data = encoded(Image.new("1", (8001, 8000)), "PNG")
    async with opened(index, max_pixels=100_000_000, **WRITES) as client:
        assert (await client.post("/search/image", files={"file": data})).status_code == 200
        given = item("a") | {"image": base64.b64encode(data).decode()}
        assert_problem(await put(client, given), 422, "items.0.image")
    assert not in_process


def test_what_cannot_be_written_is_an_error_at_the_start(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_file(tmp_path / "collections", b"")
    with pytest.raises(DcarError, match=r"collections cannot be written: .* is not a directory"):
        write_worker.require_writable(load_settings(index=index, collections_dir=file, **WRITES))
    write_worker.require_writable(load_settings(index=index, collections_dir=tmp_path / "new" / "folder", **WRITES))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    write_worker.require_writable(load_settings(index=index))
    with pytest.raises(DcarError, match="cannot be written, which DCAR_WRITES needs"):
        write_worker.require_writable(load_settings(index=index, **WRITES))
