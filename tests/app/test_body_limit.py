"""The limits on request bodies, on a small ASGI application."""

import asyncio
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.core.problems import Problem
from app.core.settings import Settings
from app.http.access import UNCOUNTED_BYTES, BodyLimit, Policy

LIMIT = 2**20 + 2 * UNCOUNTED_BYTES
CHUNKED = [(b"transfer-encoding", b"chunked")]
Handler = Callable[[Scope, Receive, Send], Any]
Response = tuple[int, dict[bytes, bytes], bytes]  # status, headers and body


async def respond(send: Send, body: bytes = b"", *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def count(_: Scope, receive: Receive, send: Send) -> None:
    """Answer with the number of bytes."""
    total, more = 0, True
    while more:
        message = await receive()
        total, more = total + len(message.get("body", b"")), message.get("more_body", False)
    await respond(send, str(total).encode())


class Served:
    """A handler behind the limits. refused: counts by reason."""

    def __init__(
        self, handler: Handler = count, *, in_flight: int = 2**30, upload_s: float = 30, limit: int = LIMIT
    ) -> None:
        self.refusals = list[str | None]()
        settings = Settings(index=Path(), max_in_flight_bytes=in_flight, upload_timeout_s=upload_s)
        self.policy = Policy("read", body=lambda _: limit)
        self.handler = handler
        self.limit = BodyLimit(settings)

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.limit.run(self.handler, self.policy, scope, receive, send)
        except Problem as problem:
            self.refusals.append(problem.refused)
            await problem.response(scope)(scope, receive, send)

    async def __call__(
        self, *parts: bytes, headers: Iterable[tuple[bytes, bytes]] = CHUNKED, hangs: asyncio.Event | None = None
    ) -> Response:
        """Send a body in parts and return the response. hangs: the end of the body comes when it is set."""
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if hangs is None:
            messages[-1]["more_body"] = False
        sent: list[Message] = []

        async def receive() -> Message:
            if messages:
                return messages.pop(0)
            await (hangs or asyncio.Event()).wait()
            return {"type": "http.request", "body": b""}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.run({"type": "http", "path": "/", "headers": list(headers)}, receive, send)
        start, bodies = sent[0], b"".join(each["body"] for each in sent[1:])
        assert [each["type"] for each in sent].count("http.response.start") == 1
        return start["status"], dict(start["headers"]), bodies


@pytest.mark.parametrize("is_announced", [True, False], ids=["announced", "in chunks"])
async def test_a_body_is_refused_at_the_first_byte_over_its_limit(is_announced: bool) -> None:
    """An announced one unread."""
    for over in (0, 1):
        served = Served()
        headers = [(b"content-length", str(LIMIT + over).encode())] if is_announced else CHUNKED
        parts = [b"x"] if is_announced else [bytes(LIMIT - 5), bytes(5 + over)]
        status, _, body = await served(*parts, headers=headers)
        assert (status, served.refusals.count("body_size")) == ((413, 1) if over else (200, 0))
    assert json.loads(body)["errors"] == [{"field": "body", "message": "at most 1,152 KiB"}]


async def test_a_body_beyond_the_budget_is_refused() -> None:
    """The first UNCOUNTED_BYTES of each are free, and a single body always has room."""
    served, done = Served(in_flight=2**20), asyncio.Event()

    async def begin(size: int) -> asyncio.Task[Response]:
        task = asyncio.create_task(served(bytes(size), hangs=done))
        await asyncio.sleep(0.01)
        return task

    first = await begin(LIMIT)
    free = [await begin(UNCOUNTED_BYTES) for _ in range(10)]
    assert served.refusals.count("uploads") == 0
    status, headers, body = await (await begin(LIMIT - 1))
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert json.loads(body)["detail"] == "Too many large requests are in progress. Try again in 1 s."
    assert served.refusals.count("uploads") == 1
    done.set()
    assert [(await each)[0] for each in (first, *free)] == 11 * [200]
    assert (await served(bytes(LIMIT)))[0] == 200


async def test_an_unfinished_body_is_refused_in_time_and_a_finished_one_is_not() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await count(scope, receive, send)
        await asyncio.sleep(0.2)

    served = Served(slow, upload_s=0.1)
    assert (await served(b"x"))[0] == 200
    status, _, body = await served(b"x", hangs=asyncio.Event())
    assert (status, served.refusals.count("slow_body")) == (408, 1)
    assert json.loads(body)["detail"] == "The body did not arrive within 0.1 seconds."
