"""Invalid requests: a 4xx as in RFC 9457 that names the field, and no traceback in the log."""

import asyncio
import errno
import json
import logging
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from PIL import Image

from tests.support.hostile_images import png_of_size
from tests.support.images import encoded, png
from tests.support.responses import assert_problem
from tests.support.service import ServiceClient, opened

JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def _no_traceback(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG)
    yield
    assert not [r for r in caplog.get_records("call") if r.exc_info], caplog.text
    assert "Traceback" not in caplog.text
    assert not [r for r in caplog.get_records("call") if r.levelno >= logging.ERROR], caplog.text


TEXTS: list[tuple[int, str, list[bytes]]] = [
    (422, "query", [b'{"query": ""}', b'{"query": " \\t\\n "}', b'{"query": "\\u0000\\u200b"}', b"{}", b'{"k": 3}']),
    (422, "query", [b'{"query": "<end_of_text>"}', b'{"query": null}', b'{"query": ["a"]}', b'{"query": 7}']),
    (422, "query", [json.dumps({"query": "x" * 1001}).encode()]),
    (422, "k", [b'{"query": "x", "k": %s}' % k for k in b'0 -1 201 1e400 99999999999999999999999 "10" true'.split()]),
    (422, "limit", [b'{"query": "x", "limit": 3}']),
    (422, "min_score", [b'{"query": "x", "min_score": 2}']),
    (422, "hybrid", [b'{"query": "x", "hybrid": "yes"}']),
    (422, "body", [b"[]", b'"red"']),
    (400, "body", [b"", b"{", b'{"query": "\xff"}', b'{"query": "\\ud800"}', b"[" * 50_000]),
    (413, "body", [b" " * 200_000]),
]


async def test_a_misspelt_field_is_told_with_the_name_that_was_meant(started: ServiceClient) -> None:
    for path, body, faults in (
        ("search/text", {"q": "cat"}, {"q": "unknown field; did you mean query?"}),
        ("search/text", {"query": "cat", "filters": {}}, {"filters": "unknown field; did you mean filter?"}),
        ("search/batch", {"queries": [{"querry": "cat"}]}, {"queries.0.querry": "unknown field; did you mean query?"}),
        ("search/text", {"query": "cat", "zzz": 1}, {"zzz": "unknown field"}),
        ("search/batch", {"queries": [{"query": "cat"}], "k": 2}, {"k": "unknown field"}),
    ):
        problem = assert_problem(await started.post(f"/{path}", json=body), 422)
        assert {each["field"]: each["message"] for each in problem["errors"]} == faults


async def test_long_names_and_values_of_callers_are_cut_in_responses(built_index: Path) -> None:
    async with opened(built_index, writes=True, admin_key="long enough") as client:
        name = "A" * 2_000_000
        for method, path, body in (
            ("POST", "/search/text", {"query": "a", "x" * 50_000: 1}),
            ("POST", "/search/batch", {"queries": [{"query": "a", name: 1}]}),
            ("POST", "/search/batch", {"queries": [{"query": "a", "filter": {name: 1}}]}),
            ("POST", "/search/text", {"query": "a", "filter": {"x" * 50_000: 1}}),
            ("POST", "/v1/embeddings", {"input": ["a"], name: 1}),
            ("PATCH", "/items", {name: 1}),
            ("DELETE", "/items", {"filter": {"x" * 50_000: 1}}),
            ("DELETE", "/items", {"filter": {"id": [name]}}),
        ):
            response = await client.request(method, path, json=body, headers={"X-API-Key": "long enough"})
            assert response.status_code == 422, (path, response.text[:200])
            assert len(response.content) < 10_000, path
        response = await client.get("/items", params={"x" * 50_000: 1})
        assert (response.status_code, len(response.content) < 10_000) == (422, True)


async def test_many_parameters_and_long_numbers_are_refused(built_index: Path) -> None:
    long = json.loads("9" * 4000)
    query, patch = {"query": "a", "filter": {"id": [long]}}, {"ids": ["a"], "metadata": {"price": long}}
    async with opened(built_index, writes=True, admin_key="long enough") as client:
        assert_problem(await client.get("/items?" + "&".join(f"a{n}" for n in range(5000))), 422, "URL")
        for method, path, body in (
            ("POST", "/search/text", query), ("POST", "/search/batch", {"queries": [query]}), ("PATCH", "/items", patch)
        ):  # fmt: skip
            response = await client.request(method, path, json=body, headers={"X-API-Key": "long enough"})
            assert "numbers have at most 300 digits" in assert_problem(response, 422)["detail"]


async def test_invalid_text_queries_name_the_field(started: ServiceClient) -> None:
    for status, field, content in ((status, field, each) for status, field, contents in TEXTS for each in contents):
        body = assert_problem(await started.post("/search/text", content=content, headers=JSON), status, field)
        assert {each["field"] for each in body["errors"]} == {field}
        assert status != 422 or body["title"] == "Unprocessable Content", "on every version of Python"
    good = b'{"query": "x"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = await started.post("/search/text", content=good, headers={"Content-Type": kind})
        assert_problem(response, 415, "Content-Type")
    assert_problem(await started.post("/search/text", content=good), 415, "Content-Type")
    exact = await started.post("/search/text", json={"query": "x" * 1000, "k": 200})
    assert exact.status_code == 200
    for path in ("/search/image", "/search/text"):
        long = {"Content-Type": "multipart/form-data; boundary=b" + ";" * 60_000}
        assert_problem(await started.post(path, content=b"", headers=long), 400, "Content-Type")
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert (await started.post("/search/text", content=good, headers=charset)).status_code == 200


JPEG = encoded(Image.effect_noise((80, 80), 90).convert("RGB"), "JPEG")
BROKEN = {
    "empty": b"",
    "text": b"this is not an image",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "truncated png": png()[:-30],
    "only a header": png()[:20],
    "only magic": b"\xff\xd8\xff",
    "20,000 x 20,000": png_of_size(20_000, 20_000),
    "noise after magic": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "webp of nothing": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    "tiff of nothing": b"II*\x00\xff\xff\xff\xff",
    "gif of nothing": b"GIF89a\xff\xff\xff\xff",
}


async def test_invalid_images_name_the_field_and_fail_alone(started: ServiceClient) -> None:
    sent = [*BROKEN.items(), *((f"../{color}.png", png(color)) for color in ("red", "green", "blue"))]
    responses = await asyncio.gather(*(started.post("/search/image", files={"file": each}) for each in sent))
    for name, response in zip(BROKEN, responses, strict=False):
        assert len(assert_problem(response, 422, "file")["detail"]) > 10, name
        assert ("20000" in response.text) == name.startswith("20"), name
    assert [response.status_code for response in responses[len(BROKEN) :]] == [200] * 3


async def test_invalid_forms_name_the_field(started: ServiceClient) -> None:
    file, kind = {"file": ("a.png", png())}, {"Content-Type": "multipart/form-data; boundary=b"}
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        *(({"files": file, "data": {"k": k}}, 422, "k") for k in ("0", "-1", "201", "many", "1.5", "")),
        ({"files": file, "data": {"filtre": "1"}}, 422, "filtre"),
        ({"files": {"picture": ("a.png", png())}}, 422, "file"),
        ({"data": {"file": "words"}, "files": {"x": ("", b"")}}, 422, "file"),
        ({"content": png(), "headers": {"Content-Type": "image/png"}}, 415, "Content-Type"),
        ({"json": {"file": "x"}}, 415, "Content-Type"), ({}, 415, "Content-Type"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, None),
        ({"content": b"--x\r\nbroken", "headers": kind}, 400, None), ({"content": b"", "headers": kind}, 422, "file"),
        ({"files": [("file", png()), ("file", png())]}, 400, "body"),
        ({"files": file, "data": {"query": "a" * 20_000}}, 400, "body"),
    ]  # fmt: skip
    for form, status, field in cases:
        assert_problem(await started.post("/search/image", **form), status, field)


async def test_images_of_too_many_pixels_or_bytes_are_refused(built_index: Path) -> None:
    async with opened(built_index, max_pixels=1000, max_upload_bytes=2**20) as client:
        assert (await client.post("/search/image", files={"file": png(size=(25, 40))})).status_code == 200
        assert_problem(await client.post("/search/image", files={"file": png(size=(25, 41))}), 422, "file")
        assert_problem(await client.post("/search/image", files={"file": bytes(2**20 + 1)}), 413, "file")


async def test_a_form_on_a_full_disk_may_be_sent_again(started: ServiceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", Mock(side_effect=full))
    refused = await started.post("/search/image", files={"file": png()})
    assert_problem(refused, 503)
    assert refused.headers["retry-after"] == "10"


async def test_queries_of_a_batch_have_the_limits_of_single_searches(built_index: Path) -> None:
    async with opened(built_index) as client:
        for queries, field in (
            ([{"query": "red"}, {"query": "x", "filter": {"caption": ["x" * 65_536]}}], "queries.1.filter"),
            ([{"query": "red"}, {"query": "x" * 1001}], "queries.1.query"),
            ([{"query": "red", "filter": {"caption": {"contains": "x" * 257}}}], "queries.0.filter.caption"),
        ):
            assert_problem(await client.post("/search/batch", json={"queries": queries}), 422, field)


@pytest.mark.parametrize("path", ["/search/batch", "/search/text"])
async def test_thousands_of_faults_are_summarised(built_index: Path, path: str) -> None:
    async with opened(built_index) as client:
        for body, field in (
            ({"queries": [1] * 20_000, "query": "a", "more_like": [1] * 20_000}, "more_like.0"),
            ({f"f{n}": 1 for n in range(999)}, "f0"),
            ({f"f{n}": 1 for n in range(5000)}, "body: has 5,001 faults; send only the fields that /docs names"),
            ({"queries": [{}] * 1001}, "queries"),
        ):
            content = json.dumps(body).encode()[: 60_000 if path == "/search/text" else None]
            began = time.monotonic()
            response = await client.post(path, content=content, headers=JSON)
            assert time.monotonic() - began < 1
            assert response.status_code in (400, 422)
            assert len(response.content) < 4000
            if path == "/search/batch":
                assert (field if field != "more_like.0" else "queries.0") in response.text


async def test_unknown_items_routes_and_methods_are_problems(started: ServiceClient) -> None:
    for item in ("nothing", "..%2f..%2fetc%2fpasswd", "%00", "circle", "a" * 1000, "%F0%9F%98%80", "..%5C..%5Cx"):
        for suffix in ("", "/image", "/similar"):
            assert_problem(await started.get(f"/items/{item}{suffix}"), 404, "id")
    assert_problem(await started.get("/items/" + "a" * 2000), 422, "item_id")
    for path in ("/nothing", "/ui/nothing.js", "/ui/..%2fmain.py", "/ui/%2e%2e/main.py", "/search", "/search/text/"):
        assert_problem(await started.get(path, follow_redirects=False), 404)
    for method, path in (("GET", "/search/text"), ("PUT", "/search/image"), ("POST", "/healthz"), ("DELETE", "/")):
        response = await started.request(method, path)
        assert_problem(response, 405)
        assert "allow" in response.headers
    for k in ("0", "x", "201", "-5"):
        assert_problem(await started.get("/items/circle%2Fred.png/similar", params={"k": k}), 422, "k")
    assert_problem(await started.get("/items/circle%2Fred.png/similar", params={"filter": "x"}), 422, "filter")


async def test_client_that_disconnects_while_sending_is_not_an_error(started: ServiceClient) -> None:
    kind = b"multipart/form-data; boundary=b"
    for path, content_type in (("/search/text", b"application/json"), ("/search/image", kind)):
        messages = [{"type": "http.request", "body": b"--b", "more_body": True}, {"type": "http.disconnect"}]
        answered: list[Any] = []

        async def receive(messages: list[Any] = messages) -> Any:
            return messages.pop(0)

        async def send(message: Any, answered: list[Any] = answered) -> None:
            answered.append(message)

        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"content-type", content_type)], "http_version": "1.1", "scheme": "http",
            "server": ("testserver", 80), "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        await started.app(scope, receive, send)
        assert answered[0]["status"] == 400
