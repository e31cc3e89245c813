"""Pure ASGI, before any body is read: API keys where they are required, and how often a caller may ask.

Everything needs a key except what is listed here, so a new route is protected without a thought. /metrics takes an API
key or the admin key; /admin has the admin key alone, which its routes check.
"""

import math
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.keys import find_key_name, is_key, key_in
from app.core.metrics import Metrics
from app.core.problems import Problem, field_problem
from app.core.rate_limit import RateLimiter
from app.core.settings import Settings

_OPEN = frozenset({"/", "/docs", "/openapi.json", "/favicon.ico", "/healthz", "/readyz"})
CALLER = "dcar.caller"  # of a request's scope: the name of its key
_CHARGE = "dcar.charge"  # of a request's scope: counts more for its caller


class Access:
    """rates: None when there is no limit."""

    def __init__(self, app: ASGIApp, settings: Settings, rates: RateLimiter | None, metrics: Metrics) -> None:
        self._app = app
        self._keys = settings.api_keys
        self._admin = settings.admin_key
        self._rates = rates
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = await self._problem(scope)
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
            if scope["method"] in ("GET", "HEAD") and CALLER in scope:
                send = partial(_private, send)
        await self._app(scope, receive, send)

    async def _problem(self, scope: Scope) -> Problem | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in _OPEN or path.startswith("/ui/") or scope["method"] == "OPTIONS":
            return None
        client = scope.get("client")
        caller = client[0] if client else "unknown"
        if self._keys and not path.startswith("/admin/"):
            name = self._name(Headers(scope=scope), metrics=path == "/metrics")
            if name is None:
                self._metrics.refused("key")
                return unauthorised("must be `Bearer` and an API key that is known here")
            caller = scope[CALLER] = name
        if self._rates is None or path == "/metrics":
            return None
        scope[_CHARGE] = partial(self._charge, self._rates, caller)
        return await self._charge(self._rates, caller)

    async def _charge(self, rates: RateLimiter, caller: str, more: int | None = None) -> Problem | None:
        wait = await rates.wait_for(caller, more)
        if not wait:
            return None
        self._metrics.refused("rate")
        seconds = max(1, math.ceil(wait))
        detail = f"Too many requests from {caller}. Try again in {seconds} s."
        return Problem(429, detail, headers={"Retry-After": str(seconds)})

    def _name(self, headers: Headers, *, metrics: bool) -> str | None:
        given = key_in(headers)
        if given is None:
            return None
        if metrics and self._admin is not None and is_key(given, self._admin.get_secret_value()):
            return "admin"
        return find_key_name(self._keys, given)


async def _private(send: Send, message: Message) -> None:
    """A cache that others share must not keep what needed a key: it would show it to those who have none."""
    if message["type"] == "http.response.start":
        headers = MutableHeaders(raw=message["headers"])
        headers.setdefault("Cache-Control", "private")
        headers.add_vary_header("Authorization, X-API-Key")
    await send(message)


async def charge(request: Request, more: int) -> None:
    """Count a request, which was counted when it came, as so many more.

    Raises:
        Problem: its caller asks too often.
    """
    charged: Callable[[int], Awaitable[Problem | None]] | None = request.scope.get(_CHARGE)
    problem = await charged(more) if charged is not None and more else None
    if problem is not None:
        raise problem


def unauthorised(message: str) -> Problem:
    """401, naming the header and the scheme."""
    problem = field_problem("Authorization", message, status=401)
    problem.headers["WWW-Authenticate"] = "Bearer"
    return problem
