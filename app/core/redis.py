"""From DCAR_REDIS_URL to a client: one server, a sentinel's master, or a cluster; each with TLS under `rediss`.

    redis://[user:password@]host[:6379][/db]             one server; rediss:// with TLS
    unix:///path/to/socket[?db=0]                         one server, on this machine
    redis+sentinel://[user:password@]host[:26379][,host2[:port]..]/service[/db]
    redis+cluster://[user:password@]host[:6379][,host2[:port]..]

Options of redis-py follow as a query string: `?ssl_ca_certs=/etc/ca.pem&ssl_certfile=..&ssl_keyfile=..`. Sentinels have
the same TLS as their master, but their own `sentinel_username` and `sentinel_password`.

Whoever calls has its own breaker, so nothing is tried twice here. Nothing connects before the first command.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
STORE_FAULTS = Exception  # beside its own errors, redis-py raises whatever its parser stumbles over: TypeError, ..
_CONNECTIONS = 32  # at a time; more commands wait for their turn
_PORTS = {"sentinel": 26_379, "cluster": 6379}

Client = Redis | RedisCluster
C = TypeVar("C", Redis, RedisCluster)


def connect(url: str, *, timeout_s: float) -> Client:
    """A client of the Redis that a URL names.

    Args:
        timeout_s: for connecting, and for each answer.

    Raises:
        ValueError: the URL is none of the above; the message does not repeat it, since it may hold a password.
    """
    return _client(url, check(url), timeout_s)


def _client(url: str, scheme: str, timeout_s: float) -> Client:
    limits: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "max_connections": _CONNECTIONS,
        "retry": Retry(NoBackoff(), 0),
    }
    if "+" not in scheme:
        return Redis.from_pool(BlockingConnectionPool.from_url(url, timeout=timeout_s, **limits))
    hosts, service, options = _several(url, scheme)
    options = limits | options  # the URL's own win, as with one server
    if scheme.endswith("cluster"):
        nodes = [ClusterNode(host, port) for host, port in hosts]
        return _in_turn(RedisCluster(startup_nodes=nodes, **options), options["max_connections"])
    auth = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    sentinel = Sentinel(hosts, sentinel_kwargs={**limits, **auth, **tls}, **options)  # type: ignore[no-untyped-call]
    master: Redis = sentinel.master_for(service)
    return _in_turn(master, options["max_connections"])


def _in_turn(client: C, most: int) -> C:
    """The client, with so many commands under way at most: the pools of sentinels and clusters refuse what is beyond.

    Whoever bounds the time of a command bounds the wait with it.
    """
    turns = asyncio.Semaphore(most)
    execute: Callable[..., Awaitable[Any]] = client.execute_command

    async def execute_command(*args: Any, **options: Any) -> Any:
        async with turns:
            return await execute(*args, **options)

    client.execute_command = execute_command  # type: ignore[method-assign]
    return client


def check(url: str) -> str:
    """The scheme of a URL that can be used.

    Raises:
        ValueError: it cannot; the message says what would do.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"must begin with {', '.join(f'{each}://' for each in SCHEMES)}")
    if "+" in scheme:
        options = _several(url, scheme)[2]
    else:
        if scheme != "unix":
            _port(urlsplit(url))
        options = dict(parse_url(url))
    try:  # a connection knows its options, and does not connect yet
        client = _client(url, scheme, 1.0)
        if isinstance(client, Redis):
            client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except TypeError:
        raise ValueError("has an option that redis-py does not know") from None
    except RedisClusterException as error:
        raise ValueError(f"has an option that does not fit: {error}") from None
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if (file := options.get(name)) and not Path(file).is_file():
            raise ValueError(f"names {file} as {name}, and there is no such file")
    return scheme


def _port(place: SplitResult) -> int | None:
    try:
        return place.port
    except ValueError:  # whose message has what stands there: where a password has a slash, the beginning of that
        raise ValueError("must have a number as its port; / # ? @ in a password are written %2F %23 %3F %40") from None


def _several(url: str, scheme: str) -> tuple[list[tuple[str, int]], str, dict[str, Any]]:
    """The hosts, the path's first part, and the options of a URL with a list of hosts."""
    kind = scheme.partition("+")[2]
    rest = url.partition("://")[2]
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    user, at, listed = authority.rpartition("@")
    hosts = []
    for each in listed.split(","):
        one = urlsplit(f"//{each}")
        if not one.hostname:
            raise ValueError("must name at least one host")
        hosts.append((one.hostname, _port(one) or _PORTS[kind]))
    service, _, db = path.partition("/")
    if kind == "sentinel" and not service:
        raise ValueError("must name the sentinels' service after the hosts, as in redis+sentinel://host:26379/mymaster")
    known = parse_url(f"{scheme.partition('+')[0]}://{user}{at}localhost/{db if kind == 'sentinel' else ''}?{query}")
    options: dict[str, Any] = {name: value for name, value in known.items() if name not in ("host", "port")}
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    return hosts, service, options


async def disconnect(client: Client) -> None:
    """Close a client, and with it the sentinels that it was found through."""
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SentinelConnectionPool):
        await pool.disconnect()
        await pool.sentinel_manager.aclose()
