"""Redis of DCAR_REDIS_URL, and when to stop asking it.

Nothing is retried, and a client has no time limits of its own: `CircuitBreaker.attempt` bounds each use.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a service without Redis starts without it
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

PAUSE_S = 5.0  # between two trials of a store that failed
KNOWN_S = 60.0  # after the last trial; without requests nobody tries whether a store responds again
_MOST_FAILURES = 3
_MAX_CONNECTIONS = 32  # more commands wait for a free one
_USAGE = (
    "must be redis://[user:password@]host[:port][/db], rediss://.. or unix:///path; / # ? @ in a password are written "
    "%2F %23 %3F %40"
)


def connect(url: str) -> "Redis":
    """Return a client, which connects at its first command. Options of redis-py follow a URL as a query string.

    Raise ValueError if the URL is invalid. The message does not repeat it: it may hold a password.
    """
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.exceptions import RedisError

    try:
        pool = BlockingConnectionPool.from_url(url, max_connections=_MAX_CONNECTIONS)
        pool.make_connection()  # type: ignore[no-untyped-call]  # checks its options before it connects
    except RedisError as error:
        raise ValueError(f"has an invalid option: {error}") from None
    except TypeError:
        raise ValueError("has an option that redis-py does not know") from None
    except ValueError:  # its message may quote the URL
        raise ValueError(_USAGE) from None
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if (file := pool.connection_kwargs.get(name)) and not Path(file).is_file():
            raise ValueError(f"names {file} as {name}, but the file does not exist")
    return Redis.from_pool(pool)


class CircuitBreaker:
    """Stop using a failing store, so callers do not wait for it again and again.

    After three failures in a row, one use in five seconds is allowed. Log lines name the `purpose`.
    """

    def __init__(self, purpose: str) -> None:
        self._purpose, self._failures, self._retry_at = purpose, 0, 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= _MOST_FAILURES

    @property
    def is_known_open(self) -> bool:
        """True if it is open, and the store was tried a short time ago."""
        return self.is_open and time.monotonic() < self._retry_at + KNOWN_S

    def allows(self) -> bool:
        """Return True if the store may be used now."""
        now = time.monotonic()
        if self.is_open and now < self._retry_at:
            return False
        self._retry_at = now + PAUSE_S  # one trial, not a stampede
        return True

    @asynccontextmanager
    async def attempt(self, timeout_s: float) -> AsyncIterator[None]:
        """Use the store in the body, which a failure ends, or the time; both are recorded and go no further."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except Exception as error:  # beside its own errors, redis-py raises whatever its parser does: TypeError, ..
            self._failures += 1
            if self._failures == _MOST_FAILURES:
                reason = str(error) or type(error).__name__
                logger.warning("Redis failed (%s); going on without %s", reason, self._purpose)
        else:
            if self.is_open:
                logger.info("Redis responds again; %s resumed", self._purpose)
            self._failures = 0
