"""Rate limits: a sliding window for each caller, by `limits`, counted in Redis if there is one.

- A caller is the name of an API key where keys are required, else an address: of IPv6 the /64 network, which one host
  can use in full.
- While Redis fails, each process counts alone, so the limit is multiplied by the number of processes.
"""

from contextvars import ContextVar
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage
from limits.aio.storage.redis import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from app.core.redis import CircuitBreaker, connect

current_caller = ContextVar("caller", default="")  # of the current request
_MARGIN_S = 0.05  # added to the computed wait


def parse_rate(text: str) -> RateLimitItem:
    """Parse a rate such as "20/second" or "100 per 10 seconds". Raise ValueError unless it is one, of at least 1."""
    try:
        (rate,) = parse_many(text)
        if rate.amount >= 1:
            return rate
    except ValueError:
        pass
    raise ValueError("must be one rate such as 20/second or 600/minute")


def network_of(address: str) -> str:
    """Return the address that requests are counted by: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        parsed = ip_address(address)
    except ValueError:  # a Unix socket, or a name
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ip_network((int(parsed), 64), strict=False))


class RateLimiter:
    """Count the requests of each caller.

    Args:
        rate: see `parse_rate`.
        redis_url: where processes count together; None counts in this process.
        timeout_s: of each use of Redis.
    """

    def __init__(self, rate: str, *, redis_url: str | None = None, timeout_s: float = 0.1) -> None:
        self._rate = parse_rate(rate)
        self._timeout = timeout_s
        self._local = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._client = connect(redis_url) if redis_url is not None else None
        self._shared: SlidingWindowCounterRateLimiter | None = None
        self.breaker = CircuitBreaker("a shared count of requests")
        if self._client is not None:
            pool: Any = self._client.connection_pool
            storage = RedisStorage(
                "async+redis://", implementation="redispy", key_prefix="dcar:rate", connection_pool=pool
            )
            self._shared = SlidingWindowCounterRateLimiter(storage)

    async def charge(self, caller: str, extra: int | None = None) -> float:
        """Count one request. Return 0 if it is allowed, else the seconds until a retry may succeed.

        Args:
            extra: for a request that is counted already, its further cost. A cost above the limit counts as the limit.
        """
        count = 1 if extra is None else min(extra, self._rate.amount - 1)
        if count == 0:
            return 0.0
        if self._shared is not None and self.breaker.allows():
            async with self.breaker.attempt(self._timeout):
                return await self._hit(self._shared, caller, count)
        return await self._hit(self._local, caller, count)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _hit(self, limiter: SlidingWindowCounterRateLimiter, caller: str, count: int) -> float:
        if await limiter.hit(self._rate, caller, cost=count):
            return 0.0
        storage: Any = limiter.storage
        window = await storage.get_sliding_window(self._rate.key_for(caller), self._rate.get_expiry())
        # A refused request with extra cost counts its first unit again when it is retried.
        return seconds_until_room(self._rate, count if count == 1 else count + 1, *window) + _MARGIN_S


def seconds_until_room(
    rate: RateLimitItem, count: int, earlier: int, earlier_ends_in: float, current: int, current_ends_in: float
) -> float:
    """Return the seconds until `count` more are allowed if nothing else is requested meanwhile.

    The current window counts in full, and the one before it by the part that the sliding window still covers. The
    latter falls to nothing in the rest of this window, and the current count in the whole of the next. `limits` rounds
    down.
    """
    expiry, below = rate.get_expiry(), rate.amount - count + 1
    rest = current_ends_in % expiry or expiry
    if current < below and earlier:
        return max(0.0, earlier_ends_in - (below - current) * expiry / earlier)
    return rest + expiry * max(0.0, 1 - below / current) if current >= below else 0.0
