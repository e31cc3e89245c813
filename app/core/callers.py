"""Who calls: API keys, known to the service only by their hashes, and the rates of callers.

- A key has 256 random bits, so a plain SHA-256 cannot be reversed and no slow hash is needed.
- A caller is the name of a key where keys are required, else an address: of IPv6 the /64 network, which one host has.
- While Redis fails, no rate is limited.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any

from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.storage.redis import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

if TYPE_CHECKING:  # a service without Redis starts without it
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

current_caller = ContextVar("caller", default="")  # of the current request
request_id = ContextVar("request_id", default="-")
TIMEOUT_S = 0.1  # of Redis; nothing is retried
PAUSE_S = 5.0  # without Redis after a failure, so that requests do not wait for it again and again
_ENTRY = re.compile(
    r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-fA-F]{64})"
    r"(:(?P<right>read|write)(:(?P<collections>[A-Za-z0-9._+-]+))?)?"
)


@dataclass(frozen=True)
class ApiKey:
    """The name of a key, and its scope. collections: the names of those it opens; None for all."""

    name: str
    may_write: bool = False
    collections: frozenset[str] | None = None

    def opens(self, collection: str) -> bool:
        return self.collections is None or collection in self.collections


def new_key() -> str:
    return "dcar_" + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str) -> dict[str, ApiKey]:
    """Return keys by hash from NAME:HASH[:RIGHT[:COLLECTIONS]] entries. Raise ValueError, without hashes, if wrong."""
    keys: dict[str, ApiKey] = {}
    for entry in text.replace(",", " ").split():
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(
                "must be NAME:HASH pairs, separated by commas, as `dcar key NAME` prints them; "
                "a scope may follow, as in NAME:HASH:write:shoes+bags"
            )
        names = frozenset(match["collections"].split("+")) if match["collections"] else None
        keys[match["digest"].lower()] = ApiKey(match["name"], match["right"] == "write", names)
    if not keys:
        raise ValueError("has no key; leave it unset to serve everybody")
    return keys


def is_key(key: str, secret: str) -> bool:
    """Return True if `key` is the secret, which is in plain text or `sha256:HASH`."""
    is_hash, digest = secret.startswith("sha256:"), secret.removeprefix("sha256:").lower()
    return hmac.compare_digest(key_hash(key).encode(), (digest if is_hash else key_hash(secret)).encode())


def key_in(headers: Mapping[str, str]) -> str:
    """Return the key of a request, `Authorization: Bearer KEY` or `X-API-Key: KEY`; "" for none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return (key.strip() if scheme.lower() == "bearer" else "") or headers.get("x-api-key", "")


def network_of(address: str) -> str:
    """Return the address that requests are counted by: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        parsed = ip_address(address)
    except ValueError:  # a Unix socket, or a name
        return address
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return str(parsed) if parsed.version == 4 else str(ip_network((int(parsed), 64), strict=False))


def connect(url: str) -> "Redis":
    """Return a client, which connects at its first command. Raise ValueError, without the URL, if it is invalid."""
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.exceptions import RedisError

    try:
        pool = BlockingConnectionPool.from_url(url, max_connections=32)  # more commands wait for a free one
        pool.make_connection()  # type: ignore[no-untyped-call]  # checks its options before it connects
    except (RedisError, TypeError, ValueError):
        raise ValueError(
            "must be redis://[user:password@]host[:port][/db], rediss://.. or unix:///path, with options of redis-py; "
            "/ # ? @ in a password are written %2F %23 %3F %40"
        ) from None
    return Redis.from_pool(pool)


class RateLimiter:
    """Count the requests of each caller in a sliding window: in Redis if there is one, else in this process."""

    def __init__(self, rate: str, redis_url: str | None = None) -> None:
        self._rate, self._retry_at = parse(rate), 0.0
        self._client = connect(redis_url) if redis_url is not None else None
        storage: MemoryStorage | RedisStorage = MemoryStorage()
        if self._client is not None:
            shared: Any = {"connection_pool": self._client.connection_pool, "key_prefix": "dcar:rate"}
            storage = RedisStorage("async+redis://", implementation="redispy", **shared)
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def charge(self, caller: str, extra: int | None = None) -> float:
        """Count one request. Return 0 if it is allowed, else the seconds until a retry may succeed.

        extra: for a request that is counted already, its further cost. A cost above the limit counts as the limit.
        """
        count = 1 if extra is None else min(extra, self._rate.amount - 1)
        if count == 0 or time.monotonic() < self._retry_at:
            return 0.0
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if await self._limiter.hit(self._rate, caller, cost=count):
                    return 0.0
                stats = await self._limiter.get_window_stats(self._rate, caller)
                return max(0.01, stats.reset_time - time.time())
        except Exception as error:  # beside its own errors, redis-py raises whatever its parser does: TypeError, ..
            logger.warning("Redis failed (%r); rates are not limited for %g s", error, PAUSE_S)
            self._retry_at = time.monotonic() + PAUSE_S
            return 0.0

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
