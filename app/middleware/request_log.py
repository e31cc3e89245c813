"""Outermost ASGI middleware: request ids, the access log, request metrics, headers of every response, and HEAD.

- A request without a Host header, or with two, is refused 400: proxies and servers may disagree about it.
- A request over loopback must name localhost, an address, or a host of DCAR_ALLOWED_HOSTS. Otherwise any web page could
  read the service of its visitor's machine, by a name that it leads there.
- HEAD is GET without the body, on every route that has GET.
- A request that is unfinished when the service shuts down (uvicorn cancels it) is answered 503.
- Every response has safe headers, unless it has its own. One that needed a key is not stored by shared caches.
- An unexpected exception is logged once, with the request id, and answered 500 without details.
- Metrics name the route's template; paths that match no route count as "none".
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
from app.middleware.access import CALLER

logger = logging.getLogger(__name__)

_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_MAX_LOGGED_PATH = 300  # characters
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_PORT = re.compile(r":\d*$")
_CLIENT_CLOSED = 499  # logged if the client disconnected before the response


class RequestLog:
    """Log and count each request, under an id. allowed_hosts: names of this service; "*" allows all."""

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
                for name, value in SAFE_HEADERS.items():
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
            problem = self._host_problem(scope)
            await (self._app if problem is None else problem.response(scope))(inner, receive, observed)
        except asyncio.CancelledError as error:
            if status or "shutdown" not in str(error):
                raise
            detail = "The service is shutting down, and the request took too long."
            await Problem(503, detail, headers={"Retry-After": "2"}).response(scope)(inner, receive, observed)
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            self._metrics.errors.inc()
            logger.exception("unexpected error in %s %s", method, quote(scope["path"][:_MAX_LOGGED_PATH]))
            if status == 0:
                problem = Problem(500, "Unexpected error. The log of the service has the details.")
                await problem.response(scope)(inner, receive, observed)
        finally:
            self._record(inner, method, status or _CLIENT_CLOSED, time.perf_counter() - began)
            request_id.reset(token)

    def _host_problem(self, scope: Scope) -> Problem | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1:
            is_old = not hosts and scope["http_version"] == "1.0"
            return None if is_old else field_problem("Host", "must be given once", status=400)
        name = _PORT.sub("", hosts[0]).strip("[]").lower()
        allowed, server = self._allowed_hosts, scope.get("server")
        is_known = name in allowed or "*" in allowed or _is_localhost_or_address(name)
        if is_known or server is None or not _is_loopback(server[0]):
            return None
        message = "must be localhost or an address; DCAR_ALLOWED_HOSTS adds the names of this service"
        return field_problem("Host", message, status=421)

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        template: str = getattr(scope.get("route"), "path", None) or "none"
        self._metrics.requests.labels(template, str(status)).observe(seconds)
        if status == 200 and scope["path"] in _PROBES:
            return  # probes arrive every few seconds
        if logger.isEnabledFor(logging.INFO):
            client = scope.get("client")
            path = quote(scope["path"][:_MAX_LOGGED_PATH])  # a raw path may contain line breaks
            extra = {
                "method": method,
                "path": path,
                "status": status,
                "ms": round(seconds * 1000, 2),
                "client": client[0] if client else None,
                "caller": scope.get(CALLER),
            }
            logger.info("%s %s %d in %.1f ms", method, path, status, seconds * 1000, extra=extra)


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
