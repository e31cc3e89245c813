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
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from app.core.metrics import Metrics
from app.core.redis import CircuitBreaker, connect
from app.core.settings import Settings
from app.search.snapshots import Recent
from dcar_core.util.arrays import Floats

if TYPE_CHECKING:
    from redis.asyncio import Redis

_DTYPE = np.dtype("<f2")
_CHECKSUM_BYTES = 4
_FORMAT = 2  # part of the key; raise it when the format of a value changes
MAX_WRITES = 256  # pending at a time
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


class EmbeddingCache:
    """The most recently used embeddings in this process and, with DCAR_REDIS_URL, those in Redis behind them.

    Redis bounds its own memory: set `maxmemory` with `maxmemory-policy allkeys-lru`. Each read and write may take
    `redis_timeout_ms` of the settings.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        url, self._metrics = settings.redis_url, metrics
        self._entries = Recent[str, NDArray[np.float16]](settings.cache_size)
        self._ttl, self._timeout = settings.cache_ttl_s, settings.redis_timeout_ms / 1000
        self.is_shared = url is not None  # so `get` may find what `peek` does not
        self._redis = connect(url.get_secret_value()) if url else None  # connects when used
        self.read_breaker = CircuitBreaker("cached embeddings")
        self.write_breaker = CircuitBreaker("caching new embeddings")
        self._writes: set[asyncio.Task[None]] = set()

    def peek(self, key: str) -> Floats | None:
        """Return the vector, float32 (E,), if this process has it."""
        entry = self._entries.use(key)
        if self._entries.size:
            self._metrics.lookups.labels("memory", "miss" if entry is None else "hit").inc()
        return None if entry is None else _widened(entry)

    async def get(self, key: str, dim: int) -> Floats | None:
        """Return the vector, float32 (dim,), from Redis; None if it is missing, unusable or late."""
        if self._redis is None:
            return None
        half, outcome = None, "skipped"
        if self.read_breaker.allows():
            outcome = "error"
            async with self.read_breaker.attempt(self._timeout):
                value = await self._redis.get(key)
                half = None if value is None else _unpack(key, value, dim)
                outcome = "hit" if half is not None else "miss" if value is None else "wrong"
        self._metrics.lookups.labels("redis", outcome).inc()
        if half is None:
            return None
        self._entries.keep(key, half)  # rounding it again could change a bit
        return _widened(half)

    def put(self, key: str, vector: Floats) -> None:
        """Cache the vector, in Redis soon and if possible."""
        self._entries.keep(key, vector.astype(_DTYPE))
        if self._redis is None:
            return
        if len(self._writes) >= MAX_WRITES or not self.write_breaker.allows():
            self._metrics.writes.labels("skipped").inc()
            return
        task = asyncio.create_task(self._write(self._redis, key, _pack(key, vector)))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, redis: "Redis", key: str, value: bytes) -> None:
        outcome = "error"
        async with self.write_breaker.attempt(self._timeout):
            await redis.set(key, value, ex=self._ttl)
            outcome = "ok"
        self._metrics.writes.labels(outcome).inc()

    async def close(self) -> None:
        """Finish pending writes, and release the connections."""
        if self._writes:
            await asyncio.wait(self._writes, timeout=_CLOSE_TIMEOUT_S)
        if self._redis is not None:
            await self._redis.aclose()


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
