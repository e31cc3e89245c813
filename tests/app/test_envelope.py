"""What every response gets: HEAD, safe headers, the check of Host; long responses; and no reference cycles."""

import gc
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from app.core.settings import Settings
from app.main import create_app
from tests.support.responses import assert_problem
from tests.support.service import serving


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
