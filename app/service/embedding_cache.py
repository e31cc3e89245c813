"""Cached embeddings of queries: in this process and, with DCAR_REDIS_URL, in Redis behind it.

- A key holds the fingerprint of the encoder, the kind of query, and a hash of the normalized text or the image bytes.
  A retrained model never reads an old embedding, and no query text is stored.
- Values are float16. A computed embedding is rounded in the same way before it is used (`rounded`), so a search has the
  same results, to the bit, whether its embedding is computed, cached here or read from Redis.
- A search never fails because Redis is down, slow, full or corrupted: short timeouts, one attempt, a checksum over key
  and value, and one `CircuitBreaker` for reads and one for writes, so a full Redis is still read.
"""

import asyncio
import hashlib
import zlib
from collections import OrderedDict
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.core.metrics import Metrics
from app.core.redis import STORE_FAULTS, CircuitBreaker, connect, disconnect
from app.core.settings import Settings
from dcar_core.util.arrays import Floats

_DTYPE = np.dtype("<f2")
_CHECKSUM_BYTES = 4
_FORMAT = 2  # part of the key; raise it when the format of a value changes
_MAX_WRITES = 256  # pending at a time
_CLOSE_TIMEOUT_S = 1.0


def cache_key(fingerprint: str, kind: Literal["text", "image"], content: bytes) -> str:
    """Return the key of an embedding. Equal content has another key under another encoder."""
    return f"dcar:{_FORMAT}:{fingerprint}:{kind}:{hashlib.sha256(content).hexdigest()}"


def rounded(vector: Floats) -> Floats:
    """Return a vector as the cache returns it: float32 (E,) of unit length, with the precision of float16."""
    return _widened(vector.astype(_DTYPE))


def _widened(half: NDArray[np.float16]) -> Floats:
    vector: Floats = half.astype(np.float32)
    vector /= np.sqrt(vector @ vector)  # three times as fast as np.linalg.norm
    return vector


class MemoryCache:
    """Embeddings in this process; the least recently used entries beyond `size` are dropped.

    Attributes:
        is_shared: True if other processes write to it, so `get` may find what `peek` does not.
    """

    is_shared = False

    def __init__(self, size: int, metrics: Metrics | None = None) -> None:
        self._size = size
        self._metrics = metrics or Metrics()
        self._entries: OrderedDict[str, NDArray[np.float16]] = OrderedDict()

    def peek(self, key: str, *, counted: bool = True) -> Floats | None:
        """Return the vector, float32 (E,), if this process has it.

        Args:
            counted: count a hit or a miss in the metrics. Do it once a query.
        """
        entry = self._entries.get(key)
        if counted and self._size:
            self._metrics.lookups.labels("memory", "miss" if entry is None else "hit").inc()
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return _widened(entry)

    async def get(self, key: str, dim: int) -> Floats | None:
        """Return the vector, float32 (dim,), from any level; None if it is missing, unusable or late.

        Call it after `peek`, which has counted the lookup in this process.
        """
        return self.peek(key, counted=False)

    def put(self, key: str, vector: Floats) -> None:
        """Cache the vector, soon and if possible."""
        self._keep(key, vector.astype(_DTYPE))

    async def close(self) -> None:
        """Finish pending writes and release connections."""

    def _keep(self, key: str, half: NDArray[np.float16]) -> None:
        """Cache a vector that is rounded already: rounding twice could change a bit."""
        self._entries[key] = half
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)


class RedisCache(MemoryCache):
    """Embeddings in Redis, behind those in this process; shared by all services of the same model.

    Redis bounds its own memory: set `maxmemory` with `maxmemory-policy allkeys-lru`.

    Args:
        ttl_s: lifetime of an entry.
        timeout_s: of each read and write.
        size: number of entries in this process.
    """

    is_shared = True

    def __init__(
        self, url: str, *, ttl_s: int, timeout_s: float = 0.1, size: int = 0, metrics: Metrics | None = None
    ) -> None:
        super().__init__(size, metrics)
        self._ttl = ttl_s
        self._timeout = timeout_s
        self.read_breaker = CircuitBreaker(purpose="cached embeddings")
        self.write_breaker = CircuitBreaker(purpose="caching new embeddings")
        self._redis = connect(url, timeout_s=timeout_s)
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, key: str, dim: int) -> Floats | None:
        if not self.read_breaker.allows():
            self._metrics.lookups.labels("redis", "skipped").inc()
            return None
        try:
            async with asyncio.timeout(self._timeout):
                value = await self._redis.get(key)
        except STORE_FAULTS as error:
            self.read_breaker.failed(error)
            self._metrics.lookups.labels("redis", "error").inc()
            return None
        self.read_breaker.succeeded()
        half = None if value is None else _unpack(key, value, dim)
        if half is None:
            self._metrics.lookups.labels("redis", "miss" if value is None else "wrong").inc()
            return None
        self._metrics.lookups.labels("redis", "hit").inc()
        self._keep(key, half)
        return _widened(half)

    def put(self, key: str, vector: Floats) -> None:
        super().put(key, vector)
        if len(self._writes) >= _MAX_WRITES or not self.write_breaker.allows():
            self._metrics.writes.labels("skipped").inc()
            return
        task = asyncio.create_task(self._write(key, _pack(key, vector)))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, key: str, value: bytes) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._redis.set(key, value, ex=self._ttl)
        except STORE_FAULTS as error:
            self.write_breaker.failed(error)
            self._metrics.writes.labels("error").inc()
        else:
            self.write_breaker.succeeded()
            self._metrics.writes.labels("ok").inc()

    async def close(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes, timeout=_CLOSE_TIMEOUT_S)
        await disconnect(self._redis)


def _pack(key: str, vector: Floats) -> bytes:
    """Return the crc32 of key and value, little endian, then the value: float16 (E,)."""
    value = vector.astype(_DTYPE).tobytes()
    return zlib.crc32(value, zlib.crc32(key.encode())).to_bytes(_CHECKSUM_BYTES, "little") + value


def _unpack(key: str, packed: object, dim: int) -> NDArray[np.float16] | None:
    """Return the value, float16 (dim,), or None if it is not what `_pack` made for this key."""
    if not isinstance(packed, bytes) or len(packed) != _CHECKSUM_BYTES + dim * _DTYPE.itemsize:
        return None
    checksum, value = packed[:_CHECKSUM_BYTES], packed[_CHECKSUM_BYTES:]
    if zlib.crc32(value, zlib.crc32(key.encode())) != int.from_bytes(checksum, "little"):
        return None
    half = np.frombuffer(value, _DTYPE)
    return half if np.isfinite(half).all() and half.any() else None


def make_cache(settings: Settings, metrics: Metrics) -> MemoryCache:
    """Make the cache that the settings ask for. It does not connect: Redis may start later than the service."""
    if settings.redis_url is None:
        return MemoryCache(settings.cache_size, metrics)
    return RedisCache(
        settings.redis_url.get_secret_value(),
        ttl_s=settings.cache_ttl_s,
        timeout_s=settings.redis_timeout_ms / 1000,
        size=settings.cache_size,
        metrics=metrics,
    )
