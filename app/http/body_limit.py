"""Limits of what requests hold, as it arrives, and the end of abandoned requests.

- A body that announces too much is refused unread; a chunked one is refused at the first byte over its limit.
- A body must be complete within `upload_timeout_s`. All requests together may hold `max_in_flight_bytes`; a body beyond
  that is refused. The first UNCOUNTED_BYTES of each do not count, so text searches never compete with uploads.
- Bytes that a request fetches, and those of a long response, count as those of its body: see `byte_counter`.
- A request whose client disconnects is cancelled, and the batcher skips its work.
"""

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
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


class LongResponse(Response):
    """A response of about `size` bytes that a thread makes."""

    def __init__(self, make: Callable[[], Response], size: int) -> None:
        super().__init__()
        self._make, self._size = make, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        byte_counter(scope)(self._size)
        await (await asyncio.to_thread(self._make))(scope, receive, send)


class BodyLimit:
    """Limit the bodies of requests by the policies of their routes and by the settings.

    Attributes:
        held: bytes of all requests in progress that count.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.held = 0

    async def run(self, app: ASGIApp, policy: Policy, scope: Scope, receive: Receive, send: Send) -> None:
        """Call an application with a limited body. Raise Problem if the body is refused."""
        limit, headers = policy.body(self._settings), Headers(scope=scope)
        announced = int(headers.get("content-length", 0))
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
            is_alone = self.held == held  # then it has room
            if more and not is_alone and self.held + more > self._settings.max_in_flight_bytes:
                detail = "Too many large requests are in progress. Try again in 1 s."
                raise Problem(503, detail, headers={"Retry-After": "1"}, refused="uploads")
            held += more
            self.held += more

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
                if not announced and "transfer-encoding" not in headers:  # it has no body, whatever its method
                    watch()
                await app(scope, limited_receive, send)
        except TimeoutError:
            if not connected.expired():
                raise
        finally:
            self.held -= held
            for each in watchers:
                each.cancel()


def _too_large(limit: int, field: str) -> Problem:
    size = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit / 2**10:.0f} KiB"
    detail = f"The body is too large; the limit is {size}."
    return Problem(413, detail, errors=[(field, f"at most {size}")], refused="body_size")
