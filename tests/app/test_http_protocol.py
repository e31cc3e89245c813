"""Connections: slow heads, trailers, upgrades, idling, unread bodies, early ends."""

import asyncio
import contextlib
import gc
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.keys import key_hash, new_key
from app.middleware import http_protocol
from app.middleware.http_protocol import HEAD_BYTES
from tests.support.responses import assert_problem
from tests.support.service import opened, serving

KEY = new_key()
AUTHORIZATION = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
CHUNKED = (
    b"POST /search/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
)
UNAUTHORISED = b"POST /search/image HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
SEARCH = b"POST /search/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + AUTHORIZATION
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: %b\r\nHTTP2-Settings: AAMA\r\n"


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
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.middleware.http_protocol.HEAD_S", 0.4)
    monkeypatch.setattr("app.middleware.http_protocol.WRITE_S", 0.4)


def test_head_and_body_are_written_at_once(connection: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed between the two would leave a head that no proxy can replace by another response."""
    are_held, write = list[bool](), http_protocol._JoiningTransport.write

    def record(transport: Any, data: bytes) -> None:
        are_held.append(transport.holds_next)
        write(transport, data)

    monkeypatch.setattr(http_protocol._JoiningTransport, "write", record)
    connection.sendall(HEALTH)
    assert read_response(connection).startswith(b"HTTP/1.1 200")
    assert are_held == [True, False], "the head waits for the body"
    connection.sendall(HEALTH.replace(b"GET", b"HEAD").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    head = b""
    while part := connection.recv(65536):
        head += part
    assert head.startswith(b"HTTP/1.1 200"), "a head without a body is sent too"


def read_response(connection: socket.socket) -> bytes:
    """Return the head of one response; its body is read too, and nothing after it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        part = connection.recv(1)
        assert part, "closed without a response"
        head += part
    left = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    while left:
        left -= len(connection.recv(left))
    return head


def read_until_closed(connection: socket.socket) -> bytes:
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionError:
        pass
    return data


def test_requests_leave_no_reference_cycles(connection: socket.socket) -> None:
    """The collector would stop every request while it looks for them."""
    searches = [SEARCH + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) for body in (b'{"query":"red"}', b"{}")]

    def ask(times: int) -> None:
        for request in times * [HEALTH, *searches]:
            connection.sendall(request)
            read_response(connection)

    ask(2)
    gc.collect()
    gc.disable()
    try:
        ask(20)
        assert gc.collect() < 60, "not one for each request"
    finally:
        gc.enable()


def is_cut_off(connection: socket.socket, pieces: Iterable[bytes], every_s: float = 0) -> bool:
    """Send pieces; True if the server ends the connection before it has taken all of them."""
    try:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(every_s)
    except ConnectionError:
        return True
    return False


BYTES = [bytes([byte]) for byte in HEALTH]
CHUNKED_BODY = UNAUTHORISED + b"Transfer-Encoding: chunked\r\n\r\n"
LONG_BODY = UNAUTHORISED + b"Content-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize(
    ("opening", "status", "pieces", "every_s"),
    [
        (b"", b"", BYTES, 0.1),
        (HEALTH, b"200", BYTES, 0.1),
        (b"GET /healthz HTTP/1.1\r\n", b"", [b"X-Y: " + b"x" * 1000 + b"\r\n"] * 50_000, 0),
        (CHUNKED + AUTHORIZATION + b"\r\n0\r\nX-Y: ", b"", [b"x" * 10_000] * 1000, 0),
        (LONG_BODY, b"401", [b"x"] * 30, 0.1),
        (CHUNKED_BODY, b"401", [b"10000\r\n" + bytes(2**16) + b"\r\n"] * 200, 0.01),
        (HEALTH, b"200", [b"\r\n"] * 30, 0.1),
    ],
    ids=["slow head", "slow second head", "endless head", "endless trailer", "slow rest of an answered body",
         "endless rest of an answered body", "line breaks"],
)  # fmt: skip
def test_endless_and_slow_bytes_end_the_connection(
    connection: socket.socket, opening: bytes, status: bytes, pieces: list[bytes], every_s: float
) -> None:
    connection.sendall(opening)
    if status:
        assert read_response(connection).startswith(b"HTTP/1.1 " + status)
    assert is_cut_off(connection, pieces, every_s)


def test_silent_connection_is_refused_408(connection: socket.socket) -> None:
    assert read_until_closed(connection).startswith(b"HTTP/1.1 408")


def test_request_on_a_connection_that_is_new_when_the_service_stops_is_answered(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.middleware.http_protocol.HEAD_S", 10)
    monkeypatch.setattr("app.middleware.http_protocol.NEW_S", 5)
    answers = list[bytes]()

    def ask(port: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                socket.create_connection(("127.0.0.1", port)).close()
                time.sleep(0.01)
        with connection:
            connection.sendall(HEALTH)
            answers.append(connection.recv(100))

    with serving(built_index, runtime="torch") as (_, port):
        thread = threading.Thread(target=ask, args=(port, socket.create_connection(("127.0.0.1", port))))
        with socket.create_connection(("127.0.0.1", port)) as later:
            later.sendall(HEALTH)
            assert later.recv(100), "so the first one was accepted"
        thread.start()
    thread.join()
    assert answers[0].startswith(b"HTTP/1.1 200")


def test_where_files_are_scarce_a_new_connection_ends_the_idlest(
    port: int, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, body = SEARCH + b"Content-Length: 16\r\n\r\n", b'{"query": "red"}'
    with (
        socket.create_connection(("127.0.0.1", port)) as sending,
        socket.create_connection(("127.0.0.1", port)) as used,
    ):
        for each, data, status in (
            (connection, half, b""),
            (sending, half, b""),
            (used, HEALTH, b"200"),
            (sending, body[:8], b""),
        ):
            each.sendall(data)
            assert not status or read_response(each)[9:12] == status
            time.sleep(0.1)
        with contextlib.ExitStack() as stack:
            for most, ended in ((0, connection), (10**6, used)):  # a low number may be free although files are scarce
                monkeypatch.setattr("app.middleware.http_protocol._most_files", lambda most=most: most)
                other = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                other.sendall(HEALTH)
                assert read_response(other)[9:12] == b"200"
                assert read_until_closed(ended) == b""
        sending.sendall(body[8:])
        assert read_response(sending)[9:12] == b"200"


def test_searches_are_refused_at_once_while_the_loop_is_behind(
    port: int, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"query": "red"}'
    head = SEARCH + b"Content-Length: %d\r\n\r\n" % len(body)

    def status(*pieces: bytes) -> bytes:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.02)
        return read_response(connection)[9:12]

    def count() -> float:
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"X-API-Key": KEY}).text
        found = re.search(r'dcar_refused_total\{reason="event_loop"\} (\S+)', metrics)
        return float(found[1]) if found else 0.0

    assert (status(head + body), count()) == (b"200", 0)
    with monkeypatch.context() as patch:
        patch.setattr(http_protocol.LoopWatch, "is_behind", True)
        assert [status(head + body) for _ in range(3)] == [b"503"] * 3, "on a connection that stays open"
        assert (status(HEALTH), status(head, body)) == (b"200", b"503"), "a request may arrive in pieces"
        connection.sendall(head)
        time.sleep(0.02)
        patch.undo()
        assert status(body) == b"200", "the rest arrives when there is room again"
        patch.setattr(http_protocol.LoopWatch, "is_behind", True)
        connection.sendall(2 * (head + body))
        assert {read_response(connection)[9:12] for _ in range(2)} <= {b"200", b"503"}
        answer = httpx.post(f"http://127.0.0.1:{port}/search/text", json={"query": "red"})
        assert_problem(answer, 503)
        assert {"retry-after", "x-content-type-options"} <= answer.headers.keys()
    assert (status(head + body), count()) == (b"200", 5)


async def test_the_loop_is_behind_after_several_long_steps_and_not_after_one() -> None:
    watch = http_protocol.LoopWatch()

    async def steps(count: int, requests: int) -> bool:
        for _ in range(count):
            for _ in range(requests):
                watch.count_request()
            time.sleep(0.05)
            await asyncio.sleep(0)
        return watch.is_behind

    assert [await steps(1, 100), await steps(8, 1), await steps(8, 100)] == [False, False, True]
    await asyncio.sleep(0.1)
    assert not watch.is_behind


@pytest.mark.parametrize("piece", [b"X-Y: z\r\n", b"x"], ids=["many headers", "one long header"])
def test_large_head_is_refused_431(connection: socket.socket, piece: bytes) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    left = HEAD_BYTES + 1 - len(head)
    connection.sendall(head + (piece * left)[:left])
    assert read_response(connection).startswith(b"HTTP/1.1 431")
    assert read_until_closed(connection) == b""


def test_used_connection_may_idle_between_requests(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(2):
            assert client.get("/healthz").status_code == 200
            time.sleep(0.2)


def test_request_that_came_in_time_is_answered_by_a_loop_that_is_behind(
    port: int, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer must not end the connection before its request is read."""

    def pause(protocol: Any, url: bytes) -> None:
        time.sleep(0.4 if url == b"/slow" else 0)

    monkeypatch.setattr(http_protocol.BoundedProtocol, "on_url", pause)
    connection.sendall(HEALTH)
    assert read_response(connection).startswith(b"HTTP/1.1 200")
    time.sleep(0.25)
    with socket.create_connection(("127.0.0.1", port)) as other:
        other.sendall(HEALTH.replace(b"/healthz", b"/slow"))
        time.sleep(0.1)
        connection.sendall(HEALTH)
        assert read_response(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("key", [b"", AUTHORIZATION], ids=["instead of a header", "beside the header"])
def test_trailers_end_the_connection_and_are_no_headers(connection: socket.socket, key: bytes) -> None:
    connection.sendall(CHUNKED + key + b'\r\n12\r\n{"query": "a cat"}\r\n0\r\n' + AUTHORIZATION + b"\r\n")
    assert b"HTTP/1.1 200" not in read_until_closed(connection)


def test_body_may_come_in_many_small_chunks(connection: socket.socket) -> None:
    body = b'{"query": "a cat"}' + b" " * 12_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert len(chunks) > HEAD_BYTES
    connection.sendall(CHUNKED + AUTHORIZATION + b"\r\n")
    for start in range(0, len(chunks), 5000):
        connection.sendall(chunks[start : start + 5000])
    connection.sendall(b"0\r\n\r\n")
    assert read_response(connection).startswith(b"HTTP/1.1 200")


def test_connection_is_kept_if_the_rest_of_an_answered_body_arrives(connection: socket.socket) -> None:
    for _ in range(2):
        connection.sendall(UNAUTHORISED + b"Content-Length: 1000000\r\n\r\n")
        assert read_response(connection).startswith(b"HTTP/1.1 401")
        connection.sendall(bytes(1_000_000) + HEALTH)
        assert read_response(connection).startswith(b"HTTP/1.1 200")
    connection.sendall(UNAUTHORISED + b"Content-Length: 3\r\n\r\n")
    assert read_response(connection).startswith(b"HTTP/1.1 401")
    connection.sendall(b"abc")
    assert read_until_closed(connection) == b"", "idle connections end here too"


def test_pipelined_requests_are_answered_in_order(connection: socket.socket) -> None:
    early = UNAUTHORISED + b"Content-Length: 3\r\n\r\nabc"
    connection.sendall(HEALTH + early + HEALTH + UNAUTHORISED + b"Content-Length: 3\r\n\r\n")
    responses = read_until_closed(connection).split(b"HTTP/1.1 ")[1:]
    assert [each[:3] for each in responses] == [b"200", b"401", b"200", b"401"]


def test_a_connection_is_not_silent_while_a_request_is_answered(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    are_silent, started = list[bool](), http_protocol.BoundedProtocol.request_started

    def record(protocol: http_protocol.BoundedProtocol, cycle: Any) -> None:
        started(protocol, cycle)
        are_silent.append(protocol in http_protocol._silent)

    monkeypatch.setattr(http_protocol.BoundedProtocol, "request_started", record)
    connection.sendall(2 * HEALTH)
    assert [read_response(connection)[9:12] for _ in range(2)] == 2 * [b"200"]
    assert are_silent == [False, False]


def test_thousands_of_pipelined_requests_are_answered_one_after_the_other(connection: socket.socket) -> None:
    count = 3000
    sender = threading.Thread(target=connection.sendall, args=(HEALTH * count,))
    sender.start()
    data, statuses = b"", 0
    while statuses < count:
        data = data[-20:] + connection.recv(65536)
        statuses += data.count(b"HTTP/1.1 200")
        data = data[data.rfind(b"HTTP/1.1 200") + 1 :]
    sender.join()


def test_client_that_leaves_its_pipelined_requests_is_no_error(port: int, caplog: pytest.LogCaptureFixture) -> None:
    document = b"GET /ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"  # over 1 MB
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(document * 20)
            connection.recv(1000)
    time.sleep(0.5)
    assert not caplog.records


def test_a_flood_of_tiny_chunks_delays_no_other_connection(port: int) -> None:
    head = (
        UNAUTHORISED.replace(b"Host: localhost", b"Host: localhost\r\nTransfer-Encoding: chunked")
        + AUTHORIZATION
        + b"\r\n"
    )
    is_over = threading.Event()

    def flood() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection, contextlib.suppress(OSError):
            connection.sendall(head)
            while not is_over.is_set():
                connection.sendall(b"1\r\nx\r\n" * 20_000)

    attacker = threading.Thread(target=flood)
    attacker.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            client.get("/healthz")
            began = time.monotonic()
            for _ in range(20):
                assert client.get("/healthz").status_code == 200
            assert time.monotonic() - began < 5
    finally:
        is_over.set()
        attacker.join()


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_offers_to_upgrade_are_ignored(connection: socket.socket, protocol: bytes) -> None:
    body = b'{"query": "a cat\\r\\nUpgrade: x", "filter": {"category": "Upgrade:"}}'
    for sent in (0, 20, len(body)):
        head = SEARCH + OFFER % protocol + b"Content-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body[:sent])
        time.sleep(0.05)
        connection.sendall(body[sent:])
        assert read_response(connection).startswith(b"HTTP/1.1 200")
    connection.sendall(HEALTH[:-2] + OFFER % protocol + b"\r\n")
    assert read_response(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "framing", [b"Content-Length: %d\r\n\r\n%b", b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("how", ["split header", "pipelined", "byte by byte"])
def test_body_behind_an_offer_to_upgrade_is_never_run_as_a_request(
    connection: socket.socket, how: str, framing: bytes
) -> None:
    smuggled = b"GET /collections HTTP/1.1\r\nHost: localhost\r\n" + AUTHORIZATION + b"\r\n"
    before, after = SEARCH, OFFER % b"h2c" + framing % (len(smuggled), smuggled)
    head_end = after.index(b"\r\n\r\n") + 4
    if how == "split header":
        pieces = [before + after[:40], after[40:head_end], after[head_end:]]
    elif how == "pipelined":
        pieces = [HEALTH + before + after[:head_end], after[head_end:]]
    else:
        pieces = [bytes([byte]) for byte in before + after]
    is_cut_off(connection, pieces, every_s=0.05 if len(pieces) < 5 else 0)
    assert b'"collections"' not in read_until_closed(connection)


def test_connect_is_refused(connection: socket.socket) -> None:
    connection.sendall(b"CONNECT x:1 HTTP/1.1\r\nHost: localhost\r\n\r\n" + HEALTH)
    assert read_until_closed(connection).startswith(b"HTTP/1.1 400")


def test_responses_that_are_not_read_end_the_connection(port: int) -> None:
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        document = b"GET /ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"  # over 1 MB
        deaf.sendall(document * 20)
        end = time.monotonic() + 10
        while not is_cut_off(deaf, [b"\r\n"]):
            assert time.monotonic() < end, "still connected"
            time.sleep(0.02)


@pytest.mark.slow
def test_slow_reader_gets_all_of_a_long_response(port: int) -> None:
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.connect(("127.0.0.1", port))
        slow.sendall(b"GET /ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        began, received = time.monotonic(), 0
        while part := slow.recv(65536):
            received += len(part)
            time.sleep(0.02)
    assert received > 10**6
    assert time.monotonic() - began > 0.4, "longer than WRITE_S"


async def test_head_is_get_without_the_body(built_index: Path) -> None:
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
            assert len(get.headers.get_list("content-security-policy")) == 1, "the page has its own"
            assert (get.headers["x-content-type-options"], get.headers["referrer-policy"]) == ("nosniff", "no-referrer")
            assert head.headers["content-type"] == get.headers["content-type"]
            if path != "/metrics":
                assert head.headers["content-length"] == get.headers["content-length"]
        refused = await client.head("/search/text")
        assert refused.status_code == 405
        assert refused.headers["allow"] == "POST"
        assert (await client.delete("/healthz")).headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("version", "hosts", "status"), [(b"1.1", 0, b"400"), (b"1.1", 2, b"400"), (b"1.0", 2, b"400"), (b"1.0", 0, b"200")]
)
def test_request_needs_exactly_one_host(connection: socket.socket, version: bytes, hosts: int, status: bytes) -> None:
    connection.sendall(b"GET /healthz HTTP/%b\r\n" % version + b"Host: localhost\r\n" * hosts + b"\r\n")
    assert read_response(connection).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("192.0.2.1", 200),
        ("[::1]:8000", 200),
        ("shop.example:80", 200),
        ("rebound.example", 421),
        ("[fe80::1%rebound.example]", 421),
        ("127.0.0.1.rebound.example", 421),
        ("localhost.rebound.example:8000", 421),
        ("", 421),
    ],
)
async def test_over_loopback_only_known_hosts_are_answered(built_index: Path, host: str, status: int) -> None:
    """Otherwise a web page could lead its own name to 127.0.0.1, and read what is served there."""
    async with opened(built_index, ready=False, allowed_hosts=("shop.example",)) as client:
        for address in ("127.0.0.1", "[::1]"):
            response = await client.get(f"http://{address}/healthz", headers={"Host": host})
            assert response.status_code == status
            if status != 200:
                assert_problem(response, 421, "Host")
        assert (await client.get("http://192.0.2.1/healthz", headers={"Host": host})).status_code == 200
