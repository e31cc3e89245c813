"""Redis clients from DCAR_REDIS_URL: one server, the master of a sentinel, or a cluster; each with TLS under `rediss`.

    redis://[user:password@]host[:6379][/db]             one server; rediss:// with TLS
    unix:///path/to/socket[?db=0]                         one server on this machine
    redis+sentinel://[user:password@]host[:26379][,host2[:port]..]/service[/db]
    redis+cluster://[user:password@]host[:6379][,host2[:port]..]

- Options of redis-py follow as a query string: `?ssl_ca_certs=/etc/ca.pem&ssl_certfile=..&ssl_keyfile=..`. Sentinels
  share the TLS options of their master and have their own `sentinel_username` and `sentinel_password`.
- Nothing is retried here, since every caller has a `CircuitBreaker`. A client connects at its first command.
"""

import asyncio
import logging
import time
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
from redis.exceptions import RedisClusterException, RedisError

logger = logging.getLogger(__name__)

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
STORE_FAULTS = Exception  # beside its own errors, redis-py raises whatever its parser does: TypeError, ..
_MAX_CONNECTIONS = 32  # more commands wait for a free one
_PORTS = {"sentinel": 26_379, "cluster": 6379}

Client = Redis | RedisCluster
C = TypeVar("C", Redis, RedisCluster)


def connect(url: str, *, timeout_s: float) -> Client:
    """Return a client of the Redis at `url`.

    Args:
        timeout_s: for connecting, and for each response.

    Raises:
        ValueError: the URL is invalid. The message does not repeat it: it may hold a password.
    """
    return _make_client(url, check_url(url), timeout_s)


def check_url(url: str) -> str:
    """Return the scheme of a usable URL. Raise ValueError if the URL is invalid; the message names the fault."""
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"must begin with {', '.join(f'{each}://' for each in SCHEMES)}")
    if "+" in scheme:
        options = _parse_hosts(url, scheme)[2]
    else:
        if scheme != "unix":
            _port(urlsplit(url))
        options = dict(parse_url(url))
    try:  # a connection checks its options before it connects
        client = _make_client(url, scheme, 1.0)
        if isinstance(client, Redis):
            client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except TypeError:
        raise ValueError("has an option that redis-py does not know") from None
    except (RedisClusterException, RedisError) as error:
        raise ValueError(f"has an invalid option: {error}") from None
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if (file := options.get(name)) and not Path(file).is_file():
            raise ValueError(f"names {file} as {name}, but the file does not exist")
    return scheme


async def disconnect(client: Client) -> None:
    """Close a client, and the sentinels that it was found through."""
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SentinelConnectionPool):
        await pool.disconnect()
        await pool.sentinel_manager.aclose()


def _make_client(url: str, scheme: str, timeout_s: float) -> Client:
    limits: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "max_connections": _MAX_CONNECTIONS,
        "retry": Retry(NoBackoff(), 0),
    }
    if "+" not in scheme:
        return Redis.from_pool(BlockingConnectionPool.from_url(url, timeout=timeout_s, **limits))
    hosts, service, url_options = _parse_hosts(url, scheme)
    options = limits | url_options
    if scheme.endswith("cluster"):
        nodes = [ClusterNode(host, port) for host, port in hosts]
        return _limit_commands(RedisCluster(startup_nodes=nodes, **options), options["max_connections"])
    auth = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    sentinel = Sentinel(hosts, sentinel_kwargs={**limits, **auth, **tls}, **options)  # type: ignore[no-untyped-call]
    master: Redis = sentinel.master_for(service)
    return _limit_commands(master, options["max_connections"])


def _limit_commands(client: C, limit: int) -> C:
    """Let commands beyond `limit` wait: the connection pools of sentinels and clusters would refuse them.

    Callers bound this wait together with the command.
    """
    slots = asyncio.Semaphore(limit)
    execute: Callable[..., Awaitable[Any]] = client.execute_command

    async def execute_command(*args: Any, **options: Any) -> Any:
        async with slots:
            return await execute(*args, **options)

    client.execute_command = execute_command  # type: ignore[method-assign]
    return client


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:  # its message quotes the "port": the start of a password that contains a slash
        raise ValueError("must have a number as its port; / # ? @ in a password are written %2F %23 %3F %40") from None


def _parse_hosts(url: str, scheme: str) -> tuple[list[tuple[str, int]], str, dict[str, Any]]:
    """Return the hosts, the service of the sentinels and the options of a URL."""
    kind = scheme.partition("+")[2]
    location, _, query = url.partition("://")[2].partition("?")
    authority, _, path = location.partition("/")
    user, at, host_list = authority.rpartition("@")
    hosts = []
    for entry in host_list.split(","):
        parts = urlsplit(f"//{entry}")
        if not parts.hostname:
            raise ValueError("must name at least one host")
        hosts.append((parts.hostname, _port(parts) or _PORTS[kind]))
    service, _, db = path.partition("/")
    if kind == "sentinel" and not service:
        raise ValueError("must name the service of the sentinels, as in redis+sentinel://host:26379/mymaster")
    single = parse_url(f"{scheme.partition('+')[0]}://{user}{at}localhost/{db if kind == 'sentinel' else ''}?{query}")
    options: dict[str, Any] = {name: value for name, value in single.items() if name not in ("host", "port")}
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    return hosts, service, options


class CircuitBreaker:
    """Stop using a failing store for a while, so callers do not wait for it again and again.

    After `failures` in a row `allows()` returns False for `pause_s`, and then True for one trial. Log lines name the
    `purpose`.
    """

    def __init__(self, failures: int = 3, pause_s: float = 5.0, *, purpose: str = "the cache") -> None:
        self._limit = failures
        self._pause = pause_s
        self._purpose = purpose
        self._failures = 0
        self._retry_at = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= self._limit

    def allows(self) -> bool:
        """Return True if the store may be used now."""
        if not self.is_open:
            return True
        now = time.monotonic()
        if is_trial := now >= self._retry_at:
            self._retry_at = now + self._pause  # one trial, not a stampede
        return is_trial

    def succeeded(self) -> None:
        if self.is_open:
            logger.info("Redis responds again; %s resumed", self._purpose)
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Record a failure, or a response that came too late."""
        self._failures += 1
        if self._failures == self._limit:
            logger.warning(
                "Redis failed (%s); continuing without %s", str(error) or type(error).__name__, self._purpose
            )
        if self.is_open:
            self._retry_at = time.monotonic() + self._pause
