"""Query embeddings, remembered: in this process, and behind that in Redis when DCAR_REDIS_URL is set.

- The key carries the encoder's fingerprint, the kind of query and a hash of the normalised text or of the image bytes:
  a retrained model never reads an old embedding, and no query text is stored.
- Values are float16, half the memory. A computed embedding is searched with as `rounded`, which is what the cache would
  give back for it, so an answer is the same to the bit whether it is computed, remembered here or read from Redis.
- Redis may be down, slow, full or wrong; a search never fails for it. Short timeouts, one attempt, a checksum over key
  and value, and a `Breaker` each for reading and for writing: a full Redis is still read.
- Writing does not delay the answer: `put` returns at once and the write goes on in the background, bounded in number.
"""

import asyncio
import hashlib
import zlib
from collections import OrderedDict
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from app.core.breaker import Breaker
from app.core.metrics import Metrics
from app.core.redis import STORE_FAULTS, connect, disconnect
from app.core.settings import Settings
from app.search.batching import Vector

_DTYPE = np.dtype("<f2")
_CHECK_BYTES = 4
_FORMAT = 2  # part of the key: raise it when the value's form changes
_MAX_WRITES = 256


def cache_key(fingerprint: str, kind: Literal["text", "image"], content: bytes) -> str:
    """The name of an embedding; equal content under another encoder has another name."""
    return f"dcar:{_FORMAT}:{fingerprint}:{kind}:{hashlib.sha256(content).hexdigest()}"


def rounded(vector: Vector) -> Vector:
    """What the cache gives back for a vector: float32 (E,) of unit length, with float16's precision."""
    return _widened(vector.astype(_DTYPE))


def _widened(half: NDArray[np.float16]) -> Vector:
    vector: Vector = half.astype(np.float32)
    vector /= np.sqrt(vector @ vector)  # a third of the time of np.linalg.norm
    return vector


class VectorCache(Protocol):
    """Where embeddings are remembered. No method raises for a fault of the store.

    shared: `get` may find what `peek` does not, since others write there too.
    """

    shared: bool

    def peek(self, key: str, dim: int, *, counted: bool = True) -> Vector | None:
        """The float32 (dim,) vector if it is known in this process. counted: as a hit or a miss, once a query."""

    async def get(self, key: str, dim: int) -> Vector | None:
        """The float32 (dim,) vector from wherever it is, or None when it is unknown, unusable or not there in time.

        To be asked after `peek`, which has counted the look into this process.
        """

    def put(self, key: str, vector: Vector) -> None:
        """Remember the vector, soon and if possible."""

    async def close(self) -> None:
        """Finish pending writes and let connections go."""


class MemoryCache:
    """Least recently used entries go first, beyond `size` of them."""

    shared = False

    def __init__(self, size: int, metrics: Metrics | None = None) -> None:
        self._size = size
        self._metrics = metrics or Metrics()
        self._entries: OrderedDict[str, NDArray[np.float16]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def peek(self, key: str, dim: int, *, counted: bool = True) -> Vector | None:
        entry = self._entries.get(key)
        known = entry is not None and entry.shape == (dim,)
        if counted and self._size:
            self._metrics.lookup("memory", "hit" if known else "miss")
        if entry is None or not known:
            return None
        self._entries.move_to_end(key)
        return _widened(entry)

    async def get(self, key: str, dim: int) -> Vector | None:
        return self.peek(key, dim, counted=False)

    def put(self, key: str, vector: Vector) -> None:
        self.keep(key, vector.astype(_DTYPE))

    def keep(self, key: str, half: NDArray[np.float16]) -> None:
        """Remember what is rounded already: doing it twice could change a bit."""
        if self._size == 0:
            return
        self._entries[key] = half
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)

    async def close(self) -> None:
        self._entries.clear()


class RedisCache:
    """Embeddings in Redis, with a lifetime, behind those in this process; shared by all that serve the same model.

    How much Redis holds is its own setting: `maxmemory` with `maxmemory-policy allkeys-lru`.
    """

    shared = True

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
        self.reading = Breaker(does="cached embeddings")
        self.writing = Breaker(does="caching new embeddings")
        self._redis = connect(url, timeout_s=timeout_s)
        self._writes: set[asyncio.Task[None]] = set()

    def peek(self, key: str, dim: int, *, counted: bool = True) -> Vector | None:
        return self._memory.peek(key, dim, counted=counted)

    async def get(self, key: str, dim: int) -> Vector | None:
        if not self.reading.allows():
            self._metrics.lookup("redis", "skipped")
            return None
        try:
            async with asyncio.timeout(self._timeout):
                value = await self._redis.get(key)
        except STORE_FAULTS as error:
            self.reading.failed(error)
            self._metrics.lookup("redis", "error")
            return None
        self.reading.succeeded()
        half = None if value is None else _unpack(key, value, dim)
        if half is None:
            self._metrics.lookup("redis", "miss" if value is None else "wrong")
            return None
        self._metrics.lookup("redis", "hit")
        self._memory.keep(key, half)
        return _widened(half)

    def put(self, key: str, vector: Vector) -> None:
        self._memory.put(key, vector)
        if len(self._writes) >= _MAX_WRITES or not self.writing.allows():
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
            self.writing.failed(error)
            self._metrics.write("error")
        else:
            self.writing.succeeded()
            self._metrics.write("ok")

    async def close(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes, timeout=1.0)
        await self._memory.close()
        await disconnect(self._redis)


def _pack(key: str, vector: Vector) -> bytes:
    """crc32 of key and value, little endian, then the value: float16 (E,)."""
    value = vector.astype(_DTYPE).tobytes()
    return zlib.crc32(value, zlib.crc32(key.encode())).to_bytes(_CHECK_BYTES, "little") + value


def _unpack(key: str, packed: object, dim: int) -> NDArray[np.float16] | None:
    """float16 (dim,), None when it is not what was once put under this key."""
    if not isinstance(packed, bytes) or len(packed) != _CHECK_BYTES + dim * _DTYPE.itemsize:
        return None
    check, value = packed[:_CHECK_BYTES], packed[_CHECK_BYTES:]
    if zlib.crc32(value, zlib.crc32(key.encode())) != int.from_bytes(check, "little"):
        return None
    half = np.frombuffer(value, _DTYPE)
    return half if np.isfinite(half).all() and half.any() else None


def make_cache(settings: Settings, metrics: Metrics | None = None) -> VectorCache:
    """The cache that the settings ask for. Does not connect: Redis may come later than the service."""
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
    metrics.watch(
        "dcar_redis_breaker_open",
        "1 while Redis is left alone because it failed.",
        ["use"],
        lambda: [(["read"], float(cache.reading.open)), (["write"], float(cache.writing.open))],
    )
    return cache
