"""HTTP load over loopback in closed loops: each caller waits for its response.

- A small asyncio client with keep-alive, which must cost less than the service under
  test.
- Latency is measured from the first byte written to the whole response.
"""

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Requests = Callable[[], bytes]
Check = Callable[[bytes, bytes], None]  # of a request and the body of its 200
# of a score in bfloat16, which depends on the other queries of a batch
TOLERANCE = 0.005
IDLE_S = 5.0  # after which a connection is not used again; the service ends it after 10
address = ContextVar("address", default="127.0.0.1")  # from which requests are sent


@dataclass
class Tally:
    """Results of a load. `seconds` is its duration."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    good: list[float] = field(default_factory=list)  # latencies of 200s
    refused: list[float] = field(default_factory=list)  # latencies of 503s
    broken: int = 0  # connections that ended without a response
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """200s per second."""
        return len(self.good) / self.seconds

    def percentile(self, share: float) -> float:
        """Return a percentile of the latencies of 200s, in ms."""
        if self.good:
            return float(np.percentile(self.good, share)) * 1000
        return float("nan")

    def __str__(self) -> str:
        if self.refused:
            refused = f", 503s p99 {np.percentile(self.refused, 99) * 1000:.0f} ms"
        else:
            refused = ""
        others = {
            status: count
            for status, count in sorted(self.statuses.items())
            if status != 200
        }
        tail = f", others {others}{refused}" if others else ""
        lost = f", {self.broken} broken" if self.broken else ""
        latency = (
            f"p50 {self.percentile(50):7.2f} ms   p99 {self.percentile(99):7.2f} ms"
        )
        return f"{self.rate:8.1f} q/s   {latency}{tail}{lost}"


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._data = bytearray()
        self._wanted: int | None = None
        self._response: asyncio.Future[int] | None = None
        self._status = self._start = 0
        self._used = time.perf_counter()
        self._is_open = True

    @property
    def alive(self) -> bool:
        """False if it is closed, or may be while a request is on its way."""
        return self._is_open and time.perf_counter() - self._used < IDLE_S

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.get_extra_info("socket").setsockopt(
            socket.IPPROTO_TCP,
            socket.TCP_NODELAY,
            1,
        )

    def ask(self, request: bytes) -> "asyncio.Future[int]":
        self._response = asyncio.get_running_loop().create_future()
        self._data.clear()
        self._wanted = None
        self.transport.write(request)
        return self._response

    @property
    def body(self) -> bytes:
        """The body of the last response."""
        return bytes(self._data[self._start : self._wanted])

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._wanted is None:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._data[:end]).lower()
            at = head.find(b"content-length:")
            self._status = int(head[9:12])
            if at < 0:
                length = 0
            else:
                length = int(
                    head[at + 15 : head.find(b"\r", at) if b"\r" in head[at:] else None]
                )
            self._start = end + 4
            self._wanted = end + 4 + length
            if b"connection: close" in head:
                self._is_open = False
        if (
            len(self._data) >= self._wanted
            and self._response is not None
            and not self._response.done()
        ):
            self._used = time.perf_counter()
            self._response.set_result(self._status)

    def connection_lost(self, error: Exception | None) -> None:
        self._is_open = False
        if self._response is not None and not self._response.done():
            self._response.set_exception(ConnectionError("closed without a response"))


async def connect(port: int) -> _Connection:
    """Open a connection."""
    loop = asyncio.get_running_loop()
    origin = (address.get(), 0)
    return (
        await loop.create_connection(_Connection, "127.0.0.1", port, local_addr=origin)
    )[1]


async def _once(
    port: int,
    connection: _Connection | None,
    request: bytes,
    tally: Tally,
    check: Check | None,
) -> _Connection | None:
    began = time.perf_counter()
    try:
        if connection is None or not connection.alive:
            connection = await connect(port)
        status = await connection.ask(request)
    except OSError as error:
        tally.broken += 1
        print(f"broken: {error!r}", flush=True)
        return None
    took = time.perf_counter() - began
    tally.statuses[status] += 1
    tally.latencies.append(took)
    if status == 200:
        tally.good.append(took)
        if check is not None:
            check(request, connection.body)
    elif status == 503:
        tally.refused.append(took)
    return connection


async def ask(port: int, request: bytes) -> bytes:
    """Return the body of the response to one request over a connection of its own."""
    connection = await connect(port)
    await connection.ask(request)
    connection.transport.close()
    return connection.body


async def closed_loop(
    port: int,
    requests: Requests,
    *,
    connections: int,
    seconds: float,
    pause_s: float = 0.0,
    check: Check | None = None,
) -> Tally:
    """Run callers that send the next request as soon as they have a response, or after
    a pause.
    """
    tally = Tally()
    began = time.perf_counter()

    async def caller() -> None:
        connection: _Connection | None = None
        while time.perf_counter() - began < seconds:
            connection = await _once(port, connection, requests(), tally, check)
            if pause_s:
                await asyncio.sleep(pause_s)
        if connection is not None:
            connection.transport.close()

    await asyncio.gather(*(caller() for _ in range(connections)))
    tally.seconds = time.perf_counter() - began
    return tally


def same_answer(body: bytes, alone: bytes) -> bool:
    """Return True if two responses to one request tell the same, but for scores that
    differ by `TOLERANCE` at most.

    Results whose scores are that close may change places, and the last ones may be
    others.
    """
    one, other = (body, alone) if body[:1] != b"{" else map(json.loads, (body, alone))
    if not isinstance(one, dict) or "results" not in one:
        return one == other
    scores = [
        {result["id"]: result["score"] for result in each["results"]}
        for each in (one, other)
    ]
    for mine, others in (scores, scores[::-1]):
        lowest = min(others.values(), default=-1.0)
        if any(
            score > others.get(item, lowest) + TOLERANCE for item, score in mine.items()
        ):
            return False
    return len(scores[0]) == len(scores[1])


def text_request(query: str, **options: Any) -> bytes:
    """Return a POST /search/text."""
    return post(
        "/search/text",
        "application/json",
        json.dumps({"query": query, "k": 10} | options).encode(),
    )


def image_request(image: bytes) -> bytes:
    """Return a POST /search/image."""
    body = (
        b"--b\r\nContent-Disposition: form-data;"
        b' name="k"\r\n\r\n10\r\n--b\r\nContent-Disposition: form-data; name="file";'
        b' filename="x"\r\n\r\n%b\r\n--b--\r\n' % image
    )
    return post("/search/image", "multipart/form-data; boundary=b", body)


def post(path: str, kind: str, body: bytes) -> bytes:
    """Return a whole request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type:"
        f" {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


_WORDS = (
    "red blue green dark bright small large old new round square wooden metal glass"
    " plastic cotton shiny worn dog cat horse bird car truck bicycle boat house tree"
    " flower chair table lamp shoe jacket bag cup knife phone running sitting standing"
    " lying seen from behind side above with two three wheels buttons handles windows"
)


def unique_texts(seed: int = 0) -> Iterator[str]:
    """Yield captions of five to ten words without repetition."""
    rng = np.random.default_rng(seed)
    words = _WORDS.split()
    i = 0
    while True:
        i += 1
        yield " ".join([*rng.choice(words, rng.integers(4, 9)), str(i)])
