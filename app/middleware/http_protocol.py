"""uvicorn's HTTP protocol with the limits that it lacks, so that no client holds a connection or memory for ever.

- A request's head must be whole in a time, and be short; so must what follows a body's last byte. Trailers are dropped:
  uvicorn would add them to the headers that the application has read already.
- A request that is answered before all of it has come is read on for a short while and thrown away, since closing on a
  sender would reset the connection and hide the answer from it. If its rest comes, the connection is kept.
- An offer to go on with another protocol (`Upgrade: h2c`, as some clients make with every request) is not heard: the
  parser would take what follows the head for that protocol and lose the body.
- A connection that does nothing has a timer, whatever has been sent on it before.
"""

import re
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 10.0
HEAD_BYTES = 64 * 2**10
LINGER_S = 1.0
LINGER_BYTES = 4 * 2**20
_UPGRADE = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class LimitedProtocol(HttpToolsProtocol):
    """Closes a connection whose head is late (408), whose head or trailers are long (431), or that goes on sending
    what was answered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: TimerHandle | None = None
        self._linger: TimerHandle | None = None
        self._bytes = 0  # since the head began, a byte of a body came, or lingering began

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._got_head()
        self._end_linger()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        if not self._receiving() and _UPGRADE.search(data):  # a body is not looked through
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nignored", head) + end + rest  # as long as before
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._linger is not None:
            if self._bytes > LINGER_BYTES:
                self.transport.close()
        elif self._bytes > HEAD_BYTES and (self._head is not None or self._receiving()):
            self._refuse(b"431 Request Header Fields Too Large")
        elif self._head is None and self.timeout_keep_alive_task is None and not self._answering():
            self._expect_head()  # line breaks between requests: uvicorn's timer is off, and no message has begun

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()  # lingering may have set it while this data came
        self._expect_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._got_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._linger is None:
            self._bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._linger is not None:
            self._end_linger()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not (self.transport.is_closing() or self._answering()) and self.cycle.more_body:
            self._unset_keepalive_if_required()
            self._bytes = 0
            self._linger = self.loop.call_later(LINGER_S, self.transport.close)

    def _answering(self) -> bool:
        """Whether an answer is still owed. `cycle` is of the last head that was read."""
        return self.cycle is not None and not self.cycle.response_complete

    def _receiving(self) -> bool:
        """Whether a message whose head was read is not whole, nor answered."""
        return self._answering() and self.cycle.more_body

    def _expect_head(self) -> None:
        if self._head is None:
            self._bytes = 0
            self._head = self.loop.call_later(HEAD_S, self._refuse, b"408 Request Timeout")

    def _got_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _end_linger(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def _refuse(self, status: bytes) -> None:
        in_head = self._head is not None
        self._got_head()
        if self.transport.is_closing():
            return
        if not self._answering() or not (in_head or self.pipeline or self.cycle.response_started):
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
