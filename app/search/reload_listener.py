"""Hearing of a new index version at once: the channel on which index jobs announce what they published.

- Only a hint, where the service has a Redis anyway: CURRENT alone says what is served, and is still looked at.
- Whatever happens to the connection, it is made anew, without a word louder than a debug line.
- A Redis cluster is not listened to; services with one look at CURRENT.
"""

import asyncio
import contextlib
import logging

from redis.asyncio import RedisCluster

from app.core.redis import connect, disconnect
from app.search.collections import Collections
from dcar_core.util.errors import DcarError
from index_jobs.store.notify import CHANNEL

log = logging.getLogger(__name__)

_AGAIN_S = 5.0
_TIMEOUT_S = 5.0


class Announcements:
    """Listens while the service runs."""

    def __init__(self, url: str, collections: Collections) -> None:
        self._url, self._collections = url, collections
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen, in the background."""
        self._task = asyncio.create_task(self._run(), name="dcar-announcements")

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            client = connect(self._url, timeout_s=_TIMEOUT_S)
            if isinstance(client, RedisCluster):
                return
            try:
                async with client.pubsub() as channel:
                    await channel.subscribe(CHANNEL)
                    while True:
                        if await channel.get_message(ignore_subscribe_messages=True, timeout=_TIMEOUT_S):
                            with contextlib.suppress(DcarError):  # it is logged, and readiness tells it
                                await self._collections.reload()
            except Exception as error:  # whatever it is, polling goes on, and so does this
                log.debug("no announcements from Redis: %s", error)
            finally:
                with contextlib.suppress(Exception):
                    await disconnect(client)
            await asyncio.sleep(_AGAIN_S)
