"""HTTP/1.1 connections with the limits that uvicorn lacks, around its unmodified protocol.

- A second httptools parser reads the framing of every message before uvicorn sees the bytes, in 10 us a request. h11
  needs less of a wrapper, but costs 130 us a request.
- The bytes of a connection are parsed for about a millisecond, then other connections have their turn. So thousands of
  tiny chunks or pipelined requests delay no one else. Reads are small, because libuv reads a socket up to 32 times in a
  row.
- While no request is answered, a complete head must arrive within HEAD_S. That bounds slow heads, idle connections and
  bodies that still arrive after their response.
- Heads, and the bytes between two pieces of a body, are limited to HEAD_BYTES. Trailers are refused, because uvicorn
  merges them into the request's headers.
- While pipelined requests wait for their responses, nothing more is parsed.
- Offers to upgrade (`Upgrade: h2c`) are hidden, since the parser would skip the request's body. An offer that is not in
  the first read of a head ends the connection before any byte behind it is read as a request.
- The head of a response is written together with the first piece of its body. So a process that is killed leaves no
  head without a body, which a proxy could not ask another one for again; and it saves a system call.
- While the event loop is behind, searches by text are refused here, at a tenth of the cost of a refusal by the
  application. Otherwise the loop would spend all of its time on refusals.
- Where open files get scarce, a new connection ends the one that has sent nothing for the longest time, among those
  without a request and those whose body has not arrived.
- A stop closes idle connections. A new one has NEW_S to send its request: it may have been accepted just before.
- Responses are sent in pieces, and a client that does not take one within WRITE_S is disconnected. The system buffers
  UNSENT_BYTES; by default it would take megabytes.
"""

import asyncio
import contextlib
import re
import resource
import socket
import time
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from app.core.problems import Problem
from app.middleware.request_log import SAFE_HEADERS

HEAD_S = 10.0
WRITE_S = 30.0
NEW_S = 0.3
HEAD_BYTES = 64 * 2**10
READ_BYTES = 64 * 2**10
PARSED_BYTES = 512  # parsed before the clock is first read; the number doubles before each further reading
PIECE_BYTES = 64 * 2**10
UNSENT_BYTES = 128 * 2**10
_GRACE_S = 0.05  # after HEAD_S
_SPARE_FILES = 24  # that connections leave to accept more, and to the rest of the service
_COSTLY_S = 0.001  # time of the event loop for one connection's turn
_LOOK_S = 0.005  # between two looks at the delay of the event loop
_LATE_S = 0.035  # a look that is later than this is late,
_CROWD = 8  # if so many requests have begun since the one before: otherwise something else holds the processor
_LATE_LOOKS = 2  # in a row, after which the loop is behind; a single long step is not
_SMALL_BYTES = 4096  # of a request that may be refused here
_STATE_KEY = "dcar.connection"
_silent: dict["BoundedProtocol", None] = {}  # connections whose clients have to send something, the idlest first
_crowding: set["BoundedProtocol"] = set()  # connections with one of the last files; with any, files are scarce
_UPGRADE = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class LoopWatch:
    """Tells whether requests keep the event loop behind: its steps take long, one after the other."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # that is being watched
        self._late = self._begun = 0

    @property
    def is_behind(self) -> bool:
        return self._late >= _LATE_LOOKS

    def count_request(self) -> None:
        """Count a request that begins, and watch the running loop for a while."""
        self._begun += 1
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._loop, self._late = loop, 0
            self._look_after(loop)

    def _look_after(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + _LOOK_S
        loop.call_at(due, self._look, loop, due)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        is_late = loop.time() - due > _LATE_S and self._begun >= _CROWD
        self._late = min(self._late + 1, _LATE_LOOKS) if is_late else self._late // 2
        if self._begun or self._late:
            self._begun = 0
            self._look_after(loop)
        else:
            self._loop = None


_watch = LoopWatch()


def track_requests(app: ASGIApp) -> ASGIApp:
    """Wrap the application so that each connection knows while a request is being answered, and sends it in pieces."""

    async def tracked(scope: Scope, receive: Receive, send: Send) -> None:
        connection: BoundedProtocol | None = scope.get("state", {}).pop(_STATE_KEY, None)
        if connection is None:
            await app(scope, receive, send)
            return
        connection.request_started(getattr(send, "__self__", None))

        async def send_in_pieces(message: Message) -> None:
            if message["type"] == "http.response.start":
                connection.hold_head()
            body = message.get("body", b"")
            last = max(0, len(body) - 1) // PIECE_BYTES * PIECE_BYTES
            for start in range(0, last, PIECE_BYTES):
                await send({**message, "body": body[start : start + PIECE_BYTES], "more_body": True})
            await send(message if last == 0 else {**message, "body": body[last:]})

        try:
            await app(scope, receive, send_in_pieces)
        finally:
            connection.request_finished()

    return tracked


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol; at a stop, a connection without a request yet may send its first one."""

    def shutdown(self) -> None:
        if self.cycle is None:
            self.loop.call_later(NEW_S, super().shutdown)
        else:
            super().shutdown()


class BoundedProtocol(asyncio.BufferedProtocol):
    """Passes a connection's bytes to uvicorn's protocol as long as they keep to the limits."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        refused: Callable[[], object],
        **options: Any,
    ) -> None:
        """Take what uvicorn gives. refused: called for each search that is refused here."""
        self._refused = refused
        self._inner = _Protocol(config, server_state, {**app_state, _STATE_KEY: self}, **options)
        self._parser = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's parser
        self._timers: dict[str, asyncio.TimerHandle] = {}  # "head", "write", "close"
        self._buffer, self._received = bytearray(READ_BYTES), bytearray()
        self._pending = 0  # requests that are being answered
        self._heads = 0  # that uvicorn has seen
        self._finished = 0  # requests that have been answered
        self._is_held = False  # True while reading is paused here
        self._cycle: Any = None  # uvicorn's state of the request that is being answered
        self._url = self._withheld = b""  # of a request that uvicorn has not seen
        self._in_message = self._in_head = self._has_trailers = False
        self._unframed = 0  # bytes since a head began or a piece of a body arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        with contextlib.suppress(AttributeError, OSError):  # the system has no such option, or it is a Unix socket
            connection = transport.get_extra_info("socket")
            if connection.fileno() >= _most_files() - _SPARE_FILES:  # the system gives the lowest free number
                _crowding.add(self)
            if _crowding and _silent:
                next(iter(_silent))._close()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._joining = _JoiningTransport(self._transport)
        self._inner.connection_made(cast(asyncio.Transport, self._joining))
        self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        _silent.pop(self, None)
        _crowding.discard(self)
        for name in [*self._timers]:
            self._stop(name)
        self._inner.connection_lost(error)
        if self._cycle is not None:  # of pipelined requests, uvicorn notifies only the last
            self._cycle.disconnected = True
            self._cycle.message_event.set()

    def eof_received(self) -> None:
        self._inner.eof_received()

    def pause_writing(self) -> None:
        self._start("write", WRITE_S, self._transport.abort)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._stop("write")
        self._inner.resume_writing()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._received += memoryview(self._buffer)[:nbytes]
        self._parse()

    def _parse(self) -> None:
        """Parse the received bytes piece by piece, until pipelined requests wait or other connections have a turn."""
        began, size = time.perf_counter(), _SMALL_BYTES if _watch.is_behind else PARSED_BYTES
        while self._received and not self._transport.is_closing():
            if self._heads - self._finished > 1:  # `request_finished` continues
                self._is_held = True
                self._transport.pause_reading()
                return
            data = bytes(memoryview(self._received)[:size])
            del self._received[:size]
            self._feed(data)
            size *= 2
            if time.perf_counter() - began > _COSTLY_S and not self._transport.is_closing():
                self._transport.pause_reading()
                self._schedule()
                return
        if self._is_held and not (self._inner.flow.read_paused or self._transport.is_closing()):
            self._transport.resume_reading()
        self._is_held = False

    def _schedule(self) -> None:
        """Parse the rest and read more after the other connections have had their turn."""
        self._is_held = True
        asyncio.get_running_loop().call_later(0, self._parse)

    def _feed(self, data: bytes) -> None:
        may_refuse = bool(self._withheld) or not (self._in_message or self._heads - self._finished)
        if not self._in_message:
            data = _hide_upgrade(data)
        self._unframed += len(data)
        is_valid = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(b"400 Bad Request")
            return
        except httptools.HttpParserError:
            is_valid = False
        if self._has_trailers:
            self._refuse(b"400 Bad Request")
        elif self._unframed > HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")
        elif is_valid and may_refuse and _watch.is_behind and self._is_small_search(data):
            self._inner.data_received(b"")  # ends uvicorn's timer of idle connections
            self._expect_head()
            self._withheld = self._withheld + data if self._in_message else b""
            if not self._in_message:
                self._heads -= 1
                self._transport.write(_BUSY)
                self._refused()
        else:
            data, self._withheld = self._withheld + data, b""
            self._inner.data_received(data)
            if not is_valid:  # uvicorn has answered
                self._close()

    def _is_small_search(self, data: bytes) -> bool:
        """Return True if this is all that has come of one search by text, and its connection stays open."""
        is_small = self._heads - self._finished == 1 and len(self._withheld) + len(data) <= _SMALL_BYTES
        return is_small and b"/search/text" in self._url[:200] and self._parser.should_keep_alive()

    def request_started(self, cycle: Any) -> None:
        self._cycle = cycle
        self._pending += 1
        self._stop("head")
        if not self._in_message:
            _silent.pop(self, None)

    def hold_head(self) -> None:
        """Write the head that follows together with what comes after it."""
        self._joining.holds_next = True

    def request_finished(self) -> None:
        self._joining.flush()
        self._pending -= 1
        self._finished += 1
        if self._received:
            self._schedule()
        if not (self._pending or self._transport.is_closing()):
            self._expect_head()

    # The parser calls the following methods.

    def on_message_begin(self) -> None:
        self._in_message = self._in_head = True
        self._url = b""
        _watch.count_request()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_trailers = self._has_trailers or not self._in_head

    def on_headers_complete(self) -> None:
        self._stop("head")
        self._in_head = False
        self._heads += not self._parser.should_upgrade()
        self._unframed = 0
        self._note_silence()

    def on_body(self, body: bytes) -> None:
        self._unframed = 0
        self._note_silence()

    def on_message_complete(self) -> None:
        self._in_message = False
        self._unframed = 0
        if self._heads > self._finished:
            _silent.pop(self, None)

    def _note_silence(self) -> None:
        """Count the time without bytes of this connection from now on."""
        _silent.pop(self, None)
        _silent[self] = None

    def _expect_head(self) -> None:
        # A loop that is behind calls timers before it reads what has come in time.
        self._start("head", HEAD_S, self._start, "head", _GRACE_S, self._refuse, b"408 Request Timeout")
        self._note_silence()

    def _refuse(self, status: bytes) -> None:
        if not self._heads:  # else a response may be half written
            self._transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self._close()

    def _start(self, timer: str, seconds: float, action: Callable[..., object], *args: object) -> None:
        self._stop(timer)
        self._timers[timer] = asyncio.get_running_loop().call_later(seconds, action, *args)

    def _stop(self, timer: str) -> None:
        if (handle := self._timers.pop(timer, None)) is not None:
            handle.cancel()

    def _close(self) -> None:
        _silent.pop(self, None)
        self._stop("head")
        self._transport.close()  # after all is written, which needs a client that reads
        self._start("close", WRITE_S, self._transport.abort)


class _JoiningTransport:
    """A transport that may hold what is written next until something follows.

    holds_next: True if it is to.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._held, self.holds_next = transport, b"", False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        data, self._held = self._held + data, b""
        if self.holds_next:
            self._held, self.holds_next = data, False
        else:
            self._transport.write(data)

    def flush(self) -> None:
        if self._held:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()


def _refusal() -> bytes:
    problem = Problem(503, "The service is busy. Try again in 1 s.", headers={"Retry-After": "1", **SAFE_HEADERS})
    response = problem.response({"path": "/"})
    heads = [b"%b: %b\r\n" % header for header in response.raw_headers]
    return b"HTTP/1.1 503 Service Unavailable\r\n" + b"".join(heads) + b"\r\n" + bytes(response.body)


_BUSY = _refusal()


@cache
def _most_files() -> int:
    """Return the number of files that this process may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _hide_upgrade(data: bytes) -> bytes:
    """Rename the Upgrade header of the head that data begins with; its length stays the same."""
    if not _UPGRADE.search(data):
        return data
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nignored", head) + end + rest
