"""Connections of a real server: offers to upgrade, heads that never end, and ordinary requests."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.service import serving

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = b"GET /collections HTTP/1.1\r\nHost: localhost\r\n\r\n"
SEARCH = b"POST /search/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: %b\r\nHTTP2-Settings: AAMA\r\n"


@pytest.fixture(scope="module")
def port(built_index: Path) -> Iterator[int]:
    with serving(built_index, runtime="torch") as (_, port):
        yield port


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
