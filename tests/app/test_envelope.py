"""What every response and connection gets: safe headers, the check of Host, no upgrade; and no reference cycles."""

import gc
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from app.core.settings import Settings
from app.main import create_app
from tests.support.responses import assert_problem
from tests.support.service import serving

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = b"GET /collections HTTP/1.1\r\nHost: localhost\r\n\r\n"
SEARCH = b"POST /search/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: %b\r\nHTTP2-Settings: AAMA\r\n"


@pytest.fixture(scope="module")
def port(built_index: Path) -> Iterator[int]:
    with serving(built_index, runtime="torch") as (_, port):
        yield port


def test_head_is_get_without_the_body(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        item = "/items/circle%2Fred.png"
        for path in ("/", "/docs", "/openapi.json", "/readyz", "/metrics", item, f"{item}/image", "/items/nothing"):
            get, head = client.get(path), client.head(path)
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert len(get.headers.get_list("content-security-policy")) == 1, "the page has its own"
            assert (get.headers["x-content-type-options"], get.headers["referrer-policy"]) == ("nosniff", "no-referrer")
            assert head.headers["content-type"] == get.headers["content-type"]
            assert "server" not in get.headers
            if path != "/metrics":
                assert head.headers["content-length"] == get.headers["content-length"]
        refused = client.head("/search/text")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert client.delete("/healthz").headers["allow"] == "GET, HEAD"


async def test_over_loopback_only_known_hosts_are_answered(tmp_path: Path) -> None:
    """Otherwise a web page could lead its own name to 127.0.0.1, and read what is served there."""
    known = "localhost:8000", "LOCALHOST", "[::1]:8000", "127.0.0.1", "shop.example:80"
    strange = "rebound.example", "127.0.0.1.rebound.example", "localhost.rebound.example:8000", "192.0.2.1", ""
    for listens, answered in (("127.0.0.1", known), ("0.0.0.0", known + strange)):
        app = create_app(Settings(index=tmp_path, host=listens, allowed_hosts=("shop.example",)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://any") as client:
            for host in known + strange:
                response = await client.get("/healthz", headers={"Host": host})
                if host in answered:
                    assert response.status_code == 200, host
                else:
                    assert_problem(response, 421, "Host")


def test_requests_leave_no_reference_cycles(port: int) -> None:
    """The collector would stop every request while it looks for them."""
    with closing(HTTPConnection("127.0.0.1", port)) as connection:

        def ask(times: int) -> None:
            for body in times * ['{"query": "red"}', "{}", None]:
                method, path = ("POST", "/search/text") if body else ("GET", "/healthz")
                connection.request(method, path, body, {"Content-Type": "application/json"})
                connection.getresponse().read()

        ask(2)
        gc.collect()
        gc.disable()
        try:
            ask(20)
            assert gc.collect() < 60, "not one for each request"
        finally:
            gc.enable()


@pytest.fixture
def connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        yield connection


def read_until(connection: socket.socket, end: bytes = b"") -> bytes:
    """Read until this has come, or to the end of the connection."""
    data = b""
    with suppress(ConnectionError):
        while not (end and data.endswith(end)) and (part := connection.recv(65536)):
            data += part
    return data


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize(
    "framing", [b"Content-Length: %d\r\n\r\n%b", b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("how", ["at once", "split header", "split body", "pipelined", "byte by byte"])
def test_body_behind_an_offer_to_upgrade_is_never_run_as_a_request(
    connection: socket.socket, how: str, framing: bytes, protocol: bytes
) -> None:
    request = SEARCH + OFFER % protocol + framing % (len(SMUGGLED), SMUGGLED)
    body = request.index(b"\r\n\r\n") + 4
    ends = {"at once": [], "split header": [len(SEARCH) + 40, body], "split body": [body], "pipelined": [body]}
    pieces = [*range(1, len(request))] if how == "byte by byte" else ends[how]
    request = HEALTH + request if how == "pipelined" else request
    with suppress(ConnectionError):  # it is closed
        for start, end in zip([0, *pieces], [*pieces, len(request)], strict=True):
            connection.sendall(request[start:end])
            time.sleep(0.05 if len(pieces) < 5 else 0)
    answers = read_until(connection)
    assert b'"collections"' not in answers
    assert answers.count(b"HTTP/1.1 ") <= 1 + (how == "pipelined")


def test_an_offer_to_upgrade_is_refused_400(connection: socket.socket) -> None:
    connection.sendall(HEALTH[:-2] + OFFER % b"h2c" + b"\r\n")
    assert read_until(connection).startswith(b"HTTP/1.1 400")
