"""What every request meets before its route, and every response after it.

- `Envelope`, the outermost ASGI middleware: the id of a request (the caller's
  X-Request-ID if it is well-formed), its line in the log, metrics, safe headers, HEAD
  as GET. An unexpected exception is logged once and answered 500 without details. While
  the service listens on loopback, its Host must be known: otherwise any web page could
  read the service of its visitor's machine, by a name that it leads there.
- `Access` checks the policy of a route before a body is read: keys, scopes and rates. A
  key for some collections opens their routes, and the few that check the collection
  themselves. Admin routes need no API key. The address of a client proves nothing:
  behind a proxy it is loopback.
- `BodyLimit`: all requests together may hold `max_in_flight_bytes`: of their bodies,
  and what `byte_counter` counts beside them. The first UNCOUNTED_BYTES of each are
  free, so text searches never compete with uploads.
"""

import asyncio
import hmac
import logging
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Literal, cast
from urllib.parse import parse_qsl, quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.callers import (
    ApiKey,
    RateLimiter,
    current_caller,
    is_key,
    key_hash,
    key_in,
    path_signature,
    request_id,
)
from app.core.metrics import Metrics
from app.core.problems import Problem, field_problem
from app.core.settings import Settings
from app.core.turns import ENDS

logger = logging.getLogger(__name__)

CALLER = "dcar.caller"  # scope key: the name of the request's API key
API_KEY = "dcar.api_key"  # scope key: the request's API key
_COUNT_BYTES = "dcar.count_bytes"  # scope key
PART_BYTES = 64 * 2**10  # of a body beside its images: fields, boundaries, part headers
UNCOUNTED_BYTES = 64 * 2**10
_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_MAX_PATH = 300  # characters of a logged path
_WELL_FORMED_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def query_bytes(settings: Settings) -> int:
    """Return the largest size of a query in JSON: two texts, whose characters take up
    to 12 bytes, and options.
    """
    return max(PART_BYTES, 24 * settings.max_query_chars + 1024)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a route needs.

    access: who may use it. read: any API key, if the service has keys; monitor: also
        the admin key; write: the admin key, or a key that may write.
    scope: what a key must open. collection: the one in the path, or the default one;
    checked: the endpoint checks it. cost: 1 if a request counts against the rate limit;
    an endpoint may charge more, see `Access.charge`. body: largest size in bytes.
    is_view: True for what a page shows beside its searches, which has a rate of its
    own. is_signable: True if a signed address opens it without a key. is_private: True
    for routes of the search page, which are not documented.
    """

    access: Literal["open", "read", "monitor", "write", "admin"]
    scope: Literal["collection", "checked", "service"] = "collection"
    cost: Literal[0, 1] = 1
    body: Callable[[Settings], int] = query_bytes
    is_view: bool = False
    is_signable: bool = False
    is_private: bool = False


OPEN = Policy("open", "service", cost=0)
# of a path without a route, so that keys are needed to find out what exists
UNKNOWN = Policy("monitor", "service")


class Access:
    """Check and count each request. rates: None for no rate limit."""

    def __init__(self, settings: Settings, rates: RateLimiter | None) -> None:
        self._settings = settings
        self._default_collection = settings.default_collection  # it looks at the disk
        self._rates = rates

    async def check(self, scope: Scope, policy: Policy) -> None:
        """Write the caller and its key into the scope. Raise Problem if the policy
        refuses the request.
        """
        if policy.access == "open" or scope["method"] == "OPTIONS":
            return
        headers = Headers(scope=scope)
        key = None
        if (
            self._settings.api_keys
            and policy.access != "admin"
            and not (policy.is_signable and self._is_signed(scope))
        ):
            key = self._find_key(
                headers, accepts_admin=policy.access in ("monitor", "write")
            )
            if key is None:
                raise _unauthorized("a known API key")
            collection = scope.get("path_params", {}).get(
                "collection", self._default_collection
            )
            if policy.scope != "checked" and not key.opens(
                collection if policy.scope == "collection" else ""
            ):
                raise out_of_scope()
            scope[CALLER] = key.name
            scope[API_KEY] = key
            current_caller.set(key.name)
        if policy.cost:
            await self.charge(is_view=policy.is_view)
        if policy.access == "write" and not self._settings.writes:
            raise Problem(
                403, "Writing is disabled; set DCAR_WRITES=true to enable it."
            )
        if policy.access == "admin" or (policy.access == "write" and key is None):
            if self._settings.admin_key is None:
                raise Problem(
                    403, "Admin routes are disabled; set DCAR_ADMIN_KEY to enable them."
                )
            if not self._is_admin(key_in(headers)):
                raise _unauthorized("the admin key")
        elif policy.access == "write" and key is not None and not key.may_write:
            raise out_of_scope()

    async def charge(self, extra: int | None = None, *, is_view: bool = False) -> None:
        """Count the request, or `extra` beside it. Raise Problem if the caller exceeds
        the rate limit.
        """
        caller = current_caller.get()
        if self._rates is not None and (
            wait := await self._rates.charge(caller, extra, is_view=is_view)
        ):
            seconds = math.ceil(wait)
            detail = f"Too many requests from {caller}. Try again in {seconds} s."
            raise Problem(
                429,
                detail,
                headers={"Retry-After": str(seconds)},
                refused="rate",
            )

    def opens_everything(self, headers: Headers) -> bool:
        """Return True if no key is needed, or if a request has the admin key or a key
        that opens all collections.
        """
        key = self._find_key(headers, accepts_admin=True)
        return not self._settings.api_keys or (
            key is not None and key.collections is None
        )

    def _is_signed(self, scope: Scope) -> bool:
        """Return True if the address is signed and has not expired."""
        given = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        secret = self._settings.image_secret
        expires = given.get("expires", "")
        signature = given.get("signature", "")
        if (
            secret is None
            or not re.fullmatch("[0-9]{1,12}", expires)
            or int(expires) < time.time()
        ):
            return False
        wanted = path_signature(
            scope["path"],
            expires,
            secret.get_secret_value().strip(),
        )
        return hmac.compare_digest(signature.encode(), wanted.encode())

    def _is_admin(self, key: str) -> bool:
        secret = self._settings.admin_key
        return secret is not None and is_key(key, secret.get_secret_value())

    def _find_key(self, headers: Headers, *, accepts_admin: bool) -> ApiKey | None:
        key = key_in(headers)
        if accepts_admin and self._is_admin(key):
            return ApiKey("admin", may_write=True)
        return self._settings.api_keys.get(key_hash(key))


def network_of(address: str) -> str:
    """Return the address that requests are counted by: an IPv4 address, or the /64
    network of an IPv6 address.
    """
    try:
        parsed = ip_address(address)
    except ValueError:  # a Unix socket, or a name
        return address
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    if parsed.version == 4:
        return str(parsed)
    return str(ip_network((int(parsed), 64), strict=False))


def _unauthorized(wanted: str) -> Problem:
    message = f"must be `Bearer` and {wanted}"
    headers = {"WWW-Authenticate": "Bearer"}
    return field_problem(
        "Authorization",
        message,
        status=401,
        headers=headers,
        refused="key",
    )


def out_of_scope() -> Problem:
    """Return a 403 for a key whose scope lacks a collection, or the right to write."""
    return field_problem(
        "Authorization",
        "the scope of this key does not allow this",
        status=403,
        refused="scope",
    )


def byte_counter(scope: Scope) -> Callable[[int], None]:
    """Return what counts bytes that a request holds beside its body. It raises Problem
    if there are too many.
    """
    return cast(Callable[[int], None], scope[_COUNT_BYTES])


class BodyLimit:
    """Limit the size and the time of bodies, and what all requests hold. held: bytes of
    all that count.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.held = 0

    async def run(
        self,
        app: ASGIApp,
        policy: Policy,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Call an application with a limited body. Raise Problem if the body is
        refused: an announced one unread.
        """
        limit = policy.body(self._settings)
        seconds = self._settings.upload_timeout_s
        if int(Headers(scope=scope).get("content-length", 0)) > limit:
            raise _too_large(limit)
        deadline = asyncio.get_running_loop().time() + seconds
        received = held = 0
        is_complete = False

        def count(size: int) -> None:
            nonlocal received, held
            received += size
            more = max(0, received - UNCOUNTED_BYTES) - held
            is_alone = self.held == held  # then it has room
            if (
                more
                and not is_alone
                and self.held + more > self._settings.max_in_flight_bytes
            ):
                detail = "Too many large requests are in progress. Try again in 1 s."
                raise Problem(
                    503,
                    detail,
                    headers={"Retry-After": "1"},
                    refused="uploads",
                )
            held += more
            self.held += more

        async def limited_receive() -> Message:
            nonlocal is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"The body did not arrive within {seconds:g} seconds."
                raise Problem(408, detail, refused="slow_body") from None
            size = len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received + size > limit:
                raise _too_large(limit)
            count(size)
            return message

        scope[_COUNT_BYTES] = count
        try:
            await app(scope, limited_receive, send)
        finally:
            self.held -= held


def _too_large(limit: int) -> Problem:
    return field_problem(
        "body",
        f"at most {limit // 2**10:,} KiB",
        status=413,
        refused="body_size",
    )


class Envelope:
    """Wrap each request and its response."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: Settings) -> None:
        self._app = app
        self._metrics = metrics
        is_open = settings.host not in _LOOPBACK or "*" in settings.allowed_hosts
        self._hosts = None if is_open else {*_LOOPBACK, *settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        method = scope["method"]
        headers = Headers(scope=scope)
        status = 0
        inner = {**scope, "method": "GET"} if method == "HEAD" else scope
        identifier = headers.get("x-request-id", "")
        if not _WELL_FORMED_ID.fullmatch(identifier):
            # a UUID reads the system's random numbers, which takes long
            identifier = f"{random.getrandbits(128):032x}"
        request_id.set(identifier)
        # raw, it may have newlines
        client = (scope.get("client") or [None])[0]
        path = quote(scope["path"][:_MAX_PATH])
        current_caller.set(network_of(client or "unknown"))

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=list(message["headers"]))
                headers["X-Request-ID"] = identifier
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                if CALLER in inner and inner["method"] == "GET":
                    headers.setdefault("Cache-Control", "private")
                    headers.add_vary_header("Authorization, X-API-Key")
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            host = (
                re.sub(r":\d*$", "", headers.get("host", "localhost"))
                .strip("[]")
                .lower()
            )
            if self._hosts is None or host in self._hosts:
                await self._app(inner, receive, observed)
            else:
                message = (
                    "must be localhost; DCAR_ALLOWED_HOSTS adds the names of this"
                    " service"
                )
                await field_problem("Host", message, status=421).response(scope)(
                    inner,
                    receive,
                    observed,
                )
        except ENDS:
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            self._metrics.errors.inc()
            logger.exception("unexpected error in %s %s", method, path)
            if status == 0:
                problem = Problem(
                    500, "Unexpected error. The log of the service has the details."
                )
                await problem.response(scope)(inner, receive, observed)
        finally:
            seconds = time.perf_counter() - began
            status = status or 500
            template = getattr(inner.get("route"), "path", None) or "none"
            self._metrics.requests.labels(template, str(status)).observe(seconds)
            if status != 200 or path not in _PROBES:  # which arrive every few seconds
                extra = {
                    "method": method,
                    "path": path,
                    "status": status,
                    "ms": round(seconds * 1000, 2),
                }
                extra |= {"client": client, "caller": inner.get(CALLER)}
                logger.info(
                    "%s %s %d in %.1f ms",
                    method,
                    path,
                    status,
                    seconds * 1000,
                    extra=extra,
                )
