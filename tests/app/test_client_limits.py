"""The Python client and its MCP tools against servers that are hostile or broken."""

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from dcar_client import AsyncClient, BatchResponse, Client, ServiceError
from dcar_client.limits import (
    MAX_JSON_BYTES,
    MAX_JSON_VALUES,
    MAX_TEXT,
    OversizedResponseError,
    clean,
)
from pydantic import ValidationError

from tests.support.parts import needs

KEY = "k" * 32
BASIC = "bWU6c2VjcmV0LXdvcmQ="  # me:secret-word
RESULT = {
    "rank": 1,
    "id": "a",
    "score": 0.5,
    "level": "likely",
    "caption": "",
    "category": "",
    "image_url": "/items/a/image",
    "width": None,
    "height": None,
}


@contextmanager
def answering_with(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers each connection by a function; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                answer(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"


def endless(
    head: bytes,
    piece: bytes,
    every_s: float = 0,
) -> Callable[[socket.socket], None]:
    """Return a function that answers with a head and then with pieces, for ever."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(every_s)

    return answer


def once(body: bytes, *headers: str) -> Callable[[socket.socket], None]:
    head = "\r\n".join(["HTTP/1.1 200 OK", f"content-length: {len(body)}", *headers])
    return lambda connection: connection.sendall(f"{head}\r\n\r\n".encode() + body)


GZIP = "content-encoding: gzip"
IMAGE = "content-type: image/png"
BOMB = gzip.compress(b" " * 2 * MAX_JSON_BYTES)
VALUES = b'{"results": [' + b"{}," * (MAX_JSON_VALUES // 2) + b"{}]}"


@pytest.mark.parametrize(
    ("answer", "timeout_s", "error"),
    [
        (endless(HEAD[:-2] + b"x-long: ", b"a", 0.1), 0.5, httpx.ReadTimeout),
        (endless(HEAD, b" ", 0.1), 0.5, httpx.ReadTimeout),
        (endless(HEAD, b" " * 2**20), 60, OversizedResponseError),
        (once(BOMB, GZIP), 60, OversizedResponseError),
        (once(b"", "content-encoding: zstd"), 60, httpx.RemoteProtocolError),
        (once(BOMB[:-1], GZIP, IMAGE), 60, httpx.RemoteProtocolError),
        (once(b"{}", GZIP), 60, httpx.RemoteProtocolError),
        (once(VALUES), 60, OversizedResponseError),
        (once(b'{"status": "ok"}', IMAGE), 60, ServiceError),
    ],
    ids=[
        "headers",
        "body",
        "endless",
        "bomb",
        "zstd",
        "cut off",
        "not gzip",
        "values",
        "image",
    ],
)
async def test_an_attempt_ends(
    answer: Callable[[socket.socket], None],
    timeout_s: float,
    error: Any,
) -> None:
    with answering_with(answer) as url:
        with Client(url, timeout_s=timeout_s) as client, pytest.raises(error):
            client.readiness()
        async with AsyncClient(url, timeout_s=timeout_s) as client:
            with pytest.raises(error):
                await client.readiness()


async def test_a_body_packed_by_gzip_is_asked_for_and_read() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["accept-encoding"] == "gzip"
        return httpx.Response(200, json={"status": "ok"})

    with Client("http://odd", transport=httpx.MockTransport(answer)) as client:
        assert client.health().status == "ok"
    with answering_with(once(gzip.compress(b'{"status": "ok"}'), GZIP)) as url:
        with Client(url) as client:
            assert client.health().status == "ok"
        async with AsyncClient(url) as awaited:
            assert (await awaited.health()).status == "ok"


def test_the_first_wrong_value_of_a_list_ends_its_reading() -> None:
    """A report of each takes a thousand times as much as the response."""
    body = {
        "index_version": 1,
        "answers": [{"took_ms": 1.0, "cached": False, "results": [{}] * 9}] * 9,
    }
    with pytest.raises(ValidationError) as caught:
        BatchResponse.model_validate(body)
    wrong = {
        ("answers", 0, "index_version"),
        ("answers", 0, "results", 0),
        ("answers", 0, "nothing_fits"),
    }
    assert {each["loc"][:4] for each in caught.value.errors()} == wrong


def refusal(detail: str) -> httpx.MockTransport:
    problem = {"type": "about:blank", "title": detail, "status": 422, "detail": detail}
    faults = {"errors": [{"field": detail, "message": detail}] * 1000}
    return httpx.MockTransport(
        lambda request: httpx.Response(
            422,
            json=problem | faults,
            headers={"x-request-id": KEY + "\x1b[0m"},
        )
    )


def test_errors_hold_no_key_no_control_characters_and_little_text() -> None:
    transport = refusal(f"\x1b[2J\u202e{KEY} " + "long " * 2_000)
    with (
        Client("http://odd", key=KEY, transport=transport) as client,
        pytest.raises(ServiceError) as caught,
    ):
        client.readiness()
    assert caught.value.problem
    texts = [str(caught.value), caught.value.problem.model_dump_json()]
    assert not [
        text for text in texts if KEY in text or "\x1b" in text or "\u202e" in text
    ]
    assert len(str(caught.value)) < 2 * MAX_TEXT
    assert len(caught.value.problem.errors or ()) == 20


@pytest.mark.parametrize(
    ("address", "key"),
    [("http://", KEY), ("http://me:secret-word@", None)],
    ids=["key", "password"],
)
@pytest.mark.parametrize(
    "head",
    ["HTTP/1.1 {}\r\n\r\n", "HTTP/1.1 200 OK\r\n{} \r\n\r\n"],
    ids=["status", "header"],
)
async def test_a_secret_in_place_of_http_is_not_repeated(
    head: str,
    address: str,
    key: str | None,
) -> None:
    def echo(connection: socket.socket) -> None:
        connection.sendall(head.format(f"{KEY}\x1b secret-word {BASIC}").encode())

    with answering_with(echo) as url:
        url = url.replace("http://", address)
        with (
            Client(url, key=key) as client,
            pytest.raises(httpx.RemoteProtocolError) as caught,
        ):
            client.readiness()
        async with AsyncClient(url, key=key) as awaited:
            with pytest.raises(httpx.RemoteProtocolError) as caught_too:
                await awaited.readiness()
    for error in (caught.value, caught_too.value):
        text = "".join(traceback.format_exception(error))
        assert "***" in text
        assert not [
            secret
            for secret in ([KEY] if key else ["secret-word", BASIC])
            if secret in text
        ]


@pytest.mark.parametrize("between", ["", "\u200b", "\x07"])
def test_errors_hold_no_password_whatever_is_between_its_letters(between: str) -> None:
    transport = refusal(" ".join(map(between.join, ("secret-word", BASIC, "family"))))
    with (
        Client("http://me:secret-word@odd", transport=transport) as client,
        pytest.raises(ServiceError) as caught,
    ):
        client.readiness()
    # of emoji and languages
    joined = "\U0001f469\u200d\U0001f4bb \u0645\u06cc\u200c\u0634\u0648\u062f"
    assert clean(f"\u200b{joined}") == f" {joined}"
    assert str(caught.value).startswith("422: *** *** f")
    assert caught.value.problem
    assert caught.value.problem.title.startswith("*** *** f")


@pytest.mark.parametrize("score", ["NaN", "1e999", "-Infinity"])
def test_scores_are_finite(score: str) -> None:
    body = json.dumps(
        {
            "results": [RESULT],
            "took_ms": 1.0,
            "cached": False,
            "index_version": 1,
        }
    ).replace("0.5", score)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=body))
    with (
        Client("http://odd", transport=transport) as client,
        pytest.raises(ServiceError, match="not a response"),
    ):
        client.search_text("red")


def test_a_password_in_the_address_is_sent_and_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={"status": "ok"})

    caplog.set_level("DEBUG")
    with Client(
        "http://me:secret@far", transport=httpx.MockTransport(respond)
    ) as client:
        client.health()
    assert seen == ["Basic bWU6c2VjcmV0"]
    assert "secret" not in caplog.text


@needs("mcp")
@pytest.mark.parametrize(
    "image_url", ["https://evil.example/a", "//evil.example/a", "/\\evil.example/a"]
)
async def test_mcp_results_name_images_of_the_service_and_hold_no_password(
    image_url: str,
) -> None:
    from dcar_client.mcp import GalleryTools
    from mcp.server.mcpserver.exceptions import ToolError

    url = [image_url]

    def respond(request: httpx.Request) -> httpx.Response:
        own = {
            "caption": f"secret-word {BASIC}",
            "metadata": {},
            "image_url": url[0],
            "index_version": 1,
        }
        return httpx.Response(200, json={**RESULT, **own})

    async with AsyncClient(
        "http://me:secret-word@odd", transport=httpx.MockTransport(respond)
    ) as client:
        tools = GalleryTools(client, "http://me:secret-word@odd")
        with pytest.raises(ToolError, match="outside of itself"):
            await tools.get_item("a")
        url[0] = "/items/a/image"
        answer = (await tools.get_item("a")).structured_content
        assert answer["image_url"] == "http://odd/items/a/image"
        assert answer["caption"] == "*** ***"


@needs("mcp")
async def test_an_answer_over_mcp_is_clean_and_bounded() -> None:
    from dcar_client.mcp import THUMBNAILS_AT_A_TIME, GalleryTools
    from mcp.server.mcpserver.exceptions import ToolError

    odd = f"\x1b[2J\u202e{KEY} " + "long " * 2_000
    asked = busiest = busy = 0

    async def respond(request: httpx.Request) -> httpx.Response:
        nonlocal asked, busiest, busy
        if request.method == "GET":
            asked = asked + 1
            busy = busy + 1
            busiest = max(busiest, busy)
            size = 1000 if asked == 1 else 2**21
            await asyncio.sleep(0.01)
            busy -= 1
            return httpx.Response(
                200,
                content=bytes(size),
                headers={"content-type": "image/png"},
            )
        result = RESULT | {
            "id": odd,
            "caption": odd,
            "category": odd,
            "metadata": {odd: [odd] * most},
        }
        body = {
            "results": [result] * found,
            "took_ms": 1.0,
            "cached": False,
            "index_version": 1,
            "nothing_fits": False,
        }
        return httpx.Response(200, json=body)

    async with AsyncClient(
        "http://odd",
        key=KEY,
        transport=httpx.MockTransport(respond),
    ) as client:
        tools = GalleryTools(client, "http://odd")
        found = 300
        most = 1
        answer = await tools.search_by_words("red", k=9, thumbnails=True)
        texts = [block.text for block in answer.content if block.type == "text"]
        assert not [
            text
            for text in texts
            if KEY in text or "u001b" in text or "\x1b" in text or "\u202e" in text
        ]
        assert len(answer.content) == 10
        assert len(texts) == 9
        assert asked == 9
        assert busiest == THUMBNAILS_AT_A_TIME
        assert len(answer.structured_content["results"]) == 9
        assert sum(map(len, texts)) < 9 * 25_000
        found = 9
        most = 100
        with pytest.raises(ToolError, match="more than 2 MiB; ask for fewer results"):
            await tools.search_by_words("red", k=9)
