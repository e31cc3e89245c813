"""Outermost ASGI middleware: what every request and every response gets, whichever route it is for.

- Its id, its line in the log, and its metrics.
- HEAD is GET without the body, on every route that has GET.
- Every response has safe headers, unless it has its own. One that needed a key is not stored by shared caches.
- A request that is unfinished when the service shuts down (uvicorn cancels it) is answered 503.
- An unexpected exception is logged once, with the request id, and answered 500 without details.
"""

import asyncio
import logging
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.logs import choose_id, request_id
from app.core.metrics import Metrics
from app.core.problems import Problem
from app.core.rate_limit import current_caller, network_of
from app.http.access import CALLER
from app.http.hosts import host_problem
from app.http.request_log import log_request, quoted_path

logger = logging.getLogger(__name__)

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_CLIENT_CLOSED = 499  # logged if the client disconnected before the response


class Envelope:
    """Wrap each request and its response. allowed_hosts: see `host_problem`."""

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
            problem = host_problem(scope, self._allowed_hosts)
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
            logger.exception("unexpected error in %s %s", method, quoted_path(scope))
            if status == 0:
                problem = Problem(500, "Unexpected error. The log of the service has the details.")
                await problem.response(scope)(inner, receive, observed)
        finally:
            log_request(self._metrics, inner, method, status or _CLIENT_CLOSED, time.perf_counter() - began)
            request_id.reset(token)
