"""Images of queries and new items that JSON holds in base64 or names by URL.

- By URL, images are fetched only from the hosts in `DCAR_IMAGE_HOSTS`, and from the ports in `DCAR_IMAGE_PORTS`.
- A host that has an address which is not public is refused. The connection goes to a checked address and not to the
  name, whose address may change after the check.
- Redirects are not followed. Size, time, and the number of simultaneous requests of the service and of each caller are
  bounded, and the bytes count against the budget of request bodies.
"""

import asyncio
import base64
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

from starlette.types import Scope

from app.core.problems import Problem, field_problem
from app.core.settings import Settings
from app.core.turns import FairTurns, run_in_new_thread
from app.http.access import byte_counter
from dcar_core.util.errors import MissingExtraError

TIMEOUT_S = 10.0  # of one image, including the time in the queue
MAX_URLS = 8  # of one request
_AT_ONCE = 16
_AT_ONCE_EACH = 4  # of one caller
_URL = re.compile("[!-~]{1,8192}")  # printable ASCII
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity"}
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")


def decode_base64(image: str, max_bytes: int, field: str) -> bytes:
    """Return the file in a base64 text or data URI; an error names the field."""
    try:
        data = base64.b64decode(image.rpartition(",")[2], validate=True)
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


def _require_public(*addresses: str) -> None:
    if not addresses or not all(map(is_public, addresses)):
        raise field_problem("image", "the host has an address that is not public")


class _PublicResolver:
    """What aiohttp finds the addresses of a host with. It raises Problem if one of them is not public."""

    async def resolve(self, host: str, port: int, family: int) -> list[dict[str, Any]]:
        found = await run_in_new_thread(partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM))
        _require_public(*(str(address[0]) for *_, address in found))
        return [
            {"hostname": host, "host": address[0], "port": port, "family": kind, "proto": protocol, "flags": 0}
            for kind, _, protocol, _, address in found
        ]


class ImageFetcher:
    """Fetch images. One per process. Raise MissingExtraError if the settings need aiohttp and it is not installed."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._turns = settings, FairTurns(_AT_ONCE, _AT_ONCE_EACH)
        if settings.image_hosts and find_spec("aiohttp") is None:
            raise MissingExtraError("fetching images by URL (DCAR_IMAGE_HOSTS)", "http")

    async def read(self, scope: Scope, images: Mapping[str, str]) -> dict[str, bytes]:
        """Return the files of images in base64 or at URLs, by their places. Raise Problem with the place of a fault."""
        urls = {place: image for place, image in images.items() if image.startswith(("http://", "https://"))}
        if len(urls) > MAX_URLS:
            field = next(iter(urls)).partition(".")[0]
            raise field_problem(field, f"at most {MAX_URLS} images by URL, not {len(urls)}")
        most, files = self._settings.max_upload_bytes, dict[str, bytes]()
        for place in images.keys() - urls.keys():
            files[place] = await asyncio.to_thread(decode_base64, images[place], most, f"{place}.image")
        fetches = (self.fetch(url, byte_counter(scope)) for url in urls.values())
        for place, image in zip(urls, await asyncio.gather(*fetches, return_exceptions=True), strict=True):
            if isinstance(image, BaseException):
                raise image.within(place) if isinstance(image, Problem) else image
            files[place] = image
        return files

    async def fetch(self, url: str, count: Callable[[int], None]) -> bytes:
        """Return the file at a URL. Raise Problem with the field "image" if it may not be fetched, or cannot be.

        count: is called with the size of each part, and raises Problem if the budget is exceeded.
        """
        if not self._settings.image_hosts:
            raise field_problem("image", "this service fetches no images by URL; send the file in base64")
        import aiohttp
        from yarl import URL

        try:
            parsed = URL(url, encoded=True)
            host, port = (parsed.raw_host or "").lower(), parsed.port
        except ValueError:
            raise field_problem("image", "is not a valid URL") from None
        if not _URL.fullmatch(url) or parsed.raw_user is not None:
            raise field_problem("image", "a URL has at most 8,192 printable ASCII characters, and no user name")
        if host not in self._settings.image_hosts or port not in self._settings.image_ports:
            raise field_problem("image", f"this service fetches no images from {host}:{port}")
        with suppress(ValueError):  # of a name, whose addresses the resolver checks
            _require_public(host)
        body, connector = bytearray(), aiohttp.TCPConnector(resolver=_PublicResolver(), use_dns_cache=False)
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._turns.turn(),
                aiohttp.ClientSession(connector=connector, auto_decompress=False) as session,
                session.get(parsed, headers=_HEADERS, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise field_problem("image", f"the host answered {response.status}; redirects are not followed")
                async for piece in response.content.iter_any():
                    count(len(piece))
                    body += piece
                    require_size(len(body), self._settings.max_upload_bytes, "image")
        except TimeoutError:
            raise field_problem("image", f"the host took more than {TIMEOUT_S:g} seconds") from None
        except (OSError, aiohttp.ClientError):
            raise field_problem("image", "the host cannot be reached, or does not answer in HTTP") from None
        return bytes(body)
