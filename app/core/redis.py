"""Redis of DCAR_REDIS_URL, whose failures end no request."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # a service without Redis starts without it
    from redis.asyncio import Redis

T = TypeVar("T")
logger = logging.getLogger(__name__)

TIMEOUT_S = 0.1  # of a command; nothing is retried
PAUSE_S = 5.0  # after a failure, so that requests do not wait for Redis again and again


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


class SharedRedis:
    """A client for one purpose. without: what a failure means, for the log."""

    def __init__(self, url: str, without: str) -> None:
        self.client, self._without, self._retry_at = connect(url), without, 0.0

    async def attempt(self, use: Callable[[], Awaitable[T]]) -> T | None:
        """Return the result of a use of the client; None if it fails or is late, and for `PAUSE_S` after that."""
        if time.monotonic() < self._retry_at:
            return None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await use()
        except Exception as error:  # beside its own errors, redis-py raises whatever its parser does: TypeError, ..
            logger.warning("Redis failed (%r); %s for %g s", error, self._without, PAUSE_S)
            self._retry_at = time.monotonic() + PAUSE_S
            return None
