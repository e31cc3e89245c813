"""What a connection may do beside its request: trailers, bodies that were answered already, idling, leaving."""

import asyncio
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.keys import key_hash, new_key
from app.middleware.http_protocol import HEAD_BYTES, LimitedProtocol
from tests.support.service import hold, opened, serving

KEY = new_key()
CHUNKED = b"POST /search/text HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
UNKNOWN = b"POST /search/image HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
AUTHORIZATION = b"Authorization: Bearer " + KEY.encode() + b"\r\n"


@pytest.fixture(scope="module")
def port(built_index: Path) -> Iterator[int]:
    with serving(built_index, api_keys=f"shop:{key_hash(KEY)}", runtime="torch") as (_, port):
        yield port


@pytest.fixture
def connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        yield connection


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    made = LimitedProtocol.__init__

    def hasty(self: LimitedProtocol, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.timeout_keep_alive = 0.4  # type: ignore[assignment]

    monkeypatch.setattr(LimitedProtocol, "__init__", hasty)
    monkeypatch.setattr("app.middleware.http_protocol.HEAD_S", 0.4)
    monkeypatch.setattr("app.middleware.http_protocol.LINGER_S", 0.4, raising=False)


def answer(connection: socket.socket) -> bytes:
    """One answer with its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        assert part, "closed without an answer"
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    while len(body) < length:
        body += connection.recv(65536)
    return head


def is_closed(connection: socket.socket, within: float = 3) -> bool:
    """Whether the other side ends the connection; what it still says is read."""
    connection.settimeout(within)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def breaks_off(connection: socket.socket, pieces: Iterable[bytes], every: float = 0) -> bool:
    """Whether the other side ends the connection before it has taken all that is sent."""
    try:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(every)
    except ConnectionError:
        return True
    return False


def test_trailers_are_no_headers(connection: socket.socket) -> None:
    body = b'12\r\n{"query": "a cat"}\r\n0\r\n'
    connection.sendall(CHUNKED + b"\r\n" + body + AUTHORIZATION + b"\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 401")
    connection.sendall(CHUNKED + AUTHORIZATION + b"\r\n" + body + b"X-Checksum: 7\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 200"), "they do no harm either"


@pytest.mark.parametrize("piece", [b"X-Y: z\r\n", b"x"], ids=["many", "one long"])
def test_trailers_without_end_are_refused(connection: socket.socket, piece: bytes) -> None:
    head = CHUNKED + AUTHORIZATION + b"\r\n"
    connection.sendall(head + b"0\r\n")
    left = HEAD_BYTES + 1 - len(head) - len(b"0\r\n")
    connection.sendall((piece * left)[:left])
    assert answer(connection).startswith(b"HTTP/1.1 431")
    assert is_closed(connection)


def test_a_body_may_come_in_many_small_chunks(connection: socket.socket) -> None:
    body = b'{"query": "a cat"}' + b" " * 12_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert len(chunks) > HEAD_BYTES
    connection.sendall(CHUNKED + AUTHORIZATION + b"\r\n")
    for start in range(0, len(chunks), 5000):
        connection.sendall(chunks[start : start + 5000])
    connection.sendall(b"0\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 200")


def test_a_dripping_body_that_was_answered_ends(connection: socket.socket) -> None:
    connection.sendall(UNKNOWN + b"Content-Length: 1000000\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 401")
    assert breaks_off(connection, [b"x"] * 30, every=0.1)


def test_an_endless_body_that_was_answered_ends(connection: socket.socket) -> None:
    connection.sendall(UNKNOWN + b"Transfer-Encoding: chunked\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 401")
    assert breaks_off(connection, [b"100000\r\n" + bytes(2**20) + b"\r\n"] * 200)


def test_a_body_that_was_answered_and_comes_nevertheless_costs_no_connection(connection: socket.socket) -> None:
    for _ in range(2):
        connection.sendall(UNKNOWN + b"Content-Length: 1000000\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 401")
        connection.sendall(bytes(1_000_000))
        connection.sendall(HEALTH)
        assert answer(connection).startswith(b"HTTP/1.1 200")
    connection.sendall(UNKNOWN + b"Content-Length: 3\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 401")
    connection.sendall(b"abc")
    assert is_closed(connection), "an idle one ends, here too"


def test_line_breaks_do_not_keep_a_connection(connection: socket.socket) -> None:
    connection.sendall(HEALTH)
    assert answer(connection).startswith(b"HTTP/1.1 200")
    connection.sendall(b"\r\n" + HEALTH)
    assert answer(connection).startswith(b"HTTP/1.1 200")
    connection.sendall(b"\r\n")
    assert is_closed(connection)


def test_requests_in_one_go_are_answered_in_turn(connection: socket.socket) -> None:
    early = UNKNOWN + b"Content-Length: 3\r\n\r\nabc"
    connection.sendall(HEALTH + early + HEALTH + UNKNOWN + b"Content-Length: 3\r\n\r\n")
    data = b""
    while data.count(b"HTTP/1.1 ") < 4:
        data += connection.recv(65536)
    assert [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]] == [b"200", b"401", b"200", b"401"]
    assert is_closed(connection), "what the last one announced never comes"


def test_head_is_get_without_the_body(built_index: Path) -> None:
    async def main() -> None:
        async with opened(built_index) as client:
            for path in (
                "/",
                "/docs",
                "/openapi.json",
                "/healthz",
                "/readyz",
                "/metrics",
                "/items/circle%2Fred.png",
                "/items/circle%2Fred.png/image",
                "/items/nothing",
            ):
                get, head = await client.get(path), await client.head(path)
                assert head.status_code == get.status_code, path
                assert head.content == b""
                assert head.headers["content-type"] == get.headers["content-type"]
                if path != "/metrics":
                    assert head.headers["content-length"] == get.headers["content-length"]
            wrong = await client.head("/search/text")
            assert wrong.status_code == 405
            assert wrong.headers["allow"] == "POST"
            assert (await client.delete("/healthz")).headers["allow"] == "GET, HEAD"

    asyncio.run(main())


def _read_all(connection: socket.socket) -> bytes:
    connection.settimeout(10)
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def test_connections_without_a_request_and_callers_that_leave(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.middleware.http_protocol.HEAD_S", 0.3)
    with serving(built_index) as (app, port):
        at = ("127.0.0.1", port)
        with socket.create_connection(at) as silent, socket.create_connection(at) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHo")
            assert _read_all(silent).startswith(b"HTTP/1.1 408")
            assert _read_all(slow).startswith(b"HTTP/1.1 408")
        with socket.create_connection(at) as endless:
            endless.sendall(b"GET /healthz HTTP/1.1\r\n")
            with pytest.raises(ConnectionError):  # broken off long before this
                endless.sendall((b"X-Y: " + b"x" * 1000 + b"\r\n") * 50_000)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/healthz").status_code == 200
            time.sleep(0.5)
            assert client.get("/healthz").status_code == 200, "an idle connection that was used is kept a while"

            encoder = app.state.collections[None].live.encoder
            gate, seen = hold(encoder)
            for query in ("first", "left"):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"http://127.0.0.1:{port}/search/text", json={"query": query}, timeout=0.3)
            end = time.monotonic() + 5
            while app.state.retriever._pending.total() and time.monotonic() < end:
                time.sleep(0.02)
            assert app.state.retriever._pending.total() == 0, "their searches are given up"
            gate.set()
            assert client.post("/search/text", json={"query": "stays"}).status_code == 200
            assert seen == ["first", "stays"]


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_offer_of_another_protocol_is_not_heard(connection: socket.socket, protocol: bytes) -> None:
    body = b'{"query": "a cat\\r\\nUpgrade: x", "filter": {"category": "Upgrade:"}}'
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: " + protocol + b"\r\nHTTP2-Settings: AAMA\r\n"
    head = b"POST /search/text HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + AUTHORIZATION
    for sent in range(2):
        connection.sendall(head + offer + b"Content-Length: %d\r\n\r\n" % len(body) + body[: 20 * sent])
        time.sleep(0.05)
        connection.sendall(body[20 * sent :])
        assert answer(connection).startswith(b"HTTP/1.1 200")
