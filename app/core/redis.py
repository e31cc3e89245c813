"""Redis clients from DCAR_REDIS_URL: one server, the master of a sentinel, or a cluster; each with TLS under `rediss`.

- `_USAGE` lists the forms of a URL. Options of redis-py follow as a query string, such as `?ssl_ca_certs=/etc/ca.pem`.
- Sentinels share the TLS options of their master and have their own `sentinel_username` and `sentinel_password`.
- Nothing is retried here, since every caller has a `CircuitBreaker`. A client connects at its first command.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

if TYPE_CHECKING:  # a service without Redis starts without it
    from redis.asyncio import Redis, RedisCluster

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3
_KNOWN_S = 60.0  # after the last trial; without requests nobody tries whether a store responds again
_MAX_CONNECTIONS = 32  # of one server; more commands wait for a free one
_PORTS = {"sentinel": 26_379, "cluster": 6379}
_SEVERAL = re.compile(  # what redis-py has no URL for
    r"(?P<scheme>rediss?)\+(?P<kind>sentinel|cluster)://(?P<user>[^/?#]*@)?(?P<hosts>[^/?#@]+)"
    r"(?:/(?P<service>[^/?]*))?(?P<rest>.*)"
)
_USAGE = (
    "must be redis://[user:password@]host[:port][/db], rediss://.., unix:///path, redis+sentinel://host[,host]/service "
    "or redis+cluster://host[,host]; / # ? @ in a password are written %2F %23 %3F %40"
)

Client: TypeAlias = "Redis | RedisCluster"


def connect(url: str, *, timeout_s: float) -> Client:
    """Return a client of the Redis at `url`.

    Args:
        timeout_s: for connecting, and for each response.

    Raises:
        ValueError: the URL is invalid. The message does not repeat it: it may hold a password.
    """
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisClusterException, RedisError

    limits: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
    }
    client: Client
    match = _SEVERAL.fullmatch(url)
    try:
        if match is None:
            pool = BlockingConnectionPool.from_url(url, max_connections=_MAX_CONNECTIONS, timeout=timeout_s, **limits)
            client, options = Redis.from_pool(pool), pool.connection_kwargs
        else:
            client, options = _several(match.groupdict(""), limits)
        if isinstance(client, Redis):  # a connection checks its options before it connects
            client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except (RedisClusterException, RedisError) as error:
        raise ValueError(f"has an invalid option: {error}") from None
    except TypeError:
        raise ValueError("has an option that redis-py does not know") from None
    except ValueError:  # its message may quote the URL
        raise ValueError(_USAGE) from None
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if (file := options.get(name)) and not Path(file).is_file():
            raise ValueError(f"names {file} as {name}, but the file does not exist")
    return client


async def disconnect(client: Client) -> None:
    """Close a client, and the sentinels that it was found through."""
    from redis.asyncio.sentinel import SentinelConnectionPool

    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SentinelConnectionPool):
        await pool.disconnect()
        await pool.sentinel_manager.aclose()


def _several(parts: dict[str, str], limits: dict[str, Any]) -> tuple[Client, dict[str, Any]]:
    """Return the client of a cluster or of a sentinel's master, and its options, from the parts of its URL."""
    from redis.asyncio import RedisCluster
    from redis.asyncio.cluster import ClusterNode
    from redis.asyncio.connection import parse_url
    from redis.asyncio.sentinel import Sentinel

    places = [urlsplit(f"//{host}") for host in parts["hosts"].split(",")]
    hosts = [(place.hostname or "", place.port or _PORTS[parts["kind"]]) for place in places]
    options: dict[str, Any] = limits | parse_url(f"{parts['scheme']}://{parts['user']}{parts['rest']}")
    options["ssl"] = options.pop("connection_class", None) is not None
    if parts["kind"] == "cluster":
        return RedisCluster(startup_nodes=[ClusterNode(*host) for host in hosts], **options), options
    if not parts["service"]:
        raise ValueError
    auth = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    sentinel = Sentinel(hosts, sentinel_kwargs={**limits, **auth, **tls}, **options)  # type: ignore[no-untyped-call]
    return sentinel.master_for(parts["service"]), options


class CircuitBreaker:
    """Stop using a failing store for a while, so callers do not wait for it again and again.

    After three failures in a row `allows()` returns False for five seconds, and then True for one trial. Log lines name
    the `purpose`.
    """

    def __init__(self, purpose: str) -> None:
        self._purpose, self._pause = purpose, 5.0
        self._failures, self._retry_at = 0, 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= _MOST_FAILURES

    @property
    def is_known_open(self) -> bool:
        """True if it is open, and the store was tried a short time ago."""
        return self.is_open and time.monotonic() < self._retry_at + _KNOWN_S

    def allows(self) -> bool:
        """Return True if the store may be used now."""
        if not self.is_open:
            return True
        now = time.monotonic()
        if is_trial := now >= self._retry_at:
            self._retry_at = now + self._pause  # one trial, not a stampede
        return is_trial

    @asynccontextmanager
    async def attempt(self, timeout_s: float) -> AsyncIterator[None]:
        """Use the store in the body, which a failure ends, or the time; both are recorded and go no further."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except Exception as error:  # beside its own errors, redis-py raises whatever its parser does: TypeError, ..
            self.failed(error)
        else:
            self.succeeded()

    def succeeded(self) -> None:
        if self.is_open:
            logger.info("Redis responds again; %s resumed", self._purpose)
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Record a failure, or a response that came too late."""
        self._failures += 1
        if self._failures == _MOST_FAILURES:
            logger.warning("Redis failed (%s); going on without %s", str(error) or type(error).__name__, self._purpose)
        if self.is_open:
            self._retry_at = time.monotonic() + self._pause
