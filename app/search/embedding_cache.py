"""Cached embeddings of queries: in this process and, with DCAR_REDIS_URL, in Redis behind it.

- A key holds the fingerprint of the encoder, the kind of query, and a hash of the normalised text or the image bytes.
  A retrained model never reads an old embedding, and no query text is stored.
- Values are float16. A computed embedding is rounded in the same way before it is used (`rounded`), so a search has the
  same results, to the bit, whether its embedding is computed, cached here or read from Redis.
- A search never fails because Redis is down, slow, full or corrupted: short timeouts, one attempt, a checksum over key
  and value, and one `CircuitBreaker` for reads and one for writes, so a full Redis is still read.
- `put` returns at once; the write runs in the background. The number of pending writes is bounded.
"""

import asyncio
import hashlib
import zlib
from collections import OrderedDict
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from app.core.breaker import CircuitBreaker
from app.core.metrics import Metrics
from app.core.redis import STORE_FAULTS, connect, disconnect
from app.core.settings import Settings
from dcar_core.util.arrays import Floats

_DTYPE = np.dtype("<f2")
_CHECKSUM_BYTES = 4
_FORMAT = 2  # part of the key; raise it when the format of a value changes
_MAX_WRITES = 256
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


class VectorCache(Protocol):
    """A cache of embeddings. No method raises when its store fails.

    Attributes:
        is_shared: True if other processes write to it, so `get` may find what `peek` does not.
    """

    is_shared: bool

    def peek(self, key: str, dim: int, *, counted: bool = True) -> Floats | None:
        """Return the vector, float32 (dim,), if this process has it.

        Args:
            counted: count a hit or a miss in the metrics. Do it once a query.
        """

    async def get(self, key: str, dim: int) -> Floats | None:
        """Return the vector, float32 (dim,), from any level; None if it is missing, unusable or late.

        Call it after `peek`, which has counted the lookup in this process.
        """

    def put(self, key: str, vector: Floats) -> None:
        """Cache the vector, soon and if possible."""

    async def close(self) -> None:
        """Finish pending writes and release connections."""


class MemoryCache:
    """Embeddings in this process; the least recently used entries beyond `size` are dropped."""

    is_shared = False

    def __init__(self, size: int, metrics: Metrics | None = None) -> None:
        self._size = size
        self._metrics = metrics or Metrics()
        self._entries: OrderedDict[str, NDArray[np.float16]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def peek(self, key: str, dim: int, *, counted: bool = True) -> Floats | None:
        entry = self._entries.get(key)
        if entry is not None and entry.shape != (dim,):
            entry = None
        if counted and self._size:
            self._metrics.lookup("memory", "miss" if entry is None else "hit")
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return _widened(entry)

    async def get(self, key: str, dim: int) -> Floats | None:
        return self.peek(key, dim, counted=False)

    def put(self, key: str, vector: Floats) -> None:
        self.put_half(key, vector.astype(_DTYPE))

    def put_half(self, key: str, half: NDArray[np.float16]) -> None:
        """Cache a vector that is rounded already: rounding twice could change a bit."""
        if self._size == 0:
            return
        self._entries[key] = half
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)

    async def close(self) -> None:
        self._entries.clear()


class RedisCache:
    """Embeddings in Redis, behind those in this process; shared by all services of the same model.

    Redis bounds its own memory: set `maxmemory` with `maxmemory-policy allkeys-lru`.

    Args:
        ttl_s: lifetime of an entry.
        timeout_s: of each read and write.
        memory: the level before Redis; None for Redis alone.
    """

    is_shared = True

    def __init__(
        self,
        url: str,
        *,
        ttl_s: int,
        timeout_s: float = 0.1,
        memory: MemoryCache | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._ttl = ttl_s
        self._timeout = timeout_s
        self._metrics = metrics or Metrics()
        self._memory = MemoryCache(0) if memory is None else memory
        self.read_breaker = CircuitBreaker(purpose="cached embeddings")
        self.write_breaker = CircuitBreaker(purpose="caching new embeddings")
        self._redis = connect(url, timeout_s=timeout_s)
        self._writes: set[asyncio.Task[None]] = set()

    def peek(self, key: str, dim: int, *, counted: bool = True) -> Floats | None:
        return self._memory.peek(key, dim, counted=counted)

    async def get(self, key: str, dim: int) -> Floats | None:
        if not self.read_breaker.allows():
            self._metrics.lookup("redis", "skipped")
            return None
        try:
            async with asyncio.timeout(self._timeout):
                value = await self._redis.get(key)
        except STORE_FAULTS as error:
            self.read_breaker.failed(error)
            self._metrics.lookup("redis", "error")
            return None
        self.read_breaker.succeeded()
        half = None if value is None else _unpack(key, value, dim)
        if half is None:
            self._metrics.lookup("redis", "miss" if value is None else "wrong")
            return None
        self._metrics.lookup("redis", "hit")
        self._memory.put_half(key, half)
        return _widened(half)

    def put(self, key: str, vector: Floats) -> None:
        self._memory.put(key, vector)
        if len(self._writes) >= _MAX_WRITES or not self.write_breaker.allows():
            self._metrics.write("skipped")
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
            self._metrics.write("error")
        else:
            self.write_breaker.succeeded()
            self._metrics.write("ok")

    async def close(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes, timeout=_CLOSE_TIMEOUT_S)
        await self._memory.close()
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


def make_cache(settings: Settings, metrics: Metrics | None = None) -> VectorCache:
    """Make the cache that the settings ask for. It does not connect: Redis may start later than the service."""
    metrics = metrics or Metrics()
    memory = MemoryCache(settings.cache_size, metrics)
    if settings.redis_url is None:
        return memory
    cache = RedisCache(
        settings.redis_url.get_secret_value(),
        ttl_s=settings.cache_ttl_s,
        timeout_s=settings.redis_timeout_ms / 1000,
        memory=memory,
        metrics=metrics,
    )
    metrics.add_gauge(
        "dcar_redis_breaker_open",
        "1 while Redis is not used because it failed.",
        ["use"],
        lambda: [(["read"], float(cache.read_breaker.is_open)), (["write"], float(cache.write_breaker.is_open))],
    )
    return cache
