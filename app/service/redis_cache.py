"""Vectors of queries in Redis, which all processes with the same DCAR_REDIS_URL share.

- A key holds the fingerprint of the encoder and a hash of the text or image, never the words of a query. A retrained
  model reads no old vector.
- No search fails because of Redis: a slow or failing one is a miss, and is not used for the next seconds.
- Redis bounds its own memory: set `maxmemory`, with the policy `allkeys-lru`.
"""

import asyncio
import hashlib
from functools import partial

import numpy as np

from app.core.redis import SharedRedis
from dcar_core.util.arrays import Floats

_DTYPE = "<f4"


class RedisCache:
    """A cache of vectors. Values are float32, so a search has the same results with a stored and a computed one."""

    def __init__(self, url: str, ttl_s: int) -> None:
        self._redis, self._ttl_s = SharedRedis(url, "vectors of queries are not shared"), ttl_s
        self._writes = set[asyncio.Task[object]]()

    async def get(self, fingerprint: str, query: object, dim: int) -> Floats | None:
        """Return the vector (dim,) of a query; None if it is missing, late or damaged."""
        value = await self._redis.attempt(lambda: self._redis.client.get(_key(fingerprint, query)))
        if not isinstance(value, bytes) or len(value) != dim * np.dtype(_DTYPE).itemsize:
            return None
        vector: Floats = np.frombuffer(value, _DTYPE)
        return vector if np.isfinite(vector).all() else None

    def put(self, fingerprint: str, query: object, vector: Floats) -> None:
        """Store a vector soon, if possible."""
        key, value = _key(fingerprint, query), vector.astype(_DTYPE).tobytes()
        store = partial(self._redis.client.set, key, value, ex=self._ttl_s)
        task = asyncio.create_task(self._redis.attempt(store))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """Finish pending writes, each within its time limit, and release the connections."""
        await asyncio.gather(*self._writes)
        await self._redis.client.aclose()


def _key(fingerprint: str, query: object) -> str:
    return f"dcar:vector:{fingerprint}:{hashlib.sha256(repr(query).encode()).hexdigest()}"
