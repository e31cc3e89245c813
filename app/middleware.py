"""Pure ASGI, around everything: bodies are limited while they arrive, and every answer carries the safe headers.

- A body that announces too much is refused before a byte of it is read; one that does not say (chunked) is counted, and
  refused at the first byte too many. Nothing of it is kept.
- The connection is closed after such a refusal. For a short while what the client still sends is read and thrown away,
  since closing on a sender would reset the connection and hide the answer from it.
"""

import asyncio
import contextlib
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.problems import SAFE_HEADERS, Problem

_LINGER_S = 1.0
_LINGER_BYTES = 4 * 2**20


class _TooLargeError(Exception):
    pass


class Guard:
    """limit: request path -> (most bytes of a body, the field to blame for more)."""

    def __init__(self, app: ASGIApp, limit: Callable[[str], tuple[int, str]]) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, field = self._limit(scope["path"])
        received = 0
        over = False
        started = False

        async def counted() -> Message:
            nonlocal received, over
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    over = True
                    raise _TooLargeError
            return message

        async def safe(message: Message) -> None:
            nonlocal started
            if over and not started:
                return  # whatever the application makes of the broken-off body, the answer is 413
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        announced = _content_length(scope)
        if announced is None or announced <= limit:
            try:
                await self._app(scope, counted, safe)
            except _TooLargeError:
                pass
            except Exception:
                if not over:
                    raise
        else:
            over = True
        if over and not started:
            await _refuse(limit, field, receive, send)


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            with contextlib.suppress(ValueError):
                return int(value)
    return None


async def _refuse(limit: int, field: str, receive: Receive, send: Send) -> None:
    size = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit / 2**10:.0f} KiB"
    problem = Problem(
        413,
        f"The body is too large; at most {size} are accepted.",
        errors=[(field, f"at most {limit} bytes")],
        headers={"Connection": "close"},
    ).response()
    await send({"type": "http.response.start", "status": 413, "headers": problem.raw_headers})
    await send({"type": "http.response.body", "body": problem.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            thrown = 0
            while thrown < _LINGER_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                thrown += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b"", "more_body": False})
