"""API keys, rate limits and cross-origin access."""

import asyncio
from pathlib import Path

import httpx
import pytest

from app.core.keys import find_key_name, is_key, key_hash, new_key, parse_keys
from app.core.rate_limit import RateLimiter, parse_rate
from app.core.settings import load_settings
from dcar_core.util.errors import DcarError
from tests.support.redis_server import RedisServer
from tests.support.service import ADMIN, ALICE, BOB, KEYS, WORDS, bearer, opened, until


def test_keys_are_recognised_by_their_hashes() -> None:
    keys = parse_keys(f"alice:{key_hash(ALICE)}\nbob:{key_hash(BOB).upper()}")
    assert (
        find_key_name(keys, ALICE),
        find_key_name(keys, BOB),
        find_key_name(keys, ALICE[:-1]),
        find_key_name(keys, ""),
    ) == (
        "alice",
        "bob",
        None,
        None,
    )
    assert is_key(ADMIN, ADMIN)
    assert is_key(ADMIN, f"sha256:{key_hash(ADMIN)}")
    assert not is_key(f"sha256:{key_hash(ADMIN)}", f"sha256:{key_hash(ADMIN)}"), "the hash itself is not a key"
    for wrong in ("alice", "alice:00", f":{key_hash(BOB)}", f"a:{key_hash(BOB)},a:{key_hash(ALICE)}"):
        with pytest.raises(ValueError, match=r"NAME:HASH|two keys") as caught:
            parse_keys(wrong)
        assert key_hash(BOB) not in str(caught.value)
    assert len({new_key() for _ in range(100)}) == 100


def test_invalid_keys_rates_origins_and_collections_name_their_setting(tmp_path: Path) -> None:
    for given, name in (
        ({"api_keys": "x"}, "API_KEYS"),
        ({"api_keys": " , "}, "API_KEYS"),
        ({"rate_limit": "fast"}, "RATE_LIMIT"),
        ({"rate_limit": "20/second, 600/minute"}, "RATE_LIMIT"),
        ({"rate_limit": "20/second; 600/minute"}, "RATE_LIMIT"),
        ({"rate_limit": "0/second"}, "RATE_LIMIT"),
        ({"collections": {tmp_path.name: tmp_path}}, "COLLECTIONS"),  # the name of the default collection
        ({"collections": {".hidden": tmp_path}}, "COLLECTIONS"),
        ({"collections": {"a/b": tmp_path}}, "COLLECTIONS"),
        ({"cors_origins": "shop"}, "CORS"),
        ({"cors_origins": "https://shop.example/path"}, "CORS"),
        ({"cors_origins": "https://*.shop.example"}, "CORS"),
    ):
        with pytest.raises(DcarError, match=f"DCAR_{name}"):
            load_settings(index=tmp_path, **given)


async def test_every_route_except_pages_and_probes_needs_a_key(built_index: Path) -> None:
    async with opened(built_index, **KEYS) as client:
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/ui/search.js", "/favicon.ico"):
            assert (await client.get(path)).status_code == 200, path
        document = (await client.get("/openapi.json")).json()
        for path, methods in document["paths"].items():
            if path in ("/healthz", "/readyz"):
                continue
            for method in methods:
                response = await client.request(method, path.replace("{item_id}", "circle%2Fred.png"))
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/nothing")).status_code == 401, "unknown paths are not revealed without a key"
        for wrong in (
            bearer("wrong"),
            {"Authorization": ALICE},
            {"X-API-Key": ""},
            bearer(key_hash(ALICE)),
            bearer("é"),
        ):
            headers = {name.encode(): value.encode() for name, value in wrong.items()}
            assert (await client.post("/search/text", json=WORDS, headers=headers)).status_code == 401
        for right in (bearer(ALICE), bearer(BOB), {"X-API-Key": BOB}):
            assert (await client.post("/search/text", json=WORDS, headers=right)).status_code == 200
        assert (await client.post("/search/text", json=WORDS, headers=bearer(ADMIN))).status_code == 401
        assert (await client.post("/admin/reload", headers=bearer(ALICE))).status_code == 401
        assert (await client.post("/admin/reload", headers=bearer(ADMIN))).status_code == 200
        assert (await client.get("/metrics", headers=bearer(ADMIN))).status_code == 200


@pytest.mark.slow
async def test_caller_over_its_rate_is_refused_429(built_index: Path) -> None:
    async with opened(built_index, rate_limit="3/minute", **KEYS) as client:

        async def ask(key: str) -> httpx.Response:
            return await client.post("/search/text", json=WORDS, headers=bearer(key))

        assert [(await ask(ALICE)).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
        refused = await ask(ALICE)
        assert refused.headers["content-type"] == "application/problem+json"
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert "alice" in refused.json()["detail"]
        assert (await ask(BOB)).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
    async with opened(built_index, rate_limit="5/minute", **KEYS) as client:

        async def several(count: int, key: str) -> int:
            body = {"queries": [WORDS] * count}
            return (await client.post("/search/batch", json=body, headers=bearer(key))).status_code

        assert [await several(count, ALICE) for count in (3, 3, 1)] == [200, 429, 200], "a batch counts as its queries"
        assert [await several(count, BOB) for count in (20, 1)] == [200, 429], "one batch may use the whole rate"
    async with opened(built_index, rate_limit="1/second") as client:

        async def allowed() -> bool:  # a search could take longer than the window
            return (await client.get("/collections")).status_code == 200

        await until(allowed)
        assert not all([await allowed() for _ in range(3)])  # a second one may pass where a window ends between them
        await until(allowed)
    async with opened(built_index, rate_limit="1/minute") as client:

        async def collections(address: str) -> int:
            client._transport.client = address, 1  # type: ignore[attr-defined]
            return (await client.get("/collections")).status_code

        asked = [await collections(address) for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2")]
        assert asked == [200, 429, 200], "without keys, callers are addresses"
        assert [(await client.get("/metrics")).status_code for _ in range(2)] == [200, 200]


async def test_open_paths_stay_open_below_a_root_path(built_index: Path) -> None:
    async with opened(built_index, **KEYS) as client:
        client._transport.root_path = "/images"  # type: ignore[attr-defined]
        assert (await client.get("/images/healthz")).status_code == 200
        assert (await client.get("/images/collections")).status_code == 401
        assert (await client.post("/images/admin/reload", headers=bearer(ADMIN))).status_code == 200


@pytest.mark.redis
async def test_rates_are_shared_in_redis_and_local_without_it(redis_server: RedisServer) -> None:
    first, second = (RateLimiter("4/minute", redis_url=redis_server.url, timeout_s=1) for _ in range(2))
    waits = [await rates.charge("alice") for rates in (first, second, first, second, first, second)]
    assert [wait == 0 for wait in waits] == [True] * 4 + [False] * 2
    assert all(0 < wait <= 60.1 for wait in waits[4:])
    for _ in range(2):
        first.breaker.failed(OSError("lost"))
    await first.charge("bob")
    first.breaker.failed(OSError("lost"))
    assert not first.breaker.is_open, "a success between failures counts"
    redis_server.stop()
    assert [await first.charge("alice") == 0 for _ in range(6)] == [True] * 4 + [False] * 2
    assert first.breaker.is_open
    await first.close()
    await second.close()


def test_rates_are_parsed() -> None:
    assert parse_rate("20/second").amount == 20
    assert parse_rate("100 per 10 seconds").get_expiry() == 10
    for wrong in ("", "20", "-1/second", "20/blink"):
        with pytest.raises(ValueError, match="20/second"):
            parse_rate(wrong)


async def test_images_behind_keys_are_private_to_caches(built_index: Path) -> None:
    path = "/items/circle%2Fred.png/image"
    for given, who, wanted in (({}, {}, "public"), (KEYS, bearer(ALICE), "private")):
        async with opened(built_index, cors_origins="https://shop.example", **given) as client:
            headers = {**who, "Origin": "https://shop.example"}
            whole = await client.get(path, headers=headers)
            again = await client.get(path, headers={**headers, "If-None-Match": whole.headers["etag"]})
            assert (whole.status_code, again.status_code) == (200, 304)
            for response in (whole, again):
                assert response.headers["cache-control"].startswith(f"{wanted}, max-age=")
                vary = {each.strip() for each in response.headers.get("vary", "").split(",")}
                assert ({"Authorization", "X-API-Key"} <= vary) == bool(given)
                assert "Origin" in vary


async def test_responses_behind_keys_are_private_to_caches(built_index: Path) -> None:
    async with opened(built_index, **KEYS) as client:
        for path in ("/collections", "/items", "/items/circle%2Fred.png", "/items/circle%2Fred.png/similar"):
            response = await client.get(path, headers=bearer(ALICE))
            assert response.headers["cache-control"] == "private", path
            assert response.headers["vary"] == "Authorization, X-API-Key"
        assert "cache-control" not in (await client.get("/healthz")).headers
    async with opened(built_index) as client:
        assert "cache-control" not in (await client.get("/collections")).headers


@pytest.mark.slow
async def test_caller_is_accepted_after_the_announced_wait() -> None:
    async def call(cost: int, requests: int) -> None:
        rates, refused = RateLimiter("10/second"), 0
        for _ in range(requests):
            for attempt in range(3):
                wait = await rates.charge("alice") or await rates.charge("alice", extra=cost - 1)
                if not wait:
                    break
                refused += 1
                assert attempt < 2, f"refused again after the announced wait, at a cost of {cost}"
                await asyncio.sleep(wait + 0.01)
        assert refused, cost

    await asyncio.gather(*(call(cost, requests) for cost, requests in ((3, 4), (6, 2), (10, 2))))


@pytest.mark.redis
@pytest.mark.slow
async def test_announced_wait_is_sufficient_with_redis(redis_server: RedisServer) -> None:
    rates = RateLimiter("10/second", redis_url=redis_server.url, timeout_s=1)
    for _ in range(2):
        for attempt in range(3):
            wait = await rates.charge("alice") or await rates.charge("alice", extra=5)
            if not wait:
                break
            assert attempt < 2, "refused again after the announced wait"
            await asyncio.sleep(wait + 0.05)
    await rates.close()


async def test_only_named_origins_may_search(built_index: Path) -> None:
    origin = {"Origin": "https://shop.example"}
    asks = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    async with opened(built_index) as client:
        assert "access-control-allow-origin" not in (await client.get("/readyz", headers=origin)).headers
        assert (await client.options("/search/text", headers=asks)).status_code == 405
    async with opened(built_index, cors_origins="https://shop.example", **KEYS) as client:
        asked = await client.options("/search/text", headers=asks)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://shop.example"
        refused = await client.post("/search/text", json=WORDS, headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://shop.example", "the page can read the reason"
        other = await client.get("/readyz", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
