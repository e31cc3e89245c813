"""Query images by URL: which are fetched, and what their hosts may do."""

import asyncio
import gzip
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from app.api.requests import ImageFetcher, is_public
from app.core.callers import current_caller
from app.core.problems import Problem
from app.core.settings import Settings
from app.main import create_app
from dcar_core.util.errors import MissingExtraError
from tests.support.images import png
from tests.support.parts import needs
from tests.support.responses import assert_problem
from tests.support.service import opened, until
from tests.support.writes import WRITES, put

HOST = "pictures.example"


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The addresses of hosts, beside those of the machine's resolver."""
    known = {HOST: ["127.0.0.1"]}
    resolve = socket.getaddrinfo

    def look_up(host: Any, *given: Any, **options: Any) -> list[Any]:
        if host not in known:
            return resolve(host, *given, **options)
        return [
            found
            for address in known[host]
            for found in resolve(address, *given, **options)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


@pytest.fixture
def all_public(
    addresses: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "app.api.requests.is_public", lambda address: ip_address(address).is_loopback
    )


def url_of(port: int, host: str = HOST) -> str:
    return f"http://{host}:{port}/a.png?size=2#x"


def ignore(size: int) -> None:
    """Count no bytes."""


def fetcher(
    index: Path,
    *ports: int,
    hosts: tuple[str, ...] = (HOST,),
    max_upload_bytes: int = 2048,
) -> ImageFetcher:
    settings = Settings(
        index=index,
        image_hosts=hosts,
        image_ports=ports,
        max_upload_bytes=max_upload_bytes,
    )
    return ImageFetcher(settings)


@asynccontextmanager
async def served(
    answer: bytes,
    *,
    stays_open: bool = False,
) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that gives every request this answer: its port, and the requests."""
    requests: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def respond(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
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


@needs("http")
@pytest.mark.usefixtures("all_public")
async def test_a_batch_searches_with_an_image_by_its_url(built_index: Path) -> None:
    async with (
        served(ok(png())) as (port, requests),
        opened(built_index, image_hosts=(HOST,), image_ports=(port,)) as client,
    ):
        queries = [{"query": "red"}, {"image": url_of(port), "k": 2}]
        response = await client.post("/search/batch", json={"queries": queries})
        answers = response.json()["answers"]
        response = await client.post(
            "/search/image",
            files={"file": ("a.png", png())},
            data={"k": "2"},
        )
        image = response.json()
        assert answers[1]["results"] == image["results"]
        assert requests[0].startswith(b"GET /a.png?size=2 HTTP/1.1\r\n")
        assert f"Host: {HOST}:{port}\r\n".encode() in requests[0]


@needs("http")
@pytest.mark.usefixtures("all_public")
async def test_fetched_bytes_are_counted(tmp_path: Path) -> None:
    sizes = list[int]()
    async with served(ok(bytes(1500))) as (port, _):
        await fetcher(tmp_path, port).fetch(url_of(port), sizes.append)
    assert sum(sizes) == 1500


@needs("http")
@pytest.mark.usefixtures("no_writer", "all_public")
async def test_an_item_is_put_with_an_image_by_its_url(index: Path) -> None:
    async with (
        served(ok(png())) as (port, _),
        opened(
            index,
            image_hosts=(HOST,),
            image_ports=(port,),
            **WRITES,
        ) as client,
    ):
        given = {"id": "a", "image": url_of(port)}
        other = {"id": "b", "image": "http://other.example/a.png"}
        assert_problem(await put(client, given, other), 422, "items.1.image")
        assert_problem(
            await put(client, *(given | {"id": f"{number}"} for number in range(9))),
            422,
            "items",
        )
        response = await put(client, given)
        assert response.status_code == 202
        (stored,) = (index / "images").iterdir()
        assert stored.read_bytes() == png()


async def test_without_allowed_hosts_no_url_is_fetched(built_index: Path) -> None:
    async with opened(built_index) as client:
        for count, field in ((1, "queries.0.image"), (9, "queries")):
            queries = [
                {"image": f"https://{HOST}/{number}.png"} for number in range(count)
            ]
            assert_problem(
                await client.post("/search/batch", json={"queries": queries}),
                422,
                field,
            )


async def test_hosts_without_aiohttp_end_with_the_command(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingExtraError, match=r"DCAR_IMAGE_HOSTS\) needs .*http"):
        create_app(Settings(index=built_index, image_hosts=(HOST,)))
    create_app(Settings(index=built_index))


@needs("http")
@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "::8.8.8.8",
        "5f00::1",
        "2001:db8::1",
    ],
)
async def test_nothing_is_sent_to_an_address_that_is_not_public(
    tmp_path: Path,
    address: str,
    addresses: dict[str, list[str]],
) -> None:
    assert is_public("8.8.8.8")
    assert is_public("2001:4860:4860::8888")
    assert not is_public(address)
    async with served(ok(b"x")) as (port, requests):
        for addresses[HOST] in ([address], ["8.8.8.8", address], []):
            with pytest.raises(Problem, match="not public"):
                await fetcher(tmp_path, port).fetch(url_of(port), ignore)
        literal = f"[{address}]" if ":" in address else address
        with pytest.raises(Problem, match="not public"):
            await fetcher(tmp_path, port, hosts=(address,)).fetch(
                url_of(port, literal), ignore
            )
        assert not requests


@needs("http")
@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a",
        f"http://user@{HOST}/a",
        f"http://{HOST}:99999/a",
        f"http://{HOST}/a b",
        "http://[::1",
        f"http://{HOST}:22/a",
        f"http://{HOST}.other.example/",
        "http:///a",
        f"http://{HOST}/\r\nX: y",
        f"https://{HOST}\\@other.example/",
        f"http://{HOST}/" + "a" * 9000,
    ],
)
async def test_other_hosts_and_odd_urls_are_refused(
    tmp_path: Path,
    url: str,
    addresses: dict[str, list[str]],
) -> None:
    addresses.clear()
    with pytest.raises(
        Problem, match=r"this service fetches no images|a URL has|not a valid URL"
    ) as caught:
        await fetcher(tmp_path, 80, 443).fetch(url, ignore)
    assert caught.value.errors[0][0] == "image"


@needs("http")
@pytest.mark.usefixtures("all_public")
@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (
            (
                b"HTTP/1.1 302 Found\r\nLocation:"
                b" http://other.example/\r\nContent-Length: 0\r\n\r\n"
            ),
            422,
            "302; redirects",
        ),
        (ok(b"x" * 20_001), 413, "MiB"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 25_000, 413, "MiB"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", 422, "does not answer"),
        (b"SSH-2.0-server\r\n\r\n", 422, "does not answer"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"1\r\nx\r\n" * 20_001,
            413,
            "MiB",
        ),
    ],
    ids=["redirect", "too large", "endless", "cut off", "no HTTP", "chunks"],
)
async def test_answers_without_images_name_the_field(
    tmp_path: Path,
    answer: bytes,
    status: int,
    message: str,
) -> None:
    async with served(answer) as (port, requests):
        with pytest.raises(Problem, match=message) as caught:
            await fetcher(tmp_path, port, max_upload_bytes=20_000).fetch(
                url_of(port), ignore
            )
        assert caught.value.status == status
        assert caught.value.errors[0][0] == "image"
        assert len({*requests}) == 1


@needs("http")
@pytest.mark.usefixtures("all_public")
async def test_encodings_stay_and_slow_hosts_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = gzip.compress(bytes(100_000))
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        % len(packed)
    )
    async with served(answer + packed) as (port, _):
        assert await fetcher(tmp_path, port).fetch(url_of(port), ignore) == packed
    monkeypatch.setattr("app.api.requests.TIMEOUT_S", 0.05)
    async with served(
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", stays_open=True
    ) as (port, _):
        with pytest.raises(Problem, match="more than") as caught:
            await fetcher(tmp_path, port).fetch(url_of(port), ignore)
    assert caught.value.status == 422


@needs("http")
@pytest.mark.usefixtures("all_public")
async def test_slow_hosts_of_one_caller_leave_places_to_others(tmp_path: Path) -> None:
    async with (
        served(b"", stays_open=True) as (slow, requests),
        served(ok(b"image")) as (quick, _),
    ):
        both = fetcher(tmp_path, slow, quick)

        async def fetch(caller: int, port: int) -> bytes:
            current_caller.set(f"192.0.2.{caller}")
            return await both.fetch(url_of(port), ignore)

        waits = [asyncio.create_task(fetch(caller, slow)) for caller in (0, 1) * 8]
        await until(lambda: len(requests) == 8)
        assert await asyncio.create_task(fetch(2, quick)) == b"image"
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
        assert len(requests) == 8
