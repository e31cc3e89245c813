"""Query images by URL: which are fetched, and what their hosts may do."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from app.api import image_urls
from app.api.image_urls import ImageFetcher, is_public
from app.core.problems import Problem
from app.core.settings import Settings
from app.middleware import body_limit
from tests.support.images import png
from tests.support.responses import assert_problem
from tests.support.service import opened, until
from tests.support.writes import WRITES, put

HOST = "pictures.example"
SCOPE: dict[str, Any] = {body_limit._COUNT_BYTES: lambda _: None}


URL = f"http://{HOST}/a.png?size=2#x"


def resolve_to(port: int, *addresses: str) -> Callable[[str, int], Any]:
    async def resolve(host: str, _: int) -> list[tuple[str, int]]:
        return [(address, port) for address in addresses]

    return resolve


def fetcher(index: Path, port: int, **given: Any) -> ImageFetcher:
    settings = Settings(index=index, image_hosts=(HOST,), max_upload_bytes=given.pop("max_upload_bytes", 2048))
    return ImageFetcher(settings, **{"resolve": resolve_to(port, "127.0.0.1"), "is_allowed": lambda _: True, **given})


@asynccontextmanager
async def served(answer: bytes, *, stays_open: bool = False) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that gives every request this answer: its port, and the requests."""
    requests: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        if stays_open:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], requests
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def test_a_batch_searches_with_an_image_by_its_url(built_index: Path) -> None:
    async with opened(built_index, image_hosts=(HOST,)) as client, served(ok(png())) as (port, requests):
        client.app.state.fetcher = fetcher(built_index, port, is_allowed=lambda address: address == "127.0.0.1")
        queries = [{"query": "red"}, {"image": URL, "k": 2}]
        answers = (await client.post("/search/batch", json={"queries": queries})).json()["answers"]
        image = (await client.post("/search/image", files={"file": ("a.png", png())}, data={"k": "2"})).json()
        assert answers[1]["results"] == image["results"]
        assert requests[0].startswith(b"GET /a.png?size=2 HTTP/1.1\r\n")
        assert f"Host: {HOST}\r\n".encode() in requests[0]


async def test_fetched_bytes_count_against_the_budget_of_bodies(built_index: Path) -> None:
    large, kind = ok(png() + bytes(900_000)), {"Content-Type": "multipart/form-data; boundary=b"}
    go, arrived = asyncio.Event(), asyncio.Event()

    async def upload() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n\r\n' + png() + bytes(500_000)
        arrived.set()
        await go.wait()
        yield b"\r\n--b--\r\n"

    async with opened(built_index, max_in_flight_bytes=2**20) as client, served(large) as (port, _):
        client.app.state.fetcher = fetcher(built_index, port, max_upload_bytes=2**20)
        body = {"queries": [{"image": URL}]}
        assert (await client.post("/search/batch", json=body)).status_code == 200, "a single request always has room"
        uploading = asyncio.create_task(client.post("/search/image", content=upload(), headers=kind))
        await arrived.wait()
        refused = await client.post("/search/batch", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert_problem(refused, 503)
        go.set()
        assert (await uploading).status_code == 200
        assert (await client.post("/search/batch", json=body)).status_code == 200, "refused requests free their part"


@pytest.mark.usefixtures("no_writer")
async def test_an_item_is_put_with_an_image_by_its_url(index: Path) -> None:
    async with opened(index, image_hosts=(HOST,), **WRITES) as client, served(ok(png())) as (port, _):
        client.app.state.fetcher = fetcher(index, port, is_allowed=lambda address: address == "127.0.0.1")
        given = {"id": "a", "image": URL}
        other = {"id": "b", "image": "http://other.example/a.png"}
        assert_problem(await put(client, given, other), 422, "items.1.image")
        assert_problem(await put(client, *(given | {"id": f"{number}"} for number in range(9))), 422, "items")
        assert (await put(client, given)).status_code == 202
        (stored,) = (index / "writes" / "images").glob("*/*")
        assert stored.read_bytes() == png()


async def test_without_allowed_hosts_no_url_is_fetched(built_index: Path) -> None:
    async with opened(built_index) as client:
        queries = [{"query": "red"}, {"image": f"https://{HOST}/a.png"}]
        response = await client.post("/search/batch", json={"queries": queries})
        assert_problem(response, 422)
        assert response.json()["errors"][0]["field"] == "queries.1.image"
        many = [{"image": f"https://{HOST}/{number}.png"} for number in range(9)]
        response = await client.post("/search/batch", json={"queries": many})
        assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "queries")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1",
     "fd00::1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "::8.8.8.8", "::ffff:0:8.8.8.8", "64:ff9b:1::1",
     "fec0::1", "3fff::1", "5f00::1", "2001:db8::1"],
)  # fmt: skip
async def test_nothing_is_sent_to_an_address_that_is_not_public(tmp_path: Path, address: str) -> None:
    assert not is_public(address)
    async with served(ok(b"x")) as (port, requests):
        for addresses in ([address], ["8.8.8.8", address], []):
            resolve = resolve_to(port, *addresses)
            with pytest.raises(Problem, match="not public"):
                await fetcher(tmp_path, port, resolve=resolve, is_allowed=is_public).fetch(SCOPE, URL)
        assert not requests


def test_public_addresses_are_allowed() -> None:
    assert is_public("8.8.8.8")
    assert is_public("2001:4860:4860::8888")


@pytest.mark.parametrize(
    "url",
    ["http://other.example/a", f"http://user@{HOST}/a", f"http://{HOST}:99999/a", f"http://{HOST}/a b", "http://[::1",
     f"http://{HOST}:22/a", f"http://{HOST}.other.example/", "http:///a", f"http://{HOST}/\r\nX: y",
     f"https://{HOST}\\@other.example/"],
)  # fmt: skip
async def test_other_hosts_and_odd_urls_are_refused(tmp_path: Path, url: str) -> None:
    async def fail(host: str, port: int) -> list[str]:
        raise AssertionError

    with pytest.raises(Problem) as caught:
        await fetcher(tmp_path, 0, resolve=fail).fetch(SCOPE, url)
    assert caught.value.errors[0][0] == "image"


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://other.example/\r\nContent-Length: 0\r\n\r\n", 422, "302; redirects"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 422, "404"),
        (ok(b"x" * 20_001), 413, "MiB"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 25_000, 413, "MiB"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", 422, "does not answer"),
        (b"SSH-2.0-server\r\n\r\n", 422, "does not answer"),
        (b"", 422, "does not answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 422, "answered 100"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 16_000, 422, "does not answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 12_000, 422, "does not answer"),
    ],
    ids=["redirect", "missing", "too large", "endless", "cut off", "no HTTP", "closed", "interim", "chunks", "heads"],
)
async def test_other_answers_than_an_image_name_the_field(
    tmp_path: Path, answer: bytes, status: int, message: str
) -> None:
    async with served(answer) as (port, requests):
        with pytest.raises(Problem, match=message) as caught:
            await fetcher(tmp_path, port, max_upload_bytes=20_000).fetch(SCOPE, URL)
        assert (caught.value.status, caught.value.errors[0][0], len(requests)) == (status, "image", 1)


async def test_a_slow_host_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "_TIMEOUT_S", 0.05)
    async with served(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", stays_open=True) as (port, _):
        with pytest.raises(Problem, match="more than") as caught:
            await fetcher(tmp_path, port).fetch(SCOPE, URL)
    assert caught.value.status == 422


async def test_slow_hosts_of_one_caller_leave_places_to_others(tmp_path: Path) -> None:
    async with served(b"", stays_open=True) as (slow, requests), served(ok(b"image")) as (quick, _):

        async def resolve(host: str, _: int) -> list[tuple[str, int]]:
            return [("127.0.0.1", quick if host == HOST else slow)]

        settings = Settings(index=tmp_path, image_hosts=(HOST, "slow.example"))
        both = ImageFetcher(settings, resolve, lambda _: True)
        callers: list[dict[str, Any]] = [{**SCOPE, "client": (f"192.0.2.{number}", 1)} for number in range(3)]
        waits = [asyncio.create_task(both.fetch(each, "http://slow.example/")) for each in callers[:2] * 8]
        await until(lambda: len(requests) == 8)
        assert await both.fetch(callers[2], URL) == b"image"
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
        assert len(requests) == 8
