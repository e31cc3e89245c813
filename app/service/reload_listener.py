"""Notices of new index versions over Redis, so a service reloads at once.

- A notice is only a hint for services that use Redis anyway: CURRENT decides which version is served, and is polled.
- One notice a second is read, so a flood of them costs nothing: each reload finds the newest version, whatever waits.
- After any failure the listener reconnects; failures are logged at debug level.
- Redis clusters are not supported here: a service that uses one relies on polling.
"""

import asyncio
import contextlib
import logging

from redis.asyncio import RedisCluster

from app.core.redis import connect, disconnect
from app.service.collections import Collections
from dcar_core.util.errors import DcarError
from index_jobs.store.manifest import PUBLISHED_CHANNEL

logger = logging.getLogger(__name__)

_RECONNECT_S = 5.0
_PAUSE_S = 1.0
_TIMEOUT_S = 5.0


async def listen(url: str, collections: Collections) -> None:
    """Reload all collections at each notice."""
    while True:
        client = connect(url, timeout_s=_TIMEOUT_S)
        if isinstance(client, RedisCluster):
            return
        try:
            async with client.pubsub() as channel:
                await channel.subscribe(PUBLISHED_CHANNEL)
                while True:
                    if await channel.get_message(ignore_subscribe_messages=True, timeout=_TIMEOUT_S):
                        with contextlib.suppress(DcarError):  # logged, and shown by /readyz
                            await collections.reload()
                        await asyncio.sleep(_PAUSE_S)
        except Exception as error:
            logger.debug("no notices from Redis: %s", error)
        finally:
            with contextlib.suppress(Exception):
                await disconnect(client)
        await asyncio.sleep(_RECONNECT_S)
