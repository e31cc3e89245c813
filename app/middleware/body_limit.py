"""ASGI middleware around the routes: limits bodies as they arrive, adds security headers, cancels abandoned requests.

- A body that announces too much is refused unread; a chunked one is refused at the first byte over its limit.
- A body must be complete within `upload_s`. All unfinished bodies together may hold `in_flight` bytes; beyond that the
  largest one is dropped. The first UNCOUNTED_BYTES of a body do not count, so text searches never compete with uploads.
- Bytes that a request fetches count as those of its body: see `byte_counter`.
- Bytes that arrive after a refusal are discarded by the HTTP protocol.
- A request whose client disconnects is cancelled, and the batcher skips its work.
"""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.metrics import Metrics
from app.core.problems import SAFE_HEADERS, Problem
from app.core.settings import Settings
from app.middleware.policy import POLICY, UNKNOWN, Policy

UNCOUNTED_BYTES = 64 * 2**10
_COUNT_BYTES = "dcar.count_bytes"  # scope key
_SAFE = [(name.lower().encode(), value.encode()) for name, value in SAFE_HEADERS.items()]
_WATCH_AFTER_S = 0.05


class _RefusedError(Exception):
    """Unwinds the reader of a body; the response is the `refusal` of its `_Body`."""


class _Body:
    """The state of one request body.

    received: bytes so far. held: its part of the shared budget. cancel: cancels the request.
    """

    def __init__(self) -> None:
        self.received = 0
        self.held = 0
        self.is_complete = False
        self.refusal: Problem | None = None
        self.cancel: Callable[[], None] = lambda: None


def byte_counter(scope: Scope) -> Callable[[int], None]:
    """Return the function that counts bytes which a request holds beside its body, such as of images that it fetches.

    It ends the request if they exceed the budget.
    """
    count: Callable[[int], None] = scope[_COUNT_BYTES]
    return count


class BodyLimit:
    """Limit the bodies of requests.

    The policy of the route gives the largest size. The settings give the bytes of all unfinished bodies together, with
    what their requests fetch, and the seconds for one body to arrive.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._in_flight = settings.max_in_flight_bytes
        self._upload_s = settings.upload_timeout_s
        self._bodies: set[_Body] = set()  # with a part of the budget
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        policy: Policy = scope.get(POLICY) or UNKNOWN
        limit, field = policy.body(self._settings), policy.field
        body = _Body()
        announced, body.is_complete = _announced(scope)
        has_started = False

        async def limited_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.received += len(message.get("body", b""))
                body.is_complete = not message.get("more_body", False)
                if body.received > limit:
                    body.refusal = self._too_large(limit, field)
                else:
                    self._hold(body)
                if body.refusal is not None:
                    raise _RefusedError
            return message

        def count_bytes(size: int) -> None:
            if body.refusal is None:
                body.received += size
                self._hold(body)
            if body.refusal is not None:
                raise _RefusedError

        async def safe_send(message: Message) -> None:
            nonlocal has_started
            if body.refusal is not None and not has_started:
                return  # the refusal replaces the application's response to the broken body
            if message["type"] == "http.response.start":
                has_started = True
                headers = message["headers"]
                names = {name for name, _ in headers}
                message = {**message, "headers": [*headers, *(each for each in _SAFE if each[0] not in names)]}
            await send(message)

        def refuse_late() -> None:
            body.refusal = self._too_slow()

        scope[_COUNT_BYTES] = count_bytes
        try:
            if announced > limit:
                body.refusal = self._too_large(limit, field)
            else:
                with _Watch(receive, body, self._upload_s, refuse_late):
                    await self._app(scope, limited_receive, safe_send)
        except _RefusedError:
            pass
        except Exception:
            if body.refusal is None:
                raise
        finally:
            self._release(body)
            del scope[_COUNT_BYTES], body.cancel  # these are reference cycles, which would cost a garbage collection
        if body.refusal is not None and not has_started:
            await body.refusal.response()(scope, receive, send)

    def _hold(self, body: _Body) -> None:
        """Count the body's bytes. While the budget is exceeded, refuse the largest unfinished body."""
        more = max(0, body.received - UNCOUNTED_BYTES) - body.held
        if not more:
            return
        self._bodies.add(body)
        body.held += more
        self._held += more
        while self._held > self._in_flight and len(self._bodies) > 1:  # a single body always has room
            unfinished = (each for each in self._bodies if not each.is_complete or each is body)
            largest = max(unfinished, key=lambda each: each.held)
            largest.refusal = self._full()
            self._release(largest)
            if largest is body:
                return
            largest.cancel()

    def _release(self, body: _Body) -> None:
        self._bodies.discard(body)
        self._held -= body.held
        body.held = 0

    def _too_large(self, limit: int, field: str) -> Problem:
        self._metrics.refused.labels("body_size").inc()
        size = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit / 2**10:.0f} KiB"
        detail = f"The body is too large; the limit is {size}."
        return Problem(413, detail, errors=[(field, f"at most {size}")])

    def _full(self) -> Problem:
        self._metrics.refused.labels("uploads").inc()
        return Problem(503, "Too many uploads are in progress. Try again in 1 s.", headers={"Retry-After": "1"})

    def _too_slow(self) -> Problem:
        self._metrics.refused.labels("slow_body").inc()
        return Problem(408, f"The body did not arrive within {self._upload_s:g} seconds.")


class _Watch:
    """Cancels the surrounded request if its body is unfinished after `upload_s`, or if the client disconnects.

    One timer serves both, because most requests are answered before it fires. Only one reader may use the connection,
    so the disconnect is watched once the body is complete.
    """

    def __init__(self, receive: Receive, body: _Body, upload_s: float, refuse_late: Callable[[], None]) -> None:
        self._receive = receive
        self._body = body
        self._refuse_late = refuse_late
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + upload_s
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._is_cancelled = False
        body.cancel = self._cancel

    def __enter__(self) -> None:
        self._timer = self._loop.call_later(_WATCH_AFTER_S, self._check)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if self._is_cancelled and self._task is not None:
            self._task.uncancel()
            return kind is asyncio.CancelledError
        return False

    def _check(self) -> None:
        now = self._loop.time()
        if self._body.is_complete:
            self._watcher = self._loop.create_task(self._wait_for_disconnect())
        elif now < self._deadline:
            self._timer = self._loop.call_at(min(now + _WATCH_AFTER_S, self._deadline), self._check)
        else:
            self._refuse_late()
            self._cancel()

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    def _cancel(self) -> None:
        if self._task is not None and not self._task.done() and not self._is_cancelled:
            self._is_cancelled = True
            self._task.cancel()


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
