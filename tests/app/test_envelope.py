"""What every response gets: HEAD, safe headers, the check of Host; long responses; and no reference cycles."""

import gc
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.support.responses import assert_problem
from tests.support.service import opened, serving


@pytest.fixture(scope="module")
def port(built_index: Path) -> Iterator[int]:
    with serving(built_index, runtime="torch") as (_, port):
        yield port


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
