"""Images of queries and new items that a request names by URL.

- Images are fetched only from the hosts in `DCAR_IMAGE_HOSTS`.
- A host name is resolved once. If one of its addresses is not public, the image is refused. The connection goes to a
  checked address and not to the name, whose address may change after the check.
- Redirects are not followed. Size, time and the number of simultaneous requests are bounded, and the bytes count
  against the budget of request bodies.
- fsspec, which reads galleries, resolves names and follows redirects by itself. It is therefore not used here.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import cached_property
from urllib.parse import SplitResult, urlsplit

import h11
from starlette.types import Scope

from app.api.requests import BatchEntry
from app.core.problems import Problem, field_problem
from app.core.settings import Settings
from app.middleware.body_limit import byte_counter
from app.search.query import Query

_TIMEOUT_S = 10.0  # of one image, including the time in the queue
_AT_ONCE = 8
MAX_URLS = 8  # of one request
_READ_BYTES = 64 * 2**10
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_image_url(image: str | None) -> bool:
    return image is not None and image.startswith(("http://", "https://"))


def is_public(address: str) -> bool:
    """Return True for an address of the public internet. IPv6 addresses that embed an IPv4 address do not count."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in _NAT64):
        return False
    return ip.is_global and not ip.is_multicast


async def resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class ImageFetcher:
    """Fetch images. One per process."""

    def __init__(
        self,
        settings: Settings,
        resolve: Callable[[str, int], Awaitable[list[str]]] = resolve,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        """Take hosts and the largest size from the settings; the other arguments replace the network in tests."""
        self._hosts, self._max_bytes = frozenset(settings.image_hosts), settings.max_upload_bytes
        self._resolve, self._is_allowed = resolve, is_allowed
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def complete(self, scope: Scope, entries: Sequence[BatchEntry], queries: Sequence[Query]) -> list[Query]:
        """Return the queries of a batch with the images of those whose entry has a URL.

        Args:
            scope: of the request.

        Raises:
            Problem: it names the query and the field.
        """
        urls = {number: entry.image for number, entry in enumerate(entries) if is_image_url(entry.image)}
        if len(urls) > MAX_URLS:
            raise field_problem("queries", f"at most {MAX_URLS} images by URL, not {len(urls)}")
        fetches = (self.fetch(scope, url or "") for url in urls.values())
        fetched = await asyncio.gather(*fetches, return_exceptions=True)
        completed = list(queries)
        for number, image in zip(urls, fetched, strict=True):
            if isinstance(image, Problem):
                raise image.within(f"queries.{number}")
            if isinstance(image, BaseException):
                raise image
            completed[number] = replace(queries[number], image=image)
        return completed

    async def fetch(self, scope: Scope, url: str) -> bytes:
        """Return the file at a URL. Raise Problem with the field "image" if it may not be fetched, or cannot be."""
        parts = self._check(url)
        try:
            async with asyncio.timeout(_TIMEOUT_S), self._turns:
                return await self._download(parts, byte_counter(scope))
        except TimeoutError:
            raise field_problem("image", f"the host took more than {_TIMEOUT_S:g} seconds") from None
        except (OSError, h11.ProtocolError):
            raise field_problem("image", "the host cannot be reached, or does not answer in HTTP") from None

    def _check(self, url: str) -> SplitResult:
        if not self._hosts:
            raise field_problem("image", "this service fetches no images by URL; send the file in base64")
        try:
            parts = urlsplit(url)
            _ = parts.port  # raises
        except ValueError:
            raise field_problem("image", "is not a valid URL") from None
        if parts.hostname not in self._hosts:
            raise field_problem("image", "this service fetches no images from this host")
        if not url.isascii() or not url.isprintable() or " " in url or "@" in parts.netloc:
            raise field_problem("image", "a URL must be of printable ASCII characters, without a user name")
        return parts

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def _download(self, parts: SplitResult, count: Callable[[int], None]) -> bytes:
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise field_problem("image", "the host has an address that is not public")
        is_tls = parts.scheme == "https"
        reader, writer = await asyncio.open_connection(
            addresses[0], port, ssl=self._tls if is_tls else None, server_hostname=host if is_tls else None
        )
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection = h11.Connection(h11.CLIENT)
            headers = [("Host", parts.netloc), ("Accept", "image/*"), ("Connection", "close")]
            request = connection.send(h11.Request(method="GET", target=target, headers=headers)) or b""
            writer.write(request + (connection.send(h11.EndOfMessage()) or b""))
            return await self._read_body(reader, connection, count)
        finally:
            writer.close()

    async def _read_body(
        self, reader: asyncio.StreamReader, connection: h11.Connection, count: Callable[[int], None]
    ) -> bytes:
        data = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response) and event.status_code != 200:
                raise field_problem("image", f"the host answered {event.status_code}; redirects are not followed")
            elif isinstance(event, h11.Data):
                count(len(event.data))
                data += event.data
                if len(data) > self._max_bytes:
                    raise field_problem("image", f"at most {self._max_bytes / 2**20:.3g} MiB", status=413)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(data)
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionError
