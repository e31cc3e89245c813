"""Redis of DCAR_REDIS_URL, whose failures end no request, and the vectors of queries
that its processes share in it.

- A key holds the fingerprint of the encoder and a hash of the text or image, never the
  words of a query. A retrained model reads no old vector.
- A digest stands before each vector: a damaged or foreign value is a miss.
- No search fails because of Redis: a slow or failing one is a miss, and is not used for
  the next seconds.
- Redis bounds its own memory: set `maxmemory`, with the policy `allkeys-lru`.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dcar_core.util.arrays import Floats

if TYPE_CHECKING:  # a service without Redis starts without it
    from redis.asyncio import Redis

T = TypeVar("T")
logger = logging.getLogger(__name__)

TIMEOUT_S = 0.1  # of a command; nothing is retried
_DTYPE = "<f4"  # of stored vectors
_DIGEST_BYTES = 16
PAUSE_S = 5.0  # after a failure, so that requests do not wait for Redis again and again


def connect(url: str) -> "Redis":
    """Return a client, which connects at its first command. Raise ValueError, without
    the URL, if it is invalid.
    """
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.exceptions import RedisError

    try:
        # more commands wait for a free one
        pool = BlockingConnectionPool.from_url(url, max_connections=32)
        pool.make_connection()  # type: ignore[no-untyped-call]  # checks its options before it connects
    except (RedisError, TypeError, ValueError):
        raise ValueError(
            "must be redis://[user:password@]host[:port][/db], rediss://.. or"
            " unix:///path, with options of redis-py; / # ? @ in a password are written"
            " %2F %23 %3F %40"
        ) from None
    return Redis.from_pool(pool)


class SharedRedis:
    """A client for one purpose. without: what a failure means, for the log."""

    def __init__(self, url: str, without: str) -> None:
        self.client = connect(url)
        self._without = without
        self._retry_at = 0.0

    async def attempt(self, use: Callable[[], Awaitable[T]]) -> T | None:
        """Return the result of a use of the client; None if it fails or is late, and
        for `PAUSE_S` after that.
        """
        if time.monotonic() < self._retry_at:
            return None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await use()
        except Exception as error:
            # beside its own errors, redis-py raises whatever its parser does:
            # TypeError, ..
            logger.warning(
                "Redis failed (%r); %s for %g s",
                error,
                self._without,
                PAUSE_S,
            )
            self._retry_at = time.monotonic() + PAUSE_S
            return None


class RedisCache:
    """A cache of vectors. Values are float32, so a search has the same results with a
    stored and a computed one.
    """

    def __init__(self, url: str, ttl_s: int) -> None:
        self._redis = SharedRedis(url, "vectors of queries are not shared")
        self._ttl_s = ttl_s
        self._writes = set[asyncio.Task[object]]()

    async def get(self, fingerprint: str, query: object, dim: int) -> Floats | None:
        """Return the vector (dim,) of a query; None if it is missing, late or
        damaged.
        """
        key = _key(fingerprint, query)
        value = await self._redis.attempt(lambda: self._redis.client.get(key))
        if not isinstance(value, bytes):
            return None
        digest = value[:_DIGEST_BYTES]
        content = value[_DIGEST_BYTES:]
        if digest != _digest(key, content):
            return None
        vector: Floats = np.frombuffer(content, _DTYPE)
        return vector if len(vector) == dim else None

    def put(self, fingerprint: str, query: object, vector: Floats) -> None:
        """Store a vector soon, if possible."""
        key = _key(fingerprint, query)
        content = vector.astype(_DTYPE).tobytes()
        value = _digest(key, content) + content
        store = partial(self._redis.client.set, key, value, ex=self._ttl_s)
        task = asyncio.create_task(self._redis.attempt(store))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """Finish pending writes, each within its time limit, and release the
        connections.
        """
        await asyncio.gather(*self._writes)
        await self._redis.client.aclose()


def _key(fingerprint: str, query: object) -> str:
    return (
        f"dcar:vector:{fingerprint}:{hashlib.sha256(repr(query).encode()).hexdigest()}"
    )


def _digest(key: str, content: bytes) -> bytes:
    """Return the digest that stands before a value: of the key too, so that the value
    of another query is damage.
    """
    return hashlib.blake2b(key.encode() + content, digest_size=_DIGEST_BYTES).digest()
