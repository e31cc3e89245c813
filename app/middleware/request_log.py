"""Pure ASGI, outermost: each request gets an id, a line in the log and its place in the metrics; HEAD is answered.

- HEAD is GET without the body, on every route that GET has.
- A request that is not done when the service ends (uvicorn then cancels it) is answered 503.
- What a request raised is logged here, once and with its id, and answered with a 500 that tells nothing of it.
- Metrics name the route's template; a path that matches none counts as "none", however many of them are tried.
"""

import asyncio
import logging
import time
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.logs import choose_id, request_id
from app.core.metrics import Metrics
from app.core.problems import Problem
from app.middleware.access import CALLER

log = logging.getLogger("app.middleware.access")

_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_ID = b"x-request-id"
_SHOWN = 300  # characters of a path
_NAMED = "/collections/{collection}"


class Observe:
    """metrics: where requests are counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        method = scope["method"]
        inner = {**scope, "method": "GET"} if method == "HEAD" else scope
        known_as = choose_id(_given_id(scope))
        token = request_id.set(known_as)
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (_ID, known_as.encode())]}
            elif method == "HEAD":
                if message.get("more_body", False):
                    return
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(inner, receive, observed)
        except asyncio.CancelledError as error:
            if status or "shutdown" not in str(error):
                raise
            detail = "The service is shutting down, and the request took too long."
            await Problem(503, detail, headers={"Retry-After": "2"}).response()(inner, receive, observed)
        except Exception:
            self._metrics.error()
            log.exception("unforeseen error in %s %s", method, quote(scope["path"][:_SHOWN]))
            if status == 0:
                problem = "Something went wrong on our side; the log of the service has the details."
                await Problem(500, problem).response()(inner, receive, observed)
        finally:
            self._note(inner, method, status, time.perf_counter() - began)
            request_id.reset(token)

    def _note(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        template = _template(scope)
        self._metrics.request(template, status or 499, seconds)  # 499: the caller left before the answer
        if status == 200 and scope["path"] in _PROBES:
            return  # they come every few seconds
        if log.isEnabledFor(logging.INFO):
            client = scope.get("client")
            path = quote(scope["path"][:_SHOWN])  # as it was, it could hold line breaks
            extra = {
                "method": method,
                "path": path,
                "status": status or 499,
                "ms": round(seconds * 1000, 2),
                "client": client[0] if client else None,
                "caller": scope.get(CALLER),
            }
            log.info("%s %s %d in %.1f ms", method, path, status or 499, seconds * 1000, extra=extra)


def _given_id(scope: Scope) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == _ID), None)


def _template(scope: Scope) -> str:
    route: Any = scope.get("route")
    template: str = getattr(route, "path", None) or "none"
    if "collection" in scope.get("path_params", {}) and not template.startswith(_NAMED):
        return _NAMED + template  # some versions of FastAPI tell the path without its router's prefix
    return template
