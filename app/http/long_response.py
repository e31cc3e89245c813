"""Long responses, sent as fast as the client reads.

All that are being made or sent may hold UNSENT_BYTES, those of one caller half of it. So clients that do not read
cannot fill the memory.
"""

import asyncio
from collections import Counter
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.core.problems import Problem
from app.core.rate_limit import current_caller

UNSENT_BYTES = 128 * 2**20
_PIECE_BYTES = 64 * 2**10


class LongResponse(Response):
    """A response that a thread makes. size: its bytes, about; unsent: those of all long responses, by caller."""

    def __init__(self, make: Callable[[], Response], size: int, unsent: Counter[str]) -> None:
        super().__init__()
        self._make, self._size, self._unsent = make, size, unsent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = current_caller.get()
        for held, most in ((self._unsent.total(), UNSENT_BYTES), (self._unsent[caller], UNSENT_BYTES // 2)):
            if held and held + self._size > most:  # a single one has room
                detail = "Too many long responses are being sent. Try again in 1 s."
                raise Problem(503, detail, headers={"Retry-After": "1"}, refused="responses")
        self._unsent[caller] += self._size
        try:
            made = await asyncio.to_thread(self._make)
            await send({"type": "http.response.start", "status": made.status_code, "headers": made.raw_headers})
            for start in range(0, len(made.body), _PIECE_BYTES):
                piece = made.body[start : start + _PIECE_BYTES]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._unsent -= Counter({caller: self._size})  # which drops a caller that holds nothing
