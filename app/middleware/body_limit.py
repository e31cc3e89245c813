"""Limits of request bodies as they arrive and of responses until they are sent, and the end of abandoned requests.

- A body that announces too much is refused unread; a chunked one is refused at the first byte over its limit.
- A body must be complete within `upload_s`. All unfinished bodies together may hold `in_flight` bytes; beyond that the
  largest one is dropped. The first UNCOUNTED_BYTES of a body do not count, so text searches never compete with uploads.
- Bytes that a request fetches count as those of its body: see `byte_counter`.
- All long responses that are being made or sent may hold UNSENT_BYTES, those of one caller half of it. So clients that
  do not read cannot fill the memory.
- Bytes that arrive after a refusal are discarded by the HTTP protocol.
- A request whose client disconnects is cancelled, and the batcher skips its work.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.problems import Problem
from app.core.rate_limit import current_caller
from app.core.settings import Settings
from app.middleware.access import Policy

UNCOUNTED_BYTES = 64 * 2**10
UNSENT_BYTES = 128 * 2**20
_COUNT_BYTES = "dcar.count_bytes"  # scope key
_UNSENT = "dcar.unsent"  # scope key: the bytes of a long response, by caller
WATCH_AFTER_S = 0.05


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
        self._bodies: set[_Body] = set()  # with a part of the budget
        self._held = 0
        self._unsent = Counter[str]()  # bytes by caller

    async def run(self, app: ASGIApp, policy: Policy, scope: Scope, receive: Receive, send: Send) -> None:
        """Call an application with a limited body. Raise Problem if the body is refused."""
        limit, (announced, is_complete) = policy.body(self._settings), _announced(scope)
        if announced > limit:
            raise _too_large(limit, policy.field)
        has_started = False

        async def limited_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                if body.received + size > limit:
                    raise _too_large(limit, policy.field)
                body.is_complete = not message.get("more_body", False)
                self._hold(body, size)
            return message

        async def noted_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        body = _Body(receive, is_complete, self._settings.upload_timeout_s)
        scope[_COUNT_BYTES] = partial(self._hold, body)
        try:
            with body:
                await app(scope, limited_receive, noted_send)
        finally:
            self._release(body)
            if _UNSENT in scope:
                self._unsent -= scope[_UNSENT]
            del scope[_COUNT_BYTES]  # it is a reference cycle, which would cost a garbage collection
        if body.refusal is not None and not has_started:
            raise body.refusal

    def hold_response(self, scope: Scope, size: int) -> None:
        """Count the bytes of a response until it is sent. Raise Problem if they exceed the budget; one has room."""
        caller = current_caller.get()
        for held, most in ((self._unsent.total(), UNSENT_BYTES), (self._unsent[caller], UNSENT_BYTES // 2)):
            if held and held + size > most:
                detail = "Too many long responses are being sent. Try again in 1 s."
                raise Problem(503, detail, headers={"Retry-After": "1"}, refused="responses")
        scope[_UNSENT] = Counter({caller: size})
        self._unsent += scope[_UNSENT]

    def _hold(self, body: "_Body", size: int) -> None:
        """Count bytes of a request. While the budget is exceeded, refuse the largest unfinished body."""
        body.received += size
        more = max(0, body.received - UNCOUNTED_BYTES) - body.held
        if not more:
            return
        self._bodies.add(body)
        body.held += more
        self._held += more
        while self._held > self._settings.max_in_flight_bytes and len(self._bodies) > 1:  # a single one has room
            unfinished = (each for each in self._bodies if not each.is_complete or each is body)
            largest = max(unfinished, key=lambda each: each.held)
            self._release(largest)
            detail = "Too many uploads are in progress. Try again in 1 s."
            refusal = Problem(503, detail, headers={"Retry-After": "1"}, refused="uploads")
            if largest is body:
                raise refusal
            largest.cancel(refusal)

    def _release(self, body: "_Body") -> None:
        self._bodies.discard(body)
        self._held -= body.held
        body.held = 0


class _Body:
    """One request body. It cancels the surrounded request if it is late, or if the client disconnects.

    One timer serves both, because most requests are answered before it fires. Only one reader may use the connection,
    so the disconnect is watched once the body is complete.

    Attributes:
        received: bytes so far.
        held: its part of the shared budget.
        refusal: the response to a request that was cancelled; None if nobody waits for one.
    """

    def __init__(self, receive: Receive, is_complete: bool, upload_s: float) -> None:
        self.received = self.held = 0
        self.is_complete = is_complete
        self.refusal: Problem | None = None
        self._receive, self._upload_s = receive, upload_s
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._deadline = self._loop.time() + upload_s
        self._watcher: asyncio.Task[None] | None = None
        self._is_cancelled = False

    def __enter__(self) -> None:
        self._timer = self._loop.call_later(WATCH_AFTER_S, self._check)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if self._is_cancelled and self._task is not None:
            self._task.uncancel()
            return kind is asyncio.CancelledError
        return False

    def cancel(self, refusal: Problem | None = None) -> None:
        """Cancel the request."""
        if self._task is not None and not self._task.done() and not self._is_cancelled:
            self.refusal, self._is_cancelled = refusal, True
            self._task.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        if self.is_complete:
            self._watcher = self._loop.create_task(self._wait_for_disconnect())
        elif now < self._deadline:
            self._timer = self._loop.call_at(min(now + WATCH_AFTER_S, self._deadline), self._check)
        else:
            detail = f"The body did not arrive within {self._upload_s:g} seconds."
            self.cancel(Problem(408, detail, refused="slow_body"))

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.cancel()


def _announced(scope: Scope) -> tuple[int, bool]:
    """Return the announced length of the body (0 if unknown), and True if the request has no body.

    A request has a body if Content-Length or Transfer-Encoding says so, whatever its method.
    """
    length, is_chunked = 0, False
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value) if value.isdigit() else 0
        elif name == b"transfer-encoding":
            is_chunked = True
    return length, not (length or is_chunked)


def _too_large(limit: int, field: str) -> Problem:
    size = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit / 2**10:.0f} KiB"
    detail = f"The body is too large; the limit is {size}."
    return Problem(413, detail, errors=[(field, f"at most {size}")], refused="body_size")
