"""Pure ASGI, around the routes: bodies are limited while they arrive, every answer carries the safe headers, and work
whose caller has left is given up.

- A body that announces too much is refused before a byte of it is read; one that does not say (chunked) is counted, and
  refused at the first byte too many. Nothing of it is kept.
- A body must be whole in `upload_s`; what has come of all bodies under way is at most `in_flight` bytes together. What
  is only announced counts for nothing: it costs its sender nothing either.
- What the client still sends after such a refusal is thrown away: see `connections`.
- A request that takes long is watched: when its caller closes the connection it is cancelled, and the batcher drops it.
"""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.metrics import Metrics
from app.core.problems import SAFE_HEADERS, Problem

_SAFE = [(name.lower().encode(), value.encode()) for name, value in SAFE_HEADERS.items()]
_WATCH_AFTER_S = 0.05


class _RefusedError(Exception):
    """Breaks off what reads the body; the problem that is answered lies in the request's `_Body`."""


class _Body:
    """What has come of one body, and why no more of it is wanted."""

    def __init__(self) -> None:
        self.received = 0
        self.held = 0
        self.whole = False
        self.refusal: Problem | None = None


class Guard:
    """Args:
    limit: request path -> (most bytes of a body, the field to blame for more).
    in_flight: bytes of all bodies under way.
    upload_s: seconds for one body to arrive.
    """

    def __init__(
        self, app: ASGIApp, limit: Callable[[str], tuple[int, str]], metrics: Metrics, in_flight: int, upload_s: float
    ) -> None:
        self._app = app
        self._limit = limit
        self._metrics = metrics
        self._in_flight = in_flight
        self._held = 0
        self._upload_s = upload_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, field = self._limit(scope["path"])
        body = _Body()
        announced, body.whole = _announced(scope)
        started = False

        async def counted() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.received += len(message.get("body", b""))
                body.whole = not message.get("more_body", False)
                if body.received > limit:
                    body.refusal = self._large(limit, field)
                elif not self._hold(body):
                    body.refusal = self._full()
                if body.refusal is not None:
                    raise _RefusedError
            return message

        async def safe(message: Message) -> None:
            nonlocal started
            if body.refusal is not None and not started:
                return  # whatever the application makes of the broken-off body, the answer is the refusal
            if message["type"] == "http.response.start":
                started = True
                given = message["headers"]
                names = {name for name, _ in given}
                message = {**message, "headers": [*given, *(each for each in _SAFE if each[0] not in names)]}
            await send(message)

        def late() -> None:
            body.refusal = self._slow()

        try:
            if announced > limit:
                body.refusal = self._large(limit, field)
            else:
                with _Watch(receive, body, self._upload_s, late):
                    await self._app(scope, counted, safe)
        except _RefusedError:
            pass
        except Exception:
            if body.refusal is None:
                raise
        finally:
            self._held -= body.held
        if body.refusal is not None and not started:
            await body.refusal.response()(scope, receive, send)

    def _hold(self, body: _Body) -> bool:
        """Take room for what has come of a body. One body alone always has room."""
        more = body.received - body.held
        if more and self._held > body.held and self._held + more > self._in_flight:
            return False
        self._held += more
        body.held += more
        return True

    def _large(self, limit: int, field: str) -> Problem:
        self._metrics.refused("body_size")
        size = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit / 2**10:.0f} KiB"
        detail = f"The body is too large; at most {size} are accepted."
        return Problem(413, detail, errors=[(field, f"at most {size}")])

    def _full(self) -> Problem:
        self._metrics.refused("uploads")
        return Problem(503, "Too many uploads are under way. Try again in a second.", headers={"Retry-After": "1"})

    def _slow(self) -> Problem:
        self._metrics.refused("slow_body")
        return Problem(408, f"The body did not arrive in {self._upload_s:g} seconds.")


class _Watch:
    """Cancels the request that it surrounds, once that has taken longer than usual: when its body is still not whole
    after `upload_s`, having called `late`, or when the caller leaves.

    One timer for both, since most requests are answered before it rings. While the body comes nothing else may read
    from the connection, so whether the caller is there is only watched afterwards.
    """

    def __init__(self, receive: Receive, body: _Body, upload_s: float, late: Callable[[], None]) -> None:
        self._receive = receive
        self._body = body
        self._late = late
        self._loop = asyncio.get_running_loop()
        self._ends = self._loop.time() + upload_s
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._given_up = False

    def __enter__(self) -> None:
        self._timer = self._loop.call_later(_WATCH_AFTER_S, self._look)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._given_up and self._task is not None:
            self._task.uncancel()
            return kind is asyncio.CancelledError
        return False

    def _look(self) -> None:
        now = self._loop.time()
        if self._body.whole:
            self._watcher = self._loop.create_task(self._watch())
        elif now < self._ends:
            self._timer = self._loop.call_at(min(now + _WATCH_AFTER_S, self._ends), self._look)
        else:
            self._late()
            self._give_up()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._give_up()

    def _give_up(self) -> None:
        if self._task is not None and not self._task.done():
            self._given_up = True
            self._task.cancel()


def _announced(scope: Scope) -> tuple[int, bool]:
    """The length that the body is said to have, 0 when it is not said, and whether it is certain that there is none.

    HTTP tells by one of two headers that a body comes, whatever the method.
    """
    length, chunked = 0, False
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value) if value.isdigit() else 0
        elif name == b"transfer-encoding":
            chunked = True
    return length, not (length or chunked)
