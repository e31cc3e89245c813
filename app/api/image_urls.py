"""Images of queries and new items that JSON holds in base64 or names by URL.

- By URL, images are fetched only from the hosts in `DCAR_IMAGE_HOSTS`, and from the ports in `DCAR_IMAGE_PORTS`.
- A host name is resolved once. If one of its addresses is not public, the image is refused. The connection goes to a
  checked address and not to the name, whose address may change after the check.
- Redirects are not followed. Size, time, and the number of simultaneous requests of the service and of each caller are
  bounded, and the bytes count against the budget of request bodies.
- httptools parses the response. h11, on which httpx is built, blocks the event loop for half a second on 64 KiB of tiny
  chunks.
- fsspec, which reads galleries, resolves names and follows redirects by itself. It is therefore not used here.
"""

import asyncio
import base64
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property, partial
from urllib.parse import SplitResult, urlsplit
from weakref import WeakValueDictionary

import httptools
from starlette.types import Scope

from app.core.problems import Problem, field_problem
from app.core.rate_limit import network_of
from app.core.settings import Settings
from app.core.threads import run_in_new_thread
from app.middleware.access import CALLER
from app.middleware.body_limit import byte_counter

PIECE = 2**20  # bytes looked at, or characters of base64, before other threads may have their turn
_TIMEOUT_S = 10.0  # of one image, including the time in the queue
_AT_ONCE = 16
_AT_ONCE_EACH = 4  # of one caller
MAX_URLS = 8  # of one request
_MAX_URL = 8192  # characters
_READ_BYTES = 64 * 2**10  # parsed at a time: in 2 ms if every chunk has one byte
_OVERHEAD_BYTES = 64 * 2**10  # of heads and chunk sizes; beyond it they may be as large as the body
_PORTS = {"http": 80, "https": 443}
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")

Resolve = Callable[[str, int], Awaitable[list[tuple[str, int]]]]  # host, port -> its addresses and ports


def decode_base64(image: str, max_bytes: int, field: str) -> bytes:
    """Return the file in a base64 text or data URI; an error names the field."""
    text = image.rpartition(",")[2]
    try:
        parts = [base64.b64decode(text[start : start + PIECE], validate=True) for start in range(0, len(text), PIECE)]
        data = b"".join(parts)
    except ValueError:
        raise field_problem(field, "must be base64, or a data URI with base64") from None
    require_size(len(data), max_bytes, field)
    return data


def require_size(size: int, max_bytes: int, field: str) -> None:
    """Raise Problem if an image file is too large."""
    if size > max_bytes:
        raise field_problem(field, f"at most {max_bytes / 2**20:.3g} MiB, not {size / 2**20:.3g}", status=413)


def is_public(address: str) -> bool:
    """Return True for an address of the public internet. IPv6 addresses that embed an IPv4 address do not count."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (
        ip not in _GLOBAL_UNICAST or ip in _DOCUMENTATION or ip.sixtofour or ip.teredo
    ):
        return False
    return ip.is_global and not ip.is_multicast


async def resolve(host: str, port: int) -> list[tuple[str, int]]:
    found = await run_in_new_thread(partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    return [(str(address[0]), int(address[1])) for *_, address in found]


class ImageFetcher:
    """Fetch images. One per process."""

    def __init__(
        self, settings: Settings, resolve: Resolve = resolve, is_allowed: Callable[[str], bool] = is_public
    ) -> None:
        """Take the limits from the settings; the other arguments replace the network in tests."""
        self._hosts, self._ports = frozenset(settings.image_hosts), frozenset(settings.image_ports)
        self._max_bytes = settings.max_upload_bytes
        self._resolve, self._is_allowed = resolve, is_allowed
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._turns_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def read(self, scope: Scope, images: Mapping[str, str]) -> dict[str, bytes]:
        """Return the files of the images of a request, by their places in it. Raise Problem with the place of a fault.

        Args:
            images: in base64, as data URIs or URLs.
        """
        urls = {place: image for place, image in images.items() if image.startswith(("http://", "https://"))}
        if len(urls) > MAX_URLS:
            field = next(iter(urls)).partition(".")[0]
            raise field_problem(field, f"at most {MAX_URLS} images by URL, not {len(urls)}")

        def decode() -> dict[str, bytes]:
            return {
                place: decode_base64(image, self._max_bytes, f"{place}.image")
                for place, image in images.items()
                if place not in urls
            }

        files = await asyncio.to_thread(decode)
        fetches = (self.fetch(scope, url) for url in urls.values())
        for place, image in zip(urls, await asyncio.gather(*fetches, return_exceptions=True), strict=True):
            if isinstance(image, BaseException):
                raise image.within(place) if isinstance(image, Problem) else image
            files[place] = image
        return files

    async def fetch(self, scope: Scope, url: str) -> bytes:
        """Return the file at a URL. Raise Problem with the field "image" if it may not be fetched, or cannot be."""
        parts = self._check(url)
        client = scope.get("client")
        caller = scope.get(CALLER) or (network_of(client[0]) if client else "")
        own_turns = self._turns_of.setdefault(caller, asyncio.Semaphore(_AT_ONCE_EACH))
        try:
            async with asyncio.timeout(_TIMEOUT_S), own_turns, self._turns:
                return await self._download(parts, byte_counter(scope))
        except TimeoutError:
            raise field_problem("image", f"the host took more than {_TIMEOUT_S:g} seconds") from None
        except (OSError, httptools.HttpParserError, httptools.HttpParserUpgrade):
            raise field_problem("image", "the host cannot be reached, or does not answer in HTTP") from None

    def _check(self, url: str) -> SplitResult:
        if not self._hosts:
            raise field_problem("image", "this service fetches no images by URL; send the file in base64")
        if len(url) > _MAX_URL:
            raise field_problem("image", f"a URL has at most {_MAX_URL:,} characters")
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS[parts.scheme]
        except ValueError:
            raise field_problem("image", "is not a valid URL") from None
        if parts.hostname not in self._hosts:
            raise field_problem("image", "this service fetches no images from this host")
        if port not in self._ports:
            raise field_problem("image", "this service fetches no images from this port")
        if not url.isascii() or not url.isprintable() or " " in url or "@" in parts.netloc:
            raise field_problem("image", "a URL must be of printable ASCII characters, without a user name")
        return parts

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def _download(self, parts: SplitResult, count: Callable[[int], None]) -> bytes:
        host, is_tls = parts.hostname or "", parts.scheme == "https"
        found = await self._resolve(host, parts.port or _PORTS[parts.scheme])
        if not found or not all(self._is_allowed(address) for address, _ in found):
            raise field_problem("image", "the host has an address that is not public")
        reader, writer = await asyncio.open_connection(
            *found[0], ssl=self._tls if is_tls else None, server_hostname=host if is_tls else None
        )
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            head = f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: image/*\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            return await self._read_body(reader, count)
        finally:
            writer.close()

    async def _read_body(self, reader: asyncio.StreamReader, count: Callable[[int], None]) -> bytes:
        response, received, counted = _Response(), 0, 0
        while not response.is_complete:
            data = await reader.read(_READ_BYTES)
            received += len(data)
            response.feed(data)
            if response.status not in (None, 200):
                raise field_problem("image", f"the host answered {response.status}; redirects are not followed")
            count(len(response.body) - counted)
            counted = len(response.body)
            require_size(counted, self._max_bytes, "image")
            if received > _OVERHEAD_BYTES + 2 * counted:
                raise ConnectionError("almost nothing but heads and sizes of chunks")
        return bytes(response.body)


class _Response:
    """A response as httptools parses it. status: of the first head, even if it is an interim one."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.body = bytearray()
        self.is_complete = False
        self._ends_with_connection = True
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Parse the next bytes; none if the connection has ended. Raise ConnectionError if it ended too early."""
        if not data:
            if self.status is None or not self._ends_with_connection:
                raise ConnectionError
            self.is_complete = True
        self._parser.feed_data(data)

    # The parser calls the following methods.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._ends_with_connection &= name.lower() not in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.status = self.status or self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True
