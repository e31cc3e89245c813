"""Limits of request bodies as they arrive, and the end of abandoned requests.

- A body that announces too much is refused unread; a chunked one is refused at the first byte over its limit.
- A body must be complete within `upload_timeout_s`. All requests together may hold `max_in_flight_bytes`; a body beyond
  that is refused. The first UNCOUNTED_BYTES of each do not count, so text searches never compete with uploads.
- Bytes that a request fetches count as those of its body: see `byte_counter`.
- A request whose client disconnects is cancelled, and the batcher skips its work.
"""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.problems import Problem
from app.core.settings import Settings
from app.http.access import Policy

UNCOUNTED_BYTES = 64 * 2**10
WATCH_AFTER_S = 0.05  # most requests are answered before
_COUNT_BYTES = "dcar.count_bytes"  # scope key


def byte_counter(scope: Scope) -> Callable[[int], None]:
    """Return the function that counts bytes which a request holds beside its body, such as of images that it fetches.

    It raises Problem if they exceed the budget.
    """
    count: Callable[[int], None] = scope[_COUNT_BYTES]
    return count


class BodyLimit:
    """Limit the bodies of requests by the policies of their routes and by the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._held = 0  # bytes of all requests in progress

    async def run(self, app: ASGIApp, policy: Policy, scope: Scope, receive: Receive, send: Send) -> None:
        """Call an application with a limited body. Raise Problem if the body is refused."""
        limit, (announced, has_body) = policy.body(self._settings), _announced(scope)
        if announced > limit:
            raise _too_large(limit, policy.field)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.upload_timeout_s
        received = held = 0
        watchers: list[asyncio.TimerHandle | asyncio.Task[None]] = []

        def count(size: int) -> None:
            nonlocal received, held
            received += size
            more = max(0, received - UNCOUNTED_BYTES) - held
            is_alone = self._held == held  # then it has room
            if more and not is_alone and self._held + more > self._settings.max_in_flight_bytes:
                detail = "Too many uploads are in progress. Try again in 1 s."
                raise Problem(503, detail, headers={"Retry-After": "1"}, refused="uploads")
            held += more
            self._held += more

        async def limited_receive() -> Message:
            if watchers:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"The body did not arrive within {self._settings.upload_timeout_s:g} seconds."
                raise Problem(408, detail, refused="slow_body") from None
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                if received + size > limit:
                    raise _too_large(limit, policy.field)
                count(size)
                if not message.get("more_body", False):
                    watch()
            return message

        def watch() -> None:
            """Look for the end of the connection once the body is complete: the watcher would take its messages."""
            watchers.append(loop.call_later(WATCH_AFTER_S, lambda: watchers.append(loop.create_task(wait_for_end()))))

        async def wait_for_end() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            connected.reschedule(loop.time())

        scope[_COUNT_BYTES] = count
        try:
            async with asyncio.timeout(None) as connected:
                if not has_body:
                    watch()
                await app(scope, limited_receive, send)
        except TimeoutError:
            if not connected.expired():
                raise
        finally:
            self._held -= held
            for each in watchers:
                each.cancel()


def _announced(scope: Scope) -> tuple[int, bool]:
    """Return the announced length of the body (0 if unknown), and True if the request has a body.

    A request has a body if Content-Length or Transfer-Encoding says so, whatever its method.
    """
    length, is_chunked = 0, False
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value) if value.isdigit() else 0
        elif name == b"transfer-encoding":
            is_chunked = True
    return length, bool(length) or is_chunked


def _too_large(limit: int, field: str) -> Problem:
    size = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit / 2**10:.0f} KiB"
    detail = f"The body is too large; the limit is {size}."
    return Problem(413, detail, errors=[(field, f"at most {size}")], refused="body_size")
