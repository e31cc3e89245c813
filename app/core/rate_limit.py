"""How much one caller may ask in a time: a sliding window by `limits`, counted in Redis when there is one.

A caller is the name of an API key where keys are required, else an address. While Redis fails, each process counts for
itself; that is more generous by as many processes as there are, and better than refusing everybody or nobody.
"""

import asyncio
from typing import Any

from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage
from limits.aio.storage.redis import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from app.core.breaker import Breaker
from app.core.redis import STORE_FAULTS, Client, connect, disconnect

_HAIR_S = 0.05  # beyond the very moment


def parse_rate(text: str) -> RateLimitItem:
    """ "20/second", "600/minute", "100 per 10 seconds".

    Raises:
        ValueError: it is none, several, or one of nothing.
    """
    try:
        (rate,) = parse_many(text)
        if rate.amount >= 1:
            return rate
    except ValueError:
        pass
    raise ValueError("must be one rate such as 20/second or 600/minute")


class Rates:
    """Counts what callers ask."""

    def __init__(self, rate: str, *, redis_url: str | None = None, timeout_s: float = 0.1) -> None:
        self._rate = parse_rate(rate)
        self._timeout = timeout_s
        self._here = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._client: Client | None = None
        self._shared: SlidingWindowCounterRateLimiter | None = None
        self.breaker = Breaker(does="a common count of requests")
        if redis_url is not None:
            self._client = connect(redis_url, timeout_s=timeout_s)
            self._shared = SlidingWindowCounterRateLimiter(_Storage(self._client))

    async def wait_for(self, caller: str, more: int | None = None) -> float:
        """Count one request; 0 when it may go on, else the seconds until it is worth trying again.

        Args:
            more: the request is counted already, but asks for so much more. What the rate never allows at a time counts
                as all that it allows.
        """
        count = 1 if more is None else min(more, self._rate.amount - 1)
        if count == 0:
            return 0.0
        if self._shared is not None and self.breaker.allows():
            try:
                async with asyncio.timeout(self._timeout):
                    wait = await self._ask(self._shared, caller, count)
            except STORE_FAULTS as error:
                self.breaker.failed(error)
            else:
                self.breaker.succeeded()
                return wait
        return await self._ask(self._here, caller, count)

    async def _ask(self, limiter: SlidingWindowCounterRateLimiter, caller: str, count: int) -> float:
        if await limiter.hit(self._rate, caller, cost=count):
            return 0.0
        storage: Any = limiter.storage
        expiry = self._rate.get_expiry()
        known = await storage.get_sliding_window(self._rate.key_for(caller), expiry)
        # What a request asks for beyond the first is refused with that one counted: next time it is counted anew.
        return _room_in(self._rate, count if count == 1 else count + 1, *known) + _HAIR_S

    async def close(self) -> None:
        """Let the connections go."""
        if self._client is not None:
            await disconnect(self._client)


def _room_in(
    rate: RateLimitItem, count: int, earlier: int, earlier_ends_in: float, current: int, current_ends_in: float
) -> float:
    """The seconds until `count` more are allowed if nothing else is asked meanwhile.

    What counts is the current window, and of the one before the part that the sliding one still covers: that falls to
    nothing in the rest of this window, and what is now current in the whole of the next. `limits` rounds it down.
    """
    expiry, below = rate.get_expiry(), rate.amount - count + 1
    rest = current_ends_in % expiry or expiry
    if current < below and earlier:
        return max(0.0, earlier_ends_in - (below - current) * expiry / earlier)
    return rest + expiry * max(0.0, 1 - below / current) if current >= below else 0.0


class _Storage(RedisStorage):
    """limits' storage on a client of ours, which may be a sentinel's or a cluster's."""

    def __init__(self, client: Client) -> None:
        self._client = client
        super().__init__("async+redis://", implementation="redispy", key_prefix="dcar:rate")

    def configure_bridge(self) -> None:
        bridge: Any = self.bridge
        bridge.storage = self._client
        bridge.connection_getter = lambda _: self._client
