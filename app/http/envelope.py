"""Outermost ASGI middleware: what every request and every response gets, whichever route it is for.

- Its id (the caller's X-Request-ID if it is well-formed, else a new one), its line in the log, and its metrics.
- Its Host must be known while the service listens on loopback: otherwise any web page could read the service of its
  visitor's machine, by a name that it leads there.
- HEAD is GET; uvicorn leaves the body out. Safe headers, and private caching of what needed a key, are the default.
- An unexpected exception is logged once, with the request id, and answered 500 without details.
"""

import logging
import random
import re
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.callers import current_caller, network_of, request_id
from app.core.metrics import Metrics
from app.core.problems import Problem, field_problem
from app.core.settings import Settings
from app.core.turns import ENDS
from app.http.access import CALLER

logger = logging.getLogger(__name__)

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_MAX_PATH = 300  # characters of a logged path
_WELL_FORMED_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class Envelope:
    """Wrap each request and its response."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: Settings) -> None:
        self._app, self._metrics = app, metrics
        is_open = settings.host not in _LOOPBACK or "*" in settings.allowed_hosts
        self._hosts = None if is_open else {*_LOOPBACK, *settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, method, headers, status = time.perf_counter(), scope["method"], Headers(scope=scope), 0
        inner = {**scope, "method": "GET"} if method == "HEAD" else scope
        identifier = headers.get("x-request-id", "")
        if not _WELL_FORMED_ID.fullmatch(identifier):
            identifier = f"{random.getrandbits(128):032x}"  # a UUID reads the system's random numbers, which takes long
        request_id.set(identifier)
        client, path = (scope.get("client") or [None])[0], quote(scope["path"][:_MAX_PATH])  # raw, it may have newlines
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
            host = re.sub(r":\d*$", "", headers.get("host", "localhost")).strip("[]").lower()
            if self._hosts is None or host in self._hosts:
                await self._app(inner, receive, observed)
            else:
                message = "must be localhost; DCAR_ALLOWED_HOSTS adds the names of this service"
                await field_problem("Host", message, status=421).response(scope)(inner, receive, observed)
        except ENDS:
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            self._metrics.errors.inc()
            logger.exception("unexpected error in %s %s", method, path)
            if status == 0:
                problem = Problem(500, "Unexpected error. The log of the service has the details.")
                await problem.response(scope)(inner, receive, observed)
        finally:
            seconds, status = time.perf_counter() - began, status or 500
            template = getattr(inner.get("route"), "path", None) or "none"
            self._metrics.requests.labels(template, str(status)).observe(seconds)
            if status != 200 or path not in _PROBES:  # which arrive every few seconds
                extra = {"method": method, "path": path, "status": status, "ms": round(seconds * 1000, 2)}
                extra |= {"client": client, "caller": inner.get(CALLER)}
                logger.info("%s %s %d in %.1f ms", method, path, status, seconds * 1000, extra=extra)
