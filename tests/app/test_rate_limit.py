"""Rate limits and keys without a service: addresses, waits, scopes, and comparison in constant time."""

import asyncio
import hmac
import time
from pathlib import Path

import httpx
import pytest

from app.core.keys import ApiKey, find_key_name, is_key, key_hash, key_in, new_key, parse_keys
from app.core.rate_limit import RateLimiter, _seconds_until_room, network_of, parse_rate
from app.core.redis import connect, disconnect
from app.core.settings import Settings
from app.main import create_app
from app.service.embedding_cache import RedisCache


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
    ],
)
def test_ipv6_addresses_are_counted_by_network(address: str, network: str) -> None:
    assert network_of(address) == network


async def test_one_ipv6_network_shares_a_rate_limit(tmp_path: Path) -> None:
    app = create_app(Settings(index=tmp_path, rate_limit="1/year"))

    async def get(address: str) -> int:
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            return (await client.get("/nothing")).status_code

    statuses = [await get(address) for address in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")]
    assert statuses == [404, 429, 404]


def test_keys_are_compared_in_constant_time_with_every_known_key(monkeypatch: pytest.MonkeyPatch) -> None:
    compare, compared = hmac.compare_digest, list[tuple[bytes, bytes]]()

    def record(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", record)
    keys = {name: ApiKey(key_hash(name)) for name in ("first", "second", "third")}
    for key, name in (("first", "first"), ("third", "third"), ("none of them", None)):
        compared.clear()
        assert find_key_name(keys, key) == name
        assert [other for _, other in compared] == [each.digest.encode() for each in keys.values()]
    compared.clear()
    assert is_key("secret", "secret")
    assert not is_key("wrong", f"sha256:{key_hash('secret')}")
    assert [other for _, other in compared] == [key_hash("secret").encode()] * 2


def test_a_scope_follows_the_hash() -> None:
    digest = key_hash("secret")
    keys = parse_keys(
        f"a:{digest}, b:{digest}:read c:{digest}:write\nd:{digest}:read:shoes+bags e:{digest}:write:shoes"
    )
    assert [each.may_write for each in keys.values()] == [False, False, True, False, True]
    assert [each.opens("bags") for each in keys.values()] == [True, True, True, True, False]
    assert keys["d"].collections == frozenset({"shoes", "bags"})
    assert {each.digest for each in keys.values()} == {digest}
    assert not ApiKey(digest).may_write
    for scope in (":", ":all", ":read:", ":write:shoes:", ":read+write"):
        with pytest.raises(
            ValueError, match="has a scope of a that is not read or write, as in a:HASH:write"
        ) as caught:
            parse_keys(f"a:{digest}{scope}")
        assert digest not in str(caught.value)
    with pytest.raises(ValueError, match="has no key; leave it unset"):
        parse_keys(" , ")
    with pytest.raises(ValueError, match="must be NAME:HASH pairs"):
        parse_keys(f"{65 * 'a'}:{digest}")


def test_a_key_is_read_from_two_headers() -> None:
    for headers, key in (
        ({"authorization": "Bearer secret"}, "secret"),
        ({"authorization": "bearer  secret "}, "secret"),
        ({"authorization": "Basic secret"}, None),
        ({"authorization": "secret"}, None),
        ({"authorization": "Bearer ", "x-api-key": "other"}, "other"),
        ({"authorization": "Bearer secret", "x-api-key": "other"}, "secret"),
        ({"x-api-key": ""}, None),
        ({}, None),
    ):
        assert key_in(headers) == key, headers
    assert (new_key()[:5], len(new_key())) == ("dcar_", 48)


@pytest.mark.parametrize(
    ("count", "window", "seconds"),
    [  # window: earlier count, seconds to its end, current count, seconds to its end; the rate is 10 in 20 s
        (1, (0, 0, 9, 5), 0),
        (1, (0, 0, 10, 25), 5),  # this window ends in 5 s, and counts in full until then
        (1, (0, 0, 10, 40), 20),
        (1, (0, 0, 20, 25), 5 + 10),  # half of its 20 must fall out of the next
        (3, (0, 0, 10, 25), 5 + 4),
        (1, (10, 15, 4, 35), 15 - 12),  # room for six of the earlier ten: 12 s
        (4, (10, 15, 4, 35), 15 - 6),
        (1, (5, 4, 4, 24), 0),
    ],
)
def test_the_announced_wait_is_exact(count: int, window: tuple[int, float, int, float], seconds: float) -> None:
    assert _seconds_until_room(parse_rate("10 per 20 seconds"), count, *window) == pytest.approx(seconds)


async def test_a_cost_above_the_rate_takes_all_of_it() -> None:
    limiter = RateLimiter("5/year")
    assert await limiter.charge("alice") == 0
    assert await limiter.charge("alice", extra=0) == 0
    assert await limiter.charge("alice", extra=19) == 0
    assert 0 < await limiter.charge("alice") <= 2 * 366 * 24 * 3600
    assert await limiter.charge("alice", extra=0) == 0, "costs nothing more"
    assert [await limiter.charge("bob") == 0 for _ in range(6)] == [True] * 5 + [False]
    assert await RateLimiter("1/year").charge("alice", extra=7) == 0, "one request is the whole rate"
    await limiter.close()


async def test_every_use_of_a_hanging_redis_times_out() -> None:
    """A URL may set longer timeouts for the connection, so the cache and the limiter have their own."""
    ended = asyncio.Event()
    connections: list[asyncio.Task[None] | None] = []

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        await ended.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    started = time.monotonic()
    client = connect(url, timeout_s=0.1)
    with pytest.raises(Exception, match="Timeout"):
        await asyncio.wait_for(client.get("key"), 10)
    await disconnect(client)
    patient = f"{url}?socket_timeout=60&socket_connect_timeout=60"
    cache = RedisCache(patient, ttl_s=60, timeout_s=0.1)
    assert await asyncio.wait_for(cache.get("key", 32), 10) is None
    limiter = RateLimiter("1/hour", redis_url=patient, timeout_s=0.1)
    assert await asyncio.wait_for(limiter.charge("alice"), 10) == 0
    assert time.monotonic() - started < 9
    await cache.close()
    await limiter.close()
    ended.set()
    await asyncio.gather(*filter(None, connections))
    server.close()
