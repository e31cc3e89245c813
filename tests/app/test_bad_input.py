"""Invalid requests: a 4xx as in RFC 9457 that names the field, and no traceback in the
log.
"""

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

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
    assert not [r for r in caplog.get_records("call") if r.levelno >= logging.ERROR], (
        caplog.text
    )


TEXTS: list[tuple[int, str, list[bytes]]] = [
    (
        422,
        "query",
        [
            b'{"query": ""}',
            b'{"query": " \\t\\n "}',
            b'{"query": "\\u0000\\u200b"}',
            b"{}",
            b'{"k": 3}',
        ],
    ),
    (422, "query", [b'{"query": null}', b'{"query": ["a"]}', b'{"query": 7}']),
    (422, "query", [json.dumps({"query": "x" * 1001}).encode()]),
    (
        422,
        "k",
        [
            b'{"query": "x", "k": %s}' % k
            for k in b'0 -1 201 1e400 99999999999999999999999 "10" true'.split()
        ],
    ),
    (422, "limit", [b'{"query": "x", "limit": 3}']),
    (422, "min_score", [b'{"query": "x", "min_score": 2}']),
    (422, "hybrid", [b'{"query": "x", "hybrid": "yes"}']),
    (422, "body", [b"[]", b'"red"']),
    (
        400,
        "body",
        [b"", b"{", b'{"query": "\xff"}', b'{"query": "\\ud800"}', b"[" * 50_000],
    ),
    (413, "body", [b" " * 200_000]),
]


async def test_invalid_text_queries_name_the_field(started: ServiceClient) -> None:
    for status, field, content in (
        (status, field, each) for status, field, contents in TEXTS for each in contents
    ):
        body = assert_problem(
            await started.post("/search/text", content=content, headers=JSON),
            status,
            field,
        )
        assert {fault["field"] for fault in body["errors"]} == {field}
        assert status != 422 or body["title"] == "Unprocessable Content", (
            "on every version of Python"
        )
    good = b'{"query": "x"}'
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
    ):
        response = await started.post(
            "/search/text",
            content=good,
            headers={"Content-Type": kind},
        )
        assert_problem(response, 415, "Content-Type")
    exact = await started.post("/search/text", json={"query": "x" * 1000, "k": 200})
    assert exact.status_code == 200
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert (
        await started.post("/search/text", content=good, headers=charset)
    ).status_code == 200


async def test_unknown_fields_are_named(started: ServiceClient) -> None:
    for path, body, field in (
        ("search/text", {"query": "cat", "filters": {}}, "filters"),
        ("search/batch", {"queries": [{"querry": "cat"}]}, "queries.0.querry"),
        ("search/batch", {"queries": [{"query": "cat"}], "k": 2}, "k"),
    ):
        problem = assert_problem(await started.post(f"/{path}", json=body), 422, field)
        assert "unknown field; /docs names the fields" in problem["detail"]


async def test_hostile_names_numbers_and_counts_make_short_answers_soon(
    built_index: Path,
) -> None:
    name = "A" * 2_000_000
    digits = json.loads("9" * 4000)
    cases: list[tuple[str, str, Any]] = [
        ("POST", "/search/text", {"query": "a", "x" * 50_000: 1}),
        ("POST", "/search/text", {"query": "a", "filter": {"x" * 50_000: 1}}),
        ("POST", "/search/text", {"query": "a", "more_like": [1] * 9000}),
        ("POST", "/search/text", {f"f{number}": 1 for number in range(5000)}),
        ("POST", "/search/text", {"query": "a", "filter": {"id": [digits]}}),
        ("POST", "/search/batch", {"queries": [{"query": "a", name: 1}]}),
        ("POST", "/search/batch", {"queries": [{"query": "a", "filter": {name: 1}}]}),
        ("POST", "/search/batch", {"queries": [1] * 20_000}),
        ("POST", "/search/batch", {"queries": [{}] * 1001}),
        ("POST", "/v1/embeddings", {"input": ["a"], name: 1}),
        ("PATCH", "/items", {name: 1}),
        ("PATCH", "/items", {"ids": ["a"], "metadata": {"price": digits}}),
        ("DELETE", "/items", {"filter": {"x" * 50_000: 1}}),
        ("DELETE", "/items", {"filter": {"id": [name]}}),
        ("GET", f"/items?{'x' * 50_000}=1", None),
    ]
    async with opened(
        built_index, writes=True, admin_key="a long enough key"
    ) as client:
        for method, path, body in cases:
            began = time.monotonic()
            response = await client.request(
                method,
                path,
                json=body,
                headers={"X-API-Key": "a long enough key"},
            )
            assert time.monotonic() - began < 1
            assert (response.status_code, len(response.content) < 10_000) == (
                422,
                True,
            ), (path, response.text[:200])
            assert ("numbers have at most 300 digits" in response.text) == (
                str(digits)[:50] in str(body)
            )


JPEG = encoded(Image.effect_noise((80, 80), 90).convert("RGB"), "JPEG")
BROKEN = {
    "empty": b"",
    "text": b"this is not an image",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    ),
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


async def test_invalid_images_name_the_field_and_fail_alone(
    started: ServiceClient,
) -> None:
    sent = [
        *BROKEN.items(),
        *((f"../{color}.png", png(color)) for color in ("red", "green", "blue")),
    ]
    responses = await asyncio.gather(
        *(started.post("/search/image", files={"file": each}) for each in sent)
    )
    for name, response in zip(BROKEN, responses, strict=False):
        assert_problem(response, 422, "file")
        assert ("20000" in response.text) == name.startswith("20"), name
    assert [response.status_code for response in responses[len(BROKEN) :]] == [200] * 3


async def test_invalid_forms_name_the_field(started: ServiceClient) -> None:
    file = {"file": ("a.png", png())}
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        *(
            ({"files": file, "data": {"k": k}}, 422, "k")
            for k in ("0", "-1", "201", "many", "1.5", "")
        ),
        ({"files": file, "data": {"filtre": "1"}}, 422, "filtre"),
        ({"files": {"picture": ("a.png", png())}}, 422, "file"),
        (
            {"content": png(), "headers": {"Content-Type": "image/png"}},
            415,
            "Content-Type",
        ),
        ({}, 415, "Content-Type"),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
            400,
            None,
        ),
        ({"content": b"--x\r\nbroken", "headers": kind}, 400, None),
        ({"content": b"", "headers": kind}, 422, "file"),
        ({"files": [("file", png()), ("file", png())]}, 400, "body"),
        ({"files": file, "data": {"query": "a" * 20_000}}, 400, "body"),
    ]
    for form, status, field in cases:
        assert_problem(await started.post("/search/image", **form), status, field)


async def test_images_of_too_many_pixels_or_bytes_are_refused(
    built_index: Path,
) -> None:
    async with opened(built_index, max_pixels=1000, max_upload_bytes=2**20) as client:
        response = await client.post(
            "/search/image", files={"file": png(size=(25, 40))}
        )
        assert response.status_code == 200
        assert_problem(
            await client.post("/search/image", files={"file": png(size=(25, 41))}),
            422,
            "file",
        )
        assert_problem(
            await client.post("/search/image", files={"file": bytes(2**20 + 2**17)}),
            413,
            "body",
        )


async def test_queries_of_a_batch_have_the_limits_of_single_searches(
    built_index: Path,
) -> None:
    async with opened(built_index) as client:
        for queries, field in (
            (
                [
                    {"query": "red"},
                    {"query": "x", "filter": {"caption": ["x" * 65_536]}},
                ],
                "queries.1.filter",
            ),
            ([{"query": "red"}, {"query": "x" * 1001}], "queries.1.query"),
            (
                [{"query": "red", "filter": {"caption": {"contains": "x" * 257}}}],
                "queries.0.filter.caption",
            ),
        ):
            assert_problem(
                await client.post("/search/batch", json={"queries": queries}),
                422,
                field,
            )


async def test_unknown_items_routes_and_methods_are_problems(
    started: ServiceClient,
) -> None:
    for item in (
        "nothing",
        "..%2f..%2fetc%2fpasswd",
        "%00",
        "circle",
        "a" * 1000,
        "%F0%9F%98%80",
        "..%5C..%5Cx",
    ):
        for suffix in ("", "/image", "/similar"):
            assert_problem(await started.get(f"/items/{item}{suffix}"), 404, "id")
    assert_problem(await started.get("/items/" + "a" * 2000), 422, "item_id")
    for path in (
        "/nothing",
        "/ui/nothing.js",
        "/ui/..%2fmain.py",
        "/ui/%2e%2e/main.py",
        "/search",
        "/search/text/",
    ):
        assert_problem(await started.get(path, follow_redirects=False), 404)
    for method, path in (
        ("GET", "/search/text"),
        ("PUT", "/search/image"),
        ("POST", "/healthz"),
        ("DELETE", "/"),
    ):
        response = await started.request(method, path)
        assert_problem(response, 405)
        assert "allow" in response.headers
    for k in ("0", "x", "201", "-5"):
        assert_problem(
            await started.get("/items/circle%2Fred.png/similar", params={"k": k}),
            422,
            "k",
        )
    assert_problem(
        await started.get("/items/circle%2Fred.png/similar", params={"filter": "x"}),
        422,
        "filter",
    )


async def test_client_that_disconnects_while_sending_is_not_an_error(
    started: ServiceClient,
) -> None:
    kind = b"multipart/form-data; boundary=b"
    for path, content_type in (
        ("/search/text", b"application/json"),
        ("/search/image", kind),
    ):
        messages = [
            {"type": "http.request", "body": b"--b", "more_body": True},
            {"type": "http.disconnect"},
        ]
        answered: list[Any] = []

        async def receive(messages: list[Any] = messages) -> Any:
            return messages.pop(0)

        async def send(message: Any, answered: list[Any] = answered) -> None:
            answered.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", content_type)],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("testserver", 80),
            "client": ("127.0.0.1", 1),
            "root_path": "",
        }
        await started.app(scope, receive, send)
        assert answered[0]["status"] == 400
