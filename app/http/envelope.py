"""Outermost ASGI middleware: what every request and every response gets, whichever route it is for.

- Its id, its line in the log, and its metrics.
- Its Host must be known over loopback: otherwise any web page could read the service of its visitor's machine, by a
  name that it leads there.
- HEAD is GET without the body, on every route that has GET.
- Every response has safe headers, unless it has its own. One that needed a key is not stored by shared caches.
- A request that is unfinished when the service shuts down (uvicorn cancels it) is answered 503.
- An unexpected exception is logged once, with the request id, and answered 500 without details.
"""

import asyncio
import logging
import re
import time
from collections.abc import Collection
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.logs import choose_id, request_id
from app.core.metrics import Metrics
from app.core.problems import Problem, field_problem
from app.core.rate_limit import current_caller, network_of
from app.http.access import CALLER

logger = logging.getLogger(__name__)

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_CLIENT_CLOSED = 499  # logged if the client disconnected before the response
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_MAX_PATH = 300  # characters of a logged path
_PORT = re.compile(r":\d*$")


class Envelope:
    """Wrap each request and its response. allowed_hosts: further names of the service over loopback; "*" allows all."""

    def __init__(self, app: ASGIApp, metrics: Metrics, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._allowed_hosts = frozenset(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        method = scope["method"]
        inner = {**scope, "method": "GET"} if method == "HEAD" else scope
        identifier = choose_id(Headers(scope=scope).get("x-request-id"))
        token = request_id.set(identifier)
        client = scope.get("client")
        current_caller.set(network_of(client[0]) if client else "unknown")
        status = 0

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
            elif method == "HEAD":
                if message.get("more_body", False):
                    return
                message = {**message, "body": b""}
            await send(message)

        try:
            if self._is_known_host(scope):
                await self._app(inner, receive, observed)
            else:
                message = "must be localhost or an address; DCAR_ALLOWED_HOSTS adds the names of this service"
                await field_problem("Host", message, status=421).response(scope)(inner, receive, observed)
        except asyncio.CancelledError as error:
            if status or "shutdown" not in str(error):
                raise
            detail = "The service is shutting down, and the request took too long."
            await Problem(503, detail, headers={"Retry-After": "2"}).response(scope)(inner, receive, observed)
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            self._metrics.errors.inc()
            logger.exception("unexpected error in %s %s", method, _quoted_path(scope))
            if status == 0:
                problem = Problem(500, "Unexpected error. The log of the service has the details.")
                await problem.response(scope)(inner, receive, observed)
        finally:
            self._log(inner, method, status or _CLIENT_CLOSED, time.perf_counter() - began)
            request_id.reset(token)

    def _is_known_host(self, scope: Scope) -> bool:
        server = scope.get("server")
        if "*" in self._allowed_hosts or server is None or not _is_loopback(server[0]):
            return True
        name = _PORT.sub("", Headers(scope=scope).get("host", "localhost")).strip("[]").lower()
        return name in self._allowed_hosts or _is_localhost_or_address(name)

    def _log(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        template: str = getattr(scope.get("route"), "path", None) or "none"
        self._metrics.requests.labels(template, str(status)).observe(seconds)
        if (status == 200 and scope["path"] in _PROBES) or not logger.isEnabledFor(logging.INFO):
            return  # probes arrive every few seconds
        client, path = scope.get("client"), _quoted_path(scope)
        extra = {
            "method": method,
            "path": path,
            "status": status,
            "ms": round(seconds * 1000, 2),
            "client": client[0] if client else None,
            "caller": scope.get(CALLER),
        }
        logger.info("%s %s %d in %.1f ms", method, path, status, seconds * 1000, extra=extra)


def _quoted_path(scope: Scope) -> str:
    return quote(scope["path"][:_MAX_PATH])  # a raw one may contain line breaks


@lru_cache(maxsize=256)
def _is_loopback(address: str) -> bool:
    try:
        ip = ip_address(address)
    except ValueError:  # a Unix socket
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


@lru_cache(maxsize=256)
def _is_localhost_or_address(name: str) -> bool:
    try:
        return name == "localhost" or ("%" not in name and bool(ip_address(name)))  # a zone can be any text
    except ValueError:
        return False
