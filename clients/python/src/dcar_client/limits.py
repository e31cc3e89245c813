"""Limits on what a server may send: a deadline for each attempt, a size for each response, and clean texts.

The server may be broken, or may not be the service at all.
"""

import math
import re
import time
from collections.abc import AsyncIterable, Iterable
from contextvars import ContextVar
from typing import Any

import httpcore
import httpx

MAX_RESPONSE_BYTES = 64 * 2**20
MAX_TEXT = 500
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")  # and marks that reverse text
deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)  # of the attempt, in monotonic seconds


class OversizedResponseError(httpx.TransportError):
    """The response has more bytes, once decompressed, than the client accepts."""


def end_at_deadline(http: httpx.Client) -> None:
    """Make every read and write of a client end at `deadline`, as a server may send a byte now and then."""
    for transport in (http._transport, *http._mounts.values()):
        if isinstance(transport, httpx.HTTPTransport):
            transport._pool._network_backend = _DeadlineBackend()


class _DeadlineBackend(httpcore.SyncBackend):
    def connect_tcp(self, *args: Any, **options: Any) -> httpcore.NetworkStream:
        return _DeadlineStream(super().connect_tcp(*args, **options))


class _DeadlineStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **options: Any) -> httpcore.NetworkStream:
        return _DeadlineStream(self._stream.start_tls(*args, **options))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(timeout: float | None, error: type[Exception]) -> float:
    """Return the seconds that an operation may take; raise the error if there are none."""
    left = deadline.get() - time.monotonic()
    if left <= 0:
        raise error("the attempt takes longer than the timeout")
    return min(math.inf if timeout is None else timeout, left)


def read_bounded(chunks: Iterable[bytes]) -> bytes:
    """Join the chunks of a response's decompressed body.

    Raises:
        OversizedResponseError: they exceed `MAX_RESPONSE_BYTES`.
    """
    body = bytearray()
    for chunk in chunks:
        _extend(body, chunk)
    return bytes(body)


async def aread_bounded(chunks: AsyncIterable[bytes]) -> bytes:
    """Join the chunks of a response, as `read_bounded` does."""
    body = bytearray()
    async for chunk in chunks:
        _extend(body, chunk)
    return bytes(body)


def _extend(body: bytearray, chunk: bytes) -> None:
    body += chunk
    if len(body) > MAX_RESPONSE_BYTES:
        raise OversizedResponseError(f"the response has more than {MAX_RESPONSE_BYTES >> 20} MB")


def clean(text: str, secret: str | None = None) -> str:
    """Return a text of the server for people: without control characters and the secret, shortened."""
    text = text if not secret else text.replace(secret, "***")
    text = _CONTROL.sub(" ", text[: 4 * MAX_TEXT])
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
