"""ASGI middleware that runs before any body is read: API keys and rate limits.

- Every path needs a key unless it is listed in _OPEN_PATHS, so new routes are protected by default.
- /metrics and the routes that write accept an API key or the admin key. Routes below /admin check the admin key
  themselves.
- A key for some collections opens their paths alone, and the few routes that check the collection themselves.
"""

import math
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.keys import ApiKey, find_key_name, is_key, key_in
from app.core.metrics import Metrics
from app.core.problems import Problem, field_problem
from app.core.rate_limit import RateLimiter, network_of
from app.core.settings import Settings

_OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/favicon.ico", "/healthz", "/readyz"})
_DEFAULT_PATHS = ("/search/", "/items", "/browse", "/catalogue", "/facets", "/words")  # of the default collection
_CHECKED_PATHS = ("/collections", "/v1/embeddings")  # their routes check the collection
CALLER = "dcar.caller"  # scope key: the name of the request's API key
API_KEY = "dcar.api_key"  # scope key: the request's API key
_CHARGE = "dcar.charge"  # scope key: counts more requests for the caller


class Access:
    """Check the key of each request, and count it. rates: None for no rate limit."""

    def __init__(self, app: ASGIApp, settings: Settings, rates: RateLimiter | None, metrics: Metrics) -> None:
        self._app = app
        self._keys = settings.api_keys
        self._admin = settings.admin_key
        self._default = settings.default_collection
        self._rates = rates
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = await self._problem(scope)
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
            if scope["method"] in ("GET", "HEAD") and CALLER in scope:
                send = partial(_send_private, send)
        await self._app(scope, receive, send)

    async def _problem(self, scope: Scope) -> Problem | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in _OPEN_PATHS or path.startswith("/ui/") or scope["method"] == "OPTIONS":
            return None
        client = scope.get("client")
        caller = network_of(client[0]) if client else "unknown"
        if self._keys and not path.startswith("/admin/"):
            is_for_admin = path == "/metrics" or path.startswith("/jobs/") or scope["method"] in ("PUT", "DELETE")
            found = self._find_key(Headers(scope=scope), is_for_admin=is_for_admin)
            if found is None:
                self._metrics.refused.labels("key").inc()
                return unauthorised("must be `Bearer` and a known API key")
            caller, key = found
            if not self._opens(key, path):
                self._metrics.refused.labels("scope").inc()
                return out_of_scope()
            scope[CALLER], scope[API_KEY] = caller, key
        if self._rates is None or path == "/metrics":
            return None
        scope[_CHARGE] = partial(self._charge, self._rates, caller)
        return await self._charge(self._rates, caller)

    async def _charge(self, rates: RateLimiter, caller: str, more: int | None = None) -> Problem | None:
        wait = await rates.charge(caller, more)
        if not wait:
            return None
        self._metrics.refused.labels("rate").inc()
        seconds = max(1, math.ceil(wait))
        detail = f"Too many requests from {caller}. Try again in {seconds} s."
        return Problem(429, detail, headers={"Retry-After": str(seconds)})

    def _opens(self, key: ApiKey, path: str) -> bool:
        if key.collections is None or path.rstrip("/") in _CHECKED_PATHS or path.startswith("/jobs/"):
            return True
        if path.startswith("/collections/"):
            return key.opens(path.split("/")[2])
        return path.startswith(_DEFAULT_PATHS) and key.opens(self._default)

    def _find_key(self, headers: Headers, *, is_for_admin: bool) -> tuple[str, ApiKey] | None:
        key = key_in(headers)
        if key is None:
            return None
        if is_for_admin and self._admin is not None and is_key(key, self._admin.get_secret_value()):
            return "admin", ApiKey("", may_write=True)
        name = find_key_name(self._keys, key)
        return None if name is None else (name, self._keys[name])


async def _send_private(send: Send, message: Message) -> None:
    """Keep shared caches from storing a response that needed a key."""
    if message["type"] == "http.response.start":
        headers = MutableHeaders(raw=message["headers"])
        headers.setdefault("Cache-Control", "private")
        headers.add_vary_header("Authorization, X-API-Key")
    await send(message)


async def charge(request: Request, more: int) -> None:
    """Count `more` requests beside the one that is counted already. Raise Problem if they exceed the rate limit."""
    count: Callable[[int], Awaitable[Problem | None]] | None = request.scope.get(_CHARGE)
    problem = await count(more) if count is not None and more else None
    if problem is not None:
        raise problem


def unauthorised(message: str) -> Problem:
    """Return a 401 that names the header and the scheme."""
    problem = field_problem("Authorization", message, status=401)
    problem.headers["WWW-Authenticate"] = "Bearer"
    return problem


def out_of_scope() -> Problem:
    """Return a 403 for a key whose scope lacks a collection, or the right to write."""
    return field_problem("Authorization", "the scope of this key does not allow this", status=403)
