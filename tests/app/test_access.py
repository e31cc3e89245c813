"""API keys, rate limits, other sites, the policy of every route, and what every
response and connection gets.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.guard import Policy
from app.core.callers import key_hash, parse_keys
from app.core.settings import Settings
from app.main import create_app
from tests.support.responses import assert_problem
from tests.support.service import (
    ADMIN,
    ALICE,
    BOB,
    KEYS,
    WORDS,
    bearer,
    opened,
    serving,
)

PUBLIC = {
    "/",
    "/docs",
    "/openapi.json",
    "/favicon.ico",
    "/healthz",
    "/readyz",
    "/ui/insights",
    "/ui/{name}",
}
IMAGE = "/items/circle%2Fred.png/image"
SECRET = "a secret of a shop"


async def test_every_route_except_pages_and_probes_needs_a_key(
    built_index: Path,
) -> None:
    async with opened(built_index, **KEYS) as client:
        for path in (
            "/",
            "/docs",
            "/openapi.json",
            "/healthz",
            "/readyz",
            "/ui/search.js",
            "/favicon.ico",
        ):
            assert (await client.get(path)).status_code == 200, path
        document = (await client.get("/openapi.json")).json()
        for path, methods in document["paths"].items():
            if path in ("/healthz", "/readyz"):
                continue
            for method in methods:
                response = await client.request(
                    method, path.replace("{item_id}", "circle%2Fred.png")
                )
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/nothing")).status_code == 401, (
            "unknown paths are not revealed without a key"
        )
        basic = {"Authorization": f"Basic {ALICE}"}
        both = bearer("wrong") | {"X-API-Key": ALICE}
        for wrong in (
            both,
            basic,
            {"Authorization": ALICE},
            {"X-API-Key": ""},
            bearer(key_hash(ALICE)),
        ):
            headers = {name.encode(): value.encode() for name, value in wrong.items()}
            assert (
                await client.post("/search/text", json=WORDS, headers=headers)
            ).status_code == 401
        loosely = {"Authorization": f"bearer  {ALICE} "}
        for right in (
            bearer(ALICE),
            bearer(BOB),
            {"X-API-Key": BOB},
            bearer("") | {"X-API-Key": BOB},
            loosely,
        ):
            assert (
                await client.post("/search/text", json=WORDS, headers=right)
            ).status_code == 200
        assert (
            await client.post("/search/text", json=WORDS, headers=bearer(ADMIN))
        ).status_code == 401
        for key in (ALICE, KEYS["admin_key"]):  # the hash itself is not a key
            assert (
                await client.post("/admin/reload", headers=bearer(key))
            ).status_code == 401
        assert (
            await client.post("/admin/reload", headers=bearer(ADMIN))
        ).status_code == 200
        assert (await client.get("/metrics", headers=bearer(ADMIN))).status_code == 200


@pytest.mark.slow
async def test_caller_over_its_rate_is_refused_429(built_index: Path) -> None:
    async with opened(built_index, rate_limit="3/minute", **KEYS) as client:

        async def ask(key: str) -> httpx.Response:
            return await client.post("/search/text", json=WORDS, headers=bearer(key))

        assert [(await ask(ALICE)).status_code for _ in range(5)] == [
            200,
            200,
            200,
            429,
            429,
        ]
        refused = await ask(ALICE)
        assert refused.headers["content-type"] == "application/problem+json"
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert "alice" in refused.json()["detail"]
        response = await ask(BOB)
        assert response.status_code == 200
        response = await client.get("/healthz")
        assert response.status_code == 200
    async with opened(built_index, rate_limit="5/minute", **KEYS) as client:

        async def several(count: int, key: str) -> int:
            body = {"queries": [WORDS] * count}
            response = await client.post(
                "/search/batch", json=body, headers=bearer(key)
            )
            return response.status_code

        assert [await several(count, ALICE) for count in (3, 3, 1)] == [
            200,
            429,
            200,
        ], "a batch counts as its queries"
        assert [await several(count, BOB) for count in (20, 1)] == [
            200,
            429,
        ], "one batch may use the whole rate"
    async with opened(built_index, rate_limit="1/minute") as client:

        async def collections(address: str) -> int:
            client.transport.client = address, 1
            response = await client.get("/collections")
            return response.status_code

        addresses = (
            "10.0.0.1 ::ffff:10.0.0.1 10.0.0.2 2001:db8::1 2001:db8::2 2001:db8:0:1::1"
            " socket"
        )
        asked = [await collections(address) for address in addresses.split()]
        assert asked == [
            200,
            429,
            200,
            200,
            429,
            200,
            200,
        ], "without keys, callers are addresses and networks"
        assert [(await client.get("/metrics")).status_code for _ in range(2)] == [
            200,
            200,
        ]
        views = [
            (await client.get(path)).status_code
            for path in ("/ui/catalogue", IMAGE) * 26
        ]
        assert views == [200] * 50 + [429] * 2, "views are counted apart"


async def test_a_signed_picture_opens_without_a_key_until_it_expires(
    built_index: Path,
) -> None:
    guide = (Path(__file__).parents[2] / "docs/how-to/secure.md").read_text()
    names: dict[str, Any] = {}
    # as a shop would copy it
    exec(guide.split("```python\n")[1].split("```")[0], names)
    address = names["signed"](IMAGE, SECRET)
    async with opened(built_index, **KEYS, image_secret=SECRET) as client:
        response = await client.get(f"{address}&size=192")
        assert response.status_code == 200
        expires = int(address.split("expires=")[1].split("&")[0])
        for wrong in (
            IMAGE,
            names["signed"](IMAGE, "x" * 32),
            names["signed"](IMAGE, SECRET, seconds=-1),
            address.replace("red", "blue"),
            address.replace("/image", ""),
            address.replace(str(expires), str(expires + 1)),
            address.replace(str(expires), "x"),
        ):
            response = await client.get(wrong)
            assert response.status_code == 401, wrong
    async with opened(built_index, **KEYS) as client:
        response = await client.get(address)
        assert response.status_code == 401


async def test_responses_behind_keys_are_private_to_caches(built_index: Path) -> None:
    image = IMAGE
    paths = (
        "/collections",
        "/items",
        "/items/circle%2Fred.png",
        "/items/circle%2Fred.png/similar",
    )
    for given, who, wanted in (({}, {}, "public"), (KEYS, bearer(ALICE), "private")):
        async with opened(
            built_index,
            cors_origins="https://shop.example",
            **given,
        ) as client:
            headers = {**who, "Origin": "https://shop.example"}
            whole = await client.get(image, headers=headers)
            again = await client.get(
                image, headers={**headers, "If-None-Match": whole.headers["etag"]}
            )
            assert whole.status_code == 200
            assert again.status_code == 304
            for response in (whole, again):
                assert response.headers["cache-control"].startswith(
                    f"{wanted}, max-age="
                )
                vary = {
                    each.strip() for each in response.headers.get("vary", "").split(",")
                }
                assert ({"Authorization", "X-API-Key"} <= vary) == bool(given)
                assert "Origin" in vary
            for path in paths:
                response = await client.get(path, headers=who)
                assert response.headers.get("cache-control") == (
                    "private" if given else None
                ), path
                assert (
                    "Authorization, X-API-Key" in response.headers.get("vary", "")
                ) == bool(given), path
            assert "cache-control" not in (await client.get("/healthz")).headers


async def test_only_named_origins_may_search(built_index: Path) -> None:
    origin = {"Origin": "https://shop.example"}
    asks = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    async with opened(built_index) as client:
        response = await client.get("/readyz", headers=origin)
        assert "access-control-allow-origin" not in response.headers
        response = await client.options("/search/text", headers=asks)
        assert response.status_code == 405
    async with opened(
        built_index,
        cors_origins="https://shop.example",
        **KEYS,
    ) as client:
        asked = await client.options("/search/text", headers=asks)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://shop.example"
        refused = await client.post("/search/text", json=WORDS, headers=origin)
        assert refused.status_code == 401
        assert (
            refused.headers["access-control-allow-origin"] == "https://shop.example"
        ), "the page can read the reason"
        other = await client.get("/readyz", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_scope_follows_the_hash() -> None:
    a, b, c, d, e = (key_hash(name) for name in "abcde")
    keys = parse_keys(
        f"a:{a.upper()}, b:{b}:read c:{c}:write\nd:{d}:read:shoes+bags"
        f" e:{e}:write:shoes"
    )
    assert [*keys] == [a, b, c, d, e]
    assert [key.may_write for key in keys.values()] == [False, False, True, False, True]
    assert [key.opens("bags") for key in keys.values()] == [
        True,
        True,
        True,
        True,
        False,
    ]
    for scope in (
        ":",
        ":all",
        ":read:",
        ":write:shoes:",
        ":read+write",
        ":write:a b",
        ":read:a/b",
        "::a",
    ):
        with pytest.raises(ValueError, match="NAME:HASH:write") as caught:
            parse_keys(f"a:{a}{scope}")
        assert a not in str(caught.value)
    with pytest.raises(ValueError, match="has no key; leave it unset"):
        parse_keys(" , ")
    for wrong in (f"{65 * 'a'}:{a}", "alice", "alice:00", f":{a}"):
        with pytest.raises(ValueError, match="must be NAME:HASH pairs"):
            parse_keys(wrong)


def test_every_route_has_a_policy_and_few_are_open(tmp_path: Path) -> None:
    app = create_app(Settings(index=tmp_path))
    policies: dict[tuple[str, str], Policy] = {
        (route.path, method): route.policy  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert {
        path for (path, _), policy in policies.items() if policy.access == "open"
    } == PUBLIC
    changes = [
        policy
        for (_, method), policy in policies.items()
        if method in ("PUT", "DELETE", "PATCH")
    ]
    assert {policy.access for policy in changes} == {"write"}
    private = {
        path
        for (path, _), policy in policies.items()
        if policy.is_private and path not in PUBLIC
    }
    assert all(
        path.startswith(("/ui/", "/collections/{collection}/ui/")) for path in private
    )


async def test_a_route_without_a_policy_is_not_reachable(built_index: Path) -> None:
    async with opened(built_index, **KEYS) as client:

        @client.app.get("/bare")
        async def bare() -> dict[str, str]:
            return {"secret": "shown"}

        assert_problem(await client.get("/bare"), 401, "Authorization")
        response = await client.get("/bare", headers=bearer(ALICE))
        assert_problem(response, 404)
        assert "nothing at /bare" in response.json()["detail"]


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = b"GET /collections HTTP/1.1\r\nHost: localhost\r\n\r\n"
SEARCH = (
    b"POST /search/text HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
    b" application/json\r\n"
)
OFFER = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: %b\r\nHTTP2-Settings: AAMA\r\n"
)


@pytest.fixture(scope="module")
def port(built_index: Path) -> Iterator[int]:
    with serving(built_index, runtime="torch") as (_, port):
        yield port


def test_head_is_get_without_the_body(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        item = "/items/circle%2Fred.png"
        for path in (
            "/",
            "/docs",
            "/openapi.json",
            "/readyz",
            "/metrics",
            item,
            f"{item}/image",
            "/items/nothing",
        ):
            get = client.get(path)
            head = client.head(path)
            assert (head.status_code, head.content) == (get.status_code, b""), path
            assert len(get.headers.get_list("content-security-policy")) == 1, (
                "the page has its own"
            )
            assert get.headers["x-content-type-options"] == "nosniff"
            assert get.headers["referrer-policy"] == "no-referrer"
            assert head.headers["content-type"] == get.headers["content-type"]
            assert "server" not in get.headers
            if path != "/metrics":
                assert head.headers["content-length"] == get.headers["content-length"]
        refused = client.head("/search/text")
        assert refused.status_code == 405
        assert refused.headers["allow"] == "POST"
        assert client.delete("/healthz").headers["allow"] == "GET, HEAD"


async def test_over_loopback_only_known_hosts_are_answered(tmp_path: Path) -> None:
    """Otherwise a web page could lead its own name to 127.0.0.1, and read what is
    served there.
    """
    known = "localhost:8000", "LOCALHOST", "[::1]:8000", "127.0.0.1", "shop.example:80"
    strange = (
        "rebound.example",
        "127.0.0.1.rebound.example",
        "localhost.rebound.example:8000",
        "192.0.2.1",
        "",
    )
    for listens, answered in (("127.0.0.1", known), ("0.0.0.0", known + strange)):
        app = create_app(
            Settings(index=tmp_path, host=listens, allowed_hosts=("shop.example",))
        )
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://any"
        ) as client:
            for host in known + strange:
                response = await client.get("/healthz", headers={"Host": host})
                if host in answered:
                    assert response.status_code == 200, host
                else:
                    assert_problem(response, 421, "Host")


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
    "framing",
    [
        b"Content-Length: %d\r\n\r\n%b",
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize(
    "how", ["at once", "split header", "split body", "pipelined", "byte by byte"]
)
def test_body_behind_an_offer_to_upgrade_is_never_run_as_a_request(
    connection: socket.socket,
    how: str,
    framing: bytes,
    protocol: bytes,
) -> None:
    request = SEARCH + OFFER % protocol + framing % (len(SMUGGLED), SMUGGLED)
    body = request.index(b"\r\n\r\n") + 4
    ends = {
        "at once": [],
        "split header": [len(SEARCH) + 40, body],
        "split body": [body],
        "pipelined": [body],
    }
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
