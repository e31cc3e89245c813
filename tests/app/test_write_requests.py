"""Requests that change items: what they must contain, and who may send them."""

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.api import writing
from app.core.callers import key_hash, new_key
from app.core.settings import load_settings
from app.service import write_worker
from dcar_core.util.errors import DcarError
from tests.support.files import write_file
from tests.support.images import encoded
from tests.support.responses import assert_problem
from tests.support.service import ADMIN, ALICE, KEYS, WORDS, bearer, opened
from tests.support.writes import ADMINS, JSON, WRITES, ended, item, put

ONE = "/items/a"
BAD: list[tuple[str, Any, str]] = [
    ("PUT", [], "body"), ("PUT", {}, "items"), ("PUT", {"items": []}, "items"), ("PUT", {"items": [{}]}, "items.0.id"),
    ("PUT", {"items": [item("a")], "more": 1}, "more"),
    ("PUT", {"items": [item("a") | {"url": "http://x"}]}, "items.0.url"),
    ("PUT", {"items": [item("a"), item("a")]}, "items.1.id"),
    *(("PUT", {"items": [item(bad)]}, "items.0.id")
      for bad in ("", " a", "a ", "a\n", "a\x00b", ".", "..", "a/image", "a/similar", "a" * 1025)),
    *(("PUT", {"items": [item("a", caption=bad)]}, "items.0.caption") for bad in (1, "x" * 10_001)),
    ("PUT", {"items": [item("a", category=None)]}, "items.0.category"),
    *(("PUT", {"items": [item("a", metadata=bad)]}, "items.0.metadata")
      for bad in (list[Any](), {"id": "b"}, {"file_name": "/etc/passwd"}, {"x": "y" * 65_536}, {"n" * 257: 1})),
    ("PUT", {"items": [item(x, metadata={f"{x}{n}": n for n in range(500)}) for x in "ab"]}, "items.1.metadata"),
    ("PUT", {"items": [item("a") | {"image": "%"}]}, "items.0.image"),
    ("PUT", {"items": [item("a"), item("b") | {"image": "AAAA"}]}, "items.1.image"),
    ("DELETE", {}, "ids"), ("DELETE", {"ids": []}, "ids"), ("DELETE", {"ids": ["a", ""]}, "ids.1"),
    ("DELETE", {"ids": "a"}, "ids"), ("DELETE", {"ids": ["a"], "filter": {}}, "filter"),
    ("DELETE", {"ids": ["a"], "filter": {"category": "a"}}, "ids"),
    ("DELETE", {"filter": {"price": 3}}, "filter.price"),
    ("PATCH", {"ids": ["a"]}, "body"), ("PATCH", {"metadata": {"price": 3}}, "ids"),
    ("PATCH", {"ids": ["a"], "filter": {"category": "a"}, "metadata": {"price": 3}}, "ids"),
    ("PATCH", {"filter": {"price": 3}, "caption": ""}, "filter.price"),
    ("PATCH", {"ids": ["a"], "metadata": {"caption": "b"}}, "metadata"),
    ("PATCH", {"ids": ["a"], "metadata": {"x": json.loads("[" * 100 + "]" * 100)}}, "metadata"),
    ("PATCH", {"ids": ["a"], "image": "AAAA"}, "image"),
    ("PATCH", {"ids": [f"{n}" for n in range(200)], "caption": "x" * 9000}, "ids"),
    ("PATCH", {"filter": {"id": {"not": "a"}}, "metadata": {"x": "x" * 60_000}}, "filter"),
    (f"PUT {ONE}", {"image": "%"}, "image"), (f"PUT {ONE}", {"image": "AAAA"}, "image"),
    (f"PUT {ONE}", {"caption": "b"}, "image"), (f"PUT {ONE}%2Fimage", {"image": "AAAA"}, "item_id"),
    (f"PATCH {ONE}", {"ids": ["a"], "metadata": {"price": 3}}, "ids"), (f"PATCH {ONE}", {}, "body"),
]  # fmt: skip


async def test_bad_requests_name_the_field_and_change_nothing(
    index: Path, in_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MAX_CHANGE_BYTES", 2**20)
    async with opened(index, max_upload_bytes=20_000, **WRITES) as client:
        for request, body, field in BAD:
            method, _, path = request.partition(" ")
            assert_problem(await client.request(method, path or "/items", json=body, headers=ADMINS), 422, field)
        assert_problem(await client.put("/items", content=b"{", headers={**ADMINS, **JSON}), 400, "body")
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
        assert (await client.delete("/collections/none/items/a", headers=ADMINS)).status_code == 404
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
        assert await statuses(other) == [403, 422, 404, 403, 200, 403, 200, 403]
        assert await statuses("wrong") == [401] * 8
        for key, names in ((loader, ["index"]), (other, ["other"]), (ALICE, ["index", "other"])):
            listed = (await client.get("/collections", headers=bearer(key))).json()["collections"]
            assert [each["name"] for each in listed] == names
        refused = await put(client, headers=bearer(ALICE))
        assert_problem(refused, 403, "Authorization")
        job = await ended(client, await put(client, item("a"), headers=bearer(loader)))
        assert (await client.get(f"/jobs/{job['id']}", headers=bearer(other))).status_code == 404
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
    with pytest.raises(DcarError, match="cannot be written"):
        write_worker.require_writable(load_settings(index=index, **WRITES))
