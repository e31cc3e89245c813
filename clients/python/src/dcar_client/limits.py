"""Limits on what a server may send: a deadline for each attempt, a size for each
response, and clean texts.

The server may be broken, or may not be the service at all.
"""

import base64
import math
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpcore
import httpx
from pydantic_core import from_json

MAX_IMAGE_BYTES = 64 * 2**20
# texts of 16 MiB, the service's own limit, and what is around them
MAX_JSON_BYTES = 24 * 2**20
# commas and brackets; what is between them may take some hundred bytes once parsed
MAX_JSON_VALUES = 1_000_000
MAX_TEXT = 500
# and marks without a sign
_CONTROLS = (
    r"\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
)
_CONTROL = re.compile(f"[{_CONTROLS}]+")
# some languages and emoji need the last two
_HIDDEN = rf"[{_CONTROLS}\u00ad\u200c\u200d]*"
# of the attempt, in monotonic seconds
deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


class OversizedResponseError(httpx.TransportError):
    """The response has more bytes, once decompressed, than the client accepts."""


def end_at_deadline(http: httpx.Client) -> None:
    """Make every read and write of a client end at `deadline`, as a server may send a
    byte now and then.
    """
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
    """Return the seconds that an operation may take; raise the error if there are
    none.
    """
    left = deadline.get() - time.monotonic()
    if left <= 0:
        raise error("the attempt takes longer than the timeout")
    return min(math.inf if timeout is None else timeout, left)


def is_image(response: httpx.Response) -> bool:
    """Return whether the body is an image by its type."""
    kind: str = response.headers.get("content-type", "")
    return kind.startswith(("image/", "application/octet-stream"))


def json_of(response: httpx.Response) -> Any:
    """Return the body's JSON. Models take it, not the text: each of their errors would
    parse it once more.

    Raises:
        ValueError: it is not JSON, or an image by its type, which may be larger.
    """
    return from_json(b"" if is_image(response) else response.content)


def read_bounded(response: httpx.Response) -> None:
    """Read the body of a response within the limits, unless its transport has read it.

    Raises:
        OversizedResponseError: it exceeds `MAX_IMAGE_BYTES`, `MAX_JSON_BYTES` or
            `MAX_JSON_VALUES`.
        httpx.RemoteProtocolError: it is packed otherwise than once by gzip, which is
            all that requests accept.
    """
    if not response.is_stream_consumed:
        body = _Body(response)
        for chunk in response.iter_raw():
            body.add(chunk)
        response._content = body.end()


async def aread_bounded(response: httpx.Response) -> None:
    """Read the body of a response, as `read_bounded` does."""
    if not response.is_stream_consumed:
        body = _Body(response)
        async for chunk in response.aiter_raw():
            body.add(chunk)
        response._content = body.end()


class _Body:
    def __init__(self, response: httpx.Response) -> None:
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in {"identity", "gzip"}:
            raise httpx.RemoteProtocolError(
                "the response is packed otherwise than once by gzip"
            )
        self._gzip = zlib.decompressobj(31) if coding == "gzip" else None
        self._is_image = is_image(response)
        self._most = MAX_IMAGE_BYTES if self._is_image else MAX_JSON_BYTES
        self._data = bytearray()

    def add(self, chunk: bytes) -> None:
        if self._gzip:
            try:
                chunk = self._gzip.decompress(chunk, self._most + 1 - len(self._data))
            except zlib.error as error:
                raise httpx.RemoteProtocolError(
                    f"the response is not gzip: {error}"
                ) from error
            if self._gzip.unused_data:
                raise httpx.RemoteProtocolError(
                    "the response goes on after the end of its gzip stream"
                )
        self._data += chunk
        if len(self._data) > self._most:
            raise OversizedResponseError(
                f"the response has more than {self._most >> 20} MiB"
            )

    def end(self) -> bytes:
        if self._gzip and self._data and not self._gzip.eof:
            raise httpx.RemoteProtocolError(
                "the gzip stream of the response has no end"
            )
        if (
            not self._is_image
            and sum(map(self._data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES
        ):
            raise OversizedResponseError(
                f"the response has more than {MAX_JSON_VALUES:,} values"
            )
        return bytes(self._data)


def secrets_of(headers: httpx.Headers) -> list[str]:
    """Return the API key in the headers of a request, or the password, plain and as it
    is sent; they may have none.
    """
    kind, _, sent = headers.get("authorization", "").partition(" ")
    if kind == "Basic":
        password = base64.b64decode(sent).decode().partition(":")[2]
    else:
        password = ""
    return [secret for secret in (sent, password) if secret]


@contextmanager
def clean_errors(headers: httpx.Headers) -> Iterator[None]:
    """Clean the messages of httpx, which repeat what the server sends in place of HTTP;
    headers: of the request.
    """
    try:
        yield
    except httpx.RemoteProtocolError as error:
        error.args = (clean(str(error), secrets_of(headers)),)
        raise error from None


def clean(text: str, secrets: Iterable[str] = (), most: int = MAX_TEXT) -> str:
    """Return a text of the server for people: without control characters and secrets,
    shortened.
    """
    for secret in secrets:
        text = re.sub(_HIDDEN.join(map(re.escape, secret)), "***", text)
    text = _CONTROL.sub(" ", text[: 4 * most])
    return text if len(text) <= most else text[: most - 3] + "..."
