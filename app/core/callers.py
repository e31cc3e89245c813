"""Who calls: API keys, known to the service only by their hashes, and the rates of
callers.

- A key has 256 random bits, so a plain SHA-256 cannot be reversed and no slow hash is
  needed.
- A caller is the name of a key where keys are required, else an address: of IPv6 the
  /64 network, which one host has.
- While Redis fails, no rate is limited.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.storage.redis import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from app.core.redis import SharedRedis

current_caller = ContextVar("caller", default="")  # of the current request
request_id = ContextVar("request_id", default="-")
VIEWS = 50  # pictures and parts of pages for each search
MIN_ADMIN_KEY = 16  # characters of a key in plain text
_SHA256 = re.compile("[0-9a-fA-F]{64}")
_ENTRY = re.compile(
    r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-fA-F]{64})"
    r"(:(?P<right>read|write)(:(?P<collections>[A-Za-z0-9._+-]+))?)?"
)


@dataclass(frozen=True)
class ApiKey:
    """The name of a key, and its scope. collections: the names of those it opens; None
    for all.
    """

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
    """Return keys by hash from NAME:HASH[:RIGHT[:COLLECTIONS]] entries. Raise
    ValueError, without hashes, if wrong.
    """
    keys: dict[str, ApiKey] = {}
    for entry in text.replace(",", " ").split():
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(
                "must be NAME:HASH pairs, separated by commas, as `dcar key NAME`"
                " prints them; a scope may follow, as in NAME:HASH:write:shoes+bags"
            )
        if match["collections"]:
            names = frozenset(match["collections"].split("+"))
        else:
            names = None
        keys[match["digest"].lower()] = ApiKey(
            match["name"],
            match["right"] == "write",
            names,
        )
    if not keys:
        raise ValueError("has no key; leave it unset to serve everybody")
    return keys


def parse_admin_key(text: str) -> str:
    """Return `sha256:HASH` of the admin key from this form, from the line of `dcar key`
    or from the key itself. Raise ValueError, without the key, if it is
    neither or too short.
    """
    text = text.strip()
    name, _, digest = text.rpartition(":")
    if name and _SHA256.fullmatch(digest):
        return f"sha256:{digest.lower()}"
    if text.startswith("sha256:"):
        raise ValueError("must have 64 hexadecimal digits after sha256:")
    if len(text) < MIN_ADMIN_KEY:
        raise ValueError(
            f"must have at least {MIN_ADMIN_KEY} characters; `dcar key admin` makes one"
        )
    return f"sha256:{key_hash(text)}"


def is_key(key: str, secret: str) -> bool:
    """Return True if a key is the one of `sha256:HASH`."""
    return hmac.compare_digest(f"sha256:{key_hash(key)}".encode(), secret.encode())


def key_in(headers: Mapping[str, str]) -> str:
    """Return the key of a request, `Authorization: Bearer KEY` or `X-API-Key: KEY`; ""
    for none.
    """
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return (key.strip() if scheme.lower() == "bearer" else "") or headers.get(
        "x-api-key", ""
    )


def path_signature(path: str, expires: str, secret: str) -> str:
    """Return the HMAC-SHA256 of a decoded path and the Unix time until which it opens,
    in hexadecimal digits.
    """
    return hmac.new(
        secret.encode(),
        f"{path}\n{expires}".encode(),
        hashlib.sha256,
    ).hexdigest()


class RateLimiter:
    """Count the requests of each caller in a sliding window: in Redis if there is one,
    else in this process.

    Views, which a page shows beside its searches, are counted apart; VIEWS times as
    many are allowed.
    """

    def __init__(self, rate: str, redis_url: str | None = None) -> None:
        self._rate = parse(rate)
        self._views = type(self._rate)(
            VIEWS * self._rate.amount,
            self._rate.multiples,
            "views",
        )
        self._redis = (
            SharedRedis(redis_url, "rates are not limited")
            if redis_url is not None
            else None
        )
        storage: MemoryStorage | RedisStorage = MemoryStorage()
        if self._redis is not None:
            shared: Any = {
                "connection_pool": self._redis.client.connection_pool,
                "key_prefix": "dcar:rate",
            }
            storage = RedisStorage("async+redis://", implementation="redispy", **shared)
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def charge(
        self,
        caller: str,
        extra: int | None = None,
        *,
        is_view: bool = False,
    ) -> float:
        """Count one request. Return 0 if it is allowed, else the seconds until a retry
        may succeed.

        extra: for a request that is counted already, its further cost. A cost above the
        limit counts as the limit.
        """
        count = 1 if extra is None else min(extra, self._rate.amount - 1)
        if count == 0:
            return 0.0
        rate = self._views if is_view else self._rate
        if self._redis is None:
            return await self._count(rate, caller, count)
        return (
            await self._redis.attempt(lambda: self._count(rate, caller, count)) or 0.0
        )

    async def _count(self, rate: RateLimitItem, caller: str, count: int) -> float:
        if await self._limiter.hit(rate, caller, cost=count):
            return 0.0
        stats = await self._limiter.get_window_stats(rate, caller)
        return max(0.01, stats.reset_time - time.time())

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.client.aclose()
