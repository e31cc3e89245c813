"""Query embeddings, remembered: in Redis when DCAR_REDIS_URL is set, else in this process.

- The key carries the encoder's fingerprint, the kind of query and a hash of the normalised text or of the image bytes:
  a retrained model never reads an old embedding, and no query text is stored.
- The value is the float32 vector, little endian: what comes back is bit for bit what was put in, so a cached answer has
  the ranks and scores of an uncached one. (float16 would halve 2 KB an entry and could swap near ties.)
- Redis may be down, slow, full or wrong; a search never fails for it. Short timeouts, one attempt, values checked for
  size and finiteness, and a `Breaker`: after a few failures in a row Redis is left alone for some seconds.
- Writing does not delay the answer: `put` returns at once and the write goes on in the background, bounded in number.
"""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from typing import Literal, Protocol

import numpy as np
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.batching import Vector
from app.settings import Settings

log = logging.getLogger(__name__)

_DTYPE = np.dtype("<f4")
_FORMAT = 1  # part of the key: raise it when the value's form changes
_MAX_WRITES = 256


def cache_key(fingerprint: str, kind: Literal["text", "image"], content: bytes) -> str:
    """The name of an embedding; equal content under another encoder has another name."""
    return f"dcar:{_FORMAT}:{fingerprint}:{kind}:{hashlib.sha256(content).hexdigest()}"


class VectorCache(Protocol):
    """Where embeddings are remembered. No method raises for a fault of the store."""

    async def get(self, key: str, dim: int) -> Vector | None:
        """The float32 (dim,) vector, or None when it is unknown, unusable or not there in time."""

    def put(self, key: str, vector: Vector) -> None:
        """Remember the vector, soon and if possible."""

    async def close(self) -> None:
        """Finish pending writes and let connections go."""


class MemoryCache:
    """Least recently used entries go first, beyond `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[str, Vector] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: str, dim: int) -> Vector | None:
        vector = self._entries.get(key)
        if vector is None or vector.shape != (dim,):
            return None
        self._entries.move_to_end(key)
        return vector

    def put(self, key: str, vector: Vector) -> None:
        entry = vector.copy()
        entry.flags.writeable = False  # it is handed to many
        self._entries[key] = entry
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)

    async def close(self) -> None:
        self._entries.clear()


class Breaker:
    """Open after `failures` in a row: then `allows()` is False for `pause_s`, and True once for a trial after that."""

    def __init__(self, failures: int = 3, pause_s: float = 5.0) -> None:
        self._limit = failures
        self._pause = pause_s
        self._failures = 0
        self._retry_at = 0.0

    @property
    def open(self) -> bool:
        """Whether the last word was that the store is out of order."""
        return self._failures >= self._limit

    def allows(self) -> bool:
        """Whether to try the store now."""
        if not self.open:
            return True
        now = time.monotonic()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._pause  # one trial, not a stampede
        return True

    def succeeded(self) -> None:
        """The store answered."""
        if self.open:
            log.info("Redis is back; the cache is in use again")
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """The store did not answer, or not in time."""
        self._failures += 1
        if self._failures == self._limit:
            log.warning("Redis fails (%s); searching without the cache", str(error) or type(error).__name__)
        if self.open:
            self._retry_at = time.monotonic() + self._pause


class RedisCache:
    """Embeddings in Redis, with a lifetime; shared by all processes that serve the same model."""

    def __init__(self, url: str, *, ttl_s: int, timeout_s: float = 0.1, breaker: Breaker | None = None) -> None:
        self._ttl = ttl_s
        self._timeout = timeout_s
        self.breaker = breaker or Breaker()
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=32,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis = Redis.from_pool(pool)
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, key: str, dim: int) -> Vector | None:
        if not self.breaker.allows():
            return None
        try:
            async with asyncio.timeout(self._timeout):
                value = await self._redis.get(key)
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            self.breaker.failed(error)
            return None
        self.breaker.succeeded()
        if not isinstance(value, bytes) or len(value) != dim * _DTYPE.itemsize:
            return None
        vector: Vector = np.frombuffer(value, _DTYPE).astype(np.float32, copy=False)
        return vector if np.isfinite(vector).all() else None

    def put(self, key: str, vector: Vector) -> None:
        if len(self._writes) >= _MAX_WRITES or not self.breaker.allows():
            return
        task = asyncio.create_task(self._write(key, vector.astype(_DTYPE).tobytes()))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, key: str, value: bytes) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._redis.set(key, value, ex=self._ttl)
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            self.breaker.failed(error)
        else:
            self.breaker.succeeded()

    async def close(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes, timeout=1.0)
        await self._redis.aclose()


def make_cache(settings: Settings) -> VectorCache:
    """The cache that the settings ask for. Does not connect: Redis may come later than the service."""
    if settings.redis_url is None:
        return MemoryCache(settings.cache_size)
    return RedisCache(
        settings.redis_url.get_secret_value(), ttl_s=settings.cache_ttl_s, timeout_s=settings.redis_timeout_ms / 1000
    )
